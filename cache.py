"""The compressed KV cache: one tensor, whose size is the budget.

For every layer, for keys and for values, for every key-value head there is a block
(batch, max_len, r) with that head's own rank r, a multiple of d/8. All lie end to end in one
preallocated tensor:

    data = [ layer 0: keys of head 0 | keys of head 1 | … | values of head 0 | … ][ layer 1: … ] …

The context costs batch · max_len · Σ r numbers: no padding to the widest head, no list that grows
by concatenation. A row of a block holds one token's coordinates, k U_r (after RoPE) or v U_r, where
U_r is the first r columns of an orthogonal matrix of the head, one for keys and one for values.
Attention happens in that small space, for the G query heads that share a key-value head:

    scores = (q U_r)(k U_r)ᵀ / sqrt(d)      queries are turned once, stored keys read as they are
    output = softmax(scores) (v U_r)        r numbers per query head; W_o' = U_rᵀ W_o takes them

This is MatryoshkaKV (arXiv 2410.14731). The value side costs only a bias: U_r is folded into W_v
and W_o (projection.fold_values). The folded weights belong to the plan, the ranks of all heads, so
the cache holds them. A head at rank d is stored unturned: all at d give the base model's cache.

    python cache.py                                 # the full cache: its layout and its bytes
    python cache.py --ranks out/ranks.json --budget 0.25        # or --budget alone: uniform ranks
"""
import itertools
import math
import subprocess
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from model import Model, load
from projection import (
    BUDGETS,
    LEVELS,
    SIDES,
    Projection,
    check_ranks,
    fold_values,
    identity_like,
    plan_at,
    shape_of,
    uniform_ranks,
)

SCORES = 2 ** 24        # scores computed at a time in a prefill: 64 MB in float32


class Group(NamedTuple):
    """J neighbouring heads of a layer with the same ranks: their blocks end to end, one view."""
    heads: slice
    keys: Tensor                                                    # (J, batch, max_len, r)
    values: Tensor                                                  # (J, batch, max_len, r')


