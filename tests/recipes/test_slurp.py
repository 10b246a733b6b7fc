"""SLURP on a miniature of its layout: manifests, a teacher, students in every guidance mode, and what they are told."""

import json
import logging

import pytest
import torch
from click.testing import CliRunner

from cald_speech.conversion.model_card import read_facts
from cald_speech.data.audio import SAMPLE_RATE, write_audio
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import UserError
from cald_speech.evaluation import labels
from cald_speech.recipes.slurp import evaluate
from cald_speech.recipes.slurp import prepare as recipe
from cald_speech.tasks.wer import score
from tests.recipes.start import start
from tests.training.miniature import write_model

INTENTS = [("alarm", "set"), ("iot", "hue_lightoff"), ("alarm", "query"), ("play", "music")]
SENTENCES = ["wake me at six", "what's on, u. s. d.", "jack@gmail dot com", "play tech n9ne"]
SMALL = {"num_steps": 4, "max_batch_s": 5, "num_workers": 0, "precision": "fp32", "log_every_steps": 1}
SMALL |= {"validate_every_epochs": 1, "switch_step": 2, "accumulation": 2}
NARROW = {"layer_map": {"default": {"head_dim": 16, "d_state": 16}}}  # mixers of the paper's kind in a width of 32
# The one that switches and the one that trains two; pile's and glue's tests have the others.
MODES = ["hybrid", "trajectory", *(pytest.param(m, marks=pytest.mark.wide) for m in ("unguided", "target", "waypoint"))]
SIZES = {"train": 6, "train_synthetic": 4, "devel": 3, "test": 4}


@pytest.fixture
def corpus(tmp_path):
    return write_slurp(tmp_path / "slurp")


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory):
    return write_slurp(tmp_path_factory.mktemp("slurp"))


