"""How the number of valid frames reaches the slots and norms inside a Hugging Face model.

A pre-hook on the base model takes the 2-D attention mask, works the lengths out once for each forward pass, and keeps
them: gradient checkpointing calls the slots again during backward, so they must outlive the forward pass. Slots read
them here, and look at no mask: the layers of a text model are shown 4-D masks only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from cald_speech.errors import UserError
from cald_speech.mixers import Mixer
from cald_speech.ops import valid_frames


class Lengths:
    """Of the batch that a model is working on: ``frames`` (B,) that are valid in its layers, None where all are."""

    frames: Tensor | None = None

    def forget(self) -> None:
        """No batch is being worked on: what runs the model's pieces one by one hands them a single sequence."""
        self.frames = None

    def hook(self, base: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the base model, which reads the lengths off its arguments."""
        raise NotImplementedError


class MixerSlot(nn.Module):
    """Hugging Face's call on the outside, a mixer on the inside."""

    def __init__(self, mixer: Mixer, context: Lengths):
        super().__init__()
        self.mixer = mixer
        self.context = context

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) to (B, T, D) and no attention weights. Lengths come from the context, masks are not looked at."""
        return self.mixer(hidden_states, self.context.frames), None


def frame_lengths(samples: Tensor, config: PretrainedConfig) -> Tensor:
    """How many frames the convolutional front end makes of so many samples (any integer shape).

    Example
    -------
    >>> from transformers import Wav2Vec2Config
    >>> frame_lengths(torch.tensor([16_000, 400, 0]), Wav2Vec2Config()).tolist()
    [49, 1, 0]
    """
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel).div(stride, rounding_mode="floor") + 1
    return samples.clamp(min=0)


class AudioLengths(Lengths):
    """Lengths of audio: ``samples`` (B,) before the convolutional front end, ``frames`` after it."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.samples: Tensor | None = None

    def forget(self) -> None:
        self.samples = self.frames = None

    def hook(self, base: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the base model: reads ``attention_mask``, (B, samples) ones and zeros."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self.samples = self.frames = None
        if mask is None:
            return
        lengths = mask.long().sum(-1)  # a mask of floats or booleans counts the same
        if not torch.compiler.is_compiling():  # a graph has no values yet: any mask is one of padding on the right
            # One device sync for each forward pass: it tells padded from unpadded, and left from right.
            if bool((lengths == mask.size(-1)).all()):
                return
            if not torch.equal(valid_frames(lengths, mask.size(-1)), mask.bool()):
                raise ValueError(
                    "attention_mask: expected ones and then zeros in each row (right padding), got another pattern. "
                    "Pad on the right: feature_extractor.padding_side = 'right'"
                )
        self.samples = lengths
        self.frames = self.frames_of(lengths)

    def frames_of(self, sizes: Tensor) -> Tensor:
        """Frames that the layers see of inputs of these sizes."""
        return frame_lengths(sizes, self.config)

    def silence(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of a module that puts out (B, C, T): zeros in the padding, for what reads it next."""
        if self.frames is None:
            return output
        return output.masked_fill(~valid_frames(self.frames, output.size(-1))[:, None], 0)


class FeatureLengths(AudioLengths):
    """Of models whose input are features: a frame of theirs is a frame of the layers."""

    def frames_of(self, sizes: Tensor) -> Tensor:
        return sizes


class UnreadableMask(UserError, ValueError):
    """An attention mask from which no lengths can be read."""


class TokenLengths(Lengths):
    """Lengths of text: ``frames`` (B,) valid tokens, and ``starts`` (B,) padded tokens before them.

    ``starts`` is None where all rows begin with a valid token. Mixers want the padding behind: :meth:`aligned` moves
    rows that are padded in front, as generation needs them, and :meth:`put_back` undoes it.

    Arguments
    ---------
    left_padding : False refuses padding in front, for models whose positions and heads count from the first token.
    mask_at : which of the base model's positional arguments is the mask, counted from 0.

    Example
    -------
    >>> lengths = TokenLengths(left_padding=True)
    >>> lengths.read(torch.tensor([[1, 1, 1], [0, 0, 1]]))
    >>> x = torch.arange(6.0).view(2, 3, 1)
    >>> lengths.aligned(x).flatten(1).tolist()
    [[0.0, 1.0, 2.0], [5.0, 3.0, 4.0]]
    >>> torch.equal(lengths.put_back(lengths.aligned(x)), x)
    True
    """

    def __init__(self, *, left_padding: bool, mask_at: int = 1) -> None:
        self.left_padding, self.mask_at = left_padding, mask_at
        self.frames: Tensor | None = None
        self.starts: Tensor | None = None

    def hook(self, base: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the base model: reads ``attention_mask``, (B, past and present tokens) ones and zeros."""
        mask = kwargs.get("attention_mask", args[self.mask_at] if len(args) > self.mask_at else None)
        self.frames = self.starts = None
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
            raise UnreadableMask(
                f"attention_mask: expected ones and zeros of shape (batch, tokens), got {shape}. Give the tokenizer's "
                "own mask, and generate with the default cache"
            )
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        self.read(mask[:, -tokens.size(1) :])

    def read(self, mask: Tensor) -> None:
        """The lengths of the tokens that ``mask`` (B, T) tells valid from padded, of any dtype."""
        lengths, num_tokens = mask.long().sum(-1), mask.size(-1)
        if torch.compiler.is_compiling():  # a graph has no values yet: it takes padding on either side
            self.frames = lengths
            self.starts = mask.int().argmax(-1) if self.left_padding else None
            return
        # One device sync for each forward pass tells padded from unpadded; a second, for padded ones, right from left.
        if bool((lengths == num_tokens).all()):
            return
        self.frames = lengths
        valid = mask.bool()
        if torch.equal(valid_frames(lengths, num_tokens), valid):
            return
        starts = valid.int().argmax(-1)
        contiguous = valid_frames(starts + lengths, num_tokens) & ~valid_frames(starts, num_tokens)
        if not self.left_padding or not torch.equal(contiguous, valid):
            kind = "on the right or on the left" if self.left_padding else "on the right"
            self.frames = None
            raise UnreadableMask(
                f"attention_mask: expected each row's tokens in one piece, padded {kind}, got another pattern. Pad "
                f"{kind}: tokenizer.padding_side = 'right'"
            )
        self.starts = starts

    def aligned(self, x: Tensor) -> Tensor:
        """(B, T, D) with each row's valid tokens first."""
        return x if self.starts is None else _rolled(x, self.starts)

    def put_back(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`aligned`."""
        return x if self.starts is None else _rolled(x, -self.starts)


def _rolled(x: Tensor, by: Tensor) -> Tensor:
    """Row b of ``x`` (B, T, D) from token ``by[b]`` on, the tokens before it at the end."""
    by = by[:, None]
    index = (torch.arange(x.size(1), device=x.device) + by) % torch.full_like(by, x.size(1))  # ONNX needs a tensor here
    return x.gather(1, index[:, :, None].expand_as(x))