class KVCache:
    """Keys and values of `batch` sequences of equal length, up to `max_len` tokens, at a plan.

    `data` is the one flat tensor, `length` the number of tokens in it, `offsets` (2, L, K) where
    each block begins. dtype and device are the model's; since the folded weights stay with it, one
    cache serves one model. A forward pass calls `check_room`; for every layer `fold` and `attend`;
    then adds T to `length`. ValueError for ranks or sizes that make no sense, and when it is full.
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
        L, K, d = projection.mean_v.shape
        check_ranks(ranks, L, K, d)
        if ranks.ndim != 3:
            raise ValueError(f"ranks of shape {list(ranks.shape)}; a cache has one plan, (2, L, K)")
        if batch < 1 or max_len < 1:
            raise ValueError(f"batch {batch}, max_len {max_len}: both must be at least 1")
        self.projection = projection
        self.head_dim = d
        self.ranks = ranks.cpu().long()
        self.batch, self.max_len = batch, max_len
        self.length = 0
        self.dtype, self.device = dtype, torch.device(device)

        by_layer = self.ranks.transpose(0, 1)                       # (L, 2, K), as the blocks lie
        sizes = by_layer * (batch * max_len)
        ends = sizes.flatten().cumsum(0).view_as(by_layer)
        self.offsets = (ends - sizes).transpose(0, 1)
        total = int(sizes.sum())
        self.data = torch.empty(total, dtype=dtype, device=device)
        self.by_kernel = self.data.is_cuda and dtype.itemsize in (2, 4)     # Triton has no float64

        self.groups = [self.group_heads(i) for i in range(L)]
        self.key_bases = [self.key_basis(i) for i in range(L)]
        # Made for a layer when first needed: see `fold`, `places_of_token`, `table`.
        self.folded, self.places, self.tables = [None] * L, [None] * L, [None] * L

    def group_heads(self, i: int) -> list[Group]:
        """The groups of layer i: one where ranks are uniform, K where neighbours all differ."""
        pairs = self.ranks[:, i].T.tolist()                         # K of [r_k, r_v]
        groups = []
        first = 0
        for (r_k, r_v), heads in itertools.groupby(pairs):
            end = first + len(list(heads))
            keys = self.blocks(0, i, first, end, r_k)
            values = self.blocks(1, i, first, end, r_v)
            groups.append(Group(slice(first, end), keys, values))
            first = end
        return groups

    def blocks(self, side: int, i: int, first: int, end: int, r: int):
        """The view (end − first, batch, max_len, r) of the blocks of heads first … end − 1."""
        shape = end - first, self.batch, self.max_len, r
        offset = int(self.offsets[side, i, first])
        numbers = self.data[offset:offset + math.prod(shape)]
        return numbers.view(shape)

    def key_basis(self, i: int) -> Tensor | None:
        """U_k of layer i, all columns, of which a head uses the first r; None if all are d."""
        full = self.ranks[0, i] == self.head_dim
        if full.all():
            return None
        basis = self.projection.U_k[i].clone()
        basis[full.to(basis.device)] = identity_like(basis)
        return basis.to(self.device, self.dtype)

    def check_room(self, model: Model, B: int, T: int):
        """ValueError unless it suits the model and has room for T more tokens of B sequences."""
        self.projection.check_fits(model.config)
        if (self.dtype, self.data.device) != (model.dtype, model.device):
            raise ValueError(f"a cache of {self.dtype} on {self.data.device} for a model in "
                             f"{model.dtype} on {model.device}")
        if B != self.batch:
            raise ValueError(f"{B} sequences for a cache made for {self.batch}")
        if self.length + T > self.max_len:
            raise ValueError(f"the cache is full: it holds {self.length} of {self.max_len} tokens "
                             f"and {T} more were passed")

    def fold(self, i: int, weights):
        """W_v', W_o' and the bias (or None) of layer i, made when first asked for: fold_values."""
        if self.folded[i] is None:
            W_v, W_o, b_v = weights.v_proj.weight, weights.o_proj.weight, weights.v_proj.bias
            ranks = self.ranks[1, i]
            if (ranks == self.head_dim).all() and b_v is None:
                self.folded[i] = W_v, W_o, None
            else:
                U = self.projection.U_v[i].to(self.device)
                mean = self.projection.mean_v[i].to(self.device)
                self.folded[i] = fold_values(W_v, W_o, U, mean, ranks, b_v)
        return self.folded[i]

    def attend(self, i: int, q: Tensor, k: Tensor, v: Tensor, window=None) -> Tensor:
        """Append T tokens to layer i; each attends to the last `window` up to itself, or all.

        q (B, H, T, d) and k (B, K, T, d) after RoPE; v (B, T, Σ r) coordinates, from W_v'. Returns
        (B, T, Σ r over query heads), for W_o'.
        """
        T = q.shape[2]
        K = k.shape[1]
        q = q.unflatten(1, (K, -1))                                 # (B, K, G, T, d)
        basis = self.key_bases[i]
        if basis is not None:
            q = q @ basis[:, None]
            k = k @ basis
        self.append(i, k, v)

        end = self.length + T
        begin = max(0, self.length + 1 - window) if window else 0   # no new token sees earlier ones
        scale = self.head_dim ** -0.5
        if T == 1 and self.by_kernel:
            try:
                return self.attend_on_gpu(i, q, begin, end, scale)
            except (ImportError, OSError, subprocess.SubprocessError, RuntimeError) as error:
                warn_of_no_kernel(error)
                self.by_kernel = False
        groups = []
        for heads, keys, values in self.groups[i]:                  # only what is seen
            keys, values = (x.narrow(2, begin, end - begin) for x in (keys, values))
            groups.append(Group(heads, keys, values))
        if T == 1:
            return attend_one(groups, q[:, :, :, 0], scale)
        return join([attend_many(q, g, window or end, scale) for g in groups], 2)

    def append(self, i: int, k: Tensor, v: Tensor):
        """Write keys (B, K, T, d) and value coordinates (B, T, Σ r) after what layer i holds."""
        T = v.shape[1]
        if T == 1 and len(self.groups[i]) > 1:
            return self.append_one(i, k, v)
        done = 0
        for heads, keys, values in self.groups[i]:
            new_keys = k[:, heads].transpose(0, 1)                  # (J, B, T, d)
            place = keys.narrow(2, self.length, T)
            place.copy_(new_keys[..., :keys.shape[3]])

            J, B, _, r = values.shape
            new_values = v.narrow(2, done, J * r)
            new_values = new_values.view(B, T, J, r)
            place = values.narrow(2, self.length, T)
            place.copy_(new_values.permute(2, 0, 1, 3))
            done += J * r

    def append_one(self, i: int, k: Tensor, v: Tensor):
        """One token's numbers in one write for all heads: a call per group would cost more."""
        kept, place, step = self.places_of_token(i)
        keys = k.flatten(1)[:, kept]                                # (B, Σ r_k)
        values = v[:, 0]                                            # (B, Σ r_v)
        numbers = torch.cat((keys, values), dim=1)
        self.data[place + self.length * step] = numbers

    def places_of_token(self, i: int) -> list[Tensor]:
        """Where one token's numbers of layer i go.

        Which of the K·d key coordinates are kept; each number's place in `data` when the cache is
        empty, keys and then values, (B, Σ r); and its step to the next token, the block's width.
        """
        if self.places[i] is None:
            ranks = self.ranks[:, i].flatten()                      # keys, then values: (2·K,)
            offsets = self.offsets[:, i].flatten()
            columns = torch.arange(self.head_dim)
            is_kept = columns < self.ranks[0, i][:, None]           # (K, d)
            kept = is_kept.flatten().nonzero()[:, 0]
            step = ranks.repeat_interleave(ranks)
            coordinate = torch.cat([columns[:r] for r in ranks])
            sequence = torch.arange(self.batch)[:, None]
            place = offsets.repeat_interleave(ranks) + coordinate
            place = place + sequence * self.max_len * step
            self.places[i] = [x.to(self.device) for x in (kept, place, step)]
        return self.places[i]

    def attend_on_gpu(self, i: int, q: Tensor, begin: int, end: int, scale: float):
        """One token's attention by the Triton kernel, all heads at once whatever their ranks."""
        from kernel import decode_attention  # here, so that a CPU needs no Triton
        q = q[:, :, :, 0].contiguous()
        table = self.table(i)
        out = decode_attention(q, self.data, table, self.max_len, end, scale, begin)
        heads = zip(out.unbind(1), self.ranks[1, i].tolist(), strict=True)
        return torch.cat([head[..., :r].flatten(1) for head, r in heads], dim=-1)[:, None]

    def table(self, i: int) -> Tensor:
        """Where the kernel finds layer i, (4, K) in units of d/8: offsets and ranks."""
        if self.tables[i] is None:
            table = torch.cat((self.offsets[:, i], self.ranks[:, i]))
            self.tables[i] = table.to(self.device) // (self.head_dim // LEVELS)
        return self.tables[i]


