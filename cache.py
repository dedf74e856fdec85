"""The compressed KV cache: one tensor, whose size is the budget.

For every layer, for keys and for values, for every key-value head there is a block of rows
(batch, r, max_len) with that head's own rank r, a multiple of d/8. A row holds one coordinate of
every token, of k U_r (after RoPE) or of v U_r, where U_r is the first r columns of an orthogonal
matrix of the head, one for keys and one for values. All lie end to end in one preallocated tensor:

    data = [ layer 0: keys of head 0 | keys of head 2 | … | values of head 0 | … ][ layer 1: … ] …

The context costs batch · max_len · Σ r numbers: no padding to the widest head, no list that grows
by concatenation. Attention happens in the small space, for the G query heads of a group at once:

    scores = (q U_r)(k U_r)ᵀ / sqrt(d)      queries are turned once, stored keys read as they are
    output = softmax(scores) (v U_r)        r numbers per query head

Values have no RoPE between their weights and the cache, so U_r and U_rᵀ vanish into the weights
before and after them, the paper's "new linear layer" (MatryoshkaKV, arXiv 2410.14731, Figure 2):

    W_v' = W_v U_r, b_v' = b_v U_r      make the coordinates v U_r that are cached
    W_o' = U_rᵀ W_o[h]                  takes weighted sums of them, for each query head h
    bias = Σ_h μ (I − P) W_o[h]         what cut-off means add: attention weights sum to one

These weights belong to the plan, the ranks of all heads, so the cache holds them. A side of a layer
all of whose heads are at rank d is stored unturned: the full plan gives the base model's cache.

Not in the paper: heads of the same rank are made neighbours, so that one product serves them all;
and as a smaller rank is the first rows of a larger, `shrink` takes a cache in use to a smaller plan
and runs no layer again. Keys lie as products take them, as kᵀ. And where the projections have them
(projection.py):

    mean_k      rows of keys hold R_n (x_n − m) U_r, x the key before RoPE: −m is a bias of W_k.
                Scores get q · R_n m back, a product with one table for all heads, `turns`: the sum
                over pairs (a, b) of  cos(nθ)(q_a m_a + q_b m_b) + sin(nθ)(q_b m_a − q_a m_b)
    whole       `first` holds all d coordinates of the first tokens, keys and values, beside `data`.
                The bias stays as it is if a value there is v U less what the bias adds, μ U beyond
                r. W_v' then has rows, and W_o' columns, for all d; rows beyond r serve the first
                tokens alone.

    python cache.py                                 # the full cache: its layout and its bytes
    python cache.py --ranks out/ranks.json --budget 0.25
"""
import copy
import itertools
import subprocess
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from model import Model, causal_attention, frequencies, load, wide
from projection import BUDGETS, LEVELS, SIDES, Projection, check_ranks, uniform_ranks
from support import cli
from support.checkpoint import stored_for_rows
from support.plans import plan_arguments, plans_for


