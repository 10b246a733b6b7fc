"""What every text family promises, once each, for those whose full matrices run in `make test-all` alone.

test_text_contract.py, test_text_load.py and test_generation.py say more of each promise.
"""

import pytest
import torch

import cald_speech
from tests.families.contract import captured_layers, check_alone_is_padded, check_opened_layers
from tests.families.test_text_load import AUTO, outputs
from tests.families.text import (
    CASES,
    LENGTHS,
    USUAL,
    logits_alone,
    positions_of,
    tokens_and_mask,
    valid_logits,
)

OTHERS = {name: case for name, case in CASES.items() if name.split()[0] not in USUAL}
every_other = pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)


@every_other
@torch.no_grad()
def test_without_mixers_it_is_hugging_faces(case):
    model = case.converted("kept")
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    for ours, theirs in zip(valid_logits(model), valid_logits(twin), strict=True):
        assert torch.equal(ours, theirs)


@every_other
def test_padded_is_alone_in_outputs_and_gradients(case):
    model = case.converted("middle kept")
    check_alone_is_padded(model, valid_logits(model, left=case.family.causal), logits_alone(model))


@every_other
@torch.no_grad()
def test_layers_are_rebuilt_saved_and_loaded_to_the_bit(case, tmp_path):
    family, model = case.family, case.converted("middle kept")
    tokens, mask = tokens_and_mask(pad=model.config.pad_token_id)
    family.context(model)
    with captured_layers(model, family) as states:
        expected = model(tokens, attention_mask=mask, **({"use_cache": False} if family.causal else {})).logits
    check_opened_layers(model, family, case.maps()["middle kept"], states)
    alone = tokens[:1]  # no padding in the first row
    with captured_layers(model, family) as states:
        logits = model(alone, **({"use_cache": False} if family.causal else {})).logits
    assert torch.equal(family.head(model)(family.final_norm(model)(states[-1][1])), logits)
    model.save_pretrained(tmp_path)
    head = family.default_head
    for loaded in (AUTO[head].from_pretrained(tmp_path), cald_speech.from_pretrained(tmp_path, head=head)):
        assert type(loaded) is type(model)
        assert torch.equal(outputs(loaded), expected)


@pytest.mark.parametrize("name", [name for name, case in OTHERS.items() if case.family.causal])
@torch.no_grad()
def test_it_generates_in_a_batch_what_it_does_alone(name):
    model = OTHERS[name].converted("middle kept")
    tokens, mask = tokens_and_mask(left=True)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    batched = model.generate(tokens, attention_mask=mask, **options)[:, tokens.size(1) :]
    rows, _ = tokens_and_mask()
    alone = [model.generate(rows[r : r + 1, :n], **options)[:, n:] for r, n in enumerate(LENGTHS)]
    assert torch.equal(batched, torch.cat(alone))
    whole = model(tokens, attention_mask=mask, use_cache=False, **positions_of(model, mask)).logits
    assert torch.equal(batched[:, 0], whole[:, -1].argmax(-1))
