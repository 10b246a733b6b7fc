"""One label for a sentence or a pair: tokens, labels, truncation, and what does not fit."""

import logging

import numpy as np
import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch
from transformers import AutoConfig, AutoTokenizer

from cald_speech import from_pretrained
from cald_speech.data.tables import Sentences, write_table
from cald_speech.errors import UserError
from cald_speech.tasks.text_classification import TextClassification
from tests.sentences import write_encoder, write_tokenizer

LABELS = ["no", "yes"]
TASK = TextClassification(LABELS, max_tokens=16)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A classifier and its tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("encoders")
    options = {"head": "classification", "id2label": dict(enumerate(LABELS)), "label2id": {"no": 0, "yes": 1}}
    return {kind: write_encoder(folder / kind, kind, **options) for kind in ("roberta", "bert")}


def tokenizer_in(folder):
    return AutoTokenizer.from_pretrained(folder)


def table(folder, *rows):
    write_table(folder / "t.jsonl", [dict(zip(("text", "pair", "label"), row, strict=True)) for row in rows])
    return folder / "t.jsonl"


def read(path, tokenizer, task=TASK):
    return task.dataset(path, tokenizer, normaliser="none", unknown="error")


SENTENCES = [("a dull film", None, "no"), ("good", None, "yes"), ("the best of all , as you like it", None, "yes")]
PAIRS = [("is it good", "the best of all", "yes"), ("is it", "a slow , dull film", "no"), ("you", "you", "yes")]


@pytest.mark.parametrize("rows", [SENTENCES, PAIRS], ids=["sentences", "pairs"])
@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_items_are_what_the_tokenizer_makes_of_each_row(encoders, tmp_path, kind, rows):
    tokenizer = tokenizer_in(encoders[kind])
    dataset = read(table(tmp_path, *rows), tokenizer)
    assert len(dataset) == 3 and dataset.tokens.dtype == np.int32
    assert Sentences().sizes(dataset) == [len(dataset[i]["tokens"]) for i in range(3)]
    for place, (text, pair, label) in enumerate(rows):
        expected, item = tokenizer(text, pair), dataset[place]
        assert item["id"] == str(place) and item["text"] == label and item["labels"].tolist() == [LABELS.index(label)]
        assert item["tokens"].dtype == torch.int64 and item["tokens"].tolist() == expected.input_ids
        assert item["token_types"].tolist() == expected.get("token_type_ids", [0] * len(expected.input_ids))
    assert dataset[0]["token_types"].any() == (kind == "bert" and rows is PAIRS)


@pytest.mark.parametrize("rows", [SENTENCES, PAIRS], ids=["sentences", "pairs"])
@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_a_row_says_the_same_alone_padded_and_to_transformers(encoders, tmp_path, kind, rows):
    tokenizer, model = tokenizer_in(encoders[kind]), from_pretrained(encoders[kind], head="classification")
    dataset = read(table(tmp_path, *rows), tokenizer)
    with torch.no_grad():
        arguments, lengths = Sentences().arguments(PaddedBatch([dataset[i] for i in range(3)]), model)
        together = model(**arguments).logits
        for place, (text, pair, _) in enumerate(rows):
            alone = model(**Sentences().arguments(PaddedBatch([dataset[place]]), model)[0]).logits[0]
            own = model(**tokenizer(text, pair, return_tensors="pt")).logits[0]
            assert torch.allclose(together[place], alone, atol=1e-5) and torch.allclose(alone, own, atol=1e-5)
    assert lengths.tolist() == dataset.num_tokens.tolist()


def test_longer_rows_are_cut_and_counted(encoders, tmp_path, caplog):
    tokenizer = tokenizer_in(encoders["roberta"])
    long = " ".join(["good"] * 40)
    path = table(tmp_path, (long, "bad", "yes"), ("it", "is", "no"), ("bad", long, "no"))
    with caplog.at_level(logging.WARNING):
        dataset = read(path, tokenizer)
    assert "2 of 3 rows are longer than 16 tokens (max_tokens) and were cut; the longest has 45" in caplog.text
    assert dataset.num_tokens.tolist() == [16, 6, 16]
    # The longer sentence is cut: the other, and the special tokens, are all there.
    assert dataset[0]["tokens"].tolist() == tokenizer(" ".join(["good"] * 11), "bad").input_ids
    assert dataset[2]["tokens"].tolist() == tokenizer("bad", " ".join(["good"] * 11)).input_ids
    caplog.clear()
    assert max(read(path, tokenizer, TextClassification(LABELS, max_tokens=45)).num_tokens) == 45 and not caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("a", None, "no"), ("b", None, "maybe")],
            r"t\.jsonl, line 2: expected a label of no, yes, got 'maybe' \(1 s",
        ),
        ([("a", "b", "no"), ("b", None, "no")], r"line 2: expected a pair, as on line 1, got one sentence"),
        ([("a", None, "no"), ("b", "b", "no")], r"line 2: expected one sentence, as on line 1, got a pair"),
    ],
)
def test_rows_that_do_not_fit(encoders, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read(table(tmp_path, *rows), tokenizer_in(encoders["roberta"]))


def test_no_room_for_text(encoders, tmp_path):
    with pytest.raises(UserError, match="max_tokens: expected more than the tokenizer's special tokens take, got 4"):
        read(table(tmp_path, *PAIRS), tokenizer_in(encoders["roberta"]), TextClassification(LABELS, max_tokens=4))


def test_models_that_do_not_fit(encoders, tmp_path):
    tokenizer, config = tokenizer_in(encoders["roberta"]), AutoConfig.from_pretrained(encoders["roberta"])
    options = TextClassification(LABELS, max_tokens=64).head_options("x", config, tokenizer)
    assert options == {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    with pytest.raises(UserError, match="max_tokens: expected at most 64, the positions of 'x', got 65"):
        TextClassification(LABELS, max_tokens=65).head_options("x", config, tokenizer)
    with pytest.raises(UserError, match=r"'x' tells no, yes apart, and the task yes, no"):
        TextClassification(LABELS[::-1], max_tokens=64).head_options("x", config, tokenizer)
    config.vocab_size = 5
    with pytest.raises(UserError, match="embeddings for 5 tokens, and the tokenizer has"):
        TASK.head_options("x", config, tokenizer)
    speech = AutoConfig.for_model("wav2vec2", vocab_size=100)
    with pytest.raises(UserError, match="wav2vec2 models hear audio: expected one that reads text"):
        TASK.head_options("x", speech, tokenizer)


def test_token_types_of_another_model(encoders, tmp_path):
    dataset = read(table(tmp_path, *PAIRS), write_tokenizer(tmp_path / "bert", "bert"))
    model = from_pretrained(encoders["roberta"], head="classification")
    with pytest.raises(
        UserError, match="token types up to 1, and RobertaForSequenceClassification has embeddings for 1"
    ):
        Sentences().arguments(PaddedBatch([dataset[0]]), model)


def test_a_tokenizer_is_needed(encoders, tmp_path):
    train = table(tmp_path, *PAIRS)
    found = TASK.processor([str(encoders["bert"])], None, tmp_path, train, "none")
    assert found.get_vocab() == tokenizer_in(encoders["bert"]).get_vocab()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"expected a tokenizer in one of .*empty, got none"):
        TASK.processor([str(tmp_path / "empty")], None, tmp_path, train, "none")
