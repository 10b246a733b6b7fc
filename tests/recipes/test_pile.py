"""Language models on miniatures: text and token files in, every guidance mode, evaluation, lm-eval on a local task."""

import importlib
import json
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import GPTNeoXConfig, LlamaConfig, RobertaConfig

import cald_speech
from cald_speech.conversion import LayerMap
from cald_speech.data.tokens import TokenBlocks, TokenSet, train_tokenizer
from cald_speech.errors import UserError
from cald_speech.evaluation.language import PAPER_TASKS, evaluate_language, repeated_ngrams, run_tasks, step_error
from cald_speech.mixers import Linformer, Mamba, Mamba2
from cald_speech.recipes.pile import evaluate
from cald_speech.recipes.pile import prepare as recipe
from cald_speech.training.run import run
from tests.conftest import once_for_all_workers
from tests.training.miniature import ROOT

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
NEOX = GPTNeoXConfig(**SMALL, use_parallel_residual=True, max_position_embeddings=256)
MODELS = {
    "GPT-NeoX to Mamba": (NEOX, partial(Mamba, expand=2.5), "random"),
    "GPT-NeoX to Mamba-2": (NEOX, partial(Mamba2, chunk_size=16), "attention"),
    "GPT-NeoX, sequential": (GPTNeoXConfig(**SMALL, use_parallel_residual=False), Mamba2, "attention"),
    "Llama to Mamba-2": (LlamaConfig(**SMALL), Mamba2, "attention"),
    "RoBERTa to Linformer": (
        RobertaConfig(**SMALL, max_position_embeddings=70),
        partial(Linformer, k=4, max_length=64),
        "random",
    ),
}
TASK = "!new:cald_speech.tasks.language_modelling.{}"
CORPUS = {"vocab_size": 300, "block_tokens": 48, "held_out_share": 0.15}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MODES = ["unguided", "target", "hybrid", "trajectory", "waypoint"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Forty texts of a small language: counting, forwards and backwards."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        order = WORDS if number % 2 else WORDS[::-1]
        text = " ".join(order[(number + place) % 10] for place in range(60 + number))
        (folder / f"part{number % 3}").mkdir(exist_ok=True)
        (folder / f"part{number % 3}" / f"{number}.txt").write_text(text + "\n")
    return folder


def keys_of(model: str, texts, folder, **more) -> dict:
    _, _, initialise = MODELS[model]
    task = "MaskedLM" if "RoBERTa" in model else "CausalLM"
    keys = {"data_folder": str(texts), "prepare_folder": str(folder / "data"), "num_steps": 4, "log_every_steps": 1}
    keys |= {"max_batch_tokens": 400, "corpus": CORPUS, "task": TASK.format(task), "initialise": initialise}
    return keys | more


def start(model: str, keys: dict, folder, *, convert: bool):
    """An experiment of plain keys, with the layer map and the untrained model put in as objects."""
    config, mixer, _ = MODELS[model]
    task = keys.pop("task")
    text = yaml.safe_dump(keys) + f"task: {task}\n"
    if convert:
        described = LayerMap(mixer).to_dict()["default"]
        arguments = json.dumps(described["arguments"])
        text += "layer_map: !new:cald_speech.conversion.LayerMap\n"
        text += f"    default: !name:cald_speech.mixers.{described['mixer']} {arguments}\n"
    elif "source" not in keys:
        values = {
            k: v
            for k, v in config.to_dict().items()
            if k in {*SMALL, "use_parallel_residual", "max_position_embeddings"}
        }
        text += f"source: !new:transformers.{type(config).__name__} {json.dumps(values)}\n"
    path = folder / "experiment.yaml"
    if not (folder / "guidance").exists():
        (folder / "guidance").symlink_to(ROOT / "hparams" / "guidance")
    path.write_text(text)
    return run([str(path), "--noprogressbar"], recipe.prepare)


@pytest.fixture(scope="module", params=MODELS)
def teacher(request, texts, tmp_path_factory):
    """(model, its folder with processor and waypoints) of every kind."""
    folder = tmp_path_factory.mktemp("teacher")
    keys = keys_of(request.param, texts, folder, output_folder=str(folder / "run"), waypoint_every_steps=2)
    brain = start(request.param, keys | {"guidance": "unguided"}, folder, convert=False)
    return request.param, brain.store.folder


# Every mode with a causal model; of a masked one two that take most. The others stand for mixers and
# layouts, which no mode knows of: the mode that evaluates.
CASES = [("GPT-NeoX to Mamba-2", mode) for mode in MODES]
CASES += [("RoBERTa to Linformer", mode) for mode in ("target", "trajectory")]
CASES += [(name, "target") for name in MODELS if (name, "target") not in CASES]
WIDE = [(name, mode) for name in ("RoBERTa to Linformer",) for mode in MODES if (name, mode) not in CASES]
WIDE += [(name, "trajectory") for name in MODELS if (name, "trajectory") not in CASES]
CASES += [pytest.param(*case, marks=pytest.mark.wide) for case in WIDE]
CAUSAL = [*(f"GPT-NeoX{more}" for more in (" to Mamba", ", sequential")), "Llama to Mamba-2"]  # as GPT-NeoX to Mamba-2


@pytest.mark.parametrize(("teacher", "mode"), CASES, indirect=["teacher"])
def test_a_model_is_converted_in_every_mode(teacher, texts, tmp_path, mode):
    model, folder = teacher
    keys = {"teacher": str(folder / "model"), "source": str(folder / "model"), "output_folder": str(tmp_path / "run")}
    keys |= {"switch_step": 2, "waypoints": str(folder / "waypoints"), "alpha_logits": 1.0, "guidance": mode}
    keys |= {"loss": "nlp" if "RoBERTa" in model else "lm", "decay": "mixers", "gradient_checkpointing": True}
    brain = start(model, keys_of(model, texts, tmp_path, **keys), tmp_path, convert=True)
    lines = [json.loads(line) for line in (brain.store.folder / "train_log.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "loss/task" in line]) == 4
    assert (lines[1]["loss/layers"] > 0) == (lines[1]["loss/logits"] > 0) == (mode != "unguided")
    assert not any(module.training for module in (brain.teacher.modules() if brain.teacher is not None else ()))
    tokens = tmp_path / "data" / "manifests" / "valid.json"
    summary = evaluate_language(str(brain.store.folder / "model"), tokens, num_prompts=3) if mode == "target" else None
    if summary is not None:
        assert summary["value"] == pytest.approx(brain.progress.best_metric, rel=1e-4)
        low, high = summary["interval"]
        assert low <= summary["value"] <= high
        card = (brain.store.folder / "model" / "README.md").read_text()
        assert f"| valid | perplexity | {summary['value']:.2f} |" in card
        assert ("text-generation" in card) == ("RoBERTa" not in model)
        if "generation" in summary:
            assert summary["generation"]["step_error"] < 1e-5 and summary["generation"]["same_padded"] == 1


@pytest.mark.parametrize(
    "teacher",
    ["GPT-NeoX to Mamba-2", "RoBERTa to Linformer", *(pytest.param(name, marks=pytest.mark.wide) for name in CAUSAL)],
    indirect=True,
)
def test_gradient_checkpointing_changes_nothing_but_memory(teacher, texts, tmp_path):
    model, folder = teacher
    weights = []
    for on in (False, True):
        keys = {"teacher": str(folder / "model"), "output_folder": str(tmp_path / str(on)), "guidance": "target"}
        keys |= {"loss": "lm", "gradient_checkpointing": on}
        student = start(model, keys_of(model, texts, tmp_path, **keys), tmp_path, convert=True).plain
        assert student.is_gradient_checkpointing == on
        weights.append(student.state_dict())
    assert all(torch.allclose(weights[1][name], value, atol=1e-5) for name, value in weights[0].items())


def test_a_short_text_or_a_second_run_changes_nothing(texts, tmp_path):
    first = recipe.prepare(texts, tmp_path, **CORPUS)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("tokens/*/*")}
    assert len(stamps) == 5 and first.keys() == {"train", "valid", "test"}
    recipe.prepare(texts, tmp_path, **CORPUS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("tokens/*/*")} == stamps
    half = recipe.prepare(texts, tmp_path, **CORPUS, num_train_tokens=480)["train"]
    assert TokenSet.read(half).num_blocks == 10


def test_the_piles_own_files(tmp_path):
    rows = np.random.default_rng(0).integers(300, size=(40, 2049)).astype("uint16")
    rows.tofile(tmp_path / "document.bin")
    sets = recipe.prepare(tmp_path, tmp_path / "out", num_held_out_tokens=2049 * 5, vocab_size=300)
    blocks = {name: TokenBlocks(TokenSet.read(path)) for name, path in sets.items()}
    assert {name: len(of) for name, of in blocks.items()} == {"train": 30, "valid": 5, "test": 5}
    assert blocks["test"][4]["tokens"].tolist() == rows[-1].tolist()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pattern": "*.md"}, r"expected token files \(\*\.bin\) or text \(\*\.md\) in .* found neither"),
        ({"vocab_size": None}, "expected a tokenizer .* or a vocab_size"),
        ({"num_train_tokens": 10**9}, "num_train_tokens: expected at most the .* that are there"),
        ({"block_tokens": 10**6}, "do not fill one block"),
        ({"held_out_share": 0.0}, "no file of 40 fell to valid, test"),
    ],
)
def test_what_cannot_be_prepared(texts, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        recipe.prepare(texts, tmp_path, **(CORPUS | keys))


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"no such folder\. The pre-shuffled Pile is at"):
        recipe.prepare(tmp_path / "nowhere", tmp_path)


