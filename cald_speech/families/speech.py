"""Speech encoders: what wav2vec2, HuBERT, WavLM and their kin have in common.

That is the front end, both layer layouts, the slot's place, and an attention that long form can run block by block.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForAudioClassification, AutoModelForCTC, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from cald_speech.errors import UserError
from cald_speech.families.base import Family, Opened, weights_by_head
from cald_speech.families.front_end import FrontEnd, LengthAwareGroupNorm, Moments, convolve_normed
from cald_speech.families.hub import read_config
from cald_speech.families.lengths import AudioLengths, MixerSlot, frame_lengths
from cald_speech.mixers import AttentionWeights, Mixer
from cald_speech.ops import valid_frames


class SpeechFamily(Family):
    """A Hugging Face speech encoder. A subclass names its classes; WavLM changes the slot too."""

    heads = ("base", "ctc", "classification")
    auto_classes: ClassVar = {
        "base": AutoModel,
        "ctc": AutoModelForCTC,
        "classification": AutoModelForAudioClassification,
    }
    pipelines: ClassVar = {
        "base": "feature-extraction",
        "ctc": "automatic-speech-recognition",
        "classification": "audio-classification",
    }
    default_head = "ctc"
    # LayerDrop would make teacher and student skip different layers.
    config_defaults: ClassVar = {"layerdrop": 0.0}
    # A self-supervised checkpoint has no head and carries what only its pretraining needed. masked_spec_embed exists
    # only where SpecAugment is on; a checkpoint made without it starts it at random.
    head_names = (r"lm_head\.", r"projector\.", r"classifier\.", "layer_weights")
    optional_names = ("masked_spec_embed",)
    leftover_names = (
        r"quantizer\.",
        r"project_q\.",
        r"project_hid\.",
        "label_embs_concat",
        r"final_proj\.",
        "mask_emb",
        r"adapter\.",  # convolutions after the layers, which a model is asked to do without
    )
    refusal = (
        "expected a model that hears audio, got {got}: {model_type} models read text, and have no front end for audio. "
        "Give a speech encoder"
    )
    input_key = "input_values"  # the model's argument: samples, or features
    pre_norm_layer: type[nn.Module] | tuple[()] = ()
    slot_class: Callable[..., MixerSlot] = MixerSlot

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        check_last_is_layer(model)
        self.context(model)
        return model

    def _checked(self, cls: type[PreTrainedModel], source: str, **options: Any) -> PreTrainedModel:
        # Before the weights are looked at: transformers' classifiers refuse an adapter without a way out.
        if getattr(read_config(source, cls.config_class, **options), "add_adapter", False):
            raise with_adapter()
        return super()._checked(cls, source, **options)

    def new_lengths(self, base: PreTrainedModel) -> AudioLengths:
        """Lengths, and the length-aware norm that reads them."""
        return self.norm_with(base, AudioLengths(base.config))

    def norm_with(self, base: PreTrainedModel, context: AudioLengths) -> AudioLengths:
        """Let the first convolution's norm over time, where there is one, read these lengths; returns them."""
        first = base.feature_extractor.conv_layers[0]
        if isinstance(first.layer_norm, nn.GroupNorm):
            first.layer_norm = LengthAwareGroupNorm.replacing(first.layer_norm, first.conv, context)
        return context

    def frame_lengths(self, sizes: Tensor, config: PretrainedConfig) -> Tensor:
        """Frames that come out for inputs of these sizes, in samples or frames of features."""
        return frame_lengths(sizes, config)

    def inputs(self, values: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """What the model is called with, of samples (B, N) or features (B, N, C), of which (B,) sizes are valid."""
        return {self.input_key: values, "attention_mask": valid_frames(sizes, values.size(1)).long()}

    def traits(self, config: PretrainedConfig) -> dict[str, Any]:
        return super().traits(config) | {"frame rate": tuple(config.conv_stride), "kernels": tuple(config.conv_kernel)}

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return model.base_model.encoder.layers

    def open(self, layer: nn.Module) -> Opened:
        def slot(x: Tensor, *, lengths: Tensor | None = None, **arguments: Any) -> Tensor:
            if isinstance(layer.attention, MixerSlot):
                return layer.attention.mixer(x, lengths)
            return layer.attention(x, **arguments)[0]

        def after_post_norm(x: Tensor, y: Tensor) -> Tensor:
            x = layer.layer_norm(x + layer.dropout(y))
            return layer.final_layer_norm(x + layer.feed_forward(x))

        def after_pre_norm(x: Tensor, y: Tensor) -> Tensor:
            x = x + layer.dropout(y)
            x = x + layer.feed_forward(layer.final_layer_norm(x))
            adapter = getattr(layer, "adapter_layer", None)
            return x if adapter is None else x + adapter(x)

        if isinstance(layer, self.pre_norm_layer):
            return Opened(layer.layer_norm, slot, after_pre_norm)
        return Opened(lambda x: x, slot, after_post_norm)

    def slot_ends(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        return layer.attention, layer.attention

    def block_attention(self, model: PreTrainedModel, layer: nn.Module) -> "BlockAttention":
        """The attention that a layer kept, as something that takes its queries block by block."""
        return BlockAttention(layer.attention)

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        attention = self.attention(layer)
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        return weights_by_head(*inputs, attention.out_proj, heads=attention.num_heads)

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: Mixer) -> None:
        layer = self.layers(model)[index]
        layer.attention = self.slot_class(mixer, self.context(model))

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        return self.front_end(model).output_norm

    def front_end(self, model: PreTrainedModel) -> FrontEnd:
        """The pieces between audio and layers. Raises UserError for a model with convolutions after its layers."""
        check_last_is_layer(model)
        base, config = model.base_model, model.base_model.config
        norm, none = base.encoder.layer_norm, nn.Identity()
        norms = (none, norm) if isinstance(base.encoder.layers[0], self.pre_norm_layer) else (norm, none)
        first, *others = base.feature_extractor.conv_layers

        def convolutions(audio: Tensor, moments: Moments | None = None) -> Tensor:
            if moments is None:
                return base.feature_extractor(audio)
            x = first.activation(convolve_normed(audio[:, None], first.conv, first.layer_norm, moments))
            for layer in others:
                x = layer(x)
            return x

        def projection(x: Tensor) -> Tensor:
            # HuBERT's gives the projection alone, the others' the normed input too.
            projected = base.feature_projection(x)
            return projected[0] if isinstance(projected, tuple) else projected

        return FrontEnd(
            convolutions,
            projection,
            base.encoder.pos_conv_embed,
            *norms,
            kernels=tuple(config.conv_kernel),
            strides=tuple(config.conv_stride),
            positions_reach=self.positions_reach(config),
            widest=math.prod(config.conv_stride[1:]) * config.conv_dim[0],
            normed=first.conv if isinstance(first.layer_norm, nn.GroupNorm) else None,
        )

    def positions_reach(self, config: PretrainedConfig) -> int:
        """Frames that the positional convolution sees on either side."""
        return config.num_conv_pos_embeddings // 2

    def freeze_front_end(self, model: PreTrainedModel) -> None:
        """Let the convolutions that make frames of audio have no gradient from here on."""
        model.base_model.feature_extractor._freeze_parameters()

    def constants(self, model: PreTrainedModel) -> Iterator[nn.Parameter]:
        """Parameters that nothing trains, whatever is frozen beside them."""
        return iter(())

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        if not isinstance(model, self.class_with("ctc")):
            raise UserError(f"expected a model with a CTC head, got {type(model).__name__}. Load it with head='ctc'")
        return model.lm_head

    def rest(self, model: PreTrainedModel, count: int) -> Tensor:
        """Logits (count, V) of the last frames, where the model puts out some that none of its layers sees."""
        raise NotImplementedError(f"{self.model_type} models have no such frames")

    def settled(self, model: PreTrainedModel, outputs: ModelOutput | tuple) -> ModelOutput | tuple:
        """As the base says: a CTC model hears blank, and nothing else, in the padding of a batch.

        transformers' pipeline decodes padded frames like any other, so that letters would be read out of them.
        """
        context = self.context(model)
        if context.frames is None or not isinstance(model, self.classes.get("ctc", ())):
            return outputs
        frames = self.frame_lengths(context.samples, model.config)
        named = isinstance(outputs, ModelOutput)
        place = "logits" if named else next(i for i, value in enumerate(outputs) if value.dim() == 3)
        logits = outputs[place]
        blank = torch.full_like(logits[0, 0], torch.finfo(logits.dtype).min)
        pad = model.config.pad_token_id
        blank[pad if pad is not None and 0 <= pad < len(blank) else 0] = 0.0  # as transformers' own configs say
        padded = ~valid_frames(frames, logits.size(1)).unsqueeze(-1)
        logits = torch.where(padded, blank, logits)
        if named:
            outputs[place] = logits
            return outputs
        return (*outputs[:place], logits, *outputs[place + 1 :])


def check_last_is_layer(model: PreTrainedModel) -> None:
    """Raise UserError for a model with convolutions after its layers, which no loss and no long audio knows."""
    if getattr(model.base_model, "adapter", None) is not None:
        raise with_adapter()


def with_adapter() -> UserError:
    return UserError(
        "expected a speech encoder whose output is its last layer's, got one with convolutions after it (add_adapter "
        "in its config): its logits have fewer frames than its layers. Give a model without them, or fine-tune this "
        "one's encoder anew, as hparams/teacher.yaml does, with model_overrides: {add_adapter: False}"
    )


class BlockAttention:
    """One layer's attention in two steps: ``keys_values`` of every block, then ``attend`` for every block.

    Arguments
    ---------
    attention : a module with ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj`` and ``num_heads``.

    Example
    -------
    >>> import torch
    >>> from transformers import Wav2Vec2Config
    >>> from cald_speech.families import families
    >>> family = families()["wav2vec2"]
    >>> model = family.load(Wav2Vec2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).eval()
    >>> attention = family.block_attention(model, family.layers(model)[0])
    >>> x = torch.randn(1, 7, 32)
    >>> keys, values = attention.keys_values(x, first=0)
    >>> attention.attend(x[:, 3:5], keys, values, first=3).shape
    torch.Size([1, 2, 32])
    """

    def __init__(self, attention: nn.Module):
        self.attention = attention

    def keys_values(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The block (1, t, D), whose first frame is ``first``, to keys and values (1, t, D)."""
        return self.attention.k_proj(x), self.attention.v_proj(x)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        """Queries from the block x (1, t, D), whose first frame is ``first``, over all frames: (1, t, D).

        ``keys`` and ``values`` are (1, T, D).
        """
        return self.attention.out_proj(self.weigh(self.attention.q_proj(x), keys, values, None))

    def weigh(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(d) + bias) v for each head, the heads joined; bias (1, H, t, T) or None."""
        q, k, v = (p.unflatten(2, (self.attention.num_heads, -1)).transpose(1, 2) for p in (queries, keys, values))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