class KVCache:
    """Keys and values of `batch` sequences of equal length, up to `max_len` tokens, at a plan.

    `data` is the one flat tensor, `length` the number of tokens in it, which may be set back;
    `first` (L, 2, K, batch, d, whole), in the order of keys, what the first tokens keep.
    `offsets` (2, L, K): where each block begins; `head_order` (2, L, K): a layer's heads as their
    blocks lie. dtype and device are the model's, whose folded weights it holds: one cache serves
    one model. A forward pass calls `before_pass`; for every layer `fold` and `attend`; then
    `after_pass`. ValueError for ranks or sizes that make no sense, and when it is full.
    """

    def __init__(self, projection: Projection, ranks: Tensor, batch: int, max_len: int,
                 dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        if batch < 1 or max_len < 1:
            raise ValueError(f"batch {batch}, max_len {max_len}: both must be at least 1")
        self.projection = projection
        self.head_dim = projection.mean_v.shape[-1]
        self.batch, self.max_len = batch, max_len
        self.length = 0
        self.span = torch.zeros(2, device=device).long()    # what a token attends to, on the device
        self.dtype, self.device = dtype, self.span.device   # "cuda" becomes "cuda:0"
        self.turns = None                                   # (d, max_len), when a model is known
        self.lay_out(ranks)

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, n: int) -> None:
        if not 0 <= n <= self.max_len:
            raise ValueError(f"length {n} of a cache for 0 to {self.max_len} tokens")
        self._length = n

    # --------------------------------------------------------------------------
    # The layout that a plan asks for

    def lay_out(self, ranks: Tensor) -> None:
        """Allocate `data` for a plan, empty, and note where every head's rows begin."""
        L, K, d = self.projection.mean_v.shape
        check_ranks(ranks, L, K, d)
        if ranks.ndim != 3:
            raise ValueError(f"ranks of shape {list(ranks.shape)}; a cache has one plan, (2, L, K)")
        self.ranks = ranks.cpu().long()
        by_rank = [heads_by_rank(of_layer) for of_layer in self.ranks.flatten(0, 1).tolist()]
        self.head_order = torch.tensor(by_rank).view(2, L, K)

        rows = self.ranks.gather(2, self.head_order) * self.batch        # of blocks, in their order
        by_layer = rows.transpose(0, 1)                             # (L, 2, K), as the blocks lie
        ends = by_layer.flatten().cumsum(0).view_as(by_layer)
        starts = (ends - by_layer).transpose(0, 1)
        self.first_rows = torch.empty_like(starts)                  # the same, by head
        self.first_rows.scatter_(2, self.head_order, starts)
        self.offsets = self.first_rows * self.max_len

        total = int(rows.sum())
        self.data = torch.empty(total * self.max_len, dtype=self.dtype, device=self.device)
        self.rows = self.data.view(total, self.max_len)
        has_triton_dtype = self.dtype.itemsize in (2, 4)            # Triton: no float64
        self.by_kernel = self.data.is_cuda and has_triton_dtype
        p = self.projection
        self.first = torch.zeros(L, 2, K, self.batch, d, p.whole, dtype=self.dtype,
                                 device=self.device)
        self.layouts = [None] * L                                   # made when first needed,
        self.folded = [None] * L                                    # as they depend on the model

    def layout(self, i: int, G: int) -> "Layout":
        """Where things of layer i lie, for G query heads to each key-value head."""
        if self.layouts[i] is None:
            self.layouts[i] = self.find_layout(i, G)
        return self.layouts[i]

    def find_layout(self, i: int, G: int) -> "Layout":
        B, d = self.batch, self.head_dim
        by_key, by_value = self.head_order[:, i]
        ranks, first_rows = self.ranks[:, i], self.first_rows[:, i]
        K = len(by_key)
        begin = int(first_rows.min())
        rows = self.rows[begin:begin + B * int(ranks.sum())]

        p, basis, mean, kept = self.projection, None, None, None
        if not self.is_full(0, i):
            basis = p.U_k[i].cpu()[by_key].to(self.device, self.dtype)
            kept = torch.arange(d) < ranks[0, by_key, None, None]   # (K, 1, d)
            kept = kept.to(self.device)
            if p.mean_k is not None:
                mean = p.mean_k[i].cpu()[by_key].to(self.device, wide(self.dtype))
        to_value_order = None
        if (by_key != by_value).any():
            to_value_order = by_key.argsort()[by_value].to(self.device)

        first_keys = self.first[i, 0] if p.whole and basis is not None else None
        first_values, widths = None, G * ranks[1, by_value]         # of each head's output
        if p.whole and not self.is_full(1, i):
            first_values, widths = self.first[i, 1], torch.full_like(widths, G * d)
        ends = widths.cumsum(0)
        columns = torch.empty_like(ends).scatter_(0, by_value, ends - widths)       # by head
        counts = ranks[1] if first_values is None else torch.full_like(ranks[1], d)
        table = torch.cat((first_rows, ranks, columns[None], counts[None]))[:, by_key]
        table = table.to(self.device)

        # Which numbers of a token's queries, keys and values go to which row: their places, written
        # as they are.
        places = torch.arange(B * (K * (G + 1) * d + int(ranks[1].sum())))
        qk, v = places.tensor_split((B * K * (G + 1) * d,))
        written = torch.empty(len(rows), 1, dtype=torch.long)
        k = qk.view(K, B, G + 1, 1, d)[:, :, -1]
        write(self.groups(i, written), k, v.view(B, 1, -1), slice(0, 1))
        return Layout(*self.groups(i, rows), rows, basis, kept, mean, first_keys, first_values,
                      to_value_order, written[:, 0].to(self.device), table, int(ends[-1]))

    def groups(self, i: int, rows: Tensor) -> tuple[list["Group"], list["Group"]]:
        """The groups of keys and of values in the rows of layer i, (n, any width)."""
        sides, row = [], 0
        for side in (0, 1):
            groups, first = [], 0
            ranks = self.ranks[side, i, self.head_order[side, i]].tolist()
            for r, alike in itertools.groupby(ranks):
                count = self.batch * len(list(alike))               # of matrices (r, max_len)
                blocks = rows[row:row + count * r].view(count, r, -1)
                groups.append(Group(slice(first, first + count), blocks))
                row += count * r
                first += count
            sides.append(groups)
        return sides[0], sides[1]

    def is_full(self, side: int, i: int) -> bool:
        """Whether all heads of a side of layer i are at rank d: they are then stored unturned."""
        return bool((self.ranks[side, i] == self.head_dim).all())

    def block(self, side: int, i: int, j: int) -> Tensor:
        """The rows of one head: (batch, r, max_len)."""
        r, first = int(self.ranks[side, i, j]), int(self.first_rows[side, i, j])
        return self.rows[first:first + self.batch * r].view(self.batch, r, self.max_len)

    # --------------------------------------------------------------------------
    # What a pass calls

    def before_pass(self, model: Model, B: int, T: int) -> None:
        """ValueError unless the cache suits the model and has room for T more tokens."""
        check_room(self, model, B, T)
        if self.turns is None and self.projection.mean_k is not None:
            angle = frequencies(model.config)[:, None] * torch.arange(self.max_len)
            turns = torch.cat((angle.cos(), angle.sin()))           # (d, max_len)
            self.turns = turns.to(self.device, wide(self.dtype))
        if self.by_kernel and T == 1:
            self.span[1].fill_(self.length + 1)
            if window := model.config.sliding_window:
                self.span[0].fill_(max(0, self.length + 1 - window))

    def after_pass(self, T: int) -> None:
        self.length += T

    def fold(self, i: int, weights) -> "Folded":
        """The weights of layer i (model.Attention) for this plan, made when first asked for."""
        if self.folded[i] is None:
            if weights.q_proj is None:
                raise ValueError("the model's weights were dropped when they had been folded for "
                                 "another plan")
            p = self.projection
            U = None if self.is_full(1, i) else p.U_v[i]
            mean_k = None if self.is_full(0, i) or p.mean_k is None else p.mean_k[i]
            self.folded[i] = fold(weights, self.head_order[:, i], self.ranks[1, i], U, p.mean_v[i],
                                  mean_k, p.whole)
        return self.folded[i].for_first() if self.length < self.projection.whole else self.folded[i]

    def attend(self, i: int, qk: Tensor, v: Tensor, window=None) -> Tensor:
        """Append T tokens to layer i; each attends to the last `window` up to itself, or all.

        qk (B, K, G + 1, T, d): queries and keys after RoPE; v (B, T, Σ r); all as W_qkv' makes
        them. Returns (B, T, Σ r over query heads), for W_o'.
        """
        _, _, heads, T, _ = qk.shape
        layout = self.layout(i, heads - 1)
        qk = qk.transpose(0, 1)                                     # (K, B, G + 1, T, d)
        raw = qk[:, :, :-1]                                         # queries
        if layout.basis is not None:                                # q U and k U
            qk = torch.bmm(qk.flatten(1, 3), layout.basis).view(qk.shape)
        q, k = qk[:, :, :-1], qk[:, :, -1]
        end = self.length + T
        covers_first = self.length < self.projection.whole
        if covers_first:
            v = self.keep_first(layout, i, k, v)
        if T > 1 or covers_first:
            write((layout.keys, layout.values), k, v, slice(self.length, end))
        else:                                   # three operations, whatever the ranks
            numbers = torch.cat((qk.flatten(), v.flatten()))
            layout.rows[:, self.length:end] = numbers.index_select(0, layout.written)[:, None]
        if T > 1 and self.length == 0:
            return attend_first(layout, raw, k, self.turns, window)
        if T == 1 and self.by_kernel:
            try:
                return self.attend_on_gpu(raw, q, window, layout)
            except (ImportError, OSError, subprocess.SubprocessError, RuntimeError) as error:
                warn_of_no_kernel(error)
                self.by_kernel = False
        begin = max(0, self.length + 1 - window) if window else 0   # no new token sees earlier ones
        added = None                                                # q · R_n m
        if layout.mean is not None:
            added = mean_scores(raw, layout.mean, self.turns[:, begin:end])
        if T == 1:
            return attend_rows(layout, q, added, begin, end, None)
        outputs = []
        for part, some, unseen in in_pieces(q, added, begin, end, window):      # of a long chunk
            outputs.append(attend_rows(layout, part, some, begin, end, unseen))
        return join(outputs, 1)

    def keep_first(self, layout: "Layout", i: int, k: Tensor, v: Tensor) -> Tensor:
        """Keep all coordinates of first tokens among T more; returns values without the rest.

        k (K, B, T, d); v (B, T, Σ r + Σ (d − r)): W_v' made those beyond each rank too.
        """
        now = slice(self.length, min(self.projection.whole, self.length + k.shape[2]))
        T = now.stop - now.start
        if layout.first_keys is not None:
            layout.first_keys[..., now] = k[:, :, :T].mT
        if layout.first_values is None:
            return v
        by_key, by_value = self.head_order[:, i]
        ranks = self.ranks[1, i, by_value].tolist()
        d = self.head_dim
        kept = v.split(ranks + [d - r for r in ranks], dim=-1)
        place = by_key.argsort()[by_value].tolist()
        for j, head in enumerate(place):
            whole = torch.cat((kept[j][:, :T], kept[len(ranks) + j][:, :T]), dim=-1)
            layout.first_values[head, :, :, now] = whole.mT
        return v[..., :sum(ranks)]

    def attend_on_gpu(self, raw: Tensor, q: Tensor, window, layout: "Layout") -> Tensor:
        """One token's attention by the Triton kernels, all heads at once whatever their ranks."""
        from kernel import decode_attention  # here, so that a CPU needs no Triton
        q, raw = (x[:, :, :, 0].transpose(0, 1) for x in (q, raw))  # (B, K, G, d)
        tokens = min(self.length + 1, window or self.length + 1)
        return decode_attention(
            q, self.rows, layout.table, self.span, tokens, layout.width, self.head_dim ** -0.5,
            raw, layout.mean, self.turns, layout.first_keys, layout.first_values)[:, None]

    # --------------------------------------------------------------------------
    # What nesting buys

    def shrink(self, ranks: Tensor) -> None:
        """Take a cache in use to a plan at or below its own; no layer runs again.

        A smaller rank is the first rows of a block. Where all heads of a side of a layer were at
        rank d, rows are unturned, and are turned now. What is cut off is given back; for a moment
        both tensors are there. The next pass folds the model's weights anew. ValueError for a rank
        above today's.
        """
        ranks = ranks.cpu()
        if ranks.shape != self.ranks.shape or (ranks > self.ranks).any():
            raise ValueError("a cache shrinks to a plan at or below its own")
        before = copy.copy(self)
        self.lay_out(ranks)
        for side, i in itertools.product((0, 1), range(ranks.shape[1])):
            self.keep(before, side, i)

    def keep(self, before: "KVCache", side: int, i: int) -> None:
        """Copy a side of layer i, turned if it is due now."""
        p, n = self.projection, self.length
        due = before.is_full(side, i) and not self.is_full(side, i)
        U, mean_v = (p.U_k, p.U_v)[side][i], p.mean_v[i]
        places, places_before = (cache.head_order[0, i].argsort().tolist()
                                 for cache in (self, before))
        for j, (place, place_before) in enumerate(zip(places, places_before, strict=True)):
            new = self.block(side, i, j)[..., :n]
            old = before.block(side, i, j)[..., :n]
            r, r_before = new.shape[1], old.shape[1]
            first = before.first[i, side, place_before]             # (B, d, whole)
            if due:
                if side == 0 and self.turns is not None:        # None: no model ever wrote here
                    mean = p.mean_k[i, j:j + 1].to(self.turns)
                    old = old - turned_mean(mean, self.turns[:, :n])[0].T.to(old)
                old = U[j].T.to(old) @ old
                first = torch.zeros_like(first)
                w = min(p.whole, n)
                first[..., :w] = old[..., :w]
            new.copy_(old[:, :r])
            if side == 1 and p.whole and not self.is_full(side, i):
                cut = slice(r, None if due else r_before)           # what the bias now adds
                first = first.clone()
                first[:, cut] -= (mean_v[j] @ U[j])[cut, None].to(first)
            self.first[i, side, place] = first


