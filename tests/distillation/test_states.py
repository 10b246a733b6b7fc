"""What the hooks catch is each layer's output, and they are gone afterwards."""

import pytest
import torch

from cald_speech.distillation import captured_states
from tests.helpers import SPEECH, SPEECH_CASES, audio_batch, tiny_model

FAMILIES = SPEECH
every_model = pytest.mark.parametrize("norm", ["group", "layer"])


@every_model
@pytest.mark.parametrize("family", SPEECH_CASES)
def test_equal_to_hugging_faces(family, norm):
    model = tiny_model(family, norm)
    audio, mask = audio_batch((8000, 5000))
    with torch.no_grad(), captured_states(family.layers(model)) as states:
        hidden = model(audio, attention_mask=mask, output_hidden_states=True).hidden_states
    # Hugging Face's first is the input of the first layer; its last may be after the final norm.
    assert len(states) == len(hidden) - 1 == 3
    for ours, theirs in zip(states[:-1], hidden[1:-1], strict=True):
        assert torch.equal(ours, theirs)
    last = [states[-1], family.final_norm(model)(states[-1])]
    assert any(torch.equal(candidate, hidden[-1]) for candidate in last)


def test_gradients_flow():
    family = FAMILIES["wav2vec2"]
    model = tiny_model(family)
    with captured_states(family.layers(model)) as states:
        model(audio_batch((4000,))[0])
    states[-1].sum().backward()
    assert all(p.grad is not None for p in family.layers(model)[0].parameters())


@pytest.mark.parametrize("error", [False, True], ids=["after", "after an exception"])
def test_hooks_are_removed(error):
    layers = [torch.nn.Linear(2, 2) for _ in range(3)]

    def use():
        with captured_states(layers) as states:
            layers[0](torch.ones(1, 2))
            if error:
                raise ZeroDivisionError
        return states

    if error:
        with pytest.raises(ZeroDivisionError):
            use()
    else:
        assert len(use()) == 1
    assert not any(layer._forward_hooks for layer in layers)


def test_two_models_at_once():
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with captured_states([one]) as ours, captured_states([other]) as theirs:
        x = one(torch.ones(1, 2))
        y = other(x)
    assert ours == [x] and theirs == [y]
