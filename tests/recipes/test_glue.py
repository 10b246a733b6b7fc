"""Text classification on miniatures of the corpora: files, a teacher, its students in every mode, what each says."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from cald_speech import from_pretrained
from cald_speech.conversion.model_card import read_facts
from cald_speech.data.tables import read_table
from cald_speech.distillation import PRESETS
from cald_speech.errors import UserError
from cald_speech.mixers.linformer import TooLong
from cald_speech.recipes.glue import corpora as corpora_module
from cald_speech.recipes.glue.evaluate import main
from cald_speech.recipes.glue.prepare import prepare
from tests.recipes.start import start as start_experiment
from tests.sentences import WORDS, write_encoder

# On top of the experiments, which run as they stand otherwise.
SMALL = {"num_steps": 4, "max_batch_utterances": 8, "log_every_steps": 1, "max_tokens": 64}
SMALL |= {"learning_rate": 0.001}
HEADERS = {
    "QNLI": "index\tquestion\tsentence\tlabel",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "SST-2": "sentence\tlabel",
}
LABELS = {"qnli": ["entailment", "not_entailment"], "qqp": ["not_duplicate", "duplicate"]}
LABELS |= {task: ["negative", "positive"] for task in ("sst2", "imdb")}
TASK = "!new:cald_speech.tasks.text_classification.TextClassification {{labels: {}, max_tokens: 64}}"


@pytest.fixture(scope="module")
def recipe():
    """Its prepare and evaluate."""
    return SimpleNamespace(prepare=prepare, evaluate=main, corpora=corpora_module)


def sentence(number: int, label: int) -> str:
    """Some words, of which one gives the label away; no two are alike."""
    words = [WORDS[(number * 7 + place) % len(WORDS)] for place in range(3 + number % 9)]
    return " ".join([*(word for word in words if word not in ("good", "bad")), ("bad", "good")[label], f"n{number}"])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """24 rows to train on and 6 others of each corpus, in its own files; quotes are characters as any other."""
    root = tmp_path_factory.mktemp("corpora")
    for name, header in HEADERS.items():
        (root / name).mkdir()
        for split, numbers in (("train", range(24)), ("dev", range(30, 36))):
            lines = [header]
            for number in numbers:
                text, label = sentence(number, number % 2), number % 2
                lines.append(
                    {
                        "QNLI": f'{number}\tis "it\t{text} "\t{("entailment", "not_entailment")[label]}',
                        "QQP": f"{number}\t{number}\t{number + 1}\tis it\t{text}\t{label}",
                        "SST-2": f"{text} \t{label}",
                    }[name]
                )
            (root / name / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    for split, start in (("train", 0), ("test", 100)):
        for label, name in enumerate(("neg", "pos")):
            (root / "aclImdb" / split / name).mkdir(parents=True)
            for number in range(start + label, start + 40, 2):
                path = root / "aclImdb" / split / name / f"{number}_{9 * label + 1}.txt"
                path.write_text(sentence(number, label) + "<br />good")
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def start(recipe, corpora, source, tmp_path_factory):
    """Run an experiment as the command line would, into a folder of its own."""
    folder = tmp_path_factory.mktemp("results")

    def call(experiment: str, name: str, **keys):
        keys = SMALL | {"data_folder": corpora, "prepare_folder": folder / "data", "source": source} | keys
        return start_experiment(f"glue/{experiment}", keys | {"output_folder": folder / name}, recipe.prepare)

    return call


@pytest.fixture(scope="module")
def teacher(start):
    brain = start("teacher", "teacher", waypoint_every_steps=2)
    assert type(brain.plain).__name__ == "RobertaForSequenceClassification"
    return brain.store.folder


# --- preparation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["qnli", "qqp", "sst2"])
def test_tables_of_glue(recipe, corpora, tmp_path, task, caplog):
    with caplog.at_level(logging.WARNING):
        tables = recipe.prepare(corpora, tmp_path, task=task)
    counts = recipe.corpora.CORPORA[task].counts
    assert f"train has 24 rows, the official one {counts['train']:,}" in caplog.text
    assert list(tables) == ["train", "valid"] and tables["train"].stem == f"{task}-train"
    rows = read_table(tables["train"])
    assert len(rows) == 24 and len(read_table(tables["valid"])) == 6
    text, label = sentence(3, 1), LABELS[task][1]
    expected = {"qnli": ('is "it', f'{text} "'), "qqp": ("is it", text), "sst2": (f"{text} ", None)}[task]
    assert rows["3"] == {"text": expected[0], "pair": expected[1], "label": label}


def test_tables_of_imdb(recipe, corpora, tmp_path):
    tables = {name: read_table(path) for name, path in recipe.prepare(corpora, tmp_path, task="imdb").items()}
    texts = {name: {row["text"] for row in rows.values()} for name, rows in tables.items()}
    assert len(texts["train"] | texts["valid"]) == 40 == len(tables["train"]) + len(tables["valid"])
    assert 0 < len(texts["valid"]) < 12 and len(texts["test"]) == 40
    assert all(("good" in row["text"].split()) == (row["label"] == "positive") for row in tables["test"].values())
    # A review's set depends on its text alone, wherever the corpus lies; the test set may stand in, as in the paper.
    inner = recipe.prepare(corpora / "aclImdb", tmp_path / "inner", task="imdb")
    assert {row["text"] for row in read_table(inner["valid"]).values()} == texts["valid"]
    whole = recipe.prepare(corpora, tmp_path / "whole", task="imdb", held_out_share=0)
    assert len(read_table(whole["train"])) == 40
    assert whole["valid"].read_text() == whole["test"].read_text()


def test_tables_are_made_once(recipe, corpora, tmp_path):
    for name in ("train", "dev"):
        (tmp_path / "SST-2").mkdir(exist_ok=True)
        (tmp_path / "SST-2" / f"{name}.tsv").write_text((corpora / "SST-2" / f"{name}.tsv").read_text())

    def made():
        table = recipe.prepare(tmp_path, tmp_path / "out", task="sst2")["train"]
        return table, table.stat().st_ino

    table, first = made()
    assert made() == (table, first)
    table.write_text(table.read_text().replace("positive", "negative"))
    assert made() != (table, first) and "positive" in table.read_text()
    with (tmp_path / "SST-2" / "train.tsv").open("a") as file:
        file.write("one more\t1\n")
    made()
    assert len(read_table(table)) == 25


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_the_hub(recipe, corpora, tmp_path, monkeypatch):
    asked = []

    def load(*names):
        asked.append(names)
        rows = [{"question1": sentence(i, i % 2), "question2": "is it", "label": i % 2, "idx": i} for i in range(8)]
        return {"train": rows, "validation": rows[:4], "test": [row | {"label": -1} for row in rows]}

    hub(monkeypatch, load)
    rows = read_table(recipe.prepare("hub", tmp_path, task="qqp")["valid"])
    assert len(rows) == 4 and rows["1"] == {"text": sentence(1, 1), "pair": "is it", "label": "duplicate"}
    recipe.prepare("hub", tmp_path, task="qqp")
    assert asked == [("nyu-mll/glue", "qqp")]
    hub(monkeypatch, lambda *names: {s: [{"text": "x" * i, "label": 1} for i in range(50)] for s in ("train", "test")})
    rows = read_table(recipe.prepare("hub", tmp_path, task="imdb")["test"])
    assert rows["3"] == {"text": "xxx", "pair": None, "label": "positive"}


def test_no_hub(recipe, tmp_path, monkeypatch):
    def fail(*names):
        raise ConnectionError("offline")

    hub(monkeypatch, fail)
    with pytest.raises(UserError, match=r"cannot load nyu-mll/glue/sst2 from the hub: offline. .*gluebenchmark"):
        recipe.prepare("hub", tmp_path, task="sst2")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'cald-speech\[text\]', or give a folder"):
        recipe.prepare("hub", tmp_path, task="sst2")


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("sst2", b"good", r"SST-2/train.tsv, line 26: expected 2 columns, the last one of 0, 1, got 1: 'good"),
        ("sst2", b"good\t2", "line 26: expected 2 columns, the last one of 0, 1, got 2"),
        ("qnli", b"1\ta\tb\tmaybe", "line 26: expected 4 columns, the last one of entailment, not_entailment"),
        ("qqp", b'"\tis it?\t0', "line 26: expected 6 columns.*got 3: .*QQP-clean.zip"),
        ("sst2", b"\xff\t1", r"train.tsv:26: expected text in UTF-8.*0xFF"),
    ],
)
def test_malformed_lines(recipe, corpora, tmp_path, task, line, message):
    name = recipe.corpora.CORPORA[task].folder
    (tmp_path / name).mkdir()
    for split in ("train", "dev"):
        (tmp_path / name / f"{split}.tsv").write_bytes((corpora / name / f"{split}.tsv").read_bytes() + line + b"\n")
    with pytest.raises(UserError, match=message):
        recipe.prepare(tmp_path, tmp_path / "out", task=task)


def test_what_is_missing_is_named(recipe, corpora, tmp_path):
    with pytest.raises(UserError, match="task: expected one of qnli, qqp, sst2, imdb, got 'mnli'"):
        recipe.prepare(corpora, tmp_path, task="mnli")
    with pytest.raises(
        UserError, match=r"expected .*QNLI/train.tsv; it is not there.*gluebenchmark.*--data_folder hub"
    ):
        recipe.prepare(tmp_path, tmp_path, task="qnli")
    with pytest.raises(UserError, match=r"expected .*/train/\{neg,pos\}/\*.txt; it is not there.*ai.stanford.edu"):
        recipe.prepare(tmp_path, tmp_path, task="imdb")
    with pytest.raises(UserError, match="held_out_share: expected a share"):
        recipe.prepare(corpora, tmp_path, task="imdb", held_out_share=1.0)
    (tmp_path / "QNLI").mkdir()
    (tmp_path / "QNLI" / "dev.tsv").write_text("")
    (tmp_path / "QNLI" / "train.tsv").write_text("question\tsentence\tlabel\n")
    with pytest.raises(
        UserError, match=r"train.tsv: expected the columns index, question, sentence, label, got question"
    ):
        recipe.prepare(tmp_path, tmp_path, task="qnli")


# --- training -------------------------------------------------------------------------------------------------------


# The one that switches and the one with teachers of its own; pile's and slurp's tests have the others.
MODES = ["hybrid", "waypoint", *(pytest.param(m, marks=pytest.mark.wide) for m in ("unguided", "target", "trajectory"))]


@pytest.mark.parametrize("guidance", MODES)
def test_every_guidance_mode(start, teacher, guidance):
    keys = {"teacher": teacher / "model", "waypoints": teacher / "waypoints", "guidance": guidance, "switch_step": 2}
    brain = start("student", guidance, **keys)
    assert brain.optimizer_step == 4 and brain.skipped.count == 0
    assert brain.models.conversion.layers == ("Linformer", "Linformer") and brain.settings.loss == PRESETS["nlp"]
    lines = [json.loads(line) for line in (brain.store.folder / "train_log.jsonl").read_text().splitlines()]
    followed = [line["loss/layers"] > 0 for line in lines if "loss/layers" in line]
    assert followed == {"unguided": [False] * 4, "hybrid": [True] * 2 + [False] * 2}.get(guidance, [True] * 4)
    model = from_pretrained(brain.store.folder / "model", head="classification")
    assert type(model).__name__ == "CaldRobertaForSequenceClassification"
    assert all(torch.equal(value, brain.plain.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.slow  # trains on every corpus
@pytest.mark.parametrize("task", ["qnli", "qqp", "imdb"])
def test_every_corpus(start, teacher, task):
    own = start("teacher", f"{task}-teacher", glue_task=task, waypoint_every_steps=0)
    student = start("student", task, glue_task=task, teacher=own.store.folder / "model", sharing="kv")
    assert list(student.plain.config.id2label.values()) == LABELS[task]
    with pytest.raises(UserError, match=r"tells .* apart, and the task"):
        labels = json.dumps(LABELS[task][::-1])
        start("student", f"{task}-wrong", glue_task=task, teacher=own.store.folder / "model", task=TASK.format(labels))


def test_bert_is_told_which_sentence_is_which(start, tmp_path):
    source = write_encoder(tmp_path / "bert", "bert")
    own = start("teacher", "bert-teacher", glue_task="qqp", source=source)
    types = own.plain.bert.embeddings.token_type_embeddings.weight
    assert own.plain.config.type_vocab_size == 2
    assert (types != from_pretrained(source, head="masked_lm").bert.embeddings.token_type_embeddings.weight).all()
    brain = start("student", "bert", glue_task="qqp", source=source, teacher=own.store.folder / "model")
    assert type(brain.plain).__name__ == "CaldBertForSequenceClassification" and brain.optimizer_step == 4


@pytest.mark.parametrize("sharing", ["none", "kv", "layer"])
def test_every_sharing(start, teacher, recipe, corpora, sharing):
    brain = start("student", f"sharing-{sharing}", teacher=teacher / "model", sharing=sharing)
    names = ("mix_keys", "mix_values")
    mixed = {id(p) for name, p in brain.plain.named_parameters() if name.endswith(names)}
    assert len(mixed) == {"none": 4, "kv": 2, "layer": 1}[sharing]
    assert all(tuple(p.shape) == (256, 64) for name, p in brain.plain.named_parameters() if name.endswith(names))
    folder, out = brain.store.folder / "model", brain.store.folder / "report"
    words = ["--glue_task", "sst2", "--data_folder", str(corpora), "--max_tokens", "64", "--output_folder", str(out)]
    done = CliRunner().invoke(recipe.evaluate, [str(folder), *words, "--prepare_folder", str(out)])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["accuracy"] == pytest.approx(100 - brain.progress.best_metric) and summary["of"] == 6
    assert summary["interval"][0] <= summary["accuracy"] <= summary["interval"][1] and "| sst2-valid" in done.stdout
    guesses = json.loads((out / "sst2-valid-guesses.json").read_text())
    assert len(guesses) == 6 and sum(a == b for a, b in guesses.values()) == summary["right"]
    assert json.loads((out / "sst2-valid.json").read_text()) == summary
    figure = read_facts(folder)["figures"]["sst2-valid"]
    assert (figure["metric"], figure["value"], figure["count"]) == ("accuracy %", summary["accuracy"], 6)
    assert "| sst2-valid | accuracy % |" in (folder / "README.md").read_text()


def test_evaluation_that_cannot_be(recipe, teacher, corpora, tmp_path):
    words = [str(teacher / "model"), "--data_folder", str(corpora), "--prepare_folder", str(tmp_path)]
    common = {"max_tokens": 64, "glue_task": "sst2"}
    for keys, message in [
        ({"split": "test"}, "split: expected one of train, valid, which sst2 has, got 'test'"),
        ({"max_tokens": 512}, "max_tokens: expected at most 64, the positions of"),
        ({"glue_task": "qqp"}, "line 1: expected a label of negative, positive, got 'not_duplicate'"),
    ]:
        options = [f"--{key}={value}" for key, value in (common | keys).items()]
        done = CliRunner().invoke(recipe.evaluate, words + options)
        assert done.exit_code == 2 and message in done.stderr


def test_inputs_longer_than_the_mixer_knows(start, teacher):
    """The experiment gives task and mixer the same max_tokens; where a yaml does not, the message says what to do."""
    layer_map = "{default: !name:cald_speech.mixers.Linformer {k: 4, max_length: 6}}"
    with pytest.raises(TooLong, match=r"has weights for up to 6 frames, and got .*convert with a larger max_length"):
        start("student", "too-long", teacher=teacher / "model", layer_map=layer_map)
    with pytest.raises(UserError, match="max_tokens: expected at most 64, the positions of"):
        start("student", "positions", teacher=teacher / "model", max_tokens=128)


def test_experiments_know_the_four_corpora_alone(start, teacher):
    with pytest.raises(UserError, match=r"own.yaml: expected one of qnli, qqp, sst2, imdb, got 'mnli'"):
        start("student", "mnli", teacher=teacher / "model", glue_task="mnli")
