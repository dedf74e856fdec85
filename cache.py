"""The compressed KV cache: one tensor, whose size is the budget.

For every layer, for keys and for values, for every key-value head there is a block of rows
(batch, r, max_len) with that head's own rank r, a multiple of d/8. A row holds one coordinate of
every token, of k U_r (after RoPE) or of v U_r, where U_r is the first r columns of an orthogonal
matrix of the head, one for keys and one for values. All lie end to end in one preallocated tensor:

    data = [ layer 0: keys of head 0 | keys of head 2 | … | values of head 0 | … ][ layer 1: … ] …

The context costs batch · max_len · Σ r numbers: no padding to the widest head, no list that grows
by concatenation. (Beside it stand `turns`, one for all layers and sequences, and what first tokens
keep, both below.) Attention
happens in the small space, for the G query heads of a group at once:

    scores = (q U_r)(k U_r)ᵀ / sqrt(d)      q U_r is made once, stored keys are read as they are
    output = softmax(scores) (v U_r)        r numbers per query head

Values have no RoPE between their weights and the cache, so U_r and U_rᵀ vanish into the weights
before and after them, the paper's "new linear layer" (MatryoshkaKV, arXiv 2410.14731, Figure 2):

    W_v' = W_v U_r, b_v' = b_v U_r      make the coordinates v U_r that are cached
    W_o' = U_rᵀ W_o[h]                  takes weighted sums of them, for each query head h
    bias = Σ_h μ (I − P) W_o[h]         what cut-off means add: attention weights sum to one

These weights belong to the plan, the ranks of all heads, so the cache holds them. A side of a layer
all of whose heads are at rank d is stored without U, its keys with their mean: the full plan gives
the base model's cache.

Not in the paper: heads of the same rank are made neighbours, so that one product serves them all;
and as a smaller rank is the first rows of a larger, `shrink` takes a cache in use to a smaller plan
and runs no layer again. Rows lie as products take them, as kᵀ and vᵀ. And where the projections
have them (projection.py):

    mean_k      rows of keys hold R_n (x_n − m) U_r, x the key before RoPE: −m is a bias of W_k,
                or, where a norm follows (Qwen3), taken off behind it.
                Scores get q · R_n m back, a product with one table for all heads, `turns`: the sum
                over pairs (a, b) of  cos(nθ)(q_a m_a + q_b m_b) + sin(nθ)(q_b m_a − q_a m_b)
    whole       `first` holds, beside `data`, what the ranks cut off of the first tokens: their
                coordinates beyond r, 0 below; of values less μ U, as the bias gives these tokens
                μ (I − P) too. Scores get the keys' part back. The values' part goes through W_o
                once, and each step adds these outputs (`first_outputs`), each times its token's
                attention weight.

    python cache.py                                 # the full cache: its layout and its bytes
    python cache.py --ranks out/ranks.json --budget 0.25
"""
import copy
import itertools
import subprocess
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Model, causal_attention, frequencies, load, rotate, wide
from projection import BUDGETS, LEVELS, SIDES, Projection, check_ranks, uniform_ranks
from support import cli
from support.checkpoint import stored_for_rows
from support.plans import plan_arguments, plans_for


