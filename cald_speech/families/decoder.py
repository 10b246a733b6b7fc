"""What GPT-NeoX and Llama have in common: pre-norm layers behind one causal mask, and rotary positions made for all."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from cald_speech.errors import UserError
from cald_speech.families.base import Opened
from cald_speech.families.scan_state import ScanState
from cald_speech.families.slot import MixerSlot
from cald_speech.families.text import TextFamily
from cald_speech.families.token_lengths import TokenLengths
from cald_speech.mixers import CausalMixer
from cald_speech.ops import valid_frames


class CausalSlot(MixerSlot):
    """A slot whose rows may be padded in front, as prompts are, and whose mixer's state goes on from call to call.

    Arguments
    ---------
    index : of the layer, which finds its state in the cache.
    cache_argument : under which name the layer is given the cache.
    """

    def __init__(self, mixer: CausalMixer, context: TokenLengths, index: int, cache_argument: str):
        super().__init__(mixer, context)
        self.index, self.cache_argument = index, cache_argument

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """(B, T, D) to (B, T, D) and no attention weights; positions are not looked at, and the mask's lengths are."""
        x, cache = self.context.aligned(hidden_states), kwargs.get(self.cache_argument)
        if cache is None:
            y = self.mixer(x, self.context.frames)
        else:
            held = ScanState.of(cache, self.index)
            y, state = self.mixer(x, self.context.frames, state=held.state, return_state=True)
            held.keep(state, x.size(1))
        return self.context.put_back(y), None


class DecoderFamily(TextFamily):
    """A causal language model. Opened slots want rows that begin with a valid token; the model's own need not.

    Example
    -------
    >>> from transformers import GPTNeoXConfig
    >>> from cald_speech import LayerMap, convert
    >>> from cald_speech.families import families
    >>> from cald_speech.mixers import Mamba2
    >>> family = families()["gpt_neox"]
    >>> config = GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    >>> model = family.load(config, pad_token_id=0, eos_token_id=None).eval()
    >>> _ = convert(model, LayerMap(Mamba2))
    >>> prompts, mask = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    >>> model.generate(prompts, attention_mask=mask, max_new_tokens=5).shape
    torch.Size([2, 9])
    """

    causal = True
    default_head = "lm"
    head_names = (r"lm_head\.", r"embed_out\.", r"score\.")
    # Buffers that older releases of transformers saved.
    leftover_names = (r"layers\.\d+\.(attention|self_attn)\.(bias|masked_bias|rotary_emb\.inv_freq)$",)
    slot_name: str  # the layer's attribute with its attention
    cache_argument: str  # under which name the attention is given the cache
    norm_name: str  # the base model's attribute with the final norm

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return model.base_model.layers

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The layer's input and its slot's output, (B, T, D) each, to its output."""
        raise NotImplementedError

    def open(self, layer: nn.Module) -> Opened:
        def slot(x: Tensor, *, lengths: Tensor | None = None, **arguments: Any) -> Tensor:
            mixer = self.mixer(layer)
            return self.attention(layer)(x, **arguments)[0] if mixer is None else mixer(x, lengths)

        return Opened(layer.input_layernorm, slot, lambda x, y: self.after(layer, x, y))

    def slot_ends(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        slot = layer.get_submodule(self.slot_name)
        return slot, slot

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        base = model.base_model
        mask = None if lengths is None else valid_frames(lengths, x.size(1))
        positions = torch.arange(x.size(1), device=x.device)[None]
        mask = create_causal_mask(
            config=base.config, inputs_embeds=x, attention_mask=mask, past_key_values=None, position_ids=positions
        )
        return {"attention_mask": mask, "position_embeddings": base.rotary_emb(x, position_ids=positions)}

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: CausalMixer) -> None:
        slot = CausalSlot(mixer, self.context(model), index, self.cache_argument)
        setattr(self.layers(model)[index], self.slot_name, slot)

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        return model.base_model.get_submodule(self.norm_name)

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        if not isinstance(model, self.classes["lm"]):
            raise UserError(f"expected a model with an LM head, got {type(model).__name__}. Load it with head='lm'")
        return model.get_output_embeddings()
