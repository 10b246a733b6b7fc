"""What wav2vec2, HuBERT and WavLM have in common: the front end, both layer layouts, and the slot's place."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import logging

from cald_speech.errors import UserError
from cald_speech.families.base import Family, FrontEnd, Moments, Opened
from cald_speech.families.block_attention import BlockAttention
from cald_speech.families.lengths import LengthAwareGroupNorm, LengthContext, convolve_normed
from cald_speech.mixers import AttentionWeights, Mixer
from cald_speech.ops import valid_frames

# A self-supervised checkpoint has no head and carries what only its pretraining needed.
HEAD_PREFIXES = ("lm_head.", "projector.", "classifier.", "layer_weights")
PRETRAINING_PREFIXES = ("quantizer.", "project_q.", "project_hid.", "label_embs_concat", "final_proj.", "mask_emb")


class MixerSlot(nn.Module):
    """Stands where ``layer.attention`` stood: Hugging Face's call on the outside, a mixer on the inside."""

    def __init__(self, mixer: Mixer, context: LengthContext):
        super().__init__()
        self.mixer = mixer
        self.context = context

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """(B, T, D) to (B, T, D) and no attention weights. Lengths come from the context, masks are not looked at."""
        return self.mixer(hidden_states, self.context.frames), None


class SpeechFamily(Family):
    """A Hugging Face speech encoder. A subclass names its classes; WavLM changes the slot too."""

    pre_norm_layer: type[nn.Module]
    slot_class: Callable[..., MixerSlot] = MixerSlot

    def load(
        self,
        source: str | PretrainedConfig,
        *,
        model_class: type[PreTrainedModel] | None = None,
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> PreTrainedModel:
        """A prepared model; ``overrides`` are set in its config (LayerDrop is 0 unless they say otherwise).

        Raises UserError where the source cannot be had or holds other weights than the model needs: only a head may
        be missing, and only what pretraining alone needed may be left over.
        """
        cls = model_class or self.classes["ctc"]
        # LayerDrop would make teacher and student skip different layers.
        overrides = {"layerdrop": 0.0} | overrides
        if isinstance(source, PretrainedConfig):
            config = type(source).from_dict({**source.to_dict(), **overrides})
            return self.prepare(cls(config).to(dtype))
        try:
            # Other sizes are not ignored: _check_loaded names them, and all else that does not fit.
            with _quiet():
                model, info = cls.from_pretrained(
                    source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **overrides
                )
        except OSError as error:
            raise UserError(
                f"cannot load the model {source!r}: {error}. Expected a folder with config.json and model.safetensors, "
                "or a Hugging Face hub id and a network. Without a network, download it elsewhere "
                "(`huggingface-cli download`) and give the folder"
            ) from error
        # A parameter that mixers share, and that the checkpoint lacks, has no values but is not told as missing.
        info["missing_keys"] = {*info["missing_keys"], *(n for n, p in model.named_parameters() if p.is_meta)}
        _check_loaded(str(source), self.base_prefix(model), info)
        return self.prepare(model)

    @staticmethod
    def base_prefix(model: PreTrainedModel) -> str:
        return f"{model.base_model_prefix}."

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        self.context(model)
        return model

    def context(self, model: PreTrainedModel) -> LengthContext:
        """The model's lengths, put in place (with the length-aware norm) when they are first asked for."""
        base = model.base_model
        context = base.__dict__.get("cald_lengths")
        if context is None:
            context = base.__dict__["cald_lengths"] = LengthContext(base.config)
            base.register_forward_pre_hook(context.hook, with_kwargs=True)
            first = base.feature_extractor.conv_layers[0]
            if base.config.feat_extract_norm == "group":
                first.layer_norm = LengthAwareGroupNorm.replacing(first.layer_norm, first.conv, context)
        return context

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

    def mixer(self, layer: nn.Module) -> Mixer | None:
        return layer.attention.mixer if isinstance(layer.attention, MixerSlot) else None

    def block_attention(self, model: PreTrainedModel, layer: nn.Module) -> BlockAttention:
        return BlockAttention(layer.attention)

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        mask = None if lengths is None else valid_frames(lengths, x.size(1))
        return {
            "attention_mask": create_bidirectional_mask(
                config=model.base_model.config, inputs_embeds=x, attention_mask=mask
            )
        }

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        attention = layer.attention
        if isinstance(attention, MixerSlot):
            raise ValueError(f"expected a layer with attention, got one with {type(attention.mixer).__name__}")
        heads = attention.num_heads
        projections = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
        weights = {name: p.weight.unflatten(0, (heads, -1)) for name, p in projections.items()}
        biases = {f"{name}_bias": p.bias.unflatten(0, (heads, -1)) for name, p in projections.items()}
        output = attention.out_proj
        return AttentionWeights(**weights, o=output.weight.unflatten(1, (heads, -1)), **biases, o_bias=output.bias)

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: Mixer) -> None:
        layer = self.layers(model)[index]
        layer.attention = self.slot_class(mixer, self.context(model))

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        return self.front_end(model).output_norm

    def front_end(self, model: PreTrainedModel) -> FrontEnd:
        base, config = model.base_model, model.base_model.config
        if getattr(base, "adapter", None) is not None:
            raise UserError(
                "expected a speech encoder whose output is its last layer's, got one with convolutions after it "
                "(add_adapter in its config). Load the model with add_adapter: false"
            )
        norm, none = base.encoder.layer_norm, nn.Identity()
        norms = (none, norm) if config.do_stable_layer_norm else (norm, none)
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
            positions_reach=config.num_conv_pos_embeddings // 2,
            normed=first.conv if config.feat_extract_norm == "group" else None,
        )

    def freeze_front_end(self, model: PreTrainedModel) -> None:
        model.base_model.feature_extractor._freeze_parameters()

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        if not isinstance(model, self.classes["ctc"]):
            raise UserError(f"expected a model with a CTC head, got {type(model).__name__}. Load it with head='ctc'")
        return model.lm_head


@contextmanager
def _quiet() -> Iterator[None]:
    """No report of transformers' own on what did not fit: its result is read and judged here."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _check_loaded(source: str, prefix: str, info: dict) -> None:
    """Only a head may be missing from a checkpoint, and only pretraining's own weights may be left over."""
    # masked_spec_embed exists only where SpecAugment is on; a checkpoint made without it starts it at random.
    missing = [k for k in info["missing_keys"] if not k.startswith(HEAD_PREFIXES) and "masked_spec_embed" not in k]
    allowed = (*HEAD_PREFIXES, *PRETRAINING_PREFIXES)
    unexpected = [
        k
        for k in info["unexpected_keys"]
        if not k.removeprefix(prefix).startswith(allowed) and "masked_spec_embed" not in k
    ]
    mismatched = [f"{k}: {tuple(had)} for {tuple(wanted)}" for k, had, wanted in info["mismatched_keys"]]
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another size", mismatched)):
        if keys:
            raise UserError(
                f"the weights in {source!r} do not fit this model: {len(keys)} {kind} ({', '.join(sorted(keys)[:3])}, "
                "...). Expected a checkpoint of the same architecture that config.json describes"
            )
