"""The compressed KV cache: one tensor, whose size is the budget.

For every layer, for keys and for values, for every key-value head there is a block of rows
(batch, r, max_len) with that head's own rank r, a multiple of d/8. A row holds one coordinate of
every token, of k U_r (after RoPE) or of v U_r, where U_r is the first r columns of an orthogonal
matrix of the head, one for keys and one for values. All lie end to end in one preallocated tensor:

    data = [ layer 0: keys of head 0 | keys of head 2 | … | values of head 0 | … ][ layer 1: … ] …

Heads of the same rank are made neighbours: one product serves them all. The context costs
batch · max_len · Σ r numbers: no padding to the widest head, no list that grows by concatenation.
Attention happens in the small space, for the G query heads that share a key-value head:

    scores = (q U_r)(k U_r)ᵀ / sqrt(d)      queries are turned once, stored keys read as they are
    output = softmax(scores) (v U_r)        r numbers per query head; W_o' = U_rᵀ W_o takes them

This is MatryoshkaKV (arXiv 2410.14731). U_r of the values is folded into W_v and W_o (folding.py);
these weights belong to the plan, the ranks of all heads, so the cache holds them. A side of a layer
all of whose heads are at rank d is stored unturned: the full plan gives the base model's cache.

Why rows: a smaller rank is the first of them, so that `shrink` takes a cache in use to a smaller
plan and runs no layer again, which is what nesting buys; and keys lie as products take them, as kᵀ.

    python cache.py                                 # the full cache: its layout and its bytes
    python cache.py --ranks out/ranks.json --budget 0.25        # or --budget alone: uniform ranks
"""
import copy
import itertools
import subprocess
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

import common
import folding
from attention import Group, attend_first, attend_rows, attend_stored
from model import Model, load
from plans import plan_arguments, plan_for
from projection import BUDGETS, LEVELS, SIDES, Projection, check_ranks, uniform_ranks

TILE = 4096             # tokens turned at a time where heads of a side, all at rank d, shrink


