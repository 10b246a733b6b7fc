"""The card and cald.json: what is known is there, what was not measured is called so."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from cald_speech.conversion.model_card import add_figure, add_result, read_facts, render, update_facts
from cald_speech.errors import UserError
from tests.training.conftest import corpus, experiment, signal_handlers, start, teachers  # noqa: F401

FACTS = {
    "model": "CaldWav2Vec2ForCTC",
    "version": "0.1.0",
    "teacher": "somebody/teacher",
    "layers": "2 of 2 layers converted: Bidirectional",
    "guidance": "target",
    "steps": 7,
    "data": "train, manifest 0123456789ab",
    "parameters": "10 (9 before)",
    "licence": "apache-2.0",
}
RESULT = {
    "wer": 12.345,
    "wer_interval": [10.0, 14.5],
    "longest_audio_s": 35.2,
    "manifest_hash": "f" * 64,
    "decoder": "greedy",
    "words": {"count": 2345, "substitutions": 1},
    "cer": 3.0,
}
RESULT_ROW = {key: v for key, v in RESULT.items() if key != "cer"} | {"words": 2345}


def card(folder) -> str:
    return (folder / "README.md").read_text()


def rows(folder) -> list[str]:
    return [line for line in card(folder).splitlines() if line.startswith("| ")]


def test_every_fact_is_on_the_card(tmp_path):
    update_facts(tmp_path / "m", **FACTS)
    assert read_facts(tmp_path / "m") == FACTS
    assert all(str(value) in card(tmp_path / "m") for value in FACTS.values())
    assert "Not evaluated yet." in card(tmp_path / "m") and "# m\n" in card(tmp_path / "m")


def test_a_model_that_kept_its_class_is_used_by_transformers_alone():
    text = render("m", FACTS | {"model": "Wav2Vec2ForCTC"})
    assert 'pipeline("feature-extraction", model="m")' in text and "A Wav2Vec2ForCTC, written by" in text
    for said in ("import cald_speech", "trust_remote_code", "linear-time", "by [CALD]"):
        assert said not in text and said in render("m", FACTS)


def test_facts_are_added_to_those_that_are_known(tmp_path):
    update_facts(tmp_path, **FACTS)
    update_facts(tmp_path, steps=9, extra="kept")
    assert read_facts(tmp_path) == FACTS | {"steps": 9, "extra": "kept"}
    assert "| optimiser steps | 9 |" in rows(tmp_path)


@pytest.mark.parametrize("missing", FACTS)
def test_what_was_not_recorded_is_called_so(missing):
    text = render("m", {key: value for key, value in FACTS.items() if key != missing})
    assert text.count("not recorded") == 1


def test_results_stand_in_a_table_by_name(tmp_path):
    update_facts(tmp_path, **FACTS)
    add_result(tmp_path, "test-other", RESULT)
    add_result(tmp_path, "test-clean", RESULT | {"wer": 5.0})
    add_result(tmp_path, "test-clean", RESULT | {"wer": 4.0})
    *_, clean, other = rows(tmp_path)
    assert clean.startswith("| test-clean | 4.00 | 10.00 to 14.50 | 2,345 | 35.2 | `ffffffffffff` | greedy |")
    assert other.startswith("| test-other | 12.35 |") or other.startswith("| test-other | 12.34 |")
    assert "Not evaluated" not in card(tmp_path)
    assert json.loads((tmp_path / "cald.json").read_text())["results"]["test-clean"]["words"] == 2345


def test_each_dtype_has_a_row_of_its_own(tmp_path):
    """Beside what float32 gave on the same set; a card from before rows named a dtype goes on as float32's."""
    update_facts(tmp_path, **FACTS, results={"test": RESULT_ROW | {"wer": 5.0}})
    for dtype, wer in (("int8", 7.0), ("bfloat16", 6.0), ("int8", 8.0)):
        add_result(tmp_path, "test", RESULT | {"wer": wer, "dtype": dtype})
    figure = {"metric": "Accuracy", "interval": None, "count": 7, "manifest_hash": "f" * 64}
    for dtype, value in (("float32", 99.0), ("float16", 98.0)):
        add_figure(tmp_path, "test", value=value, dtype=dtype, **figure)
    shown = [(row.split(" | ")[0], row.split(" | ")[1], row.split()[-2]) for row in rows(tmp_path)[-7:]]
    assert shown[1:4] == [("| test", "5.00", "float32"), ("| test", "6.00", "bfloat16"), ("| test", "8.00", "int8")]
    assert [end for _, _, end in shown[5:]] == ["float32", "float16"]
    found = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {of.dataset_name for of in found} == {"test"}
    assert {(of.metric_type, (of.metric_args or {}).get("dtype")): of.metric_value for of in found} == {
        **{("wer", None): 5.0, ("wer", "bfloat16"): 6.0, ("wer", "int8"): 8.0},
        **{("accuracy", None): 99.0, ("accuracy", "float16"): 98.0},
    }
    add_result(tmp_path, "test", RESULT | {"wer": 4.0, "dtype": "float32"})
    results = read_facts(tmp_path)["results"]
    assert {name: row["wer"] for name, row in results.items()} == {
        "test": 4.0,
        "test, bfloat16": 6.0,
        "test, int8": 8.0,
    }


