"""Every experiment runs: built, stepped, saved, loaded, evaluated; and a converted model can learn."""

import json
from string import ascii_lowercase, ascii_uppercase

import pytest
import soundfile
import torch
from click.testing import CliRunner

import cald_speech
from cald_speech.conversion.model_card import read_facts
from cald_speech.data.manifests import read_manifest
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.mixers import DEFAULT, describe_factory
from cald_speech.recipes.digits import prepare as recipe
from cald_speech.recipes.librispeech.evaluate import main as evaluate
from cald_speech.recipes.librispeech.prepare import prepare
from cald_speech.training.run import run
from cald_speech.training.settings import Settings
from tests.training.miniature import ROOT, SPLITS, write_corpus, write_experiment, write_model

# LibriSpeech's and those of the demo and the digits. The other corpora have tests of their own.
EXPERIMENTS = [path for path in sorted((ROOT / "hparams").glob("*.yaml")) if path.stem != "long_audio"]
EXPERIMENTS += sorted((ROOT / "hparams" / "demo").glob("*.yaml"))
EXPERIMENTS += [
    ROOT / "hparams" / "digits" / f"{name}.yaml"
    for name in ("student", "grid", "teacher", "teacher_start", "cue", "cue_teacher_start", "cue_teacher")
]
FAMILIES = {"hubert": {"family": "hubert"}, "wavlm": {"family": "wavlm", "letters": ascii_lowercase}}
DEPTHS = {key: {"layers": 24} for key in ("hybrid_layers", "windowed_layers")}
# On top of every experiment; what is not named here runs as it stands.
SMALL = {"num_steps": 2, "max_batch_s": 5, "num_workers": 0, "precision": "fp32", "log_every_steps": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("LibriSpeech"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """All the clips of one speaker of the digits, 60 ms of a tone each, the digit being its pitch."""
    folder = tmp_path_factory.mktemp("fsdd")
    (folder / "recordings").mkdir()
    for digit in range(10):
        tone = 0.3 * torch.sin(torch.arange(480) * (digit + 1) * 0.05)
        for index in range(50):
            soundfile.write(folder / "recordings" / f"{digit}_theo_{index}.wav", tone.numpy(), 8_000)
    return folder


@pytest.fixture(scope="module")
def digits():
    """The digits' prepare(), with a test set of the one speaker in the place of the committed one."""
    strings = recipe.draw_strings("test", 4, ["theo"], recipe.TEST_INDICES, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "NUM_HELD_OUT_STRINGS", 2)
        patch.setattr(recipe, "_fixed_test_strings", lambda: strings)
        yield recipe.prepare


def models_for(path, folder) -> dict[str, str]:
    """Tiny models in the places of those that the experiment names; a new model's config stays as it is."""
    options = {"letters": ascii_uppercase} | FAMILIES.get(path.stem, {}) | DEPTHS.get(path.stem, {})
    text = path.read_text()
    if "!new:transformers" in text:
        return {}
    if "\nsource:" in text and "\nteacher:" not in text and "base: student.yaml" not in text:
        return {"source": str(write_model(folder / "source", head="base", **options))}
    return {"teacher": str(write_model(folder / "teacher", **options))}


AT_STEPS = {"conversion_schedule": {"steps": [0, 1]}}  # of two layers
OWN = {"schedule": AT_STEPS, **{key: {"accumulation": 1} for key in DEPTHS}}  # of many layers, all in one batch
CASES = [(path, OWN.get(path.stem, {})) for path in EXPERIMENTS]
CASES += [(ROOT / "hparams" / "mamba.yaml", {"guidance": "unguided"})]
CASES += [(ROOT / "hparams" / "linformer.yaml", {"layer_map": {"default": {"sharing": "layer"}}})]
CASES += [(ROOT / "hparams" / "digits/student.yaml", {"guidance": "hybrid", "switch_step": 1})]


@pytest.mark.parametrize(
    "path, keys", CASES, ids=[" ".join([f"{p.parent.name}/{p.stem}", *map(str, k.values())]) for p, k in CASES]
)
def test_experiment(path, keys, corpus, clips, digits, tmp_path):
    is_digits = path.parent.name == "digits"
    own = {"num_train": 8, "num_valid": 3} if is_digits else {"splits": SPLITS}
    # so many that all letters come
    own |= {"num_train": 16, "cue_pause_s": [0.2, 0.4]} if path.stem.startswith("cue") else {}
    overrides = SMALL | keys | models_for(path, tmp_path) | {"corpus": own}
    overrides["data_folder"] = str(clips if is_digits else corpus)
    overrides |= {"output_folder": str(tmp_path / "run"), "prepare_folder": str(tmp_path / "data")}
    argv = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]
    brain = run([str(path), *argv, "--noprogressbar"], digits if is_digits else prepare)
    assert brain.optimizer_step == 2 and brain.skipped.count == 0
    model = cald_speech.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.equal(value, brain.plain.state_dict()[name]) for name, value in model.state_dict().items())
    kept = sum(layer == "attention" for layer in brain.models.conversion.layers)
    expected = {"hparams/hybrid_layers": 4, "hparams/teacher": 2, "demo/teacher": 4, "digits/teacher_start": 4}
    expected |= {"demo/teacher_more": 2, "digits/teacher": 2}
    expected |= {"digits/cue_teacher_start": 2, "digits/cue_teacher": 2}
    assert kept == expected.get(f"{path.parent.name}/{path.stem}", 0)
    manifest = tmp_path / "data" / "manifests" / "valid.json"
    options = {"split": "valid", "normaliser": brain.settings.normaliser, "progress": False}
    summary = evaluate_folder(tmp_path / "run" / "model", manifest, tmp_path / "report", **options)
    assert summary["num_utterances"] == len(read_manifest(manifest)) and summary["wer"] > 0
    assert read_facts(tmp_path / "run" / "model")["results"]["valid"]["wer"] == summary["wer"]


