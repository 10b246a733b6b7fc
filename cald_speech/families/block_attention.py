"""Self-attention over long sequences: the queries go through in blocks, so that no (T, T) matrix is ever made."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BlockAttention:
    """One layer's attention in two steps: ``keys_values`` of every block, then ``attend`` for every block.

    Arguments
    ---------
    attention : a module with ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj`` and ``num_heads``.

    Example
    -------
    >>> from transformers import Wav2Vec2Config
    >>> from cald_speech.families import families
    >>> family = families()["wav2vec2"]
    >>> model = family.load(Wav2Vec2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).eval()
    >>> attention = family.block_attention(model, family.layers(model)[0])
    >>> x = torch.randn(1, 7, 32)
    >>> keys, values = attention.keys_values(x)
    >>> attention.attend(x[:, 3:5], keys, values, first=3).shape
    torch.Size([1, 2, 32])
    """

    def __init__(self, attention: nn.Module):
        self.attention = attention

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, t, D) to keys and values (1, t, D)."""
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


class GatedBiasAttention(BlockAttention):
    """WavLM's: a bias for each head and each distance, which every query scales by a gate made from its own frame.

    The bias depends on the distance alone, so that 2T - 1 values a head hold all of it; each block of queries
    multiplies its own rows out, at most ``ENTRIES`` of them at once.
    """

    ENTRIES = 2**24  # heads x queries x keys; 64 MiB in float32

    def __init__(self, attention: nn.Module, table: nn.Module):
        """``table``: the attention or slot that owns the embedding of the distances, ``rel_attn_embed``."""
        super().__init__(attention)
        self.table = table
        self.by_distance: Tensor | None = None  # (H, 2T - 1), the most negative distance first

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        num_frames = keys.size(1)
        if self.by_distance is None or self.by_distance.size(1) != 2 * num_frames - 1:
            self.by_distance = self._bias_by_distance(num_frames)
        # Row s of the windows holds the distances -s, ..., T - 1 - s from key to query, in a view: for query i,
        # s = T - 1 - i counts backwards. So the queries are taken from last to first, which spares flipping the rows.
        windows = self.by_distance.unfold(1, num_frames, 1)
        size = max(1, self.ENTRIES // (self.attention.num_heads * num_frames))
        parts = []
        for start in range(0, x.size(1), size):
            part = x[:, start : start + size].flip(1)
            row = num_frames - first - start - part.size(1)
            bias = self._gate(part) * windows[None, :, row : row + part.size(1)]
            parts.append(self.weigh(self.attention.q_proj(part), keys, values, bias).flip(1))
        return self.attention.out_proj(torch.cat(parts, dim=1))

    def _bias_by_distance(self, num_frames: int) -> Tensor:
        weight = self.table.rel_attn_embed.weight
        distances = torch.arange(1 - num_frames, num_frames, device=weight.device)
        return self.table.rel_attn_embed(self.table._relative_positions_bucket(distances)).t().contiguous()

    def _gate(self, x: Tensor) -> Tensor:
        """(1, t, D) to (1, H, t, 1), as in WavLMAttention.forward."""
        heads = x.unflatten(2, (self.attention.num_heads, -1)).transpose(1, 2)
        projected = self.attention.gru_rel_pos_linear(heads).unflatten(-1, (2, 4)).sum(-1)
        gate_a, gate_b = torch.sigmoid(projected).chunk(2, dim=-1)
        return gate_a * (gate_b * self.attention.gru_rel_pos_const - 1.0) + 2.0
