"""Data of one's own, in every format: trained on, evaluated and transcribed by commands, to the same figures."""

import csv
import json
import re
from string import ascii_lowercase, ascii_uppercase

import pytest
import soundfile
import yaml
from click.testing import CliRunner

from cald_speech.commands import main
from cald_speech.conversion.model_card import read_facts
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import UserError
from cald_speech.recipes.asr.prepare import prepare
from cald_speech.training.run import run
from tests.data.corpora import COLUMNS, FORMATS, Utterance, miniature, write
from tests.training.miniature import ROOT, write_model

SMALL = ["--num_steps=2", "--max_batch_s=20", "--noprogressbar"]


def call(*words):
    done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_sets_in_several_formats(tmp_path, caplog):
    """An experiment of one's own over the shipped one; paths from the command line. It ends with the tests' WER."""
    caplog.set_level("INFO")
    said = miniature()
    sources = {name: write(name, tmp_path / name.replace(" ", "_"), said) for name in ("CSV", "Kaldi", "WebDataset")}
    teacher = write_model(tmp_path / "teacher", letters=ascii_uppercase + "',\"")
    own = {"base": str(ROOT / "hparams/asr/student.yaml"), "teacher": str(teacher), "train": str(sources["CSV"])}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own | {"output_folder": str(tmp_path / "out")}))
    words = [f"--valid={sources['Kaldi']}", f"--test={sources['WebDataset']}", *SMALL]
    brain = run([str(tmp_path / "own.yaml"), *words])
    assert brain.optimizer_step == 2
    manifests = [read_manifest(tmp_path / "out" / "manifests" / f"{name}.json") for name in ("train", "valid", "test")]
    assert [{key: entry["text"] for key, entry in m.items()} for m in manifests] == 3 * [{u.id: u.text for u in said}]
    summary = json.loads((tmp_path / "out" / "reports" / "test.json").read_text())
    assert f"test: WER {summary['wer']:.2f} % (" in caplog.messages[-1] and summary["num_utterances"] == len(said)
    assert read_facts(tmp_path / "out" / "model")["results"]["test"]["wer"] == summary["wer"]
    assert summary["normaliser"] == "librispeech" == read_facts(tmp_path / "out" / "model")["normaliser"]
    # Called again with two sets, it trains no more, and scores both.
    run([str(tmp_path / "own.yaml"), *words[:1], f"--test={{a: {sources['CSV']}, b: {sources['Kaldi']}}}", *SMALL])
    assert [m.split(":")[0] for m in caplog.messages if ": WER " in m] == ["test", "a", "b"]


def test_labels_are_scored_too(tmp_path, caplog):
    """A label that training never saw is told before any step."""
    caplog.set_level("INFO")
    source = str(write("CSV", tmp_path / "corpus", miniature()))
    teacher = write_model(tmp_path / "teacher", head="base")
    words = ["hparams/asr/labels.yaml", "--guidance=unguided", f"--source={teacher}", "--columns={text: speaker}"]
    words += [f"--{name}={source}" for name in ("train", "valid", "test")] + SMALL
    run([*words, f"--output_folder={tmp_path / 'out'}"])
    assert re.search(r"test: accuracy \d+\.\d\d % \(.*of 3\); report: .*reports/test\.json", caplog.messages[-1])
    run([*words, f"--output_folder={tmp_path / 'out'}", "--score_test_sets=False"])
    assert re.search(r"test: not scored: `cald-speech labels \S+/model \S+/test\.json` or --score", caplog.messages[-1])
    other = [u._replace(id=f"9{u.id}") for u in miniature()]
    words = [word for word in words if not word.startswith("--test=")]
    with pytest.raises(UserError, match=r"test\.json: expected the labels .*got '93'"):
        run([*words, f"--test={write('CSV', tmp_path / 'other', other)}", f"--output_folder={tmp_path / 'none'}"])
    assert not (tmp_path / "none" / "model").exists()


