"""PEFT on converted models: an adapter acts on every projection of every mixer, in training, inference and merged."""

from functools import partial

import pytest
import torch
from transformers import set_seed

from cald_speech import LayerMap, convert, from_pretrained, mixers
from cald_speech.families import families
from cald_speech.mixers import CausalMixer, Linformer, Mixer
from tests.families.text import Case
from tests.helpers import TOLERANCE, audio_batch, relative_error, tiny_model

peft = pytest.importorskip("peft", reason="needs the extra `peft`")
PROJECTIONS = r".*\.mixer\..*_proj"  # as docs/howto/adapters.md has it


def of_every(base: type) -> LayerMap:
    """A layer for each mixer of this kind."""
    classes = [c for c in vars(mixers).values() if isinstance(c, type) and issubclass(c, base)]
    classes = [c for c in classes if c not in (Mixer, CausalMixer)]
    return LayerMap(None, dict(enumerate(partial(c, k=4, max_length=64) if c is Linformer else c for c in classes)))


def speech():
    layer_map = of_every(Mixer)
    model = tiny_model(families()["wav2vec2"], layers=len(layer_map.overrides) + 1)
    convert(model, layer_map)
    samples, mask = audio_batch([6000, 3500])
    return model, {"input_values": samples, "attention_mask": mask}, "ctc"


def text():
    layer_map = of_every(CausalMixer)
    model = Case(families()["llama"], {}).model(num_hidden_layers=len(layer_map.overrides) + 1)
    convert(model, layer_map, initialise="random")
    return model, {"input_ids": torch.arange(1, 19).view(2, 9), "attention_mask": torch.ones(2, 9).long()}, "lm"


def heard(outputs) -> torch.Tensor:
    """The logits, zeros where padding has the lowest number that there is."""
    return outputs.logits.masked_fill(outputs.logits < -1e4, 0.0)


def logits(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return heard(model.eval()(**inputs))


@pytest.mark.parametrize("kind", [speech, text])
def test_lora_on_every_mixer(kind, tmp_path):
    set_seed(0)
    model, inputs, head = kind()
    model.save_pretrained(tmp_path / "model")
    before = logits(model, inputs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False))
    expected = logits(adapted, inputs)
    assert relative_error(expected, before) > 1e-3
    assert relative_error(heard(adapted(**inputs)).detach(), expected) < TOLERANCE["rounding"]
    heard(adapted(**inputs)).square().sum().backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.grad is not None and p.grad.any() for name, p in trained.items())

    adapted.save_pretrained(tmp_path / "adapter")
    fresh = peft.PeftModel.from_pretrained(from_pretrained(tmp_path / "model", head=head), tmp_path / "adapter")
    assert torch.equal(logits(fresh, inputs), expected)
    if head == "lm":
        wanted = fresh.generate(**inputs, max_new_tokens=5, do_sample=False)

    merged = adapted.merge_and_unload()
    assert relative_error(logits(merged, inputs), expected) < TOLERANCE["rounding"]
    merged.save_pretrained(tmp_path / "merged")
    again = from_pretrained(tmp_path / "merged", head=head)
    assert type(again) is type(merged) and torch.equal(logits(again, inputs), logits(merged, inputs))
    if head == "lm":
        assert torch.equal(again.generate(**inputs, max_new_tokens=5, do_sample=False), wanted)