def check_room(cache, model: Model, B: int, T: int) -> None:
    """ValueError unless a cache, of ranks or of bits, suits the model and has room."""
    cache.projection.check_fits(model.config)
    if cache.dtype != model.dtype or cache.device != model.device:
        raise ValueError(f"a cache of {cache.dtype} on {cache.device} for a model in "
                         f"{model.dtype} on {model.device}")
    if B != cache.batch:
        raise ValueError(f"{B} sequences for a cache made for {cache.batch}")
    if cache.length + T > cache.max_len:
        raise ValueError(f"the cache is full: it holds {cache.length} of {cache.max_len} tokens "
                         f"and {T} more were passed")


# ------------------------------------------------------------------------------
# Where things lie

class Group(NamedTuple):
    """J heads of a layer with the same rank, neighbours in the cache: their blocks as one view."""
    matrices: slice                     # of J · batch matrices, in the order of the blocks
    rows: Tensor                                                    # (J·batch, r, max_len)


class Layout(NamedTuple):
    """Where things of a layer lie; heads in the order of the keys' blocks, if nothing is said."""
    keys: list[Group]
    values: list[Group]
    rows: Tensor                        # (n, max_len): of all its blocks
    basis: Tensor | None                # U of the keys (K, d, d); None: they are unturned
    kept: Tensor | None                 # (K, 1, d) which coordinates are kept, of keys
    mean: Tensor | None                 # (K, d): m
    first_keys: Tensor | None           # (K, B, d, whole), of the first tokens
    first_values: Tensor | None
    to_value_order: Tensor | None       # (K,) places by key of heads by value; None: alike
    written: Tensor                     # (n,): a token's rows, among its q, k and v end to end
    table: Tensor                       # (6, K), for kernel.decode_attention
    width: int                          # of the rows that W_o' takes