def test_one_normaliser_from_training_to_evaluation(tmp_path):
    """Lower case without marks: the hypotheses are written so too, at every place. No label at all is no training."""
    source = str(write("CSV", tmp_path / "corpus", miniature()))
    teacher = write_model(tmp_path / "teacher", letters=ascii_lowercase)
    words = [f"--{name}={source}" for name in ("train", "valid", "test")] + [f"--teacher={teacher}", *SMALL]
    words += ["--normaliser=whisper_english", f"--output_folder={tmp_path / 'out'}", "--unknown_characters=drop"]
    brain = run(["hparams/asr/student.yaml", *words])
    assert brain.results and all(said == said.lower() and "'" not in said for _, said in brain.results.values())
    report = json.loads((tmp_path / "out" / "reports" / "test.json").read_text())
    line = call("evaluate", tmp_path / "out" / "model", source, "--output_folder", tmp_path / "e", "--quiet")
    summary = json.loads(line.splitlines()[-1])
    assert summary["normaliser"] == report["normaliser"] == "whisper_english"
    assert summary["wer"] == report["wer"] == pytest.approx(brain.progress.best_metric)
    with pytest.raises(UserError, match=r"train\.json: expected transcripts .* nothing is left of any of the 3"):
        other = (word.replace("whisper_english", "librispeech").replace("/out", "/other") for word in words)
        run(["hparams/asr/student.yaml", *other])


def test_what_is_no_set(tmp_path):
    for test in ({"train": "a.csv"}, {"a/b": "a.csv"}):
        with pytest.raises(UserError, match="test: expected names of sets"):
            prepare(tmp_path, tmp_path / "out", train="a.csv", valid="a.csv", test=test)
    with pytest.raises(UserError, match=r"train: expected a corpus .*Give --train PATH"):
        prepare(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=r"valid: expected a path or a list of paths, got \{"):
        prepare(tmp_path, tmp_path / "out", train=[str(write("CSV", tmp_path / "a", miniature()))], valid={"a": 1})


@pytest.fixture(scope="module")
def spoken(speech_of):
    """Six utterances of AN4's test part; lengths in whole tenths of a millisecond, as manifests keep them."""
    folder = speech_of("an4")
    with (folder / "manifest.tsv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["split"] == "test"][:6]
    samples = [soundfile.read(folder / "flac" / f"{row['id']}.flac")[0] for row in rows]
    return [
        Utterance(f"{row['speaker']}-1-{number:04d}", one[: len(one) // 8 * 8], row["text"].upper())
        for number, (row, one) in enumerate(zip(rows, samples, strict=True))
    ]


@pytest.fixture(scope="module")
def first(spoken, tmp_path_factory):
    """The teacher that all formats start from, and what comes of our own manifest."""
    folder = tmp_path_factory.mktemp("first")
    teacher = write_model(folder / "teacher", letters=ascii_uppercase + "'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALD_SPEECH_CACHE", str(folder / "cache"))
        return teacher, through("our JSON", spoken, teacher, folder / "run")


def through(name, spoken, teacher, folder):
    """Train two steps, evaluate and transcribe what is trained, all with the corpus in that format, by commands alone.

    Training ends with the figures of its test set, which are those of `evaluate`.
    """
    source, columns = write(name, folder / "corpus", spoken), COLUMNS.get(name, {})
    keys = [f"--{key}={source}" for key in ("train", "valid", "test")] + [f"--columns={json.dumps(columns)}"]
    keys += [f"--teacher={teacher}", f"--output_folder={folder / 'out'}"]
    call("train", "hparams/asr/student.yaml", *keys, *SMALL)
    model, reports = folder / "out" / "model", folder / "reports"
    given = ["--columns", ",".join(f"{key}={value}" for key, value in columns.items())] if columns else []
    line = call("evaluate", model, source, *given, "--output_folder", reports, "--quiet").splitlines()[-1]
    call("transcribe", "--manifest", source, *given, "--model", model, "--output_folder", folder / "texts")
    texts = {path.stem: path.read_text() for path in (folder / "texts").rglob("*.txt")}
    summaries = [json.loads(line), json.loads((folder / "out" / "reports" / "test.json").read_text())]
    (summary, same) = ({key: one[key] for key in ("wer", "cer", "words", "num_utterances")} for one in summaries)
    assert summary == same
    return texts, summary


@pytest.mark.wide
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_on_real_speech(first, spoken, tmp_path, monkeypatch, name):
    monkeypatch.setenv("CALD_SPEECH_CACHE", str(tmp_path / "cache"))
    teacher, (texts, summary) = first
    found, its_summary = through(name, spoken, teacher, tmp_path)
    assert summary["num_utterances"] == len(spoken) == len(texts) and all(texts.values())
    assert found == texts and its_summary == summary
