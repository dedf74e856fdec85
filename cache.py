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
and runs no layer again. Keys lie as products take them, as kᵀ.

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

from model import Model, causal_attention, load, wide
from projection import BUDGETS, LEVELS, SIDES, Projection, check_ranks, uniform_ranks
from support import cli
from support.checkpoint import stored_for_rows
from support.plans import plan_arguments, plans_for


class KVCache:
    """Keys and values of `batch` sequences of equal length, up to `max_len` tokens, at a plan.

    `data` is the one flat tensor, `length` the number of tokens in it, which may be set back.
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

        basis = None                                                # U_r, zero beyond each rank
        if not self.is_full(0, i):
            kept = torch.arange(d) < ranks[0][:, None, None]        # (K, 1, d)
            basis = (self.projection.U_k[i].cpu() * kept)[by_key].to(self.device, self.dtype)
        to_value_order = None
        if (by_key != by_value).any():
            to_value_order = by_key.argsort()[by_value].to(self.device)

        widths = G * ranks[1, by_value]                             # of each head's output
        ends = widths.cumsum(0)
        columns = torch.empty_like(ends).scatter_(0, by_value, ends - widths)       # by head
        table = torch.cat((first_rows, ranks, columns[None]))[:, by_key].to(self.device)

        # Which numbers of a token's queries, keys and values go to which row: their places, written
        # as they are.
        places = torch.arange(B * (K * (G + 1) * d + int(ranks[1].sum())))
        qk, v = places.tensor_split((B * K * (G + 1) * d,))
        written = torch.empty(len(rows), 1, dtype=torch.long)
        k = qk.view(K, B, G + 1, 1, d)[:, :, -1]
        write(self.groups(i, written), k, v.view(B, 1, -1), slice(0, 1))
        return Layout(*self.groups(i, rows), rows, basis, to_value_order,
                      written[:, 0].to(self.device), table, int(ends[-1]))

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
            U = None if self.is_full(1, i) else self.projection.U_v[i]
            self.folded[i] = fold(weights, self.head_order[:, i], self.ranks[1, i], U,
                                  self.projection.mean_v[i])
        return self.folded[i]

    def attend(self, i: int, qk: Tensor, v: Tensor, window=None) -> Tensor:
        """Append T tokens to layer i; each attends to the last `window` up to itself, or all.

        qk (B, K, G + 1, T, d): queries and keys after RoPE; v (B, T, Σ r); all as W_qkv' makes
        them. Returns (B, T, Σ r over query heads), for W_o'.
        """
        _, _, heads, T, _ = qk.shape
        layout = self.layout(i, heads - 1)
        qk = qk.transpose(0, 1)                                     # (K, B, G + 1, T, d)
        if layout.basis is not None:                                # q U_r and k U_r
            qk = torch.bmm(qk.flatten(1, 3), layout.basis).view(qk.shape)
        q, k = qk[:, :, :-1], qk[:, :, -1]
        end = self.length + T
        if T > 1:
            write((layout.keys, layout.values), k, v, slice(self.length, end))
        else:                                   # three operations, whatever the ranks
            numbers = torch.cat((qk.flatten(), v.flatten()))
            layout.rows[:, self.length:end] = numbers.index_select(0, layout.written)[:, None]
        if T > 1 and self.length == 0:
            return attend_first(layout, q, k, window)
        if T == 1 and self.by_kernel:
            try:
                return self.attend_on_gpu(q, window, layout)
            except (ImportError, OSError, subprocess.SubprocessError, RuntimeError) as error:
                warn_of_no_kernel(error)
                self.by_kernel = False
        begin = max(0, self.length + 1 - window) if window else 0   # no new token sees earlier ones
        if T == 1:
            return attend_rows(layout, q, begin, end, None)
        pieces = in_pieces(q, begin, end, window)       # of a long chunk
        return join([attend_rows(layout, part, begin, end, unseen) for part, unseen in pieces], 1)

    def attend_on_gpu(self, q: Tensor, window, layout: "Layout") -> Tensor:
        """One token's attention by the Triton kernels, all heads at once whatever their ranks."""
        from kernel import decode_attention  # here, so that a CPU needs no Triton
        q = q[:, :, :, 0].transpose(0, 1)                           # (B, K, G, d)
        tokens = min(self.length + 1, window or self.length + 1)
        return decode_attention(q, self.rows, layout.table, self.span, tokens, layout.width,
                                self.head_dim ** -0.5)[:, None]

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
        for side, i, j in itertools.product(*map(range, ranks.shape)):
            old = before.block(side, i, j)[..., :self.length]
            new = self.block(side, i, j)[..., :self.length]
            r = new.shape[1]
            if before.is_full(side, i) and not self.is_full(side, i):
                U = (self.projection.U_k, self.projection.U_v)[side][i, j]
                old = U[:, :r].T.to(new) @ old
            new.copy_(old[:, :r])


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
    """Where things of a layer lie."""
    keys: list[Group]
    values: list[Group]
    rows: Tensor                        # (n, max_len): of all its blocks
    basis: Tensor | None                # U_r of the keys as their blocks lie, (K, d, d); None: I
    to_value_order: Tensor | None       # (K,) places by key of heads by value; None: alike
    written: Tensor                     # (n,): a token's rows, among its q, k and v end to end
    table: Tensor               # (5, K), by key: first rows and ranks of both sides, output column
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