def heads_by_rank(ranks: list[int]) -> list[int]:
    """Heads 0 … K − 1, those of the same rank side by side; as they are where all differ."""
    first_of_rank = [ranks.index(r) for r in ranks]
    return sorted(range(len(ranks)), key=first_of_rank.__getitem__)


def write(groups, k: Tensor, v: Tensor, new: slice) -> None:
    """Write keys (K, B, T, d) and values' coordinates (B, T, Σ r) to the tokens `new`."""
    B, T, _ = v.shape
    keys, values = groups
    k = k.flatten(0, 1).mT                                          # (K·B, d, T)
    for matrices, rows in keys:
        rows[:, :, new] = k[matrices, :rows.shape[1]]
    begin = 0
    for _, rows in values:
        JB, r, _ = rows.shape
        end = begin + JB // B * r
        part = v[:, :, begin:end].view(B, T, -1, r)                 # (B, T, J, r)
        rows.unflatten(0, (-1, B))[..., new] = part.permute(2, 0, 3, 1)     # (J, B, r, T)
        begin = end


# ------------------------------------------------------------------------------
# Attention over the rows, in plain PyTorch: everywhere but for a GPU's single tokens (kernel.py)

SCORES = 2 ** 24        # scores computed at a time for a long chunk: 64 MB in float32


