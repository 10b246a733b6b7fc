"""The commands that measure a model: their tables, files and last lines, and what they refuse."""

import json

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from cald_speech.data.manifests import write_manifest
from cald_speech.data.tokens import TokenSet, train_tokenizer
from tests.evaluation.layerwise import DURATIONS_S
from tests.training.miniature import write_model


def last_line(done):
    return json.loads(done.stdout.splitlines()[-1])


def test_evaluations_are_reported_and_compared(call, place, tmp_path):
    """The teacher reads its own words again; a report of both has the difference, paired."""
    folders = [tmp_path / "teacher", tmp_path / "student"]
    for folder in folders:
        where = ["--output_folder", folder, "--quiet"]
        summary = last_line(call("evaluate", place / folder.name, place / "manifest.json", *where))
        assert json.loads((folder / "manifest.json").read_text()) == summary
        assert len((folder / "manifest.jsonl").read_text().splitlines()) == len(DURATIONS_S)
    done = call("report", *folders)
    first, second = last_line(done)
    assert first["WER %"] == 0 == first["minus first"] and second["WER %"] == summary["wer"] > 0
    assert second["minus first"] == second["WER %"]
    assert second["diff low"] <= second["minus first"] <= second["diff high"]
    assert [second["low"], second["high"]] == summary["wer_interval"]
    assert len([line for line in done.stdout.splitlines() if line.startswith("|")]) == 4
    assert last_line(call("report", *folders, "--split", "manifest")) == [first, second]
    written = last_line(call("report", tmp_path, "--html", tmp_path / "page.html"))
    assert (written["evaluations"], written["audio"]["embedded"]) == (2, len(DURATIONS_S))
    assert written["bytes"] == (tmp_path / "page.html").stat().st_size
    assert "does nothing here" in call("report", *folders, "--utterances", 5, status=2).stderr
    words = ["evaluate", place / "teacher", place / "manifest.json", "--quiet", "--dtype", "int8"]
    quantised = last_line(call(*words, "--output_folder", tmp_path / "int8"))
    assert quantised["dtype"] == "int8" and quantised["wer"] < 20
    assert quantised["parameters"] == json.loads((folders[0] / "manifest.json").read_text())["parameters"]
    assert "Use bfloat16 there" in call(*words, "--device", "cuda", status=2).stderr


def test_reports_that_cannot_be_compared(call, place, tmp_path):
    entries = json.loads((place / "manifest.json").read_text())
    write_manifest(tmp_path / "fewer.json", dict(list(entries.items())[:2]))
    for name, manifest in (("all", place / "manifest.json"), ("fewer", tmp_path / "fewer.json")):
        call("evaluate", place / "teacher", manifest, "--output_folder", tmp_path / name, "--quiet")
    assert "expected a report of 'manifest'" in call("report", tmp_path / "all", tmp_path / "fewer", status=2).stderr
    for path in list((tmp_path / "fewer").glob("fewer.json*")):
        path.rename(path.with_stem("manifest"))
    told = call("report", tmp_path / "all", tmp_path / "fewer", status=2).stderr
    assert "expected reports of the same utterances" in told and "Evaluate both on one manifest" in told
    assert "got none. Evaluate first" in call("report", place / "teacher", status=2).stderr
    call("evaluate", place / "teacher", tmp_path / "fewer.json", "--output_folder", tmp_path / "all", "--quiet")
    assert "got fewer, manifest. Name one with --split" in call("report", tmp_path / "all", status=2).stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate", "nowhere", "manifest.json"], "there is no folder"),
        (["evaluate", "teacher", "none.json"], "there is no such manifest"),
        (["evaluate", "teacher", "manifest.json", "--normaliser", "polite"], "'polite' is not one of"),
        (["evaluate", "teacher", "manifest.json", "--beam", "0"], "expected a beam of at least 1"),
        (["evaluate", "teacher", "manifest.json", "--device", "toaster"], "device: expected cpu, cuda"),
        (["evaluate", "teacher", "manifest.json", "--output-folder", "x"], "No such option"),
        (["by-length", "teacher", "--manifest", "none.json"], "there is no such manifest"),
        (["by-length", "teacher", "--manifest", "manifest.json", "--readers", "eye"], "'eye' is not one of"),
        (["lookahead", "teacher", "--manifest", "manifest.json"], "need the whole audio: 0 (attention)"),
        (["lookahead", "student", "--manifest", "manifest.json", "--lookaheads_s", "1,-1"], "-1"),
        (["labels", "nowhere", "manifest.json"], "there is no folder"),
        (["perplexity", "nowhere", "t.json"], "there is no folder"),
        (["word-times", "teacher", "--data_folder", "."], "expected the Free Spoken Digit Dataset"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(call, place, monkeypatch, tmp_path, words, told):
    monkeypatch.chdir(tmp_path)
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert told in call(*words, status=2).stderr


def test_by_length(call, place, tmp_path):
    words = ["--manifest", place / "manifest.json", "--joins", "1,2", "--utterances", 2, "--quiet"]
    done = call("by-length", place / "student", *words, "--readers", "whole", "--output_folder", tmp_path / "out")
    rows = last_line(done)["rows"]
    assert [row["condition"] for row in rows][:2] == ["x 1, pauses to 0.5 s", "x 2, pauses to 0.5 s"]
    assert json.loads((tmp_path / "out" / "by_length.json").read_text()) == rows
    assert (tmp_path / "out" / "by_length.png").read_bytes().startswith(b"\x89PNG")
    assert len([line for line in done.stdout.splitlines() if line.startswith("|")]) == 2 + len(rows)


def test_lookahead(call, place, tmp_path):
    words = ["--manifest", place / "manifest.json", "--lookaheads_s", "0,0.5", "--join", 2, "--utterances", 4]
    done = call("lookahead", place / "student", *words, "--output_folder", tmp_path / "out")
    rows = last_line(done)["rows"]
    assert [row["lookahead"] for row in rows] == ["whole", "0 s", "0.5 s"]
    assert json.loads((tmp_path / "out" / "lookahead.json").read_text()) == rows


def test_labels(call, place, tmp_path):
    names = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}
    model = write_model(tmp_path / "model", head="classification", **names)
    entries = json.loads((place / "manifest.json").read_text())
    write_manifest(tmp_path / "answers.json", {key: entry | {"text": "yes"} for key, entry in entries.items()})
    summary = last_line(call("labels", model, tmp_path / "answers.json"))
    guesses = json.loads((tmp_path / "answers_labels.json").read_text())
    assert summary["of"] == len(entries) == len(guesses)
    assert summary["right"] == sum(label == guess for label, guess in guesses.values())
    told = call("labels", model, place / "manifest.json", status=2).stderr
    assert "expected labels of the model in" in told


def test_perplexity(call, tmp_path):
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 20)
    train_tokenizer([tmp_path / "text.txt"], 270, tmp_path / "model")
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=270
    )
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(270, size=(6, 32)).astype("uint16")
    tokens.tofile(tmp_path / "t.bin")
    TokenSet(str(tmp_path / "t.bin"), tokens.size, 32).write(tmp_path / "t.json")
    summary = last_line(call("perplexity", tmp_path / "model", tmp_path / "t.json"))
    assert 100 < summary["value"] < 1000 and summary["count"] == 6 * 31
    assert summary["generation"]["same_padded"] == 1.0