def attend_rows(layout: Layout, q: Tensor, begin: int, end: int, unseen: Tensor | None) -> Tensor:
    """Attention of queries (K, B, G, T, d), turned, to tokens begin … end − 1: (B, T, Σ r).

    unseen (T, end − begin): which of them they do not see; None: they see all. The G queries that
    share a key-value head form one matrix: each stored number is read once and never repeated. One
    product for all heads of a rank, and one softmax, in float32 or wider, for all heads.
    """
    K, B, G, T, d = q.shape
    dtype = q.dtype
    q = q.reshape(K * B, G * T, d)
    scores = q.new_empty(K * B, G * T, end - begin, dtype=wide(dtype))
    for matrices, rows in layout.keys:
        q_r = q[matrices, :, :rows.shape[1]].to(scores.dtype)
        k_r = rows[:, :, begin:end].to(scores.dtype)                # (J·B, r, tokens)
        some = scores[matrices]
        torch.baddbmm(some, q_r, k_r, beta=0, alpha=d ** -0.5, out=some)

    if unseen is not None:
        scores.unflatten(1, (G, T)).masked_fill_(unseen, float("-inf"))
    weights = scores.softmax(-1).to(dtype)
    if layout.to_value_order is not None:
        weights = moved(weights, layout.to_value_order, B)
    outputs = []
    for matrices, rows in layout.values:
        v_r = rows[:, :, begin:end].mT                              # (J·B, tokens, r)
        a = torch.bmm(weights[matrices], v_r)                       # (J·B, G·T, r)
        outputs.append(for_row(a.view(-1, B, G, T, a.shape[2])))
    return join(outputs, 2)