def attend_rows(layout: Layout, q: Tensor, added: Tensor | None, begin: int, end: int,
                unseen: Tensor | None) -> Tensor:
    """Attention of queries (K, B, G, T, d), turned, to tokens begin … end − 1: (B, T, width).

    added (K, B, G, T, end − begin): q · R_n m, if there is a mean. unseen (T, end − begin): which
    tokens they do not see; None: they see all. The G queries that share a key-value head form one
    matrix: each stored number is read once and never repeated. One product for all heads of a rank,
    and one softmax, in float32 or wider, for all heads.
    """
    K, B, G, T, d = q.shape
    dtype, scale = q.dtype, d ** -0.5
    q = q.reshape(K * B, G * T, d)
    if added is None:
        scores = q.new_empty(K * B, G * T, end - begin, dtype=wide(dtype))
    else:
        scores = added.reshape(K * B, G * T, -1)
    beta = 0 if added is None else scale
    f = begin                                           # the first token that is not whole
    if layout.first_keys is not None:
        f = min(max(begin, layout.first_keys.shape[-1]), end)
        k = layout.first_keys[..., begin:f].flatten(0, 1).to(scores.dtype)
        some = scores[..., :f - begin]
        some.copy_(torch.baddbmm(some, q.to(scores.dtype), k, beta=beta, alpha=scale))
    for matrices, rows in layout.keys:
        q_r = q[matrices, :, :rows.shape[1]].to(scores.dtype)
        k_r = rows[:, :, f:end].to(scores.dtype)                    # (J·B, r, tokens)
        some = scores[matrices, :, f - begin:]
        torch.baddbmm(some, q_r, k_r, beta=beta, alpha=scale, out=some)

    if unseen is not None:
        scores.unflatten(1, (G, T)).masked_fill_(unseen, float("-inf"))
    weights = scores.softmax(-1).to(dtype)
    first = layout.first_values
    f = begin if first is None else min(max(begin, first.shape[-1]), end)
    if layout.to_value_order is not None:
        weights = moved(weights, layout.to_value_order, B)
        first = None if first is None else first.index_select(0, layout.to_value_order)
    outputs = []
    for matrices, rows in layout.values:
        v_r = rows[:, :, f:end].mT                                  # (J·B, tokens, r)
        outputs.append(torch.bmm(weights[matrices, :, f - begin:], v_r))        # (J·B, G·T, r)
    if first is None:
        return join([for_row(a.view(-1, B, G, T, a.shape[2])) for a in outputs], 2)
    a = torch.bmm(weights[..., :f - begin], first[..., begin:f].flatten(0, 1).mT)
    for (matrices, _), more in zip(layout.values, outputs, strict=True):
        a[matrices, :, :more.shape[2]] += more
    return for_row(a.view(K, B, G, T, d))