def test_a_vocabulary_that_is_not_the_teachers(teacher, texts, tmp_path):
    model, folder = teacher
    other = train_tokenizer(sorted(texts.rglob("*.txt")), 280, tmp_path / "tokenizer")
    assert len(other) < 300
    keys = {"teacher": str(folder / "model"), "output_folder": str(tmp_path / "run"), "guidance": "target"}
    keys |= {"corpus": CORPUS | {"tokenizer": str(tmp_path / "tokenizer"), "vocab_size": None}}
    with pytest.raises(UserError, match="expected the same vocabulary"):
        start(model, keys_of(model, texts, tmp_path, **keys), tmp_path, convert=True)


# --- experiments -----------------------------------------------------------------------------------------------------

FEW = {"num_steps": 2, "max_batch_tokens": 400, "log_every_steps": 1}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Fifty Python files."""
    folder = tmp_path_factory.mktemp("sources")
    for number in range(50):
        (folder / f"m{number}.py").write_text(f"def number_{number}():\n    return {number}\n\n\n" * 20)
    return folder


@pytest.mark.slow  # three trainings
@pytest.mark.parametrize(
    ("name", "student"),
    [("stdlib", "stdlib"), ("stdlib_masked", "stdlib_masked"), ("stdlib_masked", "stdlib_linformer")],
)
def test_the_small_experiments_run(name, student, sources, tmp_path):
    folders = {"start": tmp_path / "start", "teacher": tmp_path / "teacher"}
    common = FEW | {"data_folder": str(sources), "prepare_folder": str(tmp_path / "data")}
    words = lambda keys: [f"--{key}={value}" for key, value in (common | keys).items()]  # noqa: E731
    experiment = lambda name: str(ROOT / "hparams" / "pile" / f"{name}.yaml")  # noqa: E731
    run([experiment(f"{name}_start"), *words({"output_folder": folders["start"]}), "--noprogressbar"], recipe.prepare)
    keys = {"output_folder": folders["teacher"], "source": folders["start"] / "model", "waypoint_every_steps": 1}
    run([experiment(f"{name}_teacher"), *words(keys), "--noprogressbar"], recipe.prepare)
    keys = {"source": folders["start"] / "model", "teacher": folders["teacher"] / "model"}
    keys |= {"waypoints": folders["teacher"] / "waypoints", "guidance": "waypoint", "teacher_steps": 1.0}
    keys |= {"output_folder": tmp_path / "student"}
    brain = run([experiment(student), *words(keys), "--noprogressbar"], recipe.prepare)
    assert "attention" not in brain.models.conversion.layers


@pytest.mark.parametrize("teacher", ["GPT-NeoX to Mamba"], indirect=True)
@pytest.mark.parametrize("name", ["teacher", "student", "mamba2"])
def test_the_piles_experiments_run(name, teacher, tmp_path):
    """With a small model, and rows of the Pile's own kind."""
    _, folder = teacher
    np.random.default_rng(0).integers(300, size=(40, 49)).astype("uint16").tofile(tmp_path / "document.bin")
    corpus = {"block_tokens": 49, "num_train_tokens": 980, "num_held_out_tokens": 98, "vocab_size": 300}
    corpus["tokenizer"] = str(folder / "model")
    keys = FEW | {"data_folder": tmp_path, "output_folder": tmp_path / "run", "prepare_folder": tmp_path / "data"}
    keys |= {"precision": "fp32", "num_workers": 0, "accumulation": 2}
    keys |= {"source" if name == "teacher" else "teacher": folder / "model"}
    words = [f"--{key}={value}" for key, value in keys.items()] + ["--corpus", json.dumps(corpus)]
    brain = run([str(ROOT / "hparams" / "pile" / f"{name}.yaml"), *words, "--noprogressbar"], recipe.prepare)
    assert brain.optimizer_step == 2 and (tmp_path / "run" / "model" / "model.safetensors").is_file()


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(texts, tmp_path_factory):
    model, length = "GPT-NeoX to Mamba-2", {"num_steps": 60, "learning_rate": 0.01}

    def train(folder):
        keys = keys_of(model, texts, folder, output_folder=str(folder / "teacher"), **length)
        start(model, keys | {"guidance": "unguided"}, folder, convert=False)
        keys = keys_of(model, texts, folder, output_folder=str(folder / "student"), **length)
        start(model, keys | {"teacher": str(folder / "teacher" / "model"), "guidance": "target"}, folder, convert=True)

    return once_for_all_workers(tmp_path_factory, "pile", train) / "student" / "model"


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """Which word comes next, as an lm-eval task with data of its own."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"context": f"{WORDS[i]} {WORDS[i + 1]}", "choices": [WORDS[i + 2], WORDS[(i + 7) % 10]], "answer": 0}
            for i in range(8)]  # fmt: skip
    (folder / "counting.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    description = {
        "task": "counting",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "counting.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "counting.yaml").write_text(yaml.safe_dump(description))
    return folder


@pytest.fixture
def own_tasks(monkeypatch):
    """The thousands of tasks that come with lm-eval take seconds to list: a test of the wide ones does."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'cald-speech[text]'")
    tasks = importlib.import_module("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@pytest.mark.slow  # lm-eval is imported
def test_a_local_task_by_lm_eval(student, own_tasks, task_files, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokens = recipe.prepare(texts, tmp_path / "data", **CORPUS, tokenizer=str(student))["test"]
    arguments = [str(student), "--tasks=counting", f"--include_path={task_files}", f"--tokens={tokens}"]
    result = CliRunner().invoke(evaluate.main, [*arguments, f"--output_folder={tmp_path / 'out'}"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    (row,) = (row for row in summary["tasks"] if row["metric"] == "acc")
    assert row["task"] == "counting" and row["value"] >= 0.5  # it has learned to count
    assert json.loads((tmp_path / "out" / "language.json").read_text()) == summary


@pytest.mark.slow  # lm-eval is imported
def test_tasks_that_are_not_known(student, own_tasks, task_files, tmp_path):
    with pytest.raises(UserError, match="tasks: lm-eval knows no nonsense:"):
        run_tasks(str(student), ["counting", "nonsense"], include_path=task_files)
    with pytest.raises(UserError, match="include_path: expected a folder of task files"):
        run_tasks(str(student), ["nonsense"], include_path=tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.wide  # thousands of tasks are listed
def test_the_papers_tasks_are_known(student):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'cald-speech[text]'")
    with pytest.raises(UserError, match="tasks: lm-eval knows no nonsense:"):
        run_tasks(str(student), [*PAPER_TASKS, "nonsense"])


def test_tokens_that_the_model_does_not_know(student, tmp_path):
    np.full(480, 60_000, dtype="uint16").tofile(tmp_path / "t.bin")
    TokenSet(str(tmp_path / "t.bin"), 480, 48).write(tmp_path / "t.json")
    with pytest.raises(UserError, match="holds the token 60000, and the model knows 300"):
        evaluate_language(str(student), tmp_path / "t.json")


def test_a_wrong_state_is_seen(student):
    """The check of generation fails where it should: a mixer that forgets its state between steps."""
    model = cald_speech.from_pretrained(student, head="lm")
    rows = torch.arange(3, 63)[None]
    assert step_error(model, rows) < 1e-5
    mixer = model.base_model.layers[0].attention.mixer
    whole = type(mixer).forward
    mixer.forward = lambda x, lengths=None, *, state=None, **options: whole(mixer, x, lengths, **options)
    assert step_error(model, rows) > 1e-3


def test_repetition_is_counted():
    assert repeated_ngrams([torch.arange(20)]) == 0
    assert repeated_ngrams([torch.ones(20)]) > 90