# ------------------------------------------------------------------------------
# Attention on a CPU; on a GPU prefill takes attend_many, and decoding the kernel

def attend_one(groups: list, q: Tensor, scale: float) -> Tensor:
    """Attention of one new token, q (B, K, G, d), over a layer: (B, 1, Σ r over query heads).

    The G queries that share a key-value head form one matrix: each stored number is read once and
    never repeated. Scores have one shape whatever the ranks: one softmax call for all heads.
    """
    q = (q * scale).transpose(0, 1)                                 # (K, B, G, d)
    scores = []
    for heads, keys, _ in groups:
        coordinates = q[heads, :, :, :keys.shape[3]]
        scores.append(product(coordinates, keys.mT))
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = join(scores, 0).softmax(-1, wide)                     # (K, B, G, tokens)
    weights = weights.to(q.dtype)
    outputs = []
    for heads, _, values in groups:
        output = product(weights[heads], values)                    # (J, B, G, r)
        outputs.append(output.transpose(0, 1).flatten(1))
    return join(outputs, 1)[:, None]


def warn_of_no_kernel(error: Exception) -> None:
    """Where Triton or its C compiler is missing, PyTorch attends; any other error is an error."""
    if isinstance(error, RuntimeError) and "C compiler" not in str(error):
        raise error
    warnings.warn(f"decoding without the Triton kernel, slower: {error}", stacklevel=2)