def mean_scores(q: Tensor, mean: Tensor, turns: Tensor) -> Tensor:
    """q · R_n m of queries (K, B, G, T, d) as they are, for the n tokens of turns (d, n).

    (K, B, G, T, n), in the dtype of m (K, d): in bfloat16 a large m would drown what differs.
    """
    half = mean.shape[-1] // 2
    m = mean[:, None, None, None]
    q = q.to(mean.dtype)
    partner = q.roll(half, -1)                                      # b for a, a for b
    pairs = q * m + partner * m.roll(half, -1)                      # q_a m_a + q_b m_b
    crossed = q * m.roll(half, -1) - partner * m                    # beyond half: q_b m_a − q_a m_b
    return torch.cat((pairs[..., :half], crossed[..., half:]), -1) @ turns


def turned_mean(mean: Tensor, turns: Tensor) -> Tensor:
    """R_n m of m (K, d), for the n tokens of turns (d, n): (K, n, d)."""
    a, b = mean[:, None].chunk(2, dim=-1)                           # (K, 1, d/2)
    cos, sin = turns.T.chunk(2, dim=-1)                             # (n, d/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend_first(layout: Layout, q: Tensor, k: Tensor, turns: Tensor | None, window: int | None):
    """Attention of the first T tokens, among themselves: (B, T, width).

    q (K, B, G, T, d) as they are, k (K, B, T, d), turned, in key order. PyTorch's own causal
    attention is the faster one here, in one call for all heads: k̂ is made again, values are read
    back from the cache, padded to d and brought into key order, outputs go back into value order.
    """
    K, B, _, T, d = q.shape
    if layout.basis is not None:
        w = 0 if layout.first_keys is None else layout.first_keys.shape[-1]
        k = torch.cat((k[:, :, :w], k[:, :, w:] * layout.kept[:, None]), dim=2)
        k = torch.bmm(k.flatten(1, 2), layout.basis.mT).view(k.shape)
        if layout.mean is not None:
            k = k + turned_mean(layout.mean, turns[:, :T])[:, None].to(k)
    v = k.new_zeros(K * B, T, d)
    for matrices, rows in layout.values:
        v[matrices, :, :rows.shape[1]] = rows[:, :, :T].mT
    if layout.to_value_order is not None:
        v = moved(v, layout.to_value_order.argsort(), B)
    if layout.first_values is not None:
        first = layout.first_values[..., :T].flatten(0, 1).mT
        v[:, :first.shape[1]] = first
    a = causal_attention(q.flatten(0, 1), k.flatten(0, 1)[:, None], v[:, None], window)
    if layout.to_value_order is not None:
        a = moved(a, layout.to_value_order, B)                      # (K·B, G, T, d)
    if layout.first_values is not None:
        return for_row(a.unflatten(0, (-1, B)))
    outputs = []
    for matrices, rows in layout.values:
        part = a[matrices, :, :, :rows.shape[1]]                    # (J·B, G, T, r)
        outputs.append(for_row(part.unflatten(0, (-1, B))))
    return join(outputs, 2)


