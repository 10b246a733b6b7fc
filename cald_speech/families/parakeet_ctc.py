"""Parakeet-CTC (NVIDIA): a FastConformer (arXiv 2305.05084) over log-mel features, with a frame every 80 ms.

Two-dimensional convolutions make a frame of eight frames of features; positions are relative, as in Transformer-XL
(arXiv 1901.02860). The encoder is a model of its own inside the CTC model, and its sizes stand in ``encoder_config``.

The converted model is CaldParakeetForCTC, which conversion/classes.py makes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ParakeetCTCConfig, ParakeetForCTC, PretrainedConfig, PreTrainedModel

from cald_speech.errors import UserError
from cald_speech.families.base import Family, Opened, weights_by_head
from cald_speech.families.front_end import MASK_KEYS, FrontEnd, Moments, Piece
from cald_speech.families.lengths import AudioLengths, MixerSlot
from cald_speech.families.log_mel import ParakeetLogMel
from cald_speech.families.speech import SpeechFamily
from cald_speech.families.wav2vec2_conformer import ConformerAttention, NoPositions, PretrainedBatchNorm
from cald_speech.mixers import AttentionWeights, DistanceKeys, Mixer
from cald_speech.ops import valid_frames


class SubsampledLengths(AudioLengths):
    """Lengths in frames of features, of which the subsampling makes fewer; its sizes are the encoder's."""

    def frames_of(self, sizes: Tensor) -> Tensor:
        return subsampled(sizes, self.config)

    def clear(self, subsampling: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of the subsampling: zeros in the padding, which its first convolution reads."""
        features, *others = args
        if self.samples is not None:
            features = features.masked_fill(~valid_frames(self.samples, features.size(1))[..., None], 0)
        return (features, *others)


def subsampled(sizes: Tensor, config: PretrainedConfig) -> Tensor:
    """How many frames the subsampling makes of so many frames of features (any integer shape).

    Example
    -------
    >>> import torch
    >>> from transformers import ParakeetEncoderConfig
    >>> subsampled(torch.tensor([0, 1, 8, 9]), ParakeetEncoderConfig()).tolist()
    [0, 1, 1, 2]
    """
    kernel, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
    for _ in range(num_convolutions(config)):
        sizes = (sizes + 2 * ((kernel - 1) // 2) - kernel).div(stride, rounding_mode="floor") + 1
    return sizes.clamp(min=0)


def num_convolutions(config: PretrainedConfig) -> int:
    """Convolutions with a stride, one after the other."""
    return config.subsampling_factor.bit_length() - 1


class ParakeetFamily(SpeechFamily):
    """Any depth and width, with the CTC head; transducers (RNN-T, TDT) decode otherwise, and are others."""

    model_type = "parakeet_ctc"
    config_class = ParakeetCTCConfig
    heads = ("ctc",)
    model_classes = (ParakeetForCTC,)
    head_names = (r"ctc_head\.",)
    optional_names = ()
    leftover_names = ()
    input_key = "input_features"

    def base(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.encoder

    def encoder_config(self, config: PretrainedConfig) -> PretrainedConfig:
        return config.encoder_config

    def overrides(self, values: Mapping[str, Any]) -> dict[str, Any]:
        own = ParakeetCTCConfig()
        others = {key: value for key, value in values.items() if hasattr(own, key)}
        encoder = {key: value for key, value in values.items() if key not in others}
        for key in [key for key in encoder if not hasattr(own.encoder_config, key)]:
            if key not in MASK_KEYS:
                raise UserError(
                    f"model_overrides: expected what {self.model_type} models have, such as dropout, "
                    f"attention_dropout or activation_dropout, got {key}. Leave it out"
                )
            if encoder.pop(key):
                raise UserError(
                    f"model_overrides: {self.model_type} models have no SpecAugment: expected {key} to be 0, or not to "
                    f"be given, got {values[key]!r} (--model_overrides '{{{key}: 0}}')"
                )
        return others | ({"encoder_config": {**others.get("encoder_config", {}), **encoder}} if encoder else {})

    def new_lengths(self, base: PreTrainedModel) -> SubsampledLengths:
        """Lengths, which also keep the subsampling and each layer's convolution from what stands in the padding."""
        context = SubsampledLengths(base.config)
        base.subsampling.register_forward_pre_hook(context.clear)
        for layer in base.layers:
            layer.conv.pointwise_conv1.register_forward_hook(context.silence)
            layer.conv.norm.__class__ = PretrainedBatchNorm
            layer.conv.norm.eval()
        return context

    def frame_lengths(self, sizes: Tensor, config: PretrainedConfig) -> Tensor:
        return subsampled(sizes, config.encoder_config)

    def traits(self, config: PretrainedConfig) -> dict[str, Any]:
        sizes = config.encoder_config
        return Family.traits(self, config) | {"features": sizes.num_mel_bins, "frame rate": sizes.subsampling_factor}

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        return self.base(model).layers

    def open(self, layer: nn.Module) -> Opened:
        def halfway(x: Tensor) -> Tensor:
            return x + 0.5 * layer.feed_forward1(layer.norm_feed_forward1(x))

        def slot(x: Tensor, *, lengths: Tensor | None = None, **arguments: Any) -> Tensor:
            if isinstance(layer.self_attn, MixerSlot):
                return layer.self_attn.mixer(x, lengths)
            return layer.self_attn(x, **arguments)[0]

        def after(x: Tensor, y: Tensor) -> Tensor:
            x = halfway(x) + y
            x = x + layer.conv(layer.norm_conv(x))
            return layer.norm_out(x + 0.5 * layer.feed_forward2(layer.norm_feed_forward2(x)))

        reach = layer.conv.depthwise_conv.kernel_size[0] // 2
        return Opened(lambda x: layer.norm_self_att(halfway(x)), slot, after, reach)

    def slot_ends(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        return layer.self_attn, layer.self_attn

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        mask = None
        if lengths is not None:
            valid = valid_frames(lengths, x.size(1))
            mask = (valid[:, None] & valid[:, :, None])[:, None]
        return {"attention_mask": mask, "position_embeddings": self.base(model).encode_positions(x)}

    def block_attention(self, model: PreTrainedModel, layer: nn.Module) -> ConformerAttention:
        return block_attention(layer.self_attn)

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        attention = self.attention(layer)
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights = weights_by_head(*inputs, attention.o_proj, head_dim=attention.head_dim)
        keys = DistanceKeys(block_attention(attention).distance_keys, attention.bias_u, attention.bias_v)
        return replace(weights, positions="relative", distance_keys=keys)

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: Mixer) -> None:
        self.layers(model)[index].self_attn = self.slot_class(mixer, self.context(model))

    def front_end(self, model: PreTrainedModel) -> FrontEnd:
        base, none = self.base(model), nn.Identity()
        config, subsampling = base.config, base.subsampling
        log_mel, kernel, stride = ParakeetLogMel(config.num_mel_bins), subsampling.kernel_size, subsampling.stride
        count, padding = num_convolutions(config), subsampling.padding
        reach = padding * sum(stride**place for place in range(count))  # frames of features before a frame's own
        needed = 1  # frames of features that the first frame must have
        for _ in range(count):
            needed = stride * (needed - 1) + kernel - 2 * padding

        def convolutions(audio: Tensor, moments: Moments, piece: Piece) -> Tensor:
            """A piece's samples to its frames; before the audio's first frame of features and behind its last one, and
            at every convolution anew, there are zeros."""
            first = piece.start * stride**count - reach
            zeros = max(0, log_mel.lead - log_mel.hop * max(0, first))
            end = max(0, log_mel.hop * first - log_mel.lead) + audio.size(1)
            ended = end >= piece.num_samples
            x = log_mel(F.pad(audio[0].float().cpu(), (zeros, 0)), ended=ended)
            x = log_mel.normalised(x, *moments).to(subsampling.linear.weight)[None, None]
            ends = (padding if first < 0 else 0, padding if ended else 0)
            for layer in subsampling.layers:
                if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
                    x = F.pad(x, (padding, padding, *ends))
                    x = F.conv2d(x, layer.weight, layer.bias, layer.stride, 0, groups=layer.groups)
                else:
                    x = layer(x)
            skipped = piece.start if first < 0 else 0
            x = x[:, :, skipped : skipped + piece.stop - piece.start]
            return x.transpose(2, 3).flatten(1, 2)

        return FrontEnd(
            convolutions,
            lambda x: subsampling.linear(x) * base.input_scale,
            NoPositions(),
            none,
            none,
            kernels=(log_mel.window, *[kernel] * count),
            strides=(log_mel.hop, *[stride] * count),
            positions_reach=0,
            widest=subsampling.channels * config.num_mel_bins // stride * stride ** (count - 1),
            normed=None,
            log_mel=log_mel,
            lead=log_mel.lead + log_mel.hop * reach,
            needed=log_mel.hop * needed,
        )

    def freeze_front_end(self, model: PreTrainedModel) -> None:
        """Let the subsampling have no gradient from here on."""
        self.base(model).subsampling.requires_grad_(False)

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        return model.ctc_head


def block_attention(attention: nn.Module) -> ConformerAttention:
    """Parakeet's attention, which is wav2vec2-conformer's under other names."""
    return ConformerAttention(
        SimpleNamespace(
            config=attention.config,
            position_embeddings_type="relative",
            num_heads=attention.config.num_attention_heads,
            scaling=attention.scaling,
            linear_q=attention.q_proj,
            linear_k=attention.k_proj,
            linear_v=attention.v_proj,
            linear_out=attention.o_proj,
            linear_pos=attention.relative_k_proj,
            pos_bias_u=attention.bias_u,
            pos_bias_v=attention.bias_v,
        )
    )


FAMILY = ParakeetFamily()
