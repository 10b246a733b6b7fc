"""Adapters in a recipe: they alone train, to the bit after a stop, and the saved model has them in its weights."""

from pathlib import Path

import pytest
import torch
import yaml

from cald_speech import LayerMap, convert, from_pretrained
from cald_speech.errors import UserError
from cald_speech.families import families
from cald_speech.mixers import NormalisedLinearAttention
from cald_speech.recipes.pile import prepare as pile
from cald_speech.training.adapters import KINDS, Adapters
from cald_speech.training.run import parse, run
from tests.families.text import CASES
from tests.helpers import TOLERANCE, audio_batch, relative_error, tiny_model
from tests.recipes.test_pile import CORPUS, TASK, texts
from tests.training.miniature import CONVERTED, write_model
from tests.training.test_resume import RESTLESS, Killed, assert_same_run, kill_after_step

__all__ = ["texts"]

peft = pytest.importorskip("peft", reason="needs the extra `peft`")
PROJECTIONS = r".*\.mixer\..*_proj"
LORA = f"!new:peft.LoraConfig {{r: 2, lora_dropout: 0.1, target_modules: '{PROJECTIONS}'}}"


def logits(model) -> torch.Tensor:
    samples, mask = audio_batch([6000, 3500])
    with torch.no_grad():
        return model.eval()(samples, attention_mask=mask).logits


def changed(folder: Path, model) -> set[str]:
    """The names of the saved model's weights that are not those of ``before_adapters``."""
    before = from_pretrained(folder / "before_adapters").state_dict()
    after = model.state_dict()
    assert before.keys() == after.keys()
    return {name for name, weight in after.items() if not torch.equal(weight, before[name])}


@pytest.mark.slow  # three trainings
def test_adapters_alone_train_and_resume_to_the_bit(experiment, start, monkeypatch):
    path, words = experiment(**RESTLESS), ("--adapters", LORA)
    expected = start(path, "whole", *words)
    with monkeypatch.context() as patch:
        kill_after_step(patch, 3)
        with pytest.raises(Killed):
            start(path, "run", *words)
    resumed = start(path, "run", *words)
    assert_same_run(resumed, expected)
    folder = resumed.store.folder
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (expected.store.folder / name).read_bytes()
    model = from_pretrained(folder / "model")
    moved = changed(folder, model)
    assert moved and all(".mixer." in name and name.endswith("_proj.weight") for name in moved)
    assert relative_error(logits(model), logits(resumed.plain)) < TOLERANCE["rounding"]
    base = peft.PeftConfig.from_pretrained(folder / "adapter").base_model_name_or_path
    adapted = peft.PeftModel.from_pretrained(from_pretrained(base), folder / "adapter")
    assert torch.equal(logits(adapted), logits(resumed.plain))
    assert "LORA" in (folder / "model" / "cald.json").read_text()


def test_mixers_and_head_train_beside_them(experiment, start):
    """Adapters on feed-forward layers, slot alignment first."""
    path = experiment(align_steps=2, num_steps=3, teacher_mask="student")
    config = "!new:peft.LoraConfig {r: 2, target_modules: [output_dense], modules_to_save: [mixer, lm_head]}"
    brain = start(path, "run", "--adapters", config)
    model = from_pretrained(brain.store.folder / "model")
    moved = changed(brain.store.folder, model)
    trained = {kind for kind in (".mixer.", "output_dense.weight", "lm_head") if any(kind in name for name in moved)}
    assert len(trained) == 3 and all(any(kind in name for kind in trained) for name in moved)
    assert relative_error(logits(model), logits(brain.plain)) < TOLERANCE["rounding"]
    adapted = peft.PeftModel.from_pretrained(
        from_pretrained(brain.store.folder / "before_adapters"), brain.store.folder / "adapter"
    )
    assert torch.equal(logits(adapted), logits(brain.plain))


def test_of_text(texts, tmp_path):
    case = CASES["llama"]
    case.model(vocab_size=CORPUS["vocab_size"], initializer_range=0.1).save_pretrained(tmp_path / "teacher")
    keys = {"data_folder": str(texts), "prepare_folder": str(tmp_path / "data"), "corpus": CORPUS}
    keys |= {"teacher": str(tmp_path / "teacher"), "output_folder": str(tmp_path / "run"), "max_batch_tokens": 400}
    text = f"task: {TASK.format('CausalLM')}\nguidance: !new:cald_speech.distillation.Unguided {{}}\nadapters: {LORA}\n"
    text += f"layer_map: {CONVERTED}\n    default: !name:cald_speech.mixers.Mamba2 {{chunk_size: 16}}\n"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(keys | {"num_steps": 2, "learning_rate": 0.01}) + text)
    run([str(tmp_path / "mine.yaml"), "--noprogressbar"], pile.prepare)
    models = [from_pretrained(tmp_path / "run" / name, head="lm") for name in ("before_adapters", "model")]
    before, after = (model.state_dict() for model in models)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all(".mixer." in name and name.endswith("_proj.weight") for name in moved)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_merged(teachers, kind):
    options = {"init_ia3_weights": False} if kind == "IA3Config" else {"r": 2, "init_weights": False}
    if kind == "LoraConfig":
        options["init_lora_weights"] = options.pop("init_weights")
    if kind == "IA3Config":
        options["feedforward_modules"] = ["output_dense"]
    model = from_pretrained(teachers["layer"])
    before = logits(model)
    config = getattr(peft, kind)(target_modules=["q_proj", "output_dense"], **options)
    adapters = Adapters(config, model, base=str(teachers["layer"]))
    merged = adapters.merged()
    assert relative_error(logits(model), before) > 1e-3
    assert relative_error(logits(merged), logits(model)) < TOLERANCE["rounding"]
    assert merged.state_dict().keys() == from_pretrained(teachers["layer"]).state_dict().keys()


