"""What the rest of the house knows about a pretrained architecture of any kind (floor F2).

``speech.py`` adds what only an encoder of audio has, ``text.py`` what only a model of tokens has.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput

from cald_speech.errors import UserError
from cald_speech.families.hub import load_checked
from cald_speech.families.lengths import Lengths, MixerSlot
from cald_speech.mixers import AttentionWeights, Mixer
from cald_speech.ops import valid_frames


class Opened(NamedTuple):
    """A layer in three pieces: ``after(x, slot(before(x), **arguments)) == layer(x, **arguments)`` to the bit.

    ``before`` is done frame by frame; so is ``after``, but for a convolution over ``reach`` frames on either side.
    """

    before: Callable[[Tensor], Tensor]
    slot: Callable[..., Tensor]
    after: Callable[[Tensor, Tensor], Tensor]
    reach: int = 0


class Family:
    """One pretrained architecture: its layers, the slot in each, its attention weights, its heads.

    A head is ``base`` (none), ``classification``, ``ctc``, ``lm`` or ``masked_lm``. A checkpoint of others may differ
    from the model in some names, and :meth:`load` refuses all else: each pattern is of names' beginnings, behind the
    base model's prefix.
    """

    model_type: str  # Hugging Face's name
    config_class: type[PretrainedConfig]
    heads: tuple[str, ...]
    model_classes: tuple[type[PreTrainedModel], ...]  # one for each head, in their order
    auto_classes: Mapping[str, Any]  # by head, the Auto class that finds the model's
    pipelines: Mapping[str, str]  # by head, transformers' name for what it does
    default_head: str
    head_names: tuple[str, ...]  # of heads: new where a checkpoint has another head or none
    optional_names: tuple[str, ...] = ()  # what a checkpoint may lack or hold
    leftover_names: tuple[str, ...]  # what pretraining alone needed, what older releases saved
    config_defaults: ClassVar[Mapping[str, Any]] = {}
    refusal: ClassVar[str]  # of a kind of family: what a user is told who gives a model of another
    causal: bool = False  # True: no layer sees what comes after a frame, and no mixer may

    @property
    def classes(self) -> dict[str, type[PreTrainedModel]]:
        """The model class with each head."""
        return dict(zip(self.heads, self.model_classes, strict=True))

    def class_with(self, head: str) -> type[PreTrainedModel]:
        """The model class with this head. Raises UserError for one that the family does not have."""
        if head not in self.classes:
            raise UserError(
                f"head: expected one of {', '.join(self.classes)}, which is what {self.model_type} models have, got "
                f"{head!r}"
            )
        return self.classes[head]

    def load(
        self,
        source: str | PretrainedConfig,
        *,
        model_class: type[PreTrainedModel] | None = None,
        dtype: torch.dtype = torch.float32,
        new_head: bool = True,
        **overrides: Any,
    ) -> PreTrainedModel:
        """A prepared model from a hub id or folder, or one with random weights from a config.

        ``overrides`` are set in its config. Raises UserError where the source cannot be had or holds other weights than
        the model needs: only a new head may be missing, where ``new_head`` lets it, and only what pretraining alone
        needed may be left over.
        """
        cls = model_class or self.class_with(self.default_head)
        overrides = self.overrides({**self.config_defaults, **overrides})
        if isinstance(source, PretrainedConfig):
            values = source.to_dict()
            for key, value in overrides.items():
                nested = isinstance(getattr(source, key, None), PretrainedConfig) and isinstance(value, Mapping)
                values[key] = {**values[key], **value} if nested else value
            return self.prepare(cls(type(source).from_dict(values)).to(dtype))
        return self.prepare(self._checked(cls, source, dtype=dtype, new_head=new_head, **overrides))

    def overrides(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Values for a config, where they belong in it: a config of parts takes those of a part under its name."""
        return dict(values)

    def _checked(self, cls: type[PreTrainedModel], source: str, **options: Any) -> PreTrainedModel:
        names = {"head_names": self.head_names, "optional_names": self.optional_names}
        return load_checked(cls, source, **names, leftover_names=self.leftover_names, **options)

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make padding invisible to the model, in place; converting and loading do this themselves."""
        raise NotImplementedError

    def new_lengths(self, base: PreTrainedModel) -> Lengths:
        """What is to read the lengths of each batch that the base model gets; may change its modules to use them."""
        raise NotImplementedError

    def base(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model without its head; its config has the layers' sizes."""
        return model.base_model

    def encoder_config(self, config: PretrainedConfig) -> PretrainedConfig:
        """The part of a config that has the layers' sizes: all of it, where it is of one part."""
        return config

    def layer_frames(self, frames: Tensor, config: PretrainedConfig) -> Tensor:
        """Frames that the layers see where the model puts out so many (any integer shape)."""
        return frames

    def context(self, model: PreTrainedModel) -> Lengths:
        """The model's lengths, put in place when they are first asked for."""
        base = self.base(model)
        context = base.__dict__.get("cald_lengths")
        if context is None:
            context = base.__dict__["cald_lengths"] = self.new_lengths(base)
            base.register_forward_pre_hook(context.hook, with_kwargs=True)
        return context

    def traits(self, config: PretrainedConfig) -> dict[str, Any]:
        """What two models must share, by its name for people, before their states and logits can be compared."""
        sizes = self.encoder_config(config)
        return {
            "family": self.model_type,
            "width": sizes.hidden_size,
            "layers": sizes.num_hidden_layers,
            "vocabulary": config.vocab_size,
            "labels": config.num_labels,
        }

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """The layers, first to last; each has one slot."""
        raise NotImplementedError

    def open(self, layer: nn.Module) -> Opened:
        """The layer in three pieces. Slots with attention need :meth:`layer_arguments`, converted ones ``lengths``."""
        raise NotImplementedError

    def slot_ends(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The module whose input is the slot's, (B, T, D), and the one whose output is; often one and the same."""
        raise NotImplementedError

    def mixer(self, layer: nn.Module) -> Mixer | None:
        """What fills the layer's slot; None where attention was kept."""
        slot = self.slot_ends(layer)[0]
        return slot.mixer if isinstance(slot, MixerSlot) else None

    def attention(self, layer: nn.Module) -> nn.Module:
        """The attention in the layer's slot; raises ValueError for a layer that is converted."""
        mixer = self.mixer(layer)
        if mixer is not None:
            raise ValueError(f"expected a layer with attention, got one with {type(mixer).__name__}")
        return self.slot_ends(layer)[0]

    def layer_arguments(self, model: PreTrainedModel, x: Tensor, lengths: Tensor | None) -> dict[str, Any]:
        """What the model hands to each layer, beside its input, for an input like ``x`` (B, T, D).

        Here that is the mask of attention in both directions, in the form that the model's attention takes.
        """
        mask = None if lengths is None else valid_frames(lengths, x.size(1))
        config = self.base(model).config
        return {"attention_mask": create_bidirectional_mask(config=config, inputs_embeds=x, attention_mask=mask)}

    def attention_weights(self, model: PreTrainedModel, layer: nn.Module) -> AttentionWeights:
        """The projections of a layer of ``model`` that has attention; raises ValueError for one that is converted."""
        raise NotImplementedError

    def replace_attention(self, model: PreTrainedModel, index: int, mixer: Mixer) -> None:
        """Put the mixer into a layer's slot, which keeps its call signature and return arity."""
        raise NotImplementedError

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        """The norm that the last layer's output goes through before the head; Identity if there is none."""
        raise NotImplementedError

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """From the final norm's output (B, T, D) to logits (B, T, V). Raises UserError for a model without a head."""
        raise NotImplementedError

    def settled(self, model: PreTrainedModel, outputs: ModelOutput | tuple) -> ModelOutput | tuple:
        """What a converted model's forward pass returns, made from what the class it was made of would return."""
        return outputs


def weights_by_head(
    q: nn.Linear, k: nn.Linear, v: nn.Linear, o: nn.Linear, *, heads: int = -1, head_dim: int = -1
) -> AttentionWeights:
    """The weights of four projections, cut into heads of which the number or the size is given.

    Example
    -------
    >>> weights = weights_by_head(*(nn.Linear(6, 6) for _ in range(4)), heads=2)
    >>> weights.q.shape, weights.o.shape, weights.k_bias.shape
    (torch.Size([2, 3, 6]), torch.Size([6, 2, 3]), torch.Size([2, 3]))
    """
    inputs, shape = {"q": q, "k": k, "v": v}, (heads, head_dim)
    weights = {name: p.weight.unflatten(0, shape) for name, p in inputs.items()}
    biases = {f"{name}_bias": p.bias.unflatten(0, shape) for name, p in inputs.items() if p.bias is not None}
    return AttentionWeights(**weights, o=o.weight.unflatten(1, shape), **biases, o_bias=o.bias)
