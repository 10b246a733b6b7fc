"""What BERT and RoBERTa have in common: post-norm layers, and an attention apart from its output projection."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.pytorch_utils import apply_chunking_to_forward

from cald_speech.errors import UserError
from cald_speech.families.base import Opened
from cald_speech.families.slot import MixerSlot
from cald_speech.families.text import TextFamily
from cald_speech.mixers import AttentionWeights, Mixer
from cald_speech.ops import valid_frames


class EncoderFamily(TextFamily):
    """A bidirectional encoder of text. The slot is ``attention.self`` and ``attention.output.dense`` behind it.

    A mixer has an output projection of its own: it takes the place of the first, and Identity that of the second.

    Example
    -------
    >>> from functools import partial
    >>> import torch
    >>> from transformers import RobertaConfig
    >>> from cald_speech import LayerMap, convert
    >>> from cald_speech.families import families
    >>> from cald_speech.mixers import Linformer
    >>> family = families()["roberta"]
    >>> model = family.load(RobertaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50))
    >>> report = convert(model, LayerMap(partial(Linformer, k=4, max_length=16)))
    >>> model(torch.tensor([[5, 6, 7]])).logits.shape
    torch.Size([1, 3, 50])
    """

    default_head = "masked_lm"
    head_names = (r"lm_head\.", r"cls\.", r"classifier\.", r"pooler\.")
    # Buffers that older releases of transformers saved.
    leftover_names = (r"embeddings\.position_ids", r"embeddings\.token_type_ids")
    masked_lm_head: str  # the masked-LM model's attribute with its head

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        if model.config.is_decoder:
            raise UserError(
                f"is_decoder: expected an encoder, got a {type(model).__name__} that its config makes a decoder. Load "
                "it with is_decoder: false"
            )
        return super().prepare(model)

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return model.base_model.encoder.layer

    def open(self, layer: nn.Module) -> Opened:
        inner, output = layer.attention.self, layer.attention.output

        def slot(x: Tensor, *, lengths: Tensor | None = None, **arguments: Any) -> Tensor:
            mixer = self.mixer(layer)
            return output.dense(inner(x, **arguments)[0]) if mixer is None else mixer(x, lengths)

        def after(x: Tensor, y: Tensor) -> Tensor:
            x = output.LayerNorm(output.dropout(y) + x)
            return apply_chunking_to_forward(layer.feed_forward_chunk, layer.chunk_size_feed_forward, 1, x)

        return Opened(lambda x: x, slot, after)

    def slot_ends(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        return layer.attention.self, layer.attention.output.dense

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        mask = None if lengths is None else valid_frames(lengths, x.size(1))
        config = model.base_model.config
        return {"attention_mask": create_bidirectional_mask(config=config, inputs_embeds=x, attention_mask=mask)}

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        attention, output = self.attention(layer), layer.attention.output.dense
        heads = attention.num_attention_heads
        projections = {"q": attention.query, "k": attention.key, "v": attention.value}
        weights = {name: p.weight.unflatten(0, (heads, -1)) for name, p in projections.items()}
        biases = {f"{name}_bias": p.bias.unflatten(0, (heads, -1)) for name, p in projections.items()}
        return AttentionWeights(**weights, o=output.weight.unflatten(1, (heads, -1)), **biases, o_bias=output.bias)

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: Mixer) -> None:
        attention = self.layers(model)[index].attention
        attention.self = MixerSlot(mixer, self.context(model))
        attention.output.dense = nn.Identity()

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        return nn.Identity()

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        if not isinstance(model, self.classes["masked_lm"]):
            raise UserError(
                f"expected a model with a masked-LM head, got {type(model).__name__}. Load it with head='masked_lm'"
            )
        return model.get_submodule(self.masked_lm_head)