REFUSED = {
    "expected `!new:peft.LoraConfig": lambda: 3,
    "got 'AdaLoraConfig'": lambda: peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"]),
    "got 'PromptTuningConfig'": lambda: peft.PromptTuningConfig(),
    "q_projj.*k_proj; v_proj": lambda: peft.LoraConfig(target_modules=["q_projj"]),
    "nowhere.*k_proj; v_proj": lambda: peft.LoraConfig(target_modules=".*nowhere"),
    "not supported.*k_proj; v_proj": lambda: peft.LoraConfig(target_modules=["layer_norm"]),
    "modules_to_save.*heads": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["heads"]),
    "init_lora_weights.*pissa": lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(teachers, message):
    with pytest.raises(UserError, match=message):
        Adapters(REFUSED[message](), from_pretrained(teachers["layer"]), base="")


def test_a_converted_model_has_no_default_targets(experiment, start):
    with pytest.raises(UserError, match=r"target_modules.*in_proj; out_proj"):
        start(experiment(), "run", "--adapters", "!new:peft.LoraConfig {}")


@pytest.fixture
def wavlm():
    """Layer 0 converted, layer 1 with the attention that takes the weights of q_proj and v_proj and calls neither."""
    model = tiny_model(families()["wavlm"], layers=2)
    convert(model, LayerMap(None, {0: NormalisedLinearAttention}))
    return model.train()


def after_step(model, adapters: Adapters) -> None:
    model.zero_grad()
    samples, mask = audio_batch([6000, 3500])
    model(samples, attention_mask=mask).logits.square().mean().backward()
    adapters.check_gradients()


def test_adapters_that_the_model_goes_by_are_refused(wavlm):
    adapters = Adapters(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), wavlm, base="")
    kept = "wavlm.encoder.layers.1.attention"
    with pytest.raises(UserError, match=rf"got {kept}.v_proj; {kept}.q_proj, which .* end in .*output_dense") as error:
        after_step(wavlm, adapters)
    assert "layers.0" not in str(error.value)


def test_a_layer_that_is_dropped_is_judged_when_it_runs(wavlm):
    wavlm.config.layerdrop = 1.0  # of every layer but the first
    adapters = Adapters(peft.LoraConfig(r=2, target_modules=["output_dense"]), wavlm, base="")
    after_step(wavlm, adapters)
    with torch.no_grad():  # as a validation does
        wavlm.eval()(torch.zeros(1, 4000))
    after_step(wavlm.train(), adapters)
    assert list(adapters.watch.waiting) == ["wavlm.encoder.layers.1.feed_forward.output_dense"]
    wavlm.config.layerdrop = 0.0
    after_step(wavlm, adapters)
    assert adapters.watch is None and not wavlm.wavlm.encoder.layers[1]._forward_pre_hooks


def test_a_run_with_adapters_that_do_nothing_ends_at_its_first_step(experiment, start, tmp_path):
    teacher = write_model(tmp_path / "teacher", "wavlm")
    path = experiment(convert=False, teacher=str(teacher), accumulation=2)
    words = ("--adapters", "!new:peft.LoraConfig {r: 2, target_modules: [q_proj, output_dense]}")
    with pytest.raises(
        UserError, match=r"layers\.0\.attention\.q_proj; wavlm\.encoder\.layers\.1\.attention\.q_proj, "
    ):
        start(path, "run", *words)
    assert not (tmp_path / "run" / "model").exists()
    start(path, "run", *(word.replace("q_proj, ", "") for word in words))


@pytest.mark.parametrize(
    ("keys", "words", "message"),
    [
        ({"converted_at": [0, 2]}, ("--adapters", LORA), "conversion_schedule"),
        ({"align_steps": 2}, ("--adapters", LORA.replace(PROJECTIONS, ".*output_dense")), "align_steps"),
        ({}, ("--adapters", LORA, "--freeze_front_end", "False"), "adapters train alone"),
    ],
)
def test_what_does_not_go_together(experiment, start, keys, words, message):
    with pytest.raises(UserError, match=message):
        start(experiment(**keys), "run", *words)


def test_a_new_head_must_train(experiment, start, tmp_path):
    source = write_model(tmp_path / "source", head="base")
    path = experiment(guidance="unguided", source=str(source), teacher=None)
    with pytest.raises(UserError, match=r"head is new.*lm_head"):
        start(path, "run", "--adapters", LORA)


def test_peft_must_be_installed(experiment, monkeypatch):
    monkeypatch.setattr("cald_speech.experiment_yaml.pydoc.locate", lambda name: None)
    monkeypatch.setattr("cald_speech.experiment_yaml.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cald-speech\[peft\]'"):
        parse([str(experiment(convert=False)), "--adapters", LORA])
