"""Generation with converted causal models: exact with a state of constant size, and the same in a batch as alone."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, pipeline

from cald_speech.errors import UserError
from cald_speech.families.generation import ScanState
from tests.families.text import CAUSAL, LENGTHS, MAPS, VOCABULARY, each, every_map_once, tokens_and_mask
from tests.helpers import TOLERANCE, relative_error

NEW = 8
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 0.7},
    "beams, several returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "chunked prompt": {"do_sample": False, "prefill_chunk_size": 3},
}
UNCHUNKED = [name for name in WAYS if name != "chunked prompt"]

every_causal = pytest.mark.parametrize("case", each(CAUSAL))
WITHOUT_WINDOW = {name: case for name, case in CAUSAL.items() if name != "mistral"}  # whose keys stop growing too
GENERATING = every_map_once(CAUSAL, MAPS)
every_model = pytest.mark.parametrize(("case", "chosen"), each(GENERATING))
every_converted_model = pytest.mark.parametrize(
    ("case", "chosen"),
    each({name: model for name, model in GENERATING.items() if model[1] != "kept"}),
)


@pytest.fixture
def drawn_by_quantile(monkeypatch):
    """Sampling takes a fixed quantile of each row's distribution, so that it does not depend on the batch."""

    def draw(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        assert num_samples == 1
        return (probabilities.cumsum(-1) > 0.6).int().argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", draw)


def talkative(case, chosen):
    """A model whose next token hangs on many before it: large steps, slow decay, nothing that passes by the scan."""
    model = case.converted(chosen)
    model.get_input_embeddings().weight.data.mul_(0.05)
    if case.family.model_type == "gpt2":  # its learned positions too
        model.base_model.wpe.weight.data.mul_(0.05)
    values = {"dt_bias": 0.0, "A_log": -3.0, "D": 0.0}
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last in values:
            parameter.data.fill_(values[last])
        if name.endswith("x_proj.weight"):  # Mamba's to B and C
            parameter.data.mul_(10)
    return model


def generate(model, tokens, mask, **options) -> torch.Tensor:
    """The new tokens of each row."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW} | options
    return model.generate(tokens, attention_mask=mask, **options)[:, tokens.size(1) :]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@every_model
def test_left_padded_prompts_generate_what_they_do_alone(case, chosen, way, drawn_by_quantile):
    model = talkative(case, chosen)
    tokens, mask = tokens_and_mask(left=True)
    batched = generate(model, tokens, mask, **way)
    forgetful = generate(model, tokens[:, -1:], mask[:, -1:], **way)
    tokens, mask = tokens_and_mask()
    alone = [generate(model, tokens[r : r + 1, :n], mask[r : r + 1, :n], **way) for r, n in enumerate(LENGTHS)]
    assert batched.shape == (len(LENGTHS) * way.get("num_return_sequences", 1), NEW)
    assert torch.equal(batched, torch.cat(alone))
    assert not torch.equal(batched, forgetful)  # or it would tell nothing


@pytest.mark.parametrize("way", [WAYS[name] for name in UNCHUNKED], ids=UNCHUNKED)
@every_converted_model
def test_with_its_state_it_generates_what_it_does_from_the_whole_prompt_each_time(case, chosen, way, drawn_by_quantile):
    model = talkative(case, chosen)
    tokens, mask = tokens_and_mask(left=True)
    expected = generate(model, tokens, mask, use_cache=False, **way)
    assert torch.equal(generate(model, tokens, mask, **way), expected)


@pytest.mark.parametrize("pieces", [(1,) * 11, (5, 1, 5), (3, 7, 1)], ids=["step by step", "mixed", "pieces"])
@every_model
@torch.no_grad()
def test_step_by_step_is_the_whole(case, chosen, pieces):
    """Rows padded in front, so that some pieces hold no token at all of some rows."""
    model = case.converted(chosen)
    tokens, mask = tokens_and_mask(left=True)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, parts, end = DynamicCache(config=model.config), [], 0
    for size in pieces:
        piece, end = slice(end, end + size), end + size
        options = {"position_ids": positions[:, piece], "past_key_values": cache, "use_cache": True}
        parts.append(model(tokens[:, piece], attention_mask=mask[:, :end], **options).logits)
        assert cache.get_seq_length() == end
    valid = mask.bool()
    assert relative_error(torch.cat(parts, dim=1)[valid], expected[valid]) <= TOLERANCE["parity"]


def sizes(cache) -> list[int]:
    """Numbers held in each layer's entry."""
    entries = [e.state if isinstance(e, ScanState) else (e.keys, e.values) for e in cache.layers]
    return [sum(t.numel() for t in torch.utils._pytree.tree_leaves(e) if t is not None) for e in entries]


@pytest.mark.parametrize("case", each(WITHOUT_WINDOW))
@torch.no_grad()
def test_the_state_does_not_grow(case):
    model = case.converted("middle kept")
    held = []
    for num_tokens in (3, 11):
        tokens, _ = tokens_and_mask((num_tokens,))
        held.append(sizes(model(tokens, use_cache=True).past_key_values))
    (first, second, third), grown = held
    assert grown == [first, second * 11 // 3, third]


@every_causal
@torch.no_grad()
def test_a_cache_starts_over_after_reset(case):
    model = case.converted("all converted")
    tokens, _ = tokens_and_mask((6,))
    cache = DynamicCache(config=model.config)
    expected = model(tokens, past_key_values=cache, use_cache=True).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(tokens, past_key_values=cache, use_cache=True).logits, expected)


@every_causal
def test_a_loaded_model_generates_the_same(case, tmp_path):
    model = case.converted("middle kept")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens, mask = tokens_and_mask(left=True)
    assert torch.equal(generate(loaded, tokens, mask), generate(model, tokens, mask))


@every_causal
def test_pipeline_in_batches_is_one_by_one(case, tmp_path):
    talkative(case, "middle kept").save_pretrained(tmp_path)
    vocabulary = Tokenizer(WordLevel({"<pad>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}, unk_token="<pad>"))
    vocabulary.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", padding_side="left")
    tokenizer.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path))
    prompts = ["w7", "w5 w6 w9 w11 w30", "w8 w9 w10"]
    options = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    alone = [write(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert [texts[0]["generated_text"] for texts in write(prompts, batch_size=3, **options)] == alone
    assert len(set(alone)) == 3


@every_causal
def test_in_bfloat16(case):
    model = case.converted("all converted").to(torch.bfloat16)
    tokens, mask = tokens_and_mask(left=True)
    assert generate(model, tokens, mask).shape == (len(LENGTHS), NEW)


@every_causal
def test_what_a_state_cannot_do_is_refused(case):
    model = case.converted("all converted")
    tokens, mask = tokens_and_mask((5,))
    with pytest.raises(UserError, match=r"default cache"):
        generate(model, tokens, mask, cache_implementation="static", disable_compile=True)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, tokens, mask, assistant_model=case.model())
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        with pytest.raises(UserError, match="cannot forget the last tokens"):
            cache.crop(2)
        foreign = case.model()(tokens, use_cache=True).past_key_values
        with pytest.raises(UserError, match=r"entry for layer 0, .* got a Dynamic\w*Layer of 5 tokens.*new cache"):
            model(tokens, past_key_values=foreign)