def in_pieces(q: Tensor, added: Tensor | None, begin: int, end: int, window: int | None):
    """Queries (K, B, G, T, d) of the last T tokens, `added`, and unseen tokens, few at a time.

    Unseen (T, end − begin) is the future, and what the window leaves behind.
    """
    K, B, G, T, _ = q.shape
    token = torch.arange(begin, end, device=q.device)
    now = token[-T:, None]
    unseen = (token > now) | (token <= now - (window or end))
    size = max(1, SCORES // (K * B * G * (end - begin)))
    parts = q.split(size, dim=3)
    some = [None] * len(parts) if added is None else added.split(size, dim=3)
    return zip(parts, some, unseen.split(size), strict=True)


def moved(x: Tensor, heads: Tensor, B: int) -> Tensor:
    """x (K·B, …) with its heads in another order."""
    return x.unflatten(0, (-1, B)).index_select(0, heads).flatten(0, 1)


def for_row(a: Tensor) -> Tensor:
    """Attention's (J, B, G, T, r) of J heads as W_o' takes it, (B, T, J·G·r)."""
    return a.permute(1, 3, 0, 2, 4).flatten(2)


def join(parts: list[Tensor], dim: int) -> Tensor:
    """torch.cat, but without its copy where there is only one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def warn_of_no_kernel(error: Exception) -> None:
    """Where Triton or its C compiler is missing, PyTorch attends; any other error is an error."""
    if isinstance(error, RuntimeError) and "C compiler" not in str(error):
        raise error
    warnings.warn(f"decoding without the Triton kernel, slower: {error}", stacklevel=2)


# ------------------------------------------------------------------------------
# Folding

class Folded(NamedTuple):
    """A layer's weights for a plan. W_qkv' holds, as the blocks of keys lie, of each head the rows
    of its G queries and of its key; then the rows of the values, as their blocks lie."""
    W_qkv: Tensor                       # (H·d + K·d + Σ r, hidden)
    b_qkv: Tensor | None                # Qwen2 has one, and −m is one
    W_o: Tensor                         # (hidden, Σ r over query heads), or (hidden, H·d) if whole
    bias: Tensor | None                 # (hidden): what cut-off means add; None where nothing is
    mean_k: Tensor | None               # (K, 1, d): m, where it is not in b_qkv: behind a norm of k
    rest: tuple | None                  # of first tokens: W_qkv', b_qkv' with rows for all d

    @property
    def nbytes(self) -> int:
        W_qkv, b_qkv = self.rest or self[:2]                        # the one is a view of the other
        return sum(x.nbytes for x in (W_qkv, b_qkv, self.W_o, self.bias) if x is not None)

    def for_first(self) -> "Folded":
        """The weights of a pass that covers first tokens."""
        if self.rest is None:
            return self
        return self._replace(W_qkv=self.rest[0], b_qkv=self.rest[1])


def fold(weights, head_order: Tensor, ranks: Tensor, U: Tensor | None, mean_v: Tensor,
         mean_k: Tensor | None = None, whole: int = 0) -> Folded:
    """A layer's weights (model.Attention) for its plan.

    head_order (2, K): heads as their keys lie, and as their values lie. Of the values by head:
    ranks (K,), U (K, d, d), or None where they are cached unturned, and means (K, d). mean_k
    (K, d), if keys are cached without it.
    """
    K, d = mean_v.shape
    by_key, by_value = head_order.tolist()
    q, k, v = weights.q_proj, weights.k_proj, weights.v_proj
    W_o = weights.o_proj.weight.unflatten(1, (K, -1, d))            # (hidden, K, G, d)
    b_v = [None] * K if v.bias is None else v.bias.chunk(K)
    values = list(zip(v.weight.chunk(K), b_v, W_o.unbind(1), strict=True))
    rests, bias = [], None
    if U is not None:
        for j, r in enumerate(ranks.tolist()):
            U_j, mean = (x[j].to(W_o.device) for x in (U, mean_v))
            *kept, constant = fold_head(*values[j], U_j, mean, r, whole > 0)
            values[j] = kept[:3]
            rests.append(kept[3:])
            bias = constant if bias is None else bias + constant
        bias = bias.to(W_o)

    b_q, b_k, after_norm = q.bias, k.bias, None
    if mean_k is not None and weights.k_norm is not None:
        after_norm = mean_k[by_key][:, None].to(W_o)
    elif mean_k is not None:
        minus_m = -mean_k.flatten().to(W_o.device)
        b_k = (minus_m if b_k is None else b_k.to(minus_m) + minus_m).to(W_o)

    def side_by_side(q: Tensor, k: Tensor, parts: list[Tensor]) -> Tensor:
        """Of each head the rows of its queries and its key, then the values."""
        pairs = list(zip(q.chunk(K), k.chunk(K), strict=True))
        return torch.cat([x for j in by_key for x in pairs[j]] + parts)

    W_parts = [values[j][0] for j in by_value]
    b_parts = [values[j][1] for j in by_value]
    W_rest = [rests[j][0] for j in by_value] if whole and rests else []
    b_rest = [rests[j][1] for j in by_value] if whole and rests else []
    has_bias = b_q is not None or b_k is not None or b_v[0] is not None

    def biases(parts: list, W_parts: list) -> Tensor | None:
        if not has_bias and not (b_rest and parts is not b_parts):
            return None
        zero = W_o.new_zeros
        parts = [zero(len(W)) if b is None else b for b, W in zip(parts, W_parts, strict=True)]
        return side_by_side(zero(len(q.weight)) if b_q is None else b_q,
                            zero(len(k.weight)) if b_k is None else b_k, parts)

    W_all = stored_for_rows(side_by_side(q.weight, k.weight, W_parts + W_rest))
    rows = len(W_all) - sum(map(len, W_rest))
    rest = (W_all, biases(b_parts + b_rest, W_parts + W_rest)) if W_rest else None
    W_out = weights.o_proj.weight                       # as it is where it can be: no second copy
    if U is not None:
        W_out = torch.cat([values[j][2].flatten(1) for j in by_value], dim=1)
    return Folded(W_all[:rows], biases(b_parts, W_parts), stored_for_rows(W_out), bias, after_norm,
                  rest)


def fold_head(W_v: Tensor, b_v: Tensor | None, W_o: Tensor, U: Tensor, mean: Tensor, r: int,
              whole: bool = False):
    """Fold a head's value side into its weights, by the equations on top (transposed: as stored).

    W_v (d, hidden), b_v (d) or None, W_o (hidden, G, d); U (d, d), mean (d). Gives W_v'
    (r, hidden), b_v' (r) or None, W_o' (hidden, G, r), or of all d columns if `whole`; then W_v',
    b_v' of the coordinates beyond r for first tokens, less what the bias adds; then the bias
    (hidden), in U's dtype.
    """
    U_r = U[:, :r]
    cut_off = mean - mean @ U_r @ U_r.T                             # μ (I − P)
    W_o_wide = W_o.to(U)
    bias = W_o_wide.sum(1) @ cut_off
    W = (U.T @ W_v.to(U)).to(W_v)                                   # (d, hidden)
    b = None if b_v is None else (b_v.to(U) @ U).to(b_v)
    b_rest = -(mean @ U[:, r:]).to(W_v) if b is None else b[r:] - (mean @ U[:, r:]).to(b)
    W_o_new = (W_o_wide @ (U if whole else U_r)).to(W_o)
    return W[:r], None if b is None else b[:r], W_o_new, W[r:], b_rest, bias


# ------------------------------------------------------------------------------
# The script

def show_layout(cache: KVCache, most: int = 8) -> None:
    """The tensor as text: a cell is d/8 numbers per token; `#` is stored, `·` a full cache adds."""
    L, K, d = cache.projection.mean_v.shape
    print(f"Layout, heads by number: {LEVELS} cells each, of d/{LEVELS} numbers per token "
          "(# stored, · not)\n")
    for i in range(L):
        for side, name in enumerate(SIDES):
            levels = cache.ranks[side, i, :most] * LEVELS // d
            cells = [f"{'#' * n:·<{LEVELS}s}" for n in levels.tolist()]
            more = " …" if K > most else ""
            offset = cache.offsets[side, i, 0]
            print(f"  layer {i:2d} {name:6s}  {' '.join(cells)}{more}  offset {offset:>9,}")
    print(f"\n  cache.data: {cache.data.numel():,} numbers = batch {cache.batch} · max_len "
          f"{cache.max_len} · Σ ranks {cache.ranks.sum():,}; {cache.data.nbytes:,} bytes\n")


def main():
    parser = cli.arguments(__doc__)
    plan_arguments(parser)
    parser.add_argument("--tokens", type=cli.within(1, 10 ** 7), default=512,
                        help="length of the cache shown [512]")
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    projection, ranks = plans_for(args, model, args.budget)
    show_layout(KVCache(projection, ranks, 1, args.tokens, dtype, device))
    print(f"Bytes for {args.tokens:,} tokens of this model, the same rank everywhere:\n")
    for budget in BUDGETS:
        numbers = args.tokens * uniform_ranks(budget, model.config).sum()
        print(f"  {budget:6.1%}  {numbers * dtype.itemsize:>12,}")


if __name__ == "__main__":
    cli.run_script(main)
