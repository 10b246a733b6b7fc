"""What a converted layer keeps between two steps of generation: a state of constant size, in Hugging Face's cache.

The cache that ``generate`` makes holds, for each layer, keys and values that grow with every token. A converted layer
puts its own entry there when it first runs, so that all else that transformers does with a cache (beams, counting the
tokens seen, masks for the layers that kept attention) goes on as before.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from cald_speech.errors import UserError
from cald_speech.families.lengths import MixerSlot, TokenLengths
from cald_speech.mixers import CausalMixer


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


class ScanState(CacheLayerMixin):
    """One layer's entry: ``state``, whatever the mixer returned, rows first; ``num_tokens`` seen, padding included.

    Example
    -------
    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> entry = ScanState.of(cache, 1)
    >>> entry.keep(torch.arange(2.0), num_tokens=5)
    >>> cache.reorder_cache(torch.tensor([1, 1]))
    >>> ScanState.of(cache, 1).state.tolist()
    [1.0, 1.0]
    """

    is_sliding = False
    supports_early_init = False  # the state's shape is the mixer's business

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.num_tokens = 0

    @classmethod
    def of(cls, cache: Cache, index: int) -> "ScanState":
        """The entry of a layer, put in place of an empty one of keys and values when first asked for.

        Raises UserError for a cache that holds this layer's keys, or that is no dynamic one.
        """
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
        entry = cache.layers[index]
        if isinstance(entry, cls):
            return entry
        if not isinstance(entry, DynamicLayer) or entry.get_seq_length():
            raise UserError(
                f"the cache's entry for layer {index}, which is converted: expected an empty one of the default cache, "
                f"got a {type(entry).__name__} of {entry.get_seq_length()} tokens. Leave cache_implementation out, and "
                "start with a new cache"
            )
        cache.layers[index] = cls()
        return cache.layers[index]

    def keep(self, state: Any, num_tokens: int) -> None:
        """The state after ``num_tokens`` more."""
        self.state, self.num_tokens, self.is_initialized = state, self.num_tokens + num_tokens, True

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1  # no end

    get_max_cache_shape = get_max_length  # its name in earlier releases of transformers 5

    def reset(self) -> None:
        self.__init__()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda tensor: tensor[indices.to(tensor.device)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = tree_map_only(torch.Tensor, change, self.state)

    def crop(self, *args: int) -> None:
        raise UserError(
            "a state cannot forget the last tokens, as assisted generation and cropping a cache would have it. "
            "Generate greedily, by sampling or with beams"
        )

    def offload(self) -> None:
        """It stays: it is small."""

    def prefetch(self) -> None:
        """It has stayed."""

    def lazy_initialization(self, *args: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__} holds no keys and values")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} holds no keys and values")