def test_every_experiment_says_how_it_is_run():
    for path in sorted((ROOT / "hparams").rglob("*.yaml")):
        if path.parent.name != "guidance":
            lines = path.read_text().splitlines()
            assert lines[0].startswith("# ") and len(lines) < 120 and max(map(len, lines)) <= 120, path
            name = path.relative_to(ROOT).as_posix()
            assert any(name in line or "rebuild_teacher" in line for line in lines[:4]), path


def test_evaluate_recipe(corpus, tmp_path):
    folder = write_model(tmp_path / "teacher")
    words = [str(folder), "--data_folder", str(corpus), "--output_folder", str(tmp_path / "report")]
    done = CliRunner().invoke(evaluate, words)
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["split"] == "test-clean" and summary["num_utterances"] == 4 and "| test-clean" in done.stdout
    assert len((tmp_path / "report" / "test-clean.jsonl").read_text().splitlines()) == 4


SMALL_CONFIG = """
source: !new:transformers.Wav2Vec2Config
    hidden_size: 64
    num_hidden_layers: 2
    num_attention_heads: 4
    intermediate_size: 128
    # 640 samples a frame: 25 frames for the 15 characters of a second
    conv_dim: [32, 48, 64]
    conv_kernel: [16, 16, 10]
    conv_stride: [8, 8, 10]
    num_conv_pos_embeddings: 16
    num_conv_pos_embedding_groups: 4
    feat_extract_norm: layer
    do_stable_layer_norm: True
    conv_bias: True
    mask_time_prob: 0.0
    hidden_dropout: 0.0
    activation_dropout: 0.0
    attention_dropout: 0.0
    feat_proj_dropout: 0.0
    final_dropout: 0.0
schedule: !new:cald_speech.training.schedules.WarmupSchedule
    warmup_steps: 20
    decay_steps: 280
    shape: cosine
    floor: 0.05
"""


@pytest.mark.slow  # 300 steps of training
def test_a_converted_model_learns_four_utterances_by_heart(shared_data, tmp_path):
    path = write_experiment(
        tmp_path / "overfit.yaml",
        output_folder=str(tmp_path / "run"),
        data_folder=str(shared_data / "librispeech"),
        corpus={"splits": {"train": ["test-clean"], "valid": ["test-clean"]}},
        guidance="unguided",
        initialise="random",
        freeze_front_end=False,
        weight_decay=0.0,
        learning_rate=0.005,
        num_steps=300,
        max_batch_s=60,
        validate_every_epochs=1000,
    )
    path.write_text(path.read_text() + SMALL_CONFIG)
    brain = run([str(path), "--noprogressbar"], prepare)
    assert len(brain.results) == 4 and brain.progress.best_metric == 0
    assert all(reference == said for reference, said in brain.results.values())


@pytest.mark.parametrize("name", ["demo/students", "align/encoder"])
def test_these_take_the_default_mixer(name):
    described = describe_factory(Settings.load(ROOT / f"hparams/{name}.yaml").layer_map.default)
    described["arguments"].pop("chunk_size", None)
    assert described == describe_factory(DEFAULT)
