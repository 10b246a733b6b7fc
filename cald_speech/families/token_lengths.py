"""How the number of valid tokens reaches the slots of a text model, whose layers are shown 4-D masks only."""

import torch
from torch import Tensor, nn

from cald_speech.errors import UserError
from cald_speech.families.lengths import Lengths
from cald_speech.ops import valid_frames


class UnreadableMask(UserError, ValueError):
    """An attention mask from which no lengths can be read."""


class TokenLengths(Lengths):
    """Those of text: ``frames`` (B,) valid tokens, and ``starts`` (B,) padded tokens before them.

    ``starts`` is None where all rows begin with a valid token. Mixers want the padding behind: :meth:`aligned` moves
    rows that are padded in front, as generation needs them, and :meth:`put_back` undoes it.

    Arguments
    ---------
    left_padding : False refuses padding in front, for models whose positions and heads count from the first token.

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

    def __init__(self, *, left_padding: bool) -> None:
        self.left_padding = left_padding
        self.frames: Tensor | None = None
        self.starts: Tensor | None = None

    def hook(self, base: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the base model: reads ``attention_mask``, (B, past and present tokens) ones and zeros."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
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
    index = (torch.arange(x.size(1), device=x.device) + by[:, None]) % x.size(1)
    return x.gather(1, index[:, :, None].expand_as(x))