def write_slurp(root):
    """Sentences with two recordings each, in slurp_real/ and, the synthetic ones, in slurp_synth/; intents by pitch."""
    number = 0
    for file, count in SIZES.items():
        lines = []
        for place in range(count):
            intent = place % len(INTENTS)
            names = [f"audio-{number}{kind}.flac" for kind in ("", "-headset")]
            folder = root / ("slurp_synth" if file == "train_synthetic" else "slurp_real")
            for louder, name in enumerate(names, start=1):
                tone = 0.1 * louder * torch.sin(torch.arange(SAMPLE_RATE + 800 * place) * 0.04 * (intent + 1))
                write_audio(folder / name, tone)
            lines.append(json.dumps(line(number, intent, names)))
            number += 1
        (root / "dataset" / "slurp").mkdir(parents=True, exist_ok=True)
        (root / "dataset" / "slurp" / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def line(number, intent, names):
    scenario, action = INTENTS[intent]
    recordings = [{"file": name, "wer": 0.0, "ent_wer": 0.0, "status": "correct"} for name in names]
    # "intent" is not always the two together; SLURP has such lines
    facts = {
        "slurp_id": number,
        "sentence": SENTENCES[intent],
        "intent": action if number == 0 else f"{scenario}_{action}",
    }
    return facts | {"action": action, "tokens": [], "scenario": scenario, "recordings": recordings, "entities": []}


def texts(path):
    return {utterance: entry["text"] for utterance, entry in read_manifest(path).items()}


# --- manifests -------------------------------------------------------------------------------------------------------


def test_manifests(corpus, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        manifests = recipe.prepare(corpus, tmp_path / "out")
    assert [path.name for path in manifests.values()] == ["train.json", "valid.json", "test.json"]
    assert [len(read_manifest(path)) for path in manifests.values()] == [20, 6, 8]
    entry = read_manifest(manifests["train"])["audio-1-headset"]
    audio = str(corpus / "slurp_real" / "audio-1-headset.flac")
    labels = {"text": "iot hue_lightoff", "slurp_id": "1", "num_characters": len(SENTENCES[1])}
    assert entry == {"audio": audio, "duration_s": 1.05, **labels}
    assert read_manifest(manifests["train"])["audio-6"]["audio"] == str(corpus / "slurp_synth" / "audio-6.flac")
    assert "devel.jsonl lists 6 recordings, but the official one has 8690" in caplog.text


def test_the_real_training_set_alone_and_audio_a_folder_deeper(corpus, tmp_path):
    (corpus / "audio").mkdir()
    for name in ("slurp_real", "slurp_synth"):
        (corpus / name).rename(corpus / "audio" / name)
    manifests = recipe.prepare(corpus, tmp_path / "out", synthetic=False)
    assert manifests["train"].name == "train-real.json" and len(read_manifest(manifests["train"])) == 12
    assert len(read_manifest(recipe.prepare(corpus, tmp_path / "out")["train"])) == 20


def test_intent_and_words_spelt_out(corpus, tmp_path):
    manifest = recipe.prepare(corpus, tmp_path / "out", joint=True, sets=["train"])["train"]
    assert manifest.name == "train-joint.json"
    of_first_four = [texts(manifest)[f"audio-{number}"] for number in range(4)]
    assert of_first_four == [
        "ALARM SET WAKE ME AT SIX",
        "IOT HUE_LIGHTOFF WHAT'S ON U S D",
        "ALARM QUERY JACK GMAIL DOT COM",
        "PLAY MUSIC PLAY TECH N9NE",
    ]


def test_work_is_done_once_for_the_same_files(corpus, tmp_path, monkeypatch):
    path = recipe.prepare(corpus, tmp_path / "out")["test"]
    before = path.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "durations_s", None)
        assert recipe.prepare(corpus, tmp_path / "out")["test"].stat().st_mtime_ns == before
    sentences = corpus / "dataset" / "slurp" / "test.jsonl"
    sentences.write_text(sentences.read_text().replace('"query"', '"remove"'))
    assert "alarm remove" in texts(recipe.prepare(corpus, tmp_path / "out")["test"]).values()


# --- what is wrong ---------------------------------------------------------------------------------------------------


def spoil_line(corpus, change):
    path = corpus / "dataset" / "slurp" / "devel.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = change(json.loads(lines[1]))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda row: json.dumps(row)[:-9],
        lambda row: json.dumps([row]),
        lambda row: json.dumps({key: v for key, v in row.items() if key != "scenario"}),
        lambda row: json.dumps(row | {"action": "hue lightoff"}),
        lambda row: json.dumps(row | {"scenario": "iot on", "action": ""}),
        lambda row: json.dumps(row | {"sentence": " "}),
        lambda row: json.dumps(row | {"recordings": [{"wer": 0.0}]}),
        lambda row: json.dumps(row | {"recordings": [{"file": 3}]}),
    ],
    ids=["cut off", "a list", "no scenario", "two words", "no action", "no sentence", "no file", "a number for a file"],
)
def test_a_malformed_line_is_named(corpus, tmp_path, change):
    spoil_line(corpus, change)
    message = r"devel\.jsonl, line 2: expected JSON with slurp_id, .*, got .*pswietojanski/slurp.*4274930"
    with pytest.raises(UserError, match=message) as caught:
        recipe.prepare(corpus, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out/manifests/valid.json").exists()


def test_what_is_missing_is_named(corpus, tmp_path):
    for number in range(3, 6):
        for kind in ("", "-headset"):
            (corpus / "slurp_real" / f"audio-{number}{kind}.flac").unlink()
    names = r"audio-3\.flac; audio-3-headset\.flac; .*; audio-5\.flac and 1 more"
    with pytest.raises(UserError, match=rf"20 recordings in slurp_real .* 6 missing: {names}\. .*zenodo.*4274930"):
        recipe.prepare(corpus, tmp_path / "out", drop_bad_audio=True)
    (corpus / "dataset/slurp/train_synthetic.jsonl").unlink()
    with pytest.raises(UserError, match=r"train_synthetic\.jsonl, but there is no such file.*pswietojanski"):
        recipe.prepare(corpus, tmp_path / "out")
    (corpus / "dataset/slurp/train.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"train\.jsonl: expected a sentence with recordings .* none"):
        recipe.prepare(corpus, tmp_path / "out", synthetic=False)
    with pytest.raises(UserError, match=r"sentences in .*dataset/slurp, but it is not there.*pswietojanski"):
        recipe.prepare(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UserError, match="sets: expected some of train, valid, test, got 'devel'"):
        recipe.prepare(corpus, tmp_path / "out", sets=["devel"])


def test_bad_audio_is_dropped_only_when_the_user_says_so(corpus, tmp_path, caplog):
    cut_off, short = corpus / "slurp_real" / "audio-1.flac", corpus / "slurp_synth" / "audio-7.flac"
    cut_off.write_bytes(cut_off.read_bytes()[:-500])
    write_audio(short, torch.zeros(399))
    with pytest.raises(UserError, match=r"train: .* 2 that cannot be used: .*drop_bad_audio: True") as caught:
        recipe.prepare(corpus, tmp_path / "out")
    assert f"{cut_off}: the audio is cut off" in str(caught.value) and f"{short}: 399 samples" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        manifest = recipe.prepare(corpus, tmp_path / "out", drop_bad_audio=True)["train"]
    assert len(read_manifest(manifest)) == 18 and not {"audio-1", "audio-7"} & read_manifest(manifest).keys()
    assert "left out 2" in caplog.text and str(cut_off) in caplog.text
    with pytest.raises(UserError, match="2 that cannot be used"):
        recipe.prepare(corpus, tmp_path / "out")


# --- training and evaluation -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluate_script():
    return evaluate


def places(folder, corpus, name):
    common = {"data_folder": str(corpus), "prepare_folder": str(folder / "data")}
    return common | {"output_folder": str(folder / name), "source": str(folder / "encoder")}


@pytest.fixture(scope="module")
def teacher(trained_on, tmp_path_factory):
    """A folder with a teacher that hparams/slurp/teacher.yaml trained, its waypoints, and what it started from."""
    folder = tmp_path_factory.mktemp("teacher")
    write_model(folder / "encoder", head="base")
    start("slurp/teacher", SMALL | places(folder, trained_on, "teacher") | {"waypoint_every_steps": 2})
    return folder


def evaluated(script, model, corpus, folder, *options):
    argv = [str(model), "--data_folder", str(corpus), "--output_folder", str(folder), *options]
    done = CliRunner().invoke(script.main, argv, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output.splitlines()[-1])


def test_the_teacher_keeps_attention_and_says_its_groups(teacher, trained_on, tmp_path, evaluate_script):
    model = teacher / "teacher" / "model"
    config = json.loads((model / "config.json").read_text())
    assert config["architectures"] == ["Wav2Vec2ForSequenceClassification"] and len(config["id2label"]) == 18 + 46
    assert config["id2label"]["0"] == "scenario:alarm" and config["id2label"]["63"] == "action:wemo_on"
    assert labels.group_names(model) == ["scenario", "action"]
    summary = evaluated(evaluate_script, model, trained_on, tmp_path)
    assert summary["intent"]["of"] == 8 and summary["split"] == "test"
    found = json.loads((tmp_path / "test.json").read_text())
    assert {label for label, guess in found.values()} == {" ".join(intent) for intent in INTENTS}
    for place, name in enumerate(("scenario", "action")):
        same = [label.split()[place] == guess.split()[place] for label, guess in found.values()]
        assert summary["intent"]["groups"][name] == 100 * sum(same) / 8
    right = sum(label == guess for label, guess in found.values())
    assert summary["intent"]["accuracy"] == 100 * right / 8 and len(summary["intent"]["interval"]) == 2
    assert "accuracy" in json.dumps(read_facts(model))
    again = labels.classify_folder(model, tmp_path / "manifests" / "test.json", tmp_path / "again.json")
    again = labels.summarise(again, labels.group_names(model))
    assert again["right"] == right and again["groups"] == summary["intent"]["groups"]


@pytest.mark.parametrize("guidance", MODES)
def test_a_student_in_every_guidance_mode(guidance, teacher, trained_on, tmp_path, evaluate_script):
    keys = (
        SMALL
        | places(teacher, trained_on, f"student-{guidance}")
        | {"guidance": guidance, "alpha_logits": 1.0}
        | NARROW
    )
    keys |= {"teacher": str(teacher / "teacher" / "model"), "waypoints": str(teacher / "teacher" / "waypoints")}
    student = start("slurp/student", keys)
    assert type(student.plain).__name__ == "CaldWav2Vec2ForSequenceClassification" and student.optimizer_step == 4
    log = map(json.loads, (student.store.folder / "train_log.jsonl").read_text().splitlines())
    lines = [row for row in log if "loss/layers" in row]
    assert (lines[0]["loss/layers"] > 0) == (lines[0]["loss/logits"] > 0) == (guidance != "unguided")
    assert (lines[-1]["loss/layers"] > 0) == (guidance not in ("unguided", "hybrid"))
    summary = evaluated(evaluate_script, student.store.folder / "model", trained_on, tmp_path, "--split", "valid")
    assert summary["intent"]["accuracy"] == pytest.approx(100 - student.progress.best_metric)


@pytest.mark.parametrize("part", ["teacher", "student"])
def test_words_and_intent_from_one_ctc_model(part, teacher, trained_on, tmp_path, evaluate_script):
    letters = "".join(sorted({*"ABCDEFGHIJKLMNOPQRSTUVWXYZ'_9"}))
    keys = SMALL | places(teacher, trained_on, f"joint-{part}")
    if part == "teacher":  # as the yaml's comment says
        keys |= {
            "guidance": "unguided",
            "teacher": "null",
            "layer_map": "!new:cald_speech.conversion.LayerMap {default: null}",
        }
    else:
        keys |= NARROW | {"teacher": str(write_model(tmp_path / "speller", letters=letters))}
    brain = start("slurp/joint", keys)
    assert type(brain.plain).__name__ == {"teacher": "Wav2Vec2ForCTC", "student": "CaldWav2Vec2ForCTC"}[part]
    assert "_" in brain.models.processor.tokenizer.get_vocab()
    summary = evaluated(evaluate_script, brain.store.folder / "model", trained_on, tmp_path, "--joint")
    assert summary["split"] == "test-joint" and summary["wer"] > 0 and summary["intent"]["of"] == 8
    read = [json.loads(line) for line in (tmp_path / "test-joint.jsonl").read_text().splitlines()]
    sentences = [recipe.spell_out(sentence) for sentence in SENTENCES for _ in range(2)]
    assert sorted(row["reference"] for row in read) == sorted(sentences)


class Speller:
    """What a CTC model would have read, in the place of evaluate()."""

    def __init__(self, said):
        self.said = said

    def __call__(self, model, processor, dataset, **options):
        with dataset.output_keys_as(["id", "text", "duration_s"]):
            items = {item["id"]: item for item in dataset}
        said = {key: self.said(item["text"]) for key, item in items.items()}
        durations_s = {key: item["duration_s"] for key, item in items.items()}
        return score({key: item["text"] for key, item in items.items()}, said, durations_s=durations_s)


@pytest.mark.parametrize(
    ("said", "accuracy", "groups", "wer"),
    [
        (lambda text: text, 100, (100, 100), 0),
        (lambda text: "", 0, (0, 0), 100),
        (lambda text: text.split()[0], 0, (100, 0), 100),
        (lambda text: text.replace("HUE_LIGHTOFF", "QUERY"), 75, (100, 75), 0),
        (lambda text: " ".join(text.split()[:2]), 100, (100, 100), 100),
    ],
    ids=["all", "nothing", "the scenario", "another action", "the intent"],
)
def test_the_first_two_words_are_the_intent(
    said, accuracy, groups, wer, corpus, tmp_path, evaluate_script, monkeypatch
):
    letters = "".join(sorted({*"ABCDEFGHIJKLMNOPQRSTUVWXYZ'_"}))  # no digit: "N9NE" cannot be written, and counts
    write_model(tmp_path / "model", letters=letters)
    monkeypatch.setattr(evaluate_script, "evaluate", Speller(said))
    summary = evaluated(evaluate_script, tmp_path / "model", corpus, tmp_path / "out", "--joint")
    assert summary["intent"]["accuracy"] == accuracy and summary["wer"] == wer
    assert summary["intent"]["groups"] == dict(zip(("scenario", "action"), groups, strict=True))


def test_labels_that_the_model_does_not_know(teacher, corpus, tmp_path, evaluate_script):
    path = corpus / "dataset" / "slurp" / "test.jsonl"
    path.write_text(path.read_text().replace('"hue_lightoff"', '"hue_lightred"'))
    argv = [str(teacher / "teacher" / "model"), "--data_folder", str(corpus), "--output_folder", str(tmp_path / "out")]
    done = CliRunner().invoke(evaluate_script.main, argv)
    assert done.exit_code == 2 and "expected labels of the model in" in done.output and "hue_lightred" in done.output
    keys = SMALL | places(teacher, corpus, "unknown") | {"prepare_folder": str(tmp_path), "teacher": "null"}
    (corpus / "dataset/slurp/train.jsonl").write_text(path.read_text())
    (corpus / "dataset/slurp/test.jsonl").write_text(path.read_text())
    with pytest.raises(UserError, match=r"train-real\.json: utterance .* as action one of .* got 'iot hue_lightred'"):
        start("slurp/student", keys | NARROW | {"guidance": "unguided", "corpus": {"synthetic": False}})


def test_labels_of_the_training_set(trained_on, teacher):
    task = "!new:cald_speech.tasks.intent.Intent {groups: [scenario, action]}"
    keys = SMALL | places(teacher, trained_on, "read-labels") | {"task": task, "num_steps": 1}
    names = start("slurp/teacher", keys).plain.config.id2label
    assert list(names.values()) == [f"scenario:{label}" for label in ("alarm", "iot", "play")] + [
        f"action:{label}" for label in ("hue_lightoff", "music", "query", "set")
    ]