class KVCache:
    """Keys and values of `batch` sequences of equal length, up to `max_len` tokens, at a plan.

    `data` is the one flat tensor, `length` the number of tokens in it, `offsets` (2, L, K) where
    each block begins, `head_order` (2, L, K) a layer's heads as their blocks lie. dtype and device
    are the model's, whose folded weights it holds: one cache serves one model. A forward pass calls
    `begin`; for every layer `fold` and `attend`; then `advance`. ValueError for ranks or sizes that
    make no sense, and when it is full.

    On the device are `span`, begin and end of what a token attends to, for the kernel, and after
    `fix_launches` the next `position`: by both, kernel or not, launches are alike at any length.
    """

    def __init__(
        self,
        projection: Projection,
        ranks: Tensor,
        batch: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        if batch < 1 or max_len < 1:
            raise ValueError(f"batch {batch}, max_len {max_len}: both must be at least 1")
        self.projection = projection
        self.head_dim = projection.mean_v.shape[-1]
        self.batch, self.max_len = batch, max_len
        self.length = 0
        self.position = None                                        # or (1,) int64 on the device
        self.span = torch.zeros(2, device=device).long()
        self.dtype, self.device = dtype, self.span.device           # "cuda" becomes "cuda:0"
        self.lay_out(ranks)

    # --------------------------------------------------------------------------
    # The layout that a plan asks for

    def lay_out(self, ranks: Tensor) -> None:
        """Allocate `data` for a plan, empty, and note where everything lies."""
        L, K, d = self.projection.mean_v.shape
        check_ranks(ranks, L, K, d)
        if ranks.ndim != 3:
            raise ValueError(f"ranks of shape {list(ranks.shape)}; a cache has one plan, (2, L, K)")
        self.ranks = ranks.cpu().long()
        layers = self.ranks.flatten(0, 1).tolist()                  # of keys, then of values
        by_rank = [heads_by_rank(of_layer) for of_layer in layers]
        self.head_order = torch.tensor(by_rank).view(2, L, K)

        rows = self.ranks.gather(2, self.head_order) * self.batch        # of blocks, in their order
        by_layer = rows.transpose(0, 1)                             # (L, 2, K), as the blocks lie
        ends = by_layer.flatten().cumsum(0).view_as(by_layer)
        starts = (ends - by_layer).transpose(0, 1)
        self.first_rows = torch.empty_like(starts)                  # the same, by head
        self.first_rows.scatter_(2, self.head_order, starts)
        self.offsets = self.first_rows * self.max_len

        total = int(rows.sum())
        size = total * self.max_len
        self.data = torch.empty(size, dtype=self.dtype, device=self.device)
        self.rows = self.data.view(total, self.max_len)
        has_triton_dtype = self.dtype.itemsize in (2, 4)            # Triton: no float64
        self.by_kernel = self.data.is_cuda and has_triton_dtype

        self.groups, self.layer_rows = [], []
        for i in range(L):
            keys = self.group_heads(0, i)
            values = self.group_heads(1, i)
            self.groups.append((keys, values))

            begin, end = starts[0, i, 0], ends[i, 1, -1]
            self.layer_rows.append(self.rows[begin:end])
        self.key_bases = [self.key_basis(i) for i in range(L)]
        self.folded, self.found_places = [None] * L, [None] * L     # made when first needed

    def group_heads(self, side: int, i: int) -> list[Group]:
        """The groups of keys (0) or values (1) of layer i: one where ranks are uniform."""
        heads = self.head_order[side, i]
        ranks = self.ranks[side, i, heads].tolist()
        row = int(self.first_rows[side, i, heads[0]])
        groups, first = [], 0
        for r, alike in itertools.groupby(ranks):
            count = self.batch * len(list(alike))                   # of matrices (r, max_len)
            matrices = slice(first, first + count)
            rows = self.rows[row:row + count * r]
            blocks = rows.view(count, r, self.max_len)
            groups.append(Group(matrices, blocks))
            row += count * r
            first += count
        return groups

    def is_full(self, side: int, i: int) -> bool:
        """Whether all heads of a side of layer i are at rank d: they are then stored unturned."""
        ranks = self.ranks[side, i]
        return bool((ranks == self.head_dim).all())

    def key_basis(self, i: int) -> Tensor | None:
        """U_r of layer i's keys, as their blocks lie, (K, d, d), zero beyond each rank."""
        if self.is_full(0, i):
            return None
        by_key = self.head_order[0, i]
        ranks = self.ranks[0, i]
        kept = torch.arange(self.head_dim) < ranks[:, None, None]   # (K, 1, d)
        basis = self.projection.U_k[i].cpu() * kept
        return basis[by_key].to(self.device, self.dtype)

    def places(self, i: int, G: int) -> "Places":
        """The index tensors of layer i."""
        if self.found_places[i] is None:
            self.found_places[i] = self.find_places(i, G)
        return self.found_places[i]

    def find_places(self, i: int, G: int) -> "Places":
        head_order = self.head_order[:, i]
        ranks = self.ranks[:, i]
        by_key, by_value = head_order
        widths = G * ranks[1, by_value]
        ends = widths.cumsum(0)
        columns = torch.empty_like(ends)                            # of a row for W_o', by head
        columns.scatter_(0, by_value, ends - widths)
        rows = self.first_rows[:, i]
        table = torch.cat((rows, ranks, columns[None]))
        table = table[:, by_key].to(self.device)

        to_value_order = None
        if (by_key != by_value).any():
            to_value_order = by_key.argsort()[by_value].to(self.device)
        written = find_written(head_order, ranks, self.batch, G, self.head_dim)
        width = int(ends[-1])
        return Places(to_value_order, written.to(self.device), table, width)

    # --------------------------------------------------------------------------
    # What a pass calls

    def begin(self, model: Model, B: int, T: int) -> tuple[Tensor, Tensor]:
        """Get ready for T more tokens of B sequences: RoPE's cosines and sines of their positions.

        ValueError unless the cache suits the model and has room for them.
        """
        self.check_room(model, B, T)
        is_fixed = self.position is not None and T == 1
        first, last = self.span[:1], self.span[1:]
        if is_fixed:
            torch.add(self.position, 1, out=last)
        elif self.by_kernel and T == 1:
            last.fill_(self.length + 1)
        if window := model.config.sliding_window:
            torch.sub(last, window, out=first)
            first.clamp_(min=0)
        if is_fixed:
            return model.rope.row(self.position)
        return model.rope.rows(self.length, T, self.dtype, self.device)

    def advance(self, T: int) -> None:
        self.length += T
        if self.position is not None:
            self.position += T

    def check_room(self, model: Model, B: int, T: int) -> None:
        self.projection.check_fits(model.config)
        if self.dtype != model.dtype or self.device != model.device:
            raise ValueError(f"a cache of {self.dtype} on {self.device} for a model in "
                             f"{model.dtype} on {model.device}")
        if B != self.batch:
            raise ValueError(f"{B} sequences for a cache made for {self.batch}")
        if self.length + T > self.max_len:
            raise ValueError(f"the cache is full: it holds {self.length} of {self.max_len} tokens "
                             f"and {T} more were passed")

    def fold(self, i: int, weights) -> folding.Folded:
        """The weights of layer i for this plan, made when first asked for."""
        if self.folded[i] is None:
            self.folded[i] = folding.fold(weights, self.layout(i))
        return self.folded[i]

    def layout(self, i: int) -> folding.Layout:
        return folding.Layout(
            head_order=self.head_order[:, i],
            ranks=self.ranks[1, i],
            U=self.projection.U_v[i],
            means=self.projection.mean_v[i],
        )

    def attend(self, i: int, qk: Tensor, v: Tensor, window=None) -> Tensor:
        """Append T tokens to layer i; each attends to the last `window` up to itself, or all.

        qk (B, K, G + 1, T, d): queries and keys after RoPE; v (B, T, Σ r); all as W_qkv' makes
        them. Returns (B, T, Σ r over query heads), for W_o'.
        """
        _, _, heads, T, _ = qk.shape
        groups = self.groups[i]
        places = self.places(i, heads - 1)
        qk = self.turn(i, qk)                                       # (K, B, G + 1, T, d)
        q = qk[:, :, :-1]
        k = qk[:, :, -1]
        if T > 1:
            self.append(groups, k, v)
        else:
            self.append_one(i, qk, v, places)
        if self.length == 0 and T > 1:                              # prefill
            return attend_first(groups, q, k, places.to_value_order, window)
        if T == 1 and self.by_kernel:                               # decode on a GPU
            try:
                return self.attend_on_gpu(i, q, window, places)
            except (ImportError, OSError, subprocess.SubprocessError, RuntimeError) as error:
                warn_of_no_kernel(error)
                self.by_kernel = False
        if T == 1 and self.position is not None:                    # decode at any length
            token = torch.arange(self.max_len, device=self.device)
            begin, end = self.span
            unseen = (token < begin) | (token >= end)
            return attend_rows(groups, q, 0, self.max_len, unseen, places.to_value_order)
        end = self.length + T                                       # a chunk, or decode on a CPU
        begin = max(0, self.length + 1 - window) if window else 0   # no new token sees earlier ones
        return attend_stored(groups, q, begin, end, window, places.to_value_order)

    def turn(self, i: int, qk: Tensor) -> Tensor:
        """q U_r and k U_r, zero beyond r, of (B, K, G + 1, T, d): (K, B, G + 1, T, d)."""
        qk = qk.transpose(0, 1)
        basis = self.key_bases[i]
        if basis is None:
            return qk
        vectors = qk.flatten(1, 3)                                  # (K, B·(G + 1)·T, d)
        return torch.bmm(vectors, basis).view(qk.shape)

    def append(self, groups: tuple, k: Tensor, v: Tensor) -> None:
        """Write keys (K, B, T, d) and value coordinates (B, T, Σ r), a group of heads at a time."""
        B, T, _ = v.shape
        keys, values = groups
        new = slice(self.length, self.length + T)
        k = k.flatten(0, 1).mT                                      # (K·B, d, T)
        for matrices, rows in keys:
            r = rows.shape[1]
            rows[:, :, new] = k[matrices, :r]

        begin = 0
        for _, rows in values:
            JB, r, _ = rows.shape
            end = begin + JB // B * r
            part = v[:, :, begin:end]
            part = part.view(B, T, -1, r)                           # (B, T, J, r)
            blocks = rows.unflatten(0, (-1, B))                     # (J, B, r, max_len)
            blocks[..., new] = part.permute(2, 0, 3, 1)
            begin = end

    def append_one(self, i: int, qk: Tensor, v: Tensor, places: "Places") -> None:
        """Write one token's keys and values, in three operations whatever the ranks."""
        numbers = torch.cat((qk.flatten(), v.flatten()))
        numbers = numbers.index_select(0, places.written)[:, None]
        rows = self.layer_rows[i]
        if self.position is None:
            rows[:, self.length:self.length + 1] = numbers
        else:
            rows.index_copy_(1, self.position, numbers)

    def attend_on_gpu(self, i: int, q: Tensor, window, places: "Places") -> Tensor:
        """One token's attention by the Triton kernels, all heads at once whatever their ranks."""
        from kernel import decode_attention  # here, so that a CPU needs no Triton
        q = q[:, :, :, 0].transpose(0, 1)                           # (B, K, G, d)
        tokens = self.length + 1 if self.position is None else self.max_len
        tokens = min(tokens, window or tokens)
        scale = self.head_dim ** -0.5
        sizes = tokens, places.width, scale
        return decode_attention(q, self.rows, places.table, self.span, *sizes)[:, None]

    def fix_launches(self, model: Model) -> None:
        """From now on decode single tokens at `position`, by what does not depend on the length.

        So that CUDA can record a step (generate.py). The kernel takes as many stretches as max_len
        asks for; without it all rows are read to their ends, which must hold numbers.
        """
        self.position = torch.full((1,), self.length, device=self.device)
        self.rows[:, self.length:] = 0
        model.rope.rows(0, self.max_len, self.dtype, self.device)           # the whole table, now

    # --------------------------------------------------------------------------
    # What nesting buys

    def shrink(self, ranks: Tensor) -> None:
        """Take a cache in use to a plan at or below its own; no layer runs again.

        A smaller rank is the first rows of a block. Where all heads of a side of a layer were at
        rank d, rows are unturned, and are turned now. What is cut off is given back; for a moment
        both tensors are there. ValueError for a rank above today's, and after `fix_launches`.
        """
        ranks = ranks.cpu()
        fits = ranks.shape == self.ranks.shape and (ranks <= self.ranks).all()
        if self.position is not None or not fits:
            raise ValueError("a cache shrinks before fix_launches, to a plan at or below its own")
        before = copy.copy(self)
        self.lay_out(ranks)

        for i in range(self.ranks.shape[1]):
            self.keep(before, 0, i, self.projection.U_k[i])
            self.keep(before, 1, i, self.projection.U_v[i])
            if before.folded[i] is not None:
                layouts = before.layout(i), self.layout(i)
                self.folded[i] = folding.cut(before.folded[i], *layouts)
                before.folded[i] = None                             # one layer's twice, not all

    def keep(self, before: "KVCache", side: int, i: int, U: Tensor) -> None:
        """Copy the first coordinates of every head; U (K, d, d) turns them if it is due now."""
        is_turned = before.is_full(side, i) and not self.is_full(side, i)
        for j in range(len(U)):
            old = before.block(side, i, j)[..., :self.length]
            new = self.block(side, i, j)[..., :self.length]
            if is_turned:
                copy_turned(old, new, U[j])
            else:
                new.copy_(old[:, :new.shape[1]])

    def block(self, side: int, i: int, j: int) -> Tensor:
        """The rows of one head: (batch, r, max_len)."""
        r = int(self.ranks[side, i, j])
        first = int(self.first_rows[side, i, j])
        rows = self.rows[first:first + self.batch * r]
        return rows.view(self.batch, r, self.max_len)


def copy_turned(old: Tensor, new: Tensor, U: Tensor) -> None:
    """Copy one head, (batch, d, length) to (batch, r, length), turned by U (d, d), by tiles."""
    U_r = U[:, :new.shape[1]].to(new)
    for start in range(0, old.shape[2], TILE):
        tile = slice(start, start + TILE)
        new[..., tile] = U_r.T @ old[..., tile]


# ------------------------------------------------------------------------------
# Where things lie

def heads_by_rank(ranks: list[int]) -> list[int]:
    """Heads 0 … K − 1, those of the same rank side by side; as they are where all differ."""
    first_of_rank = [ranks.index(r) for r in ranks]
    return sorted(range(len(ranks)), key=first_of_rank.__getitem__)


class Places(NamedTuple):
    """Where things of a layer lie, on the device."""
    to_value_order: Tensor | None       # (K,) places by key of heads by value; None: alike
    written: Tensor             # a token's rows, among K·B·(G + 1)·d numbers and B·Σ r of values
    table: Tensor               # (5, K), by key: first rows and ranks of both sides, output column
    width: int                  # of the rows that W_o' takes


def find_written(head_order: Tensor, ranks: Tensor, B: int, G: int, d: int) -> Tensor:
    """Places.written of a layer whose heads lie in this order and have these ranks, (2, K) each."""
    by_key, by_value = head_order
    K = len(by_key)
    total = K * B * (G + 1) * d
    places = torch.arange(total).view(K, B, G + 1, d)
    of_keys = places[:, :, -1]                                      # (K, B, d)
    ranks_of_keys = ranks[0, by_key]
    is_kept = torch.arange(d) < ranks_of_keys[:, None, None]        # (K, 1, d)
    of_keys = of_keys[is_kept.expand(K, B, d)]

    widths = ranks[1, by_value].tolist()
    width = sum(widths)
    rows = torch.arange(total, total + B * width).view(B, width)
    parts = rows.split(widths, dim=1)                               # of each head, (B, r)
    of_values = [part.flatten() for part in parts]
    return torch.cat((of_keys, *of_values))


def warn_of_no_kernel(error: Exception) -> None:
    """Where Triton or its C compiler is missing, PyTorch attends; any other error is an error."""
    if isinstance(error, RuntimeError) and "C compiler" not in str(error):
        raise error
    warnings.warn(f"decoding without the Triton kernel, slower: {error}", stacklevel=2)


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
    parser = common.arguments(__doc__)
    plan_arguments(parser)
    count = common.within(1, 10 ** 7)
    parser.add_argument("--tokens", type=count, default=512, help="length of the cache shown [512]")
    args = parser.parse_args()
    device, dtype = common.prepare(args)
    with common.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    projection, ranks = plan_for(args, model)
    show_layout(KVCache(projection, ranks, 1, args.tokens, dtype, device))
    print(f"Bytes for {args.tokens:,} tokens of this model, the same rank everywhere:\n")
    for budget in BUDGETS:
        numbers = args.tokens * uniform_ranks(budget, model.config).sum()
        print(f"  {budget:6.1%}  {numbers * dtype.itemsize:>12,}")


if __name__ == "__main__":
    common.run_script(main)