class KVCache:
    """Keys and values of `batch` sequences of equal length, up to `max_len` tokens, at a plan.

    `data` is the one flat tensor, `length` the number of tokens in it, which may be set back;
    `first` (L, 2, K, batch, d, whole), what is cut off of the first tokens, in the order of keys.
    `offsets` (2, L, K): where each block begins; `head_order` (2, L, K): a layer's heads as their
    blocks lie, and `places`, its inverse: where each head's block stands. dtype and device are the
    model's, whose folded weights it holds: one cache serves one model. A forward pass calls
    `before_pass`; for every layer `fold`, `attend` and `output`; then `after_pass`. ValueError for
    ranks or sizes that make no sense, and when it is full. What first tokens take beside `data` is
    `first_nbytes`; once they are there `settle` gives back what only their pass needs.
    """

    def __init__(self, projection: Projection, ranks: Tensor, batch: int, max_len: int,
                 dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        if batch < 1 or max_len < 1:
            raise ValueError(f"batch {batch}, max_len {max_len}: both must be at least 1")
        self.projection = projection
        self.head_dim = projection.mean_v.shape[-1]
        self.batch, self.max_len = batch, max_len
        self.length = 0
        self.span = torch.zeros(2, device=device).long()    # of the kernels: where what the next
                                                            # single token attends to begins, ends
        self.dtype, self.device = dtype, self.span.device   # "cuda" becomes "cuda:0"
        self.turns = None                                   # (d, max_len), if there is a mean, from
                                                            # a model's first pass on
        self.lay_out(ranks)
        # The kernel computes in float32, and its tiles grow with whole tokens.
        fits_kernel = dtype.itemsize in (2, 4) and projection.whole <= self.head_dim
        self.by_kernel = self.span.is_cuda and fits_kernel and self.head_dim % LEVELS == 0

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
        self.places = self.head_order.argsort(2)

        rows = self.ranks.gather(2, self.head_order) * self.batch        # of blocks, in their order
        by_layer = rows.transpose(0, 1)                             # (L, 2, K), as the blocks lie
        ends = by_layer.flatten().cumsum(0).view_as(by_layer)
        begins = (ends - by_layer).transpose(0, 1)
        self.begins = begins.gather(2, self.places)                 # at which row, by head
        self.offsets = self.begins * self.max_len

        total = int(rows.sum())
        self.data = torch.empty(total * self.max_len, dtype=self.dtype, device=self.device)
        self.rows = self.data.view(total, self.max_len)
        self.first = torch.zeros(L, 2, K, self.batch, d, self.projection.whole, dtype=self.dtype,
                                 device=self.device)
        self.layouts = [None] * L                                   # made when first needed,
        self.folded = [None] * L                                    # as they depend on the model
        self.first_outputs = [None] * L                             # (batch, H · whole, hidden)
        self.settled = False

    def layout(self, i: int, G: int) -> "Layout":
        """Where things of layer i lie, for G query heads to each key-value head."""
        if self.layouts[i] is None:
            self.layouts[i] = self.find_layout(i, G)
        return self.layouts[i]

    def find_layout(self, i: int, G: int) -> "Layout":
        B, d = self.batch, self.head_dim
        by_key, by_value = self.head_order[:, i]
        ranks, begins = self.ranks[:, i], self.begins[:, i]
        K = len(by_key)
        begin = int(begins.min())
        rows = self.rows[begin:begin + B * int(ranks.sum())]

        p, basis, mean, by_mean, kept = self.projection, None, None, None, None
        if not self.is_full(0, i):
            basis = p.U_k[i].cpu()[by_key].to(self.device, self.dtype)
            kept = torch.arange(d) < ranks[0, by_key, None, None]   # (K, 1, d)
            kept = kept.to(self.device)
            if p.mean_k is not None:
                mean = p.mean_k[i].cpu()[by_key].to(self.device, wide(self.dtype))
                by_mean = by_pairs(mean)
        to_value_order = None
        if (by_key != by_value).any():
            to_value_order = self.places[0, i, by_value].to(self.device)

        first_keys = self.first[i, 0] if p.whole and basis is not None else None
        whole_values = 0 if self.is_full(1, i) else p.whole
        widths = G * ranks[1, by_value]                             # of the heads' outputs
        ends = widths.cumsum(0)
        width = int(ends[-1])
        columns = (ends - widths)[self.places[1, i]]                # by head
        weights = width + G * whole_values * self.places[1, i]      # behind them, first tokens'
        table = torch.stack((*begins, *ranks, columns, weights))[:, by_key]

        # A decode step writes by one index_select. Which of a token's numbers, q and k and then v
        # end to end, goes to which row? Write each number's own index, and see what the rows got.
        n = B * K * (G + 1) * d
        qk, v = torch.arange(n + B * int(ranks[1].sum())).tensor_split((n,))
        source = torch.empty(len(rows), 1, dtype=torch.long)
        k = qk.view(K, B, G + 1, 1, d)[:, :, -1]
        write(self.groups(i, source), k, v.view(B, 1, -1), slice(0, 1))
        return Layout(*self.groups(i, rows), rows, basis, kept, mean, by_mean, first_keys,
                      whole_values, to_value_order, source[:, 0].to(self.device),
                      table.to(self.device), width + K * G * whole_values)

    def groups(self, i: int, rows: Tensor) -> tuple[list["Group"], list["Group"]]:
        """The groups of keys and of values in the rows of layer i, (n, any width)."""
        sides, row = [], 0
        for side in (0, 1):
            groups, matrix = [], 0
            ranks = self.ranks[side, i, self.head_order[side, i]].tolist()
            for r, alike in itertools.groupby(ranks):
                count = self.batch * len(list(alike))               # of matrices (r, max_len)
                blocks = rows[row:row + count * r].view(count, r, -1)
                groups.append(Group(slice(matrix, matrix + count), blocks))
                row += count * r
                matrix += count
            sides.append(groups)
        return sides[0], sides[1]

    def is_full(self, side: int, i: int) -> bool:
        """Whether all heads of a side of layer i are at rank d: they are then stored without U."""
        return bool((self.ranks[side, i] == self.head_dim).all())

    def block(self, side: int, i: int, j: int) -> Tensor:
        """The rows of one head: (batch, r, max_len)."""
        r, begin = int(self.ranks[side, i, j]), int(self.begins[side, i, j])
        return self.rows[begin:begin + self.batch * r].view(self.batch, r, self.max_len)

    # --------------------------------------------------------------------------
    # What a pass calls

    def before_pass(self, model: Model, B: int, T: int) -> None:
        """ValueError unless the cache suits the model and has room for T more tokens."""
        check_room(self, model, B, T)
        if self.turns is None and self.projection.mean_k is not None:
            self.turns = turn_table(model.config, self.max_len).to(self.device, wide(self.dtype))
        if self.by_kernel and T == 1:
            self.span[1].fill_(self.length + 1)
            if window := model.config.sliding_window:
                self.span[0].fill_(max(0, self.length + 1 - window))

    def after_pass(self, T: int) -> None:
        self.length += T

    def fold(self, i: int, weights) -> "Folded":
        """The weights of layer i (model.Attention) for this plan, made when first asked for."""
        too_few = self.settled and self.length < self.projection.whole
        if self.folded[i] is None or too_few:
            if weights.q_proj is None:
                raise ValueError("the model's weights were dropped when they had been folded for "
                                 "another plan, or the weights of first tokens were given back")
            if too_few:
                self.folded, self.settled = [None] * len(self.folded), False
            p = self.projection
            U = None if self.is_full(1, i) else p.U_v[i]
            mean_k = None if self.is_full(0, i) or p.mean_k is None else p.mean_k[i]
            self.folded[i] = fold(weights, self.head_order[:, i], self.ranks[1, i], U, p.mean_v[i],
                                  mean_k, p.whole)
        return self.folded[i].for_first() if self.length < self.projection.whole else self.folded[i]

    def attend(self, i: int, qk: Tensor, v: Tensor, window=None) -> Tensor:
        """Append T tokens to layer i; each attends to the last `window` up to itself, or all.

        qk (B, K, G + 1, T, d): queries and keys after RoPE, keys less R_n m, heads in the order of
        W_qkv'; v (B, T, Σ r), where values are cut followed by Σ (d − r) in passes with first
        tokens. Returns (B, T, Σ r over query heads), and behind them, where first tokens may be
        seen, their weights (K · G · whole), both for `output`.
        """
        _, _, heads, T, _ = qk.shape
        layout = self.layout(i, heads - 1)
        qk = qk.transpose(0, 1)                                     # (K, B, G + 1, T, d)
        raw = qk[:, :, :-1]                                         # queries
        if layout.basis is not None:                                # q U and k U
            qk = torch.bmm(qk.flatten(1, 3), layout.basis).view(qk.shape)
        q, k = qk[:, :, :-1], qk[:, :, -1]
        end = self.length + T
        if self.length < self.projection.whole:
            v = self.keep_first(layout, i, k, v)
        if T > 1:
            write((layout.keys, layout.values), k, v, slice(self.length, end))
        else:                                   # two operations, whatever the ranks
            numbers = torch.cat((qk.flatten(), v.flatten()))
            torch.index_select(numbers, 0, layout.source, out=layout.rows[:, self.length])
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
            added = mean_scores(raw, layout.by_mean, self.turns[:, begin:end])
        if T == 1:
            return attend_rows(layout, q, added, begin, end, None)
        outputs = []
        for part, some, unseen in in_pieces(q, added, begin, end, window):      # of a long chunk
            outputs.append(attend_rows(layout, part, some, begin, end, unseen))
        return join(outputs, 1)

    def output(self, i: int, a: Tensor) -> Tensor:
        """What layer i's attention adds to the states, (B, T, hidden), from what `attend` gave."""
        folded = self.folded[i]
        n = folded.W_o.shape[1]
        out = F.linear(a[..., :n], folded.W_o, folded.bias)
        if a.shape[-1] == n:
            return out
        if self.first_outputs[i] is None:
            self.first_outputs[i] = self.outputs_of_first(i, self.length + a.shape[1])
        return torch.baddbmm(out, a[..., n:], self.first_outputs[i])

    def settle(self) -> None:
        """Give back the weights that first tokens alone need, as all of them are there.

        To go back to fewer tokens than these takes the model's own weights again.
        """
        for i, folded in enumerate(self.folded):
            if folded is not None and folded.W_o_cut and self.length >= self.projection.whole:
                if self.first_outputs[i] is None:
                    self.first_outputs[i] = self.outputs_of_first(i, self.length)
                self.folded[i] = folded.without_first()
                self.settled = True

    @property
    def first_nbytes(self) -> int:
        """Bytes of the first tokens: what is cut off of them, and its outputs."""
        outputs = (x.nbytes for x in self.first_outputs if x is not None)
        return self.first.nbytes + sum(outputs)

    def outputs_of_first(self, i: int, n: int) -> Tensor:
        """What layer i's first tokens add, by query head and token: (B, H · whole, hidden).

        Of n tokens in the cache; 0 for those to come.
        """
        parts, there = [], min(self.projection.whole, n)
        for j, W in zip(self.head_order[1, i].tolist(), self.folded[i].W_o_cut, strict=True):
            cut = self.first[i, 1, self.places[0, i, j], :, self.head_dim - len(W):, :there]
            parts.append(torch.einsum("bcn,cgh->bgnh", cut, W))
        outputs = torch.cat(parts, dim=1)                           # (B, H, there, hidden)
        outputs = F.pad(outputs, (0, 0, 0, self.projection.whole - there))
        return outputs.flatten(1, 2)

    def keep_first(self, layout: "Layout", i: int, k: Tensor, v: Tensor) -> Tensor:
        """Store what is cut off of those new tokens that are first ones; returns v (B, T, Σ r).

        k (K, B, T, d); v (B, T, Σ r + Σ (d − r)): W_v' made the values beyond each rank too.
        """
        w = min(self.projection.whole - self.length, k.shape[2])    # so many of the new ones
        now = slice(self.length, self.length + w)
        if layout.first_keys is not None:
            layout.first_keys[..., now] = (k[:, :, :w] * ~layout.kept[:, None]).mT
        if not layout.whole_values:
            return v
        by_value = self.head_order[1, i]
        counts = self.head_dim - self.ranks[1, i, by_value]         # cut off, at the end of v
        v, cut = v.split([v.shape[-1] - int(counts.sum()), int(counts.sum())], dim=-1)
        places = self.places[0, i, by_value].tolist()
        for place, part in zip(places, cut[:, :w].split(counts.tolist(), dim=-1), strict=True):
            self.first[i, 1, place, :, self.head_dim - part.shape[-1]:, now] = part.mT
        self.first_outputs[i] = None                                # as they were made before
        return v

    def attend_on_gpu(self, raw: Tensor, q: Tensor, window, layout: "Layout") -> Tensor:
        """One token's attention by the Triton kernels, all heads at once whatever their ranks."""
        from kernel import decode_attention  # here, so that a CPU needs no Triton
        q, raw = (x[:, :, :, 0].transpose(0, 1) for x in (q, raw))  # (B, K, G, d)
        tokens = min(self.length + 1, window or self.length + 1)
        return decode_attention(
            q, self.rows, layout.table, self.span, tokens, layout.width, self.head_dim ** -0.5,
            raw, layout.mean, self.turns, layout.first_keys, layout.whole_values)[:, None]

    # --------------------------------------------------------------------------
    # What nesting buys

    def shrink(self, ranks: Tensor) -> None:
        """Take a cache in use to a plan at or below its own; no layer runs again.

        A smaller rank is the first rows of a block. Where all heads of a side of a layer were at
        rank d, rows are without U, and take it now; keys lose their mean. What is cut off is given
        back; for a moment both tensors are there, and where memory does not suffice for that the
        cache stays as it was. The next pass folds the model's weights anew. ValueError for a rank
        above today's.
        """
        ranks = ranks.cpu()
        if ranks.shape != self.ranks.shape or (ranks > self.ranks).any():
            raise ValueError("a cache shrinks to a plan at or below its own")
        after = copy.copy(self)
        after.lay_out(ranks)
        for side, i in itertools.product((0, 1), range(ranks.shape[1])):
            after.keep(self, side, i)
        vars(self).update(vars(after))

    def keep(self, before: "KVCache", side: int, i: int) -> None:
        """Copy a side of layer i, times U if that is due now."""
        p, n = self.projection, self.length
        w = min(n, p.whole)                             # first tokens that are there
        due = before.is_full(side, i) and not self.is_full(side, i)
        U, mean_v = (p.U_k, p.U_v)[side][i], p.mean_v[i]
        places, places_before = (cache.places[0, i].tolist() for cache in (self, before))
        for j, (place, place_before) in enumerate(zip(places, places_before, strict=True)):
            new = self.block(side, i, j)[..., :n]
            old = before.block(side, i, j)[..., :n]
            r = new.shape[1]
            first = before.first[i, side, place_before].clone()     # (B, d, whole)
            if due:
                if side == 0 and self.turns is not None:        # None: no model ever wrote here
                    mean = p.mean_k[i, j:j + 1].to(self.turns)
                    old = (old - turned_mean(mean, self.turns[:, :n])[0].T).to(old)
                old = U[j].T.to(old) @ old
            new.copy_(old[:, :r])
            cut = slice(r, old.shape[1])
            first[:, cut, :w] = old[:, cut, :w]
            if side == 1:                               # the bias now adds it
                first[:, cut, :w] -= (mean_v[j] @ U[j])[cut, None].to(first)
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
    """Where things of a layer lie; heads are in key order, as the blocks of keys are."""
    keys: list[Group]
    values: list[Group]                 # in value order
    rows: Tensor                        # (n, max_len): of all its blocks
    basis: Tensor | None                # U of the keys (K, d, d); None: they are stored without
    kept: Tensor | None                 # (K, 1, d) which coordinates are kept, of keys
    mean: Tensor | None                 # (K, d): m
    by_mean: tuple | None               # what `rotate` takes for the product with m
    first_keys: Tensor | None           # (K, B, d, whole): what is cut off of the first tokens
    whole_values: int                   # first tokens whose weights `output` takes
    to_value_order: Tensor | None       # (K,) places in key order, by value; None: orders are alike
    source: Tensor                      # (n,): where a token's rows are in its q, k, v end to end
    table: Tensor                       # (6, K), for kernel.decode_attention
    width: int                          # of what kernel.decode_attention returns


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
    """Attention of queries (K, B, G, T, d), times U, to tokens begin … end − 1: (B, T, width).

    added (K, B, G, T, end − begin): q · R_n m, if there is a mean; overwritten. unseen
    (T, end − begin): which tokens they do not see; None: they see all. The G queries that share a
    key-value head form one matrix: each stored number is read once and never repeated. One product
    for all heads of a rank, and one softmax, in float32 or wider, for all heads.
    """
    K, B, G, T, d = q.shape
    dtype, scale = q.dtype, d ** -0.5
    q = q.reshape(K * B, G * T, d).to(wide(dtype))
    shape, beta = (K * B, G * T, end - begin), 0 if added is None else scale
    scores = q.new_empty(shape) if added is None else added.reshape(shape)
    for matrices, rows in layout.keys:
        some, k = scores[matrices], rows[:, :, begin:end].to(q.dtype)   # k (J·B, r, tokens)
        torch.baddbmm(some, q[matrices, :, :k.shape[1]], k, beta=beta, alpha=scale, out=some)
    if layout.first_keys is not None and begin < layout.first_keys.shape[-1]:
        cut = layout.first_keys[..., begin:end].flatten(0, 1).to(q.dtype)
        scores[..., :cut.shape[-1]].add_(torch.bmm(q, cut), alpha=scale)

    if unseen is not None:
        scores.unflatten(1, (G, T)).masked_fill_(unseen, float("-inf"))
    weights = scores.softmax(-1)
    if layout.to_value_order is not None:
        weights = moved(weights, layout.to_value_order, B)
    parts = [torch.bmm(weights[matrices], rows[:, :, begin:end].to(q.dtype).mT)
             for matrices, rows in layout.values]                   # (J·B, G·T, r)
    if begin < layout.whole_values:                                 # else none of them is seen
        seen = weights[..., :layout.whole_values - begin]
        parts.append(F.pad(seen, (begin, layout.whole_values - begin - seen.shape[-1])))
    return join([for_row(a.unflatten(1, (G, T)), B) for a in parts], 2).to(dtype)


def mean_scores(q: Tensor, by_mean: tuple, turns: Tensor) -> Tensor:
    """q · R_n m of queries (K, B, G, T, d) as they are, for the n tokens of turns (d, n).

    (K, B, G, T, n), in the dtype of m: in bfloat16 a large m would drown what differs. What stands
    by the cos and the sin of a pair (`turns`, above) is what RoPE makes of q with m_a, −m_b in
    place of a cos and a sin.
    """
    q = rotate(q.to(turns.dtype), *by_mean)
    return (q.flatten(0, -2) @ turns).view(*q.shape[:-1], -1)       # one product for all heads


def turn_table(config, max_len: int) -> Tensor:
    """cos nθ of every pair's θ and position n, and below them sin nθ: (d, max_len)."""
    angle = frequencies(config)[:, None] * torch.arange(max_len)
    return torch.cat((angle.cos(), angle.sin()))


def by_pairs(mean: Tensor) -> tuple[Tensor, Tensor]:
    """m (K, d) as `rotate` takes it in place of cos and sin, for queries (K, B, G, T, d)."""
    a, b = mean[:, None, None, None].chunk(2, dim=-1)
    return torch.cat((a, a), dim=-1), torch.cat((b, -b), dim=-1)    # (−sin, sin), as Rope has it


def turned_mean(mean: Tensor, turns: Tensor) -> Tensor:
    """R_n m of m (K, d), for the n tokens of turns (d, n): (K, n, d)."""
    a, b = mean[:, None].chunk(2, dim=-1)                           # (K, 1, d/2)
    cos, sin = turns.T.chunk(2, dim=-1)                             # (n, d/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend_first(layout: Layout, q: Tensor, k: Tensor, turns: Tensor | None, window: int | None):
    """Attention of the first T tokens, among themselves: (B, T, width).

    q (K, B, G, T, d) before U, k (K, B, T, d) times U, in key order. PyTorch's own causal attention
    is the faster one here, in one call for all heads, each of d coordinates: k̂ is made of the first
    r of k, of whole tokens all d, times Uᵀ, plus R_n m; values are read back from the cache, padded
    to d and brought into key order, outputs go back into value order. The first tokens' weights
    come along as coordinates r, r + 1, … of the output: values have a 1 there, each such token in
    its own.
    """
    K, B, _, T, d = q.shape
    if layout.basis is not None:
        w = 0 if layout.first_keys is None else layout.first_keys.shape[-1]
        k = torch.cat((k[:, :, :w], k[:, :, w:] * layout.kept[:, None]), dim=2)
        k = torch.bmm(k.flatten(1, 2), layout.basis.mT).view(k.shape)
        if layout.mean is not None:
            k = k + turned_mean(layout.mean, turns[:, :T])[:, None].to(k)
    w = layout.whole_values
    v = k.new_zeros(K * B, T, max(d, d - d // LEVELS + w))
    for matrices, rows in layout.values:
        r = rows.shape[1]
        v[matrices, :, :r] = rows[:, :, :T].mT
        if r < d:
            v[matrices, :w, r:r + w] = torch.eye(w)[:T].to(v)
    if layout.to_value_order is not None:
        v = moved(v, layout.to_value_order.argsort(), B)
    a = causal_attention(q.flatten(0, 1), k.flatten(0, 1)[:, None], v[:, None], window)
    if layout.to_value_order is not None:
        a = moved(a, layout.to_value_order, B)                      # (K·B, G, T, d or more)
    parts = [a[matrices, :, :, :rows.shape[1]] for matrices, rows in layout.values]
    if w:
        weights = a.new_zeros(*a.shape[:3], w)
        for matrices, rows in layout.values:
            r = rows.shape[1]
            if r < d:
                weights[matrices] = a[matrices, :, :, r:r + w]
        parts.append(weights)
    return join([for_row(part, B) for part in parts], 2)


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


def for_row(a: Tensor, B: int) -> Tensor:
    """Attention's (J·B, G, T, r) of J heads as W_o' takes it, (B, T, J·G·r)."""
    return a.unflatten(0, (-1, B)).permute(1, 3, 0, 2, 4).flatten(2)


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
    W_o: Tensor                         # (hidden, Σ r over query heads)
    bias: Tensor | None                 # (hidden): what cut-off means add; None where nothing is
    mean_k: Tensor | None               # (K, 1, d): m, where it is not in b_qkv: behind a norm of k
    first: tuple | None                 # W_qkv', b_qkv' of passes with first tokens, with rows for
                                        # all d: W_qkv is a view of its start
    W_o_cut: list[Tensor]               # for first tokens' outputs: of each head, in the order of
                                        # values, (d − r, G, hidden)

    @property
    def nbytes(self) -> int:
        W_qkv, b_qkv = self.first or self[:2]
        tensors = W_qkv, b_qkv, self.W_o, self.bias, *self.W_o_cut
        return sum(x.nbytes for x in tensors if x is not None)

    def for_first(self) -> "Folded":
        """The weights of a pass that covers first tokens."""
        return self._replace(W_qkv=self.first[0], b_qkv=self.first[1]) if self.first else self

    def without_first(self) -> "Folded":
        """The weights of all other passes, in memory of their own."""
        b = None if self.b_qkv is None else self.b_qkv.clone()
        return self._replace(W_qkv=stored_for_rows(self.W_qkv.clone()), b_qkv=b, first=None,
                             W_o_cut=[])


def fold(weights, head_order: Tensor, ranks: Tensor, U: Tensor | None, mean_v: Tensor,
         mean_k: Tensor | None = None, whole: int = 0) -> Folded:
    """A layer's weights (model.Attention) for its plan.

    head_order (2, K): heads as their keys lie, and as their values lie. Of the values by head:
    ranks (K,), U (K, d, d), or None where they are cached without it, and means (K, d). mean_k
    (K, d), if keys are cached less it.
    """
    K, d = mean_v.shape
    (by_key, by_value), r = head_order.tolist(), ranks.tolist()
    q, k, v, W_o = weights.q_proj, weights.k_proj, weights.v_proj, weights.o_proj.weight
    b_q, b_k, b_v = (W_o.new_zeros(len(x.weight)) if x.bias is None else x.bias for x in (q, k, v))
    has_bias, after_norm, bias, W_o_cut = v.bias is not None, None, None, []
    if mean_k is not None and weights.k_norm is not None:
        after_norm = mean_k[by_key][:, None].to(W_o)
    elif mean_k is not None:
        has_bias, m = True, mean_k.flatten().to(W_o.device)
        b_k = (b_k.to(m) - m).to(W_o)

    heads = list(zip(v.weight.chunk(K), b_v.chunk(K), W_o.unflatten(1, (K, -1, d)).unbind(1),
                     strict=True))
    if U is not None:                                   # else W_o as it is: no second copy
        U, mean_v = U.to(W_o.device), mean_v.to(W_o.device)
        heads = [fold_head(*heads[j], U[j], mean_v[j], r[j]) for j in range(K)]
        bias = sum(head[3] for head in heads).to(W_o)
        W_o = torch.cat([heads[j][2][..., :r[j]].flatten(1) for j in by_value], dim=1)
        if whole:
            W_o_cut = [heads[j][2][..., r[j]:].permute(2, 1, 0).contiguous() for j in by_value]

    def in_order(q: Tensor, k: Tensor, v: list[Tensor]) -> Tensor:
        """Of each head its queries and its key; values up to r; and those beyond it, if whole."""
        pairs = list(zip(q.chunk(K), k.chunk(K), strict=True))
        beyond = [v[j][r[j]:] for j in by_value] if whole else []
        return torch.cat([x for j in by_key for x in pairs[j]]
                         + [v[j][:r[j]] for j in by_value] + beyond)

    W = stored_for_rows(in_order(q.weight, k.weight, [head[0] for head in heads]))
    b = in_order(b_q, b_k, [head[1] for head in heads])
    n = len(q.weight) + len(k.weight) + sum(r)
    return Folded(W[:n], b[:n] if has_bias else None, stored_for_rows(W_o), bias, after_norm,
                  (W, b) if n < len(W) else None, W_o_cut)


def fold_head(W_v: Tensor, b_v: Tensor, W_o: Tensor, U: Tensor, mean: Tensor, r: int):
    """Fold a head's value side into its weights, by the equations on top (transposed: as stored).

    W_v (d, hidden), b_v (d), W_o (hidden, G, d); U (d, d), mean (d). Gives W_v' (d, hidden), b_v'
    (d) and W_o' (hidden, G, d): the first r for all tokens, the others for whole first tokens,
    where b_v' has −μ U; and the bias (hidden), in U's dtype.
    """
    U_r, W_o_wide = U[:, :r], W_o.to(U)
    cut_off = mean - mean @ U_r @ U_r.T                             # μ (I − P)
    W = (U.T @ W_v.to(U)).to(W_v)
    b = (b_v.to(U) @ U).to(b_v)
    b[r:] -= (mean @ U[:, r:]).to(b)
    return W, b, (W_o_wide @ U).to(W_o), W_o_wide.sum(1) @ cut_off


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
    for budget in BUDGETS if model.config.head_dim % LEVELS == 0 else (1.0,):
        numbers = args.tokens * uniform_ranks(budget, model.config).sum()
        print(f"  {budget:6.1%}  {numbers * dtype.itemsize:>12,}")


if __name__ == "__main__":
    cli.run_script(main)
