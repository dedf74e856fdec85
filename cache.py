"""The compressed KV cache: one tensor, whose size is the budget.

For every layer, for keys and for values, for every key-value head: a block (batch, max_len, r) with that head's own rank r.
All blocks lie end to end in a single preallocated tensor,

    data = [ layer 0: keys of head 0 | keys of head 1 | … | values of head 0 | values of head 1 | … ][ layer 1: … ] …

so batch · max_len · Σ r numbers are all there is: no padding to the widest head, no list that grows by concatenation. A row
of a block holds one token's coordinates k U_r (keys, after RoPE) or v U_r (values); see projection.py. Attention happens in
that small space, for the G query heads that share key-value head j:

    scores = (q U_r)(k U_r)ᵀ / sqrt(d)            the queries are turned once, the stored keys are read as they are
    output = softmax(scores) (v U_r)              r numbers a head, which W_o' = U_rᵀ W_o takes from there

The value side costs nothing at run time: U_r is folded into W_v and W_o (paper, Figure 2: "a new linear layer"), and the
mean of what was cut off becomes a bias. The folded weights belong to the plan of ranks, so the cache holds them, and the
model stays as it is. A head at rank d is stored as it is, so the same class with all ranks d is the base model's cache.

    python cache.py                          # the layout, the bytes at every budget, and what they mean for 7B models
    python cache.py --benchmark              # one decoding step, full against compressed, over context lengths
"""
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from projection import BUDGETS, STEPS, Projection, check_ranks, fold_values, read_ranks, uniform_ranks


SCORES = 2 ** 24   # scores of a sequence computed at a time: 64 MB in float32


class KVCache:
    """Keys and values of `batch` sequences of up to `max_len` tokens, at a plan of ranks (2, L, K).

    `data` is the one flat tensor, `length` the number of tokens in it, `offsets` (2, L, K) where each block begins.
    Raises ValueError for ranks or sizes that make no sense, and when it is full.
    """

    def __init__(self, projection: Projection, ranks: Tensor, batch: int, max_len: int, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu"):
        L, K, d = projection.mean_v.shape
        check_ranks(ranks, L, K, d)
        if ranks.ndim != 3:
            raise ValueError(f"ranks of shape {list(ranks.shape)}; a cache has one plan for all sequences, {[2, L, K]}")
        if batch < 1 or max_len < 1:
            raise ValueError(f"a cache for a batch of {batch} and {max_len} tokens; both must be at least 1")
        self.projection, self.ranks, self.batch, self.max_len, self.length = projection, ranks.cpu(), batch, max_len, 0
        self.dtype, self.device = dtype, torch.device(device)
        sizes = self.ranks.transpose(0, 1).flatten() * batch * max_len                  # layer by layer, keys then values
        self.offsets = (sizes.cumsum(0) - sizes).view(L, 2, K).transpose(0, 1)
        self.data = torch.empty(int(sizes.sum()), dtype=dtype, device=device)
        self.blocks = [[[self.data[o:o + batch * max_len * r].view(batch, max_len, r) for o, r in zip(offsets, ranks)]
                        for offsets, ranks in zip(self.offsets[:, i].tolist(), self.ranks[:, i].tolist())]
                       for i in range(L)]                                               # [layer][keys|values][head]
        turns = torch.where((self.ranks[0] < d)[..., None, None].to(device), projection.U_k.to(device), torch.eye(d, device=device))
        self.turns = [U.to(dtype) if (r < d).any() else None for U, r in zip(turns, self.ranks[0])]   # a head at rank d is kept as it is
        self.folded = [None] * L

    @staticmethod
    def full(config, batch: int, max_len: int, dtype: torch.dtype = torch.float32, device="cpu") -> "KVCache":
        """The base model's cache: every rank d, nothing turned."""
        eye = torch.eye(config.head_dim).expand(config.num_hidden_layers, config.num_key_value_heads, -1, -1)
        return KVCache(Projection(eye, eye, torch.zeros(eye.shape[:3])), uniform_ranks(1.0, config), batch, max_len, dtype, device)

    def reserve(self, B: int, T: int) -> None:
        """ValueError unless T more tokens of B sequences fit."""
        if B != self.batch:
            raise ValueError(f"{B} sequences for a cache made for {self.batch}")
        if self.length + T > self.max_len:
            raise ValueError(f"the cache is full: it holds {self.length} of {self.max_len} tokens and {T} more were passed")

    def fold(self, i: int, attention) -> tuple[Tensor, Tensor, Tensor | None]:
        """W_v', W_o' and the bias of layer i (projection.fold_values), made when first asked for."""
        if self.folded[i] is None:
            ranks, p = self.ranks[1, i], self.projection
            if (ranks == p.mean_v.shape[-1]).all():
                self.folded[i] = attention.v_proj.weight, attention.o_proj.weight, None
            else:
                self.folded[i] = fold_values(attention.v_proj.weight, attention.o_proj.weight, p.U_v[i].to(self.device),
                                             p.mean_v[i].to(self.device), ranks)
        return self.folded[i]

    def attend(self, i: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Append the keys and values of T tokens to layer i and attend to all there are, or to the last `window`.

        q (B, H, T, d) and k (B, K, T, d) after RoPE; v (B, T, Σ r) coordinates, from W_v'. Returns (B, T, Σ r over query
        heads), for W_o'. `length` moves on once all layers have appended: `advance`.
        """
        (B, H, T, d), K = q.shape, k.shape[1]
        start, end = self.length, self.length + T
        q = q.unflatten(1, (K, H // K))                                                 # (B, K, G, T, d)
        if self.turns[i] is not None:
            q, k = q @ self.turns[i][:, None], k @ self.turns[i]
        mask = None
        if T > 1:
            age = torch.arange(start, end, device=q.device)[:, None] - torch.arange(end, device=q.device)
            mask = (age >= 0) & (age < (window or end))                                 # (T, end)
        first = max(0, end - window) if window and T == 1 else 0
        outputs = []
        for j, (keys, values, new) in enumerate(zip(*self.blocks[i], v.split(self.ranks[1, i].tolist(), dim=-1))):
            r = keys.shape[-1]
            keys[:, start:end] = k[:, j, :, :r]
            values[:, start:end] = new
            outputs.append(attend_head(q[:, j, :, :, :r], keys[:, first:end], values[:, first:end], mask, d ** -0.5))
        return torch.cat(outputs, dim=-1)

    def advance(self, T: int) -> None:
        self.length += T


def attend_head(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of the G query heads of one group, q (B, G, T, r), over keys (B, n, r) and values (B, n, r'): (B, T, G·r').

    The G·T queries form one matrix, so that keys and values are read once and never repeated for the group.
    """
    B, G, T, r = q.shape
    if mask is None:                                                                    # one token: T = 1
        scores = torch.matmul(q.reshape(B, G, r) * scale, keys.transpose(1, 2))         # (B, G, n)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
        return torch.matmul(weights, values).view(B, 1, -1)
    rows = max(1, SCORES // (G * keys.shape[1]))                                        # a long prompt goes in pieces
    pieces = []
    for q, mask in zip(q.split(rows, dim=2), mask.split(rows)):
        a = F.scaled_dot_product_attention(q.flatten(1, 2)[:, None], keys[:, None], values[:, None],
                                           attn_mask=mask.repeat(G, 1), scale=scale)    # (B, 1, G·rows, r')
        pieces.append(a.view(B, G, q.shape[2], -1).transpose(1, 2).flatten(2))
    return torch.cat(pieces, dim=1)