def attend_many(q: Tensor, group: Group, window: int, scale: float):
    """Causal attention of q (B, K, G, T, d), the last T tokens, over a group: (B, T, J·G·r')."""
    heads, keys, values = group
    J, B, n, r = keys.shape
    q = q[:, heads].transpose(0, 1)                                 # (J, B, G, T, d)
    q = q[..., :r]
    G, T = q.shape[2:4]
    position = torch.arange(n, device=q.device)
    rows = max(1, SCORES // (J * B * G * n))                        # a long prompt goes in pieces
    pieces = []
    for first in range(0, T, rows):
        part = q.narrow(3, first, min(rows, T - first))
        part = part.flatten(2, 3)                                   # (J, B, G·rows, r)
        now = position[n - T:][first:first + rows]
        age = now[:, None] - position
        mask = (age >= 0) & (age < window)
        mask = mask.repeat(G, 1)                                    # (G·rows, n)
        a = F.scaled_dot_product_attention(part, keys, values, mask, scale=scale)
        a = a.unflatten(2, (G, -1))                                 # (J, B, G, rows, r')
        a = a.permute(1, 3, 0, 2, 4)                                # (B, rows, J, G, r')
        pieces.append(a.flatten(2))
    return torch.cat(pieces, dim=1)


def join(parts: list[Tensor], dim: int) -> Tensor:
    """torch.cat, but without its copy where there is only one part."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (J, B, m, k) @ b (J, B, k, n). A single matrix goes through mm: faster on a CPU."""
    J, B = a.shape[:2]
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    if J * B == 1:
        return torch.mm(a[0], b[0])[None, None]
    return torch.bmm(a, b).unflatten(0, (J, B))


# ------------------------------------------------------------------------------
# Which plan a user asks for: --proj, --ranks and --budget

def plan_arguments(parser) -> None:
    add = parser.add_argument
    add("--proj", type=Path, default=Path("out/projections.safetensors"),
        help="projections, for --ranks and --budget [out/projections.safetensors]")
    add("--ranks", type=Path, help="a file of search.py, such as out/ranks.json")
    add("--budget", type=common.within(0.125, 1.0),
        help="share of the cache to keep: a prefix of --ranks, or without it uniform ranks")


def plan_for(args, model: Model) -> tuple[Projection, Tensor]:
    """The projections and the plan asked for; by default identity and full ranks."""
    ranks = uniform_ranks(args.budget or 1.0, model.config)
    if args.ranks is None and args.budget is None:
        return Projection.identity(model.config).to(model.device), ranks
    with common.blame("--proj"):
        projection = Projection.load(args.proj)
        projection.check_fits(model.config)
    if args.ranks is not None:
        with common.blame("--ranks"):
            _, ranks = read_plan(args.ranks, model.config, args.budget)
    return projection.to(model.device), ranks


def order_of(path: list, config) -> Tensor:
    """A file's path, entries [side, layer, head, KL after it], as an order (n,) for `plan_at`."""
    L, K, _ = shape_of(config)
    places = []
    try:
        for side, layer, head, _ in path:
            row = SIDES.index(side) * L + range(L).index(layer)
            places.append(row * K + range(K).index(head))
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a path of ranks for this model ({error})") from None
    order = torch.tensor(places, dtype=torch.long)
    if (order.bincount(minlength=1) >= LEVELS).any():
        raise ValueError("a path that takes a rank below an eighth of head_dim")
    return order


def read_plan(path: Path, config, budget=None) -> tuple[Tensor, Tensor]:
    """The order of lowerings (n,) in a file of the search, and a plan (2, L, K).

    The plan is the largest one of the order within `budget`; without one, that which the file was
    written for. ValueError names the file.
    """
    plan = common.read_json(path)
    try:
        if plan["head_dim"] != config.head_dim:
            raise ValueError(f"head_dim {plan['head_dim']}, but the model has {config.head_dim}")
        order = order_of(plan["path"], config)
        if budget is None:
            ranks = torch.tensor([plan["keys"], plan["values"]])
        else:
            ranks = plan_at(order, config, budget)
        check_ranks(ranks, *shape_of(config))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a plan of ranks for this model ({error})") from None
    return order, ranks


# ------------------------------------------------------------------------------
# The script

def show_layout(cache: KVCache, most: int = 8) -> None:
    """The tensor as text: a cell is d/8 numbers per token; `#` is stored, `·` a full cache adds."""
    L, K, d = cache.projection.mean_v.shape
    print("Layout: for every head 8 cells, each d/8 numbers per token (# stored, · not)\n")
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
    common.moved(parser, "--benchmark", to="python bench/cache.py")
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