def attend_first(layout: Layout, q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """Attention of the first T tokens, among themselves: (B, T, Σ r over query heads).

    q (K, B, G, T, d), k (K, B, T, d), in key order, zero beyond each rank. PyTorch's own causal
    attention is the faster one here, in one call for all heads: values are read back from the
    cache, padded to d and brought into key order, and outputs go back into value order.
    """
    K, B, _, T, d = q.shape
    v = k.new_zeros(K * B, T, d)
    for matrices, rows in layout.values:
        v[matrices, :, :rows.shape[1]] = rows[:, :, :T].mT
    if layout.to_value_order is not None:
        v = moved(v, layout.to_value_order.argsort(), B)
    q = q.flatten(0, 1)                                             # (K·B, G, T, d)
    k = k.flatten(0, 1)[:, None]                                    # (K·B, 1, T, d)
    a = causal_attention(q, k, v[:, None], window)
    if layout.to_value_order is not None:
        a = moved(a, layout.to_value_order, B)
    outputs = []
    for matrices, rows in layout.values:
        part = a[matrices, :, :, :rows.shape[1]]                    # (J·B, G, T, r)
        outputs.append(for_row(part.unflatten(0, (-1, B))))
    return join(outputs, 2)


def in_pieces(q: Tensor, begin: int, end: int, window: int | None):
    """Queries (K, B, G, T, d) of the last T tokens and those they do not see, few at a time.

    Unseen (T, end − begin) is the future, and what the window leaves behind.
    """
    K, B, G, T, _ = q.shape
    token = torch.arange(begin, end, device=q.device)
    now = token[-T:, None]
    unseen = (token > now) | (token <= now - (window or end))
    size = max(1, SCORES // (K * B * G * (end - begin)))
    return zip(q.split(size, dim=3), unseen.split(size), strict=True)


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
    b_qkv: Tensor | None                # Qwen2 has one
    W_o: Tensor                                                     # (hidden, Σ r over query heads)
    bias: Tensor | None                 # (hidden): what cut-off means add; None where nothing is


def fold(weights, head_order: Tensor, ranks: Tensor, U: Tensor | None, mean: Tensor) -> Folded:
    """A layer's weights (model.Attention) for its plan.

    head_order (2, K): heads as their keys lie, and as their values lie. Of the values by head:
    ranks (K,), U (K, d, d), or None where they are cached unturned, and means (K, d).
    """
    K, d = mean.shape
    by_key, by_value = head_order.tolist()
    q, k, v = weights.q_proj, weights.k_proj, weights.v_proj
    W_o = weights.o_proj.weight.unflatten(1, (K, -1, d))            # (hidden, K, G, d)
    b_v = [None] * K if v.bias is None else v.bias.chunk(K)
    values = list(zip(v.weight.chunk(K), b_v, W_o.unbind(1), strict=True))
    bias = None
    if U is not None:
        for j, r in enumerate(ranks.tolist()):
            U_r = U[j, :, :r].to(v.weight.device)
            *values[j], constant = fold_head(*values[j], U_r, mean[j].to(U_r))
            bias = constant if bias is None else bias + constant
        bias = bias.to(W_o)

    def side_by_side(q: Tensor, k: Tensor, parts: list[Tensor]) -> Tensor:
        """Of each head the rows of its queries and its key, then the values."""
        pairs = list(zip(q.chunk(K), k.chunk(K), strict=True))
        return torch.cat([x for j in by_key for x in pairs[j]] + [parts[j] for j in by_value])

    W_qkv = stored_for_rows(side_by_side(q.weight, k.weight, [W for W, _, _ in values]))
    b_qkv = None
    if q.bias is not None:
        b_qkv = side_by_side(q.bias, k.bias, [b for _, b, _ in values])
    W_out = weights.o_proj.weight                       # as it is where it can be: no second copy
    if U is not None:
        W_out = torch.cat([values[j][2].flatten(1) for j in by_value], dim=1)
    return Folded(W_qkv, b_qkv, stored_for_rows(W_out), bias)


def fold_head(W_v: Tensor, b_v: Tensor | None, W_o: Tensor, U_r: Tensor, mean: Tensor):
    """Fold a head's value side into its weights, by the equations on top (transposed: as stored).

    W_v (d, hidden), b_v (d) or None, W_o (hidden, G, d); U_r (d, r), mean (d). Gives W_v'
    (r, hidden), b_v' (r) or None, W_o' (hidden, G, r), and the bias (hidden), in U_r's dtype.
    """
    cut_off = mean - mean @ U_r @ U_r.T                             # μ (I − P)
    W_o_wide = W_o.to(U_r)
    bias = W_o_wide.sum(1) @ cut_off
    W_v_new = U_r.T @ W_v.to(U_r)
    W_o_new = W_o_wide @ U_r
    if b_v is not None:
        b_v = (b_v.to(U_r) @ U_r).to(b_v)
    return W_v_new.to(W_v), b_v, W_o_new.to(W_o), bias


# ------------------------------------------------------------------------------
# The script

def show_layout(cache: KVCache, most: int = 8) -> None:
    """The tensor as text: a cell is d/8 numbers per token; `#` is stored, `·` a full cache adds."""
    L, K, d = cache.projection.mean_v.shape
    print("Layout, heads by number: 8 cells each, of d/8 numbers per token (# stored, · not)\n")
    for i in range(L):
        for side, name in enumerate(SIDES):
            levels = cache.ranks[side, i, :most] * LEVELS // d
            cells = [f"{'#' * n:·<8s}" for n in levels.tolist()]
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