def test_a_rate_that_does_not_exist_is_not_a_number(tmp_path):
    update_facts(tmp_path, **FACTS)
    add_result(tmp_path, "one", RESULT | {"wer": None, "wer_interval": None})
    assert rows(tmp_path)[-1].startswith("| one | none | none |")


def test_audio_without_a_duration_has_no_longest(tmp_path):
    update_facts(tmp_path, **FACTS)
    add_result(tmp_path, "one", RESULT | {"longest_audio_s": None})
    assert "| 2,345 | none |" in rows(tmp_path)[-1]


def test_a_hub_can_read_the_card(tmp_path):
    update_facts(tmp_path / "m", **FACTS, base_model="somebody/teacher", pipeline="automatic-speech-recognition")
    add_result(tmp_path / "m", "test clean", RESULT)
    add_figure(tmp_path / "m", "valid", metric="Accuracy", value=99.0, interval=None, count=7, manifest_hash="f" * 64)
    data = ModelCard.load(tmp_path / "m" / "README.md").data
    assert (data.license, data.base_model, data.library_name) == ("apache-2.0", "somebody/teacher", "transformers")
    assert data.pipeline_tag == "automatic-speech-recognition" and data.metrics == ["accuracy", "wer"]
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {("test clean", "wer"): 12.345, ("valid", "accuracy"): 99.0} and data.model_name == "m"


def test_a_licence_without_an_id_has_a_name(tmp_path):
    update_facts(tmp_path / "m", **FACTS | {"licence": "that of the teacher's weights"})
    data = ModelCard.load(tmp_path / "m" / "README.md").data
    assert (data.license, data.license_name) == ("other", "that-of-the-teacher-s-weights")
    assert data.base_model is None


@pytest.mark.parametrize("strange", ["a|b", "<script>", "two\nlines\n---\nlicense: mit", '"quoted": [x'])
def test_what_comes_from_a_folder_stays_in_its_place(tmp_path, strange):
    plain = tmp_path / "plain"
    update_facts(plain, **FACTS, base_model="x/y")
    update_facts(tmp_path / "m", **FACTS | {"teacher": strange, "model": strange}, base_model=strange)
    add_result(tmp_path / "m", strange, RESULT)
    assert ModelCard.load(tmp_path / "m" / "README.md").data.license == "apache-2.0"
    text = card(tmp_path / "m").split("---\n", 2)[2]
    assert "<script>" not in text and not re.search(r"^(license|lines)", text, re.MULTILINE)
    assert text.count("\n| ") == card(plain).count("\n| ") + 2


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    add_result(tmp_path, "test-clean", RESULT)
    assert not list(tmp_path.iterdir())


def test_a_trained_models_card(experiment, start):  # noqa: F811
    brain = start(experiment(licence="mit"))
    folder = brain.store.folder / "model"
    facts, text = read_facts(folder), card(folder)
    assert facts["model"] == "CaldWav2Vec2ForCTC" and facts["guidance"] == "target" and facts["licence"] == "mit"
    assert facts["layers"] == "2 of 2 layers converted: Bidirectional"
    assert facts["steps"] == 4 and facts["valid"]["step"] == 4 and facts["valid"]["WER"] == brain.progress.best_metric
    count = sum(p.numel() for p in brain.plain.parameters())
    assert facts["parameters"].startswith(f"{count:,} (") and re.search(r"manifest [0-9a-f]{12}", facts["data"])
    assert "# model\n" in text and 'model="model")' in text and "not recorded" not in text


def test_an_unguided_model_names_no_teacher(experiment, start):  # noqa: F811
    facts = read_facts(start(experiment(guidance="unguided")).store.folder / "model")
    assert (facts["teacher"], facts["guidance"]) == ("none", "unguided")


def test_a_fine_tuned_teacher_is_not_converted(experiment, start):  # noqa: F811
    brain = start(experiment(convert=False, guidance="unguided"))
    assert read_facts(brain.store.folder / "model")["layers"] == "0 of 2 layers converted"


def test_what_a_folder_says_of_itself_is_shown_and_not_obeyed(tmp_path):
    evil = "x](http://evil) | <script>run()</script>\n\n# New heading `code`"
    update_facts(tmp_path, **FACTS | {"teacher": evil, "pipeline": "x\n---\nlicense: mit"}, results={evil: RESULT_ROW})
    head, _, text = card(tmp_path).partition("\n---\n\n")
    assert "license: mit" not in head and "pipeline_tag: feature-extraction" in head
    assert "<script" not in text and "\n# New" not in text
    assert "x\\](http://evil) \\| &lt;script&gt;run()&lt;/script&gt; \\# New heading \\`code\\`" in text


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("[]", "expected keys and values"),
        ('{"results": [1]}', "results: expected figures by the names"),
        ('{"results": {"dev": {"wer": "x"}}}', "results: dev: wer: got x"),
        ('{"figures": {"dev": {"metric": "accuracy"}}}', "figures: dev: value: got None"),
        ("{", "not a valid JSON file"),
    ],
)
def test_facts_that_are_none_are_refused_by_their_key(facts, message, tmp_path):
    (tmp_path / "cald.json").write_text(facts)
    with pytest.raises(UserError, match=rf"cald\.json: {message}"):
        update_facts(tmp_path, steps=1)
    assert not (tmp_path / "README.md").exists()
