"""The general teacher: its corpora as miniatures in their layouts, the model it begins as, its experiments."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoProcessor

from cald_speech import from_pretrained
from cald_speech.conversion.model_card import read_facts
from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.data.manifests import read_manifest
from cald_speech.errors import UserError
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.recipes.general import prepare as recipe
from cald_speech.recipes.general.deepen import LETTERS, write_deeper
from cald_speech.recipes.general.ship import ship
from cald_speech.training.run import run
from tests.helpers import TOLERANCE, relative_error
from tests.training.miniature import ROOT, write_model


def write_corpora(folder: Path) -> Path:
    """Each named speaker and two more with an utterance in the training part, and one of the test part, of noise."""
    generator = np.random.default_rng(0)
    for name, corpus in recipe.CORPORA.items():
        parts = dict.fromkeys((*corpus.dev, *corpus.long_form, "a", "b"), "train")
        columns = ["id", "speaker", "seconds", "text"]
        if corpus.train_split is not None:
            parts, columns = parts | {"tested": "test"}, [*columns, "split"]
        lines = ["\t".join(columns)]
        for number, (speaker, split) in enumerate(parts.items()):
            seconds = 0.3 + 0.02 * number
            path = folder / name / corpus.audio.format(f"{speaker}-1")
            path.parent.mkdir(parents=True, exist_ok=True)
            form = {"format": "OGG", "subtype": "OPUS"} if path.suffix == ".ogg" else {}
            soundfile.write(path, 0.1 * generator.standard_normal(round(SAMPLE_RATE * seconds)), SAMPLE_RATE, **form)
            lines.append("\t".join([f"{speaker}-1", speaker, f"{seconds:.2f}", "Don't  a", split][: len(columns)]))
        (folder / name / "manifest.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return write_corpora(tmp_path_factory.mktemp("corpora"))


def test_each_speaker_is_in_one_set(corpora, tmp_path):
    sets = {name: read_manifest(path) for name, path in recipe.prepare(corpora, tmp_path / "out").items()}
    assert list(sets["train"]) == [f"{name}/{speaker}-1" for name in sorted(recipe.CORPORA) for speaker in "ab"]
    for name, corpus in recipe.CORPORA.items():
        assert set(sets[f"dev-{name}"]) == {f"{name}/{speaker}-1" for speaker in corpus.dev}
    assert set(sets["long-form"]) == {f"librispeech_mini/{s}-1" for s in recipe.CORPORA["librispeech_mini"].long_form}
    assert sets["valid"] == sets["dev-an4"] | sets["dev-librispeech_mini"] | sets["dev-speechocean762"]
    entries = [entry for of_set in sets.values() for entry in of_set.values()]
    assert {entry["text"] for entry in entries} == {"DON'T A"}
    assert not any("tested" in entry["speaker"] for entry in entries)


def test_short_utterances_first(corpora, tmp_path):
    longest = recipe.prepare(corpora, tmp_path / "long")
    shorter = recipe.prepare(corpora, tmp_path / "short", max_s=0.45)
    lost = read_manifest(longest["train"]).keys() - read_manifest(shorter["train"]).keys()
    assert lost == {"an4/a-1", "an4/b-1"}  # behind eight named speakers
    assert read_manifest(longest["valid"]) == read_manifest(shorter["valid"])


@pytest.mark.parametrize(
    ("column", "value", "shared"), [("speaker", "b", "an4/b"), ("id", "b-1", "an4/b-1")], ids=["speaker", "utterance"]
)
def test_sets_that_overlap(column, value, shared):
    sets = {"train": {"an4/a-1": {"speaker": "an4/a"}}, "valid": {"an4/b-1": {"speaker": "an4/b"}}}
    recipe.check_disjoint(sets)
    other = {"speaker": "an4/b"} if column == "speaker" else {"speaker": "an4/c"}
    sets["train"]["an4/c-1" if column == "speaker" else f"an4/{value}"] = other
    with pytest.raises(UserError, match=f"train and valid to share neither .* {shared}"):
        recipe.check_disjoint(sets)


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


FAULTS = {
    "no table": (lambda f: remove(f / "an4/manifest.tsv"), "table .*an4/manifest.tsv, but it is not there"),
    "no column": (lambda f: replace(f / "an4/manifest.tsv", "split", "part"), "columns .*; without split"),
    "no audio": (lambda f: remove(f / "speechocean762/ogg/a-1.ogg"), "cannot be used: .*speechocean762/ogg/a-1.ogg"),
    "no named speaker": (lambda f: replace(f / "an4/manifest.tsv", "\tmtos", "\tmtoz"), "an4: .*named speakers.* mtos"),
    "an id twice": (lambda f: replace(f / "an4/manifest.tsv", "b-1\tb", "a-1\ta"), "used twice: an4/a-1"),
    "a digit": (lambda f: replace(f / "librispeech_mini/manifest.tsv", "Don't", "2"), "others: librispeech_mini/.*2 A"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_is_named(corpora, tmp_path, fault):
    spoil, message = FAULTS[fault]
    spoilt = shutil.copytree(corpora, tmp_path / "corpora")
    spoil(spoilt)
    with pytest.raises(UserError, match=message):
        recipe.prepare(spoilt, tmp_path / "out")


@pytest.mark.slow
def test_real_corpora(shared_data, speech_of, tmp_path):
    for name in recipe.CORPORA:
        speech_of(name)
    sets = {name: read_manifest(path) for name, path in recipe.prepare(shared_data, tmp_path).items()}
    hours = {name: sum(entry["duration_s"] for entry in of_set.values()) / 3600 for name, of_set in sets.items()}
    assert {name: len(of_set) for name, of_set in sets.items()} == {
        "train": 4415,
        "dev-an4": 104,
        "dev-librispeech_mini": 58,
        "dev-speechocean762": 100,
        "long-form": 290,
        "valid": 262,
    }
    assert 7.4 < hours["train"] < 7.6 and 1.0 < hours["long-form"] < 1.1


def test_deeper_model_says_the_same(tmp_path):
    source = write_model(tmp_path / "source", letters="BAC")
    with torch.no_grad():
        shallow = from_pretrained(source).eval()
        deeper = from_pretrained(write_deeper(tmp_path / "deeper", source, num_layers=5)).eval()
        known, vocabulary = (
            AutoProcessor.from_pretrained(f).tokenizer.get_vocab() for f in (source, tmp_path / "deeper")
        )
        audio = torch.randn(1, 4000)
        before, after = shallow(audio).logits, deeper(audio).logits
    assert len(deeper.wav2vec2.encoder.layers) == 5 and after.size(-1) == len(vocabulary) == 32
    for token in ("<pad>", "|", "A", "B", "C"):
        error = relative_error(after[..., vocabulary[token]], before[..., known[token]])
        assert error < TOLERANCE["rounding"]


@pytest.mark.slow  # five trainings
def test_its_experiments_run(corpora, tmp_path):
    """The three parts, each on from the model before; the second is stopped after a step and goes on. A student follows
    the last, which ships."""
    source = write_model(tmp_path / "deeper", letters=LETTERS)
    for name, until in (("teacher_start", [1]), ("teacher", [1, 2]), ("teacher_end", [1])):
        keys = {"data_folder": corpora, "output_folder": tmp_path / name, "source": source, "max_batch_s": 1.0}
        words = [f"--{key}={value}" for key, value in keys.items()]
        for steps in until:
            argv = [str(ROOT / "hparams" / "general" / f"{name}.yaml"), *words, f"--num_steps={steps}"]
            brain = run([*argv, "--noprogressbar"])
            assert brain.optimizer_step == steps
        source = brain.store.folder / "model"
    keys = {"data_folder": corpora, "output_folder": tmp_path / "student", "teacher": source, "max_batch_s": 1.0}
    words = [f"--{key}={value}" for key, value in (keys | {"num_steps": 1, "calibrate": 0}).items()]
    student = run([str(ROOT / "hparams" / "general" / "student.yaml"), *words, "--noprogressbar"])
    assert set(student.models.conversion.layers).isdisjoint({"attention"}) and student.optimizer_step == 1
    ship(tmp_path / "shipped", [tmp_path / "teacher", tmp_path / "teacher_end"])
    shipped, trained = from_pretrained(tmp_path / "shipped"), from_pretrained(source)
    assert shipped.dtype == torch.float32 and read_facts(tmp_path / "shipped") == read_facts(source)
    audio = torch.randn(1, 4000)
    assert relative_error(shipped(audio).logits, trained(audio).logits) < TOLERANCE["float16"]
    rows = [line.split("\t") for line in (tmp_path / "shipped" / "curve.tsv").read_text().splitlines()]
    assert {(run, bool(loss), bool(error)) for run, _, loss, error in rows[1:]} >= {
        ("teacher", True, False),
        ("teacher_end", False, True),
    }
    with pytest.raises(UserError, match=r"expected .*nothing/train_log\.jsonl"):
        ship(tmp_path / "shipped", [tmp_path / "nothing"])


def test_the_teacher_that_ships_reads_speakers_it_never_heard(speech_of, tmp_path):
    """As small as it may be, with its licences and its curve, and better than chance on real phrases."""
    folder = ROOT / "recipes" / "general" / "teacher"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10 * 2**20 and (folder / "LICENCES.md").is_file()
    runs = {line.split("\t")[0] for line in (folder / "curve.tsv").read_text().splitlines()[1:]}
    assert runs == {"start", "teacher", "teacher_end"}
    manifest = recipe.prepare(speech_of("an4").parent, tmp_path)["dev-an4"]
    few = dict(list(json.loads(manifest.read_text()).items())[::10])
    manifest.write_text(json.dumps(few))
    model = shutil.copytree(folder, tmp_path / "model")  # the card of which the evaluation writes
    found = evaluate_folder(model, manifest, tmp_path / "report", split="dev-an4", progress=False)
    assert found["cer"] < 30, found
