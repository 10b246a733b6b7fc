"""Models of text: what all of them have, and the layouts that they come in.

:class:`TextEncoderFamily` is BERT and RoBERTa: post-norm layers, and an attention apart from its output projection; in
:class:`WholeSlotEncoderFamily`, DistilBERT and ModernBERT, the attention holds it. :class:`TextDecoderFamily` is
GPT-NeoX, Llama and others: pre-norm layers behind a causal mask, and rotary positions made for all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.pytorch_utils import apply_chunking_to_forward

from cald_speech.errors import UserError
from cald_speech.families.base import Family, Opened, weights_by_head
from cald_speech.families.generation import CausalSlot
from cald_speech.families.lengths import MixerSlot, TokenLengths
from cald_speech.mixers import AttentionWeights, CausalMixer, Mixer
from cald_speech.ops import valid_frames


class TextFamily(Family):
    """A Hugging Face model of tokens; :class:`TextEncoderFamily` and :class:`TextDecoderFamily` know its layers."""

    auto_classes: ClassVar = {
        "base": AutoModel,
        "lm": AutoModelForCausalLM,
        "masked_lm": AutoModelForMaskedLM,
        "classification": AutoModelForSequenceClassification,
    }
    pipelines: ClassVar = {
        "base": "feature-extraction",
        "lm": "text-generation",
        "masked_lm": "fill-mask",
        "classification": "text-classification",
    }
    refusal = "{model_type} models hear audio: expected one that reads text, such as roberta-base"

    mask_at = 1  # which of the base model's positional arguments is the mask

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        # Masks hide padding from attention; lengths are there for mixers, and read from the first mixer on.
        return model

    def max_tokens(self, config: PretrainedConfig) -> int:
        """The most tokens of an input that the model has positions for."""
        return config.max_position_embeddings

    def new_lengths(self, base: nn.Module) -> TokenLengths:
        return TokenLengths(left_padding=self.causal, mask_at=self.mask_at)


class TextEncoderFamily(TextFamily):
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

    heads = ("base", "masked_lm", "classification")
    default_head = "masked_lm"
    head_names = (r"lm_head\.", r"cls\.", r"classifier\.", r"pooler\.")
    # Buffers that older releases of transformers saved.
    leftover_names = (r"embeddings\.position_ids", r"embeddings\.token_type_ids")
    masked_lm_head: str  # the masked-LM model's attribute with its head

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        if getattr(model.config, "is_decoder", False):
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

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        attention, output = self.attention(layer), layer.attention.output.dense
        inputs = (attention.query, attention.key, attention.value)
        return weights_by_head(*inputs, output, heads=attention.num_attention_heads)

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: Mixer) -> None:
        attention = self.layers(model)[index].attention
        attention.self = MixerSlot(mixer, self.context(model))
        attention.output.dense = nn.Identity()

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        return nn.Identity()

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        self.check_head(model)
        return model.get_submodule(self.masked_lm_head)

    def check_head(self, model: PreTrainedModel) -> None:
        """Raise UserError for a model without a masked-LM head."""
        if not isinstance(model, self.classes["masked_lm"]):
            raise UserError(
                f"expected a model with a masked-LM head, got {type(model).__name__}. Load it with head='masked_lm'"
            )


class WholeSlotEncoderFamily(TextEncoderFamily):
    """An encoder whose attention is one module, with its output projection in it: DistilBERT and ModernBERT."""

    slot_name: str  # the layer's attribute with its attention

    def before(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The layer's input to its slot's, (B, T, D) each."""
        return x

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The layer's input and its slot's output, (B, T, D) each, to its output."""
        raise NotImplementedError

    def open(self, layer: nn.Module) -> Opened:
        def slot(x: Tensor, *, lengths: Tensor | None = None, **arguments: Any) -> Tensor:
            mixer = self.mixer(layer)
            if mixer is not None:
                return mixer(x, lengths)
            return self.attention(layer)(x, **of_its_type(layer, arguments))[0]

        return Opened(lambda x: self.before(layer, x), slot, lambda x, y: self.after(layer, x, y))

    def slot_ends(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        slot = layer.get_submodule(self.slot_name)
        return slot, slot

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: Mixer) -> None:
        setattr(self.layers(model)[index], self.slot_name, MixerSlot(mixer, self.context(model)))


def of_its_type(layer: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Of arguments that differ by the type of a layer's attention, local or over everything, those of this layer's."""
    attention_type = getattr(layer, "attention_type", None)
    return {name: v[attention_type] if isinstance(v, dict) else v for name, v in arguments.items()}


class TextDecoderFamily(TextFamily):
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
    heads = ("base", "lm", "classification")
    default_head = "lm"
    head_names = (r"lm_head\.", r"embed_out\.", r"score\.")
    # Buffers that older releases of transformers saved.
    leftover_names = (r"layers\.\d+\.(attention|self_attn)\.(bias|masked_bias|rotary_emb\.inv_freq)$",)
    slot_name: str  # the layer's attribute with its attention
    cache_argument: str  # under which name the attention is given the cache
    norm_name: str  # the base model's attribute with the final norm
    layers_name = "layers"  # the base model's attribute with its layers
    first_norm_name = "input_layernorm"  # the layer's attribute with the norm before its attention

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return model.base_model.get_submodule(self.layers_name)

    def after(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The layer's input and its slot's output, (B, T, D) each, to its output."""
        raise NotImplementedError

    def open(self, layer: nn.Module) -> Opened:
        def slot(x: Tensor, *, lengths: Tensor | None = None, **arguments: Any) -> Tensor:
            mixer = self.mixer(layer)
            if mixer is not None:
                return mixer(x, lengths)
            return self.attention(layer)(x, **self.of_layer(layer, arguments))[0]

        return Opened(layer.get_submodule(self.first_norm_name), slot, lambda x, y: self.after(layer, x, y))

    def of_layer(self, layer: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """Of :meth:`layer_arguments`, what this layer is given: masks may differ from layer to layer."""
        return arguments

    def slot_ends(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        slot = layer.get_submodule(self.slot_name)
        return slot, slot

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        base = model.base_model
        mask = None if lengths is None else valid_frames(lengths, x.size(1))
        positions = torch.arange(x.size(1), device=x.device)[None]
        options = {"config": base.config, "inputs_embeds": x, "attention_mask": mask, "past_key_values": None}
        return {
            "attention_mask": self.masks(base.config, options | {"position_ids": positions}),
            "position_embeddings": base.rotary_emb(x, position_ids=positions),
        }

    def masks(self, config: PretrainedConfig, options: dict[str, Any]) -> Any:
        """The mask of every layer, or of each type of attention by its name; ``options`` are the mask functions'."""
        return create_causal_mask(**options)

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: CausalMixer) -> None:
        slot = CausalSlot(mixer, self.context(model), index, self.cache_argument)
        setattr(self.layers(model)[index], self.slot_name, slot)

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        return model.base_model.get_submodule(self.norm_name)

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        if not isinstance(model, self.classes["lm"]):
            raise UserError(f"expected a model with an LM head, got {type(model).__name__}. Load it with head='lm'")
        return model.get_output_embeddings()
