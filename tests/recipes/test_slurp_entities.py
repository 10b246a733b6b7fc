"""SLU-F1 by hand: what a wrong filler, a lost entity and one too many count for; entities spelt out by a CTC model."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from cald_speech.data.manifests import read_manifest
from cald_speech.errors import UserError
from cald_speech.recipes.slurp import evaluate as script
from cald_speech.recipes.slurp import prepare as recipe
from cald_speech.recipes.slurp.entities import character_distance, confusion, slu_f1, word_distance
from tests.recipes.test_slurp import SENTENCES, Speller, write_slurp
from tests.training.miniature import write_model

TRUE = [("date", "next monday"), ("time", "nine am")]


@pytest.mark.parametrize(
    ("found", "counts"),
    [
        (TRUE, (2, 0, 0)),
        ([], (0, 0, 2)),
        ([("date", "next sunday"), ("time", "nine am")], (2, 0.5, 0.5)),
        ([("date", "on next monday"), ("place", "here")], (1, 1.5, 1.5)),
        ([("date", "next monday"), ("date", "next monday")], (1, 1, 1)),
    ],
    ids=["all", "nothing", "a wrong word", "one too many, one lost", "twice"],
)
def test_words(found, counts):
    assert confusion(TRUE, found, word_distance).tolist() == pytest.approx(counts)


def test_the_nearest_of_a_type_is_taken():
    true = [("name", "anna"), ("name", "bob")]
    assert confusion(true, [("name", "bo"), ("name", "anna")], character_distance).tolist() == pytest.approx(
        (2, 1 / 3, 1 / 3)
    )


def test_both_counts_are_summed():
    pairs = {"a": (TRUE, [("date", "next sunday")]), "b": (TRUE, TRUE), "c": ([], [])}
    found = slu_f1(pairs)
    words, characters = (
        np.sum([confusion(*pair, distance) for pair in pairs.values()], axis=0)
        for distance in (word_distance, character_distance)
    )
    true, false, lost = words + characters
    assert found["SLU-F1 %"] == pytest.approx(100 * 2 * true / (2 * true + false + lost))
    assert found["word F1 %"] < found["SLU-F1 %"] < found["char F1 %"] < 100
    assert 0 <= found["low"] <= found["SLU-F1 %"] <= found["high"] <= 100


@pytest.fixture
def corpus(tmp_path):
    """The miniature with its sentences annotated: the last word is a place."""
    root = write_slurp(tmp_path / "slurp")
    for path in (root / "dataset" / "slurp").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            *words, last = row["sentence"].split()
            row["sentence_annotation"] = f"{' '.join(words)} [place_name : {last}]"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_entities_are_spelt_out_and_scored(corpus, tmp_path, monkeypatch):
    manifest = recipe.prepare(corpus, tmp_path / "out", joint=True, entities=True, sets=["test"])["test"]
    assert manifest.name == "test-entities.json"
    texts = {entry["text"] for entry in read_manifest(manifest).values()}
    assert len(texts) == len(set(SENTENCES)) and all(text.count("[PLACE_NAME ") == 1 for text in texts)
    write_model(tmp_path / "model", letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ'_[]0123456789")
    words = [str(tmp_path / "model"), "--data_folder", str(corpus), "--joint", "--entities", "--output_folder"]
    for name, said, rate, wer in (
        ("all", lambda text: text, 100, 0),
        ("no entity", lambda text: text.replace("[PLACE_NAME ", "").replace("]", ""), 0, 0),
        ("another type", lambda text: text.replace("PLACE", "EVENT"), 0, 0),
    ):
        monkeypatch.setattr(script, "evaluate", Speller(said))
        done = CliRunner().invoke(script.main, [*words, str(tmp_path / name)], catch_exceptions=False)
        summary = json.loads(done.stdout.splitlines()[-1])
        assert summary["entities"]["SLU-F1 %"] == rate and summary["wer"] == wer
        assert "SLU-F1 %" in done.stdout.splitlines()[0] and summary["intent"]["accuracy"] == 100


def test_entities_that_cannot_be_spelt_out(corpus, tmp_path):
    with pytest.raises(UserError, match="entities: expected joint: True beside it"):
        recipe.prepare(corpus, tmp_path / "out", entities=True)
    path = corpus / "dataset" / "slurp" / "devel.jsonl"
    path.write_text(path.read_text().replace("sentence_annotation", "annotated", 1))
    with pytest.raises(
        UserError, match=r"devel\.jsonl, line 1: expected the sentence with its entities as sentence_ann"
    ):
        recipe.prepare(corpus, tmp_path / "out", joint=True, entities=True, sets=["valid"])
