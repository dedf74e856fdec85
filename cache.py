"""The compressed KV cache: one tensor, whose size is the budget.

For every layer, for keys and for values, for every key-value head: a block (batch, max_len, r) with that head's own rank r.
All blocks lie end to end in a single preallocated tensor,

    data = [ layer 0: keys of head 0 | keys of head 1 | … | values of head 0 | values of head 1 | … ][ layer 1: … ] …

so batch · max_len · Σ r numbers are all that grows with the context: no padding to the widest head, no list that grows by concatenation. A row
of a block holds one token's coordinates k U_r (keys, after RoPE) or v U_r (values); see projection.py. Attention happens in
that small space, for the G query heads that share key-value head j:

    scores = (q U_r)(k U_r)ᵀ / sqrt(d)            the queries are turned once, the stored keys are read as they are
    output = softmax(scores) (v U_r)              r numbers a head, which W_o' = W_o U_r takes from there

This is MatryoshkaKV (arXiv 2410.14731). The value side costs no arithmetic: U_r is folded into W_v and W_o (its Figure 2: "a
new linear layer"), and the mean of what was cut off becomes a bias. The folded weights, a second copy of W_v and W_o whatever
the context, belong to the plan of ranks, so the cache holds them, and the model stays as it is. A head at rank d is stored as it is, so the same class with all ranks d is the base model's cache.

    python cache.py                          # the layout, the bytes at every budget, and what they mean for 7B models
    python cache.py --benchmark              # one decoding step, full against compressed, over context lengths
"""
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from projection import BUDGETS, STEPS, Projection, check_ranks, fold_values, uniform_ranks


SCORES = 2 ** 24   # scores computed at a time: 64 MB in float32


class KVCache:
    """Keys and values of `batch` sequences of equal length, up to `max_len` tokens, at a plan of ranks (2, L, K).

    `data` is the one flat tensor, `length` the number of tokens in it, `offsets` (2, L, K) where each block begins. dtype
    and device are the model's; the weights folded for it stay with it, so one cache serves one model. A forward pass calls
    `check_room`, for every layer `fold` and `attend`, then `advance`.
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
        self.projection, self.ranks, self.batch, self.max_len, self.length = projection, ranks.cpu().long(), batch, max_len, 0
        self.dtype, self.device = dtype, torch.device(device)
        sizes = self.ranks.transpose(0, 1).flatten() * batch * max_len                  # layer by layer, keys then values
        self.offsets = (sizes.cumsum(0) - sizes).view(L, 2, K).transpose(0, 1)
        self.data = torch.empty(int(sizes.sum()), dtype=dtype, device=device)
        self.groups = [self.group_heads(i) for i in range(L)]
        eye, full = torch.eye(d, device=device), (self.ranks[0] == d)[..., None, None].to(device)
        self.key_bases = [None if full[i].all() else torch.where(full[i], eye, projection.U_k[i].to(device)).to(dtype)
                          for i in range(L)]                                            # a head at rank d stays as it is
        self.folded, self.written, self.tables = [None] * L, [None] * L, [None] * L

    def group_heads(self, i: int) -> list[tuple[slice, Tensor, Tensor]]:
        """Neighbouring heads of layer i with the same ranks, as (heads, keys, values): their blocks lie end to end, so one
        view (heads, batch, max_len, r) serves them all. One group where ranks are uniform, K where they all differ."""
        (r_k, r_v), (at_k, at_v) = self.ranks[:, i].tolist(), self.offsets[:, i].tolist()
        groups, K = [], len(r_k)
        first = 0
        for j in range(1, K + 1):
            if j == K or (r_k[j], r_v[j]) != (r_k[first], r_v[first]):
                view = lambda at, r: self.data[at:at + (j - first) * self.batch * self.max_len * r].view(
                    j - first, self.batch, self.max_len, r)
                groups.append((slice(first, j), view(at_k[first], r_k[first]), view(at_v[first], r_v[first])))
                first = j
        return groups

    @staticmethod
    def full(config, batch: int, max_len: int, dtype: torch.dtype = torch.float32, device="cpu") -> "KVCache":
        """The base model's cache: every rank d, nothing turned."""
        return KVCache(Projection.identity(config), uniform_ranks(1.0, config), batch, max_len, dtype, device)

    def check_room(self, model, B: int, T: int) -> None:
        """ValueError unless this is a cache for the model, and T more tokens of B sequences fit."""
        self.projection.check_fits(model.config)
        if (self.dtype, self.data.device) != (model.dtype, model.device):
            raise ValueError(f"a cache of {self.dtype} on {self.data.device} for a model in {model.dtype} on {model.device}")
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
        (_, H, T, d), K = q.shape, k.shape[1]
        start, end = self.length, self.length + T
        q = q.unflatten(1, (K, H // K))                                                 # (B, K, G, T, d)
        if self.key_bases[i] is not None:
            q, k = q @ self.key_bases[i][:, None], k @ self.key_bases[i]
        first = max(0, start + 1 - window) if window else 0                             # what no query of these sees is not read
        self.append(i, k, v)
        if T == 1 and self.data.is_cuda:
            return self.attend_on_gpu(i, q, first, end, d ** -0.5)
        groups = [(heads, *(x.narrow(2, first, end - first) for x in blocks)) for heads, *blocks in self.groups[i]]
        if T == 1:
            return attend_one(groups, q[:, :, :, 0], d ** -0.5)
        return join([attend_many(q[:, heads], keys, values, window or end, d ** -0.5) for heads, keys, values in groups], 2)

    def append(self, i: int, k: Tensor, v: Tensor) -> None:
        """Write keys (B, K, T, d) and value coordinates (B, T, Σ r) behind what layer i holds."""
        T, done = v.shape[1], 0
        if T == 1 and len(self.groups[i]) > 1:   # one token's numbers, of heads of all ranks in one go
            kept, first, rank = self.places(i)
            self.data[first + self.length * rank] = torch.cat((k.flatten(1)[:, kept], v[:, 0]), dim=1)
            return
        for heads, keys, values in self.groups[i]:
            J, B, _, r_v = values.shape
            keys.narrow(2, self.length, T).copy_(k[:, heads, :, :keys.shape[3]].transpose(0, 1))
            values.narrow(2, self.length, T).copy_(v[:, :, done:done + J * r_v].view(B, T, J, r_v).permute(2, 0, 1, 3))
            done += J * r_v

    def places(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where one token's numbers of layer i go: which of the K·d key coordinates are kept (Σ r_k); for every number of
        every sequence its place in `data` at length 0 (B, Σ r), and its block's rank, the step to the next token (Σ r)."""
        if self.written[i] is None:
            K, d = self.projection.mean_v.shape[1:]
            kept = (torch.arange(d) < self.ranks[0, i][:, None]).flatten().nonzero()[:, 0]
            ranks, offsets = self.ranks[:, i].flatten(), self.offsets[:, i].flatten()           # keys, then values
            rank = ranks.repeat_interleave(ranks)
            coordinate = torch.cat([torch.arange(r) for r in ranks.tolist()])
            first = offsets.repeat_interleave(ranks) + coordinate + torch.arange(self.batch)[:, None] * self.max_len * rank
            self.written[i] = tuple(x.to(self.device) for x in (kept, first, rank))
        return self.written[i]

    def attend_on_gpu(self, i: int, q: Tensor, first: int, end: int, scale: float) -> Tensor:
        """One token's attention by the Triton kernel (kernel.py), all heads at once whatever their ranks."""
        from kernel import decode_attention
        out = decode_attention(q[:, :, :, 0].contiguous(), self.data, self.table(i), self.max_len, end, scale, first)
        ranks = self.ranks[1, i].tolist()
        return torch.cat([out[:, j, :, :r].flatten(1) for j, r in enumerate(ranks)], dim=-1)[:, None]

    def table(self, i: int) -> Tensor:
        """Where the kernel finds layer i: key offsets, value offsets, key ranks, value ranks, in units of d/8; (4, K)."""
        if self.tables[i] is None:
            step = self.projection.mean_v.shape[-1] // STEPS
            self.tables[i] = (torch.cat((self.offsets[:, i], self.ranks[:, i])) // step).to(self.device)
        return self.tables[i]

    def spread(self, batch: int, more: int) -> "KVCache":
        """A cache for `batch` sequences that all begin with the one in this, with room for `more` tokens. Raises ValueError
        if this holds several."""
        if self.batch != 1:
            raise ValueError(f"a cache of {self.batch} sequences; only one can be spread")
        other = KVCache(self.projection, self.ranks, batch, self.length + more, self.dtype, self.device)
        other.folded, other.length = self.folded, self.length
        for mine, theirs in zip(self.groups, other.groups):
            for (_, *blocks), (_, *copies) in zip(mine, theirs):
                for block, copy in zip(blocks, copies):
                    copy[:, :, :self.length] = block[:, :, :self.length]
        return other

    def advance(self, T: int) -> None:
        """Count the T tokens that every layer has appended."""
        self.length += T


def attend_one(groups: list, q: Tensor, scale: float) -> Tensor:
    """Attention of one new token, q (B, K, G, d), over all groups of a layer: (B, 1, Σ r over query heads).

    The G queries that share a key-value head form one matrix: each stored number is read once, and never repeated. The
    scores of all heads, which do not depend on ranks, stand in one tensor for one softmax.
    """
    q = (q * scale).transpose(0, 1)                                                     # (K, B, G, d)
    scores = join([product(q[heads, :, :, :keys.shape[3]], keys.transpose(2, 3)) for heads, keys, _ in groups], 0)
    weights = scores.softmax(-1, torch.promote_types(q.dtype, torch.float32)).to(q.dtype)                    # (K, B, G, n)
    return join([product(weights[heads], values).transpose(0, 1).flatten(1) for heads, _, values in groups], 1)[:, None]


def join(parts: list[Tensor], dim: int) -> Tensor:
    """torch.cat, which copies even where there is only one."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (J, B, m, k) @ b (J, B, k, n). A matrix alone goes without a batch, which is faster on a CPU."""
    if a.shape[0] * a.shape[1] == 1:
        return torch.mm(a[0, 0], b[0, 0])[None, None]
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def attend_many(q: Tensor, keys: Tensor, values: Tensor, window: int, scale: float) -> Tensor:
    """Causal attention of q (B, J, G, T, d), the last T tokens, over keys (J, B, n, r), values (J, B, n, r'): (B, T, J·G·r')."""
    q = q[..., :keys.shape[3]].transpose(0, 1)                                          # (J, B, G, T, r)
    J, B, G, T, _ = q.shape
    n = keys.shape[2]
    pieces, rows = [], max(1, SCORES // (J * B * G * n))                                # a long prompt goes in pieces
    for position, part in zip(torch.arange(n - T, n, device=q.device).split(rows), q.split(rows, dim=3)):
        age = position[:, None] - torch.arange(n, device=q.device)
        mask = ((age >= 0) & (age < window)).repeat(G, 1)                               # (G·rows, n)
        a = F.scaled_dot_product_attention(part.flatten(2, 3), keys, values, attn_mask=mask, scale=scale)
        pieces.append(a.unflatten(2, (G, -1)).permute(1, 3, 0, 2, 4).flatten(2))        # (B, rows, J·G·r')
    return torch.cat(pieces, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The script

SEVEN_B = {"LLaMA-2-7B": (32, 32, 128), "Mistral-7B-v0.3": (32, 8, 128)}   # L, K, d of their public config.json


def show_layout(cache: KVCache, most: int = 8) -> None:
    """The tensor as text: a cell is d/8 numbers a token; filled cells are stored, the dots are what a full cache adds."""
    L, K, d = cache.projection.mean_v.shape
    print("Layout, a group of 8 cells for every head, each cell d/8 numbers a token (# stored, · not):\n")
    for i in range(L):
        for side, name in enumerate(("keys", "values")):
            cells = [r * STEPS // d for r in cache.ranks[side, i].tolist()]
            heads = " ".join("#" * c + "·" * (STEPS - c) for c in cells[:most]) + (" …" if K > most else "")
            print(f"  layer {i:2d} {name:6s}  {heads}  offset {cache.offsets[side, i, 0]:>9,}")
    print(f"\n  cache.data: {cache.data.numel():,} numbers = batch {cache.batch} · max_len {cache.max_len} · Σ ranks "
          f"{cache.ranks.sum():,}; {cache.data.nbytes:,} bytes\n")


def show_bytes(config, tokens: int, dtype: torch.dtype) -> None:
    print(f"Bytes for {tokens:,} tokens of this model in {str(dtype).removeprefix('torch.')}, the same rank everywhere:\n")
    for budget in BUDGETS:
        print(f"  {budget:6.1%}  {uniform_ranks(budget, config).sum().item() * tokens * dtype.itemsize:>12,}")
    print("\nWhat that means for a 7B, in bfloat16, one sequence (GiB):\n")
    print("                       tokens" + "".join(f"{b:>9.1%}" for b in BUDGETS))
    for name, (L, K, d) in SEVEN_B.items():
        for n in (4096, 32768, 131072):
            print(f"  {name:16s}  {n:>9,}" + "".join(f"{2 * L * K * d * 2 * n * b / 2 ** 30:9.2f}" for b in BUDGETS))


def ragged_ranks(L: int, K: int, d: int, budget: float) -> Tensor:
    """A made-up plan at `budget`: keys wider than values, heads different, the same sum whatever the draw."""
    generator, wanted = torch.Generator().manual_seed(0), 2 * L * K * STEPS * budget
    levels = torch.ones(2, L, K, dtype=torch.long)
    while levels.sum() < wanted:
        side = int(torch.rand(1, generator=generator) > 0.7)                            # 70% of the steps go to keys
        i, j = torch.randint(L, (1,), generator=generator), torch.randint(K, (1,), generator=generator)
        levels[side, i, j] = (levels[side, i, j] + 1).clamp(max=STEPS)
    return levels * (d // STEPS)


def timed(*steps, rounds: int = 5, repeats: int = 5) -> list[list[float]]:
    """Seconds of each step, the median of `repeats`, for every round; the steps take turns, so that noise hits all."""
    seconds = [[] for _ in steps]
    for _ in range(rounds):
        for of_step, step in zip(seconds, steps):
            step()
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            of_step.append(statistics.median(times))
    return seconds


def ratio(seconds: list[float], of: list[float]) -> str:
    each = sorted(a / b for a, b in zip(seconds, of))
    return f"{statistics.median(each):.3f} [{each[0]:.3f} … {each[-1]:.3f}]"


@torch.no_grad()
def benchmark(model) -> None:
    """One attention step at LLaMA-2-7B's layer shape, then whole decoding steps of the model; ratios in one run."""
    H, d, n, place = 32, 128, 8192, dict(dtype=model.dtype, device=model.device)
    p = Projection(*torch.eye(d).repeat(2, 1, H, 1, 1), torch.zeros(1, H, d))
    q, k = torch.randn(2, 1, H, 1, d, **place)
    plans = {"full": torch.full((2, 1, H), d), "37.5% ragged": ragged_ranks(1, H, d, 0.375), "25% ragged": ragged_ranks(1, H, d, 0.25)}
    steps = []
    for ranks in plans.values():
        cache = KVCache(p, ranks, 1, n, **place)
        cache.data.normal_()
        cache.length = n - 1
        new = torch.randn(1, 1, int(ranks[1].sum()), **place)
        steps.append(lambda cache=cache, new=new: cache.attend(0, q, k, new))
    K, V = torch.randn(2, 1, H, n, d, **place)
    steps.append(lambda: F.scaled_dot_product_attention(q, K, V))
    *ours, sdpa = timed(*steps)
    print(f"One attention step, LLaMA-2-7B's layer (32 heads, d = 128), {n:,} tokens, batch 1, {str(model.dtype).removeprefix('torch.')}: "
          f"scaled_dot_product_attention over the full cache {1e3 * statistics.median(sdpa):.1f} ms\n")
    print("  cache           share of bytes   time / full cache here         time / scaled_dot_product_attention")
    for (name, ranks), seconds in zip(plans.items(), ours):
        print(f"  {name:14s} {ranks.sum().item() / (2 * H * d):10.3f}        {ratio(seconds, ours[0]):26s}     {ratio(seconds, sdpa)}")

    p = Projection.identity(model.config)
    print("\nA whole decoding step of the model, batch 1, tokens/s at the full cache and time against it:\n")
    print("  context   100%, tokens/s   50%                      37.5%                    25%")
    for n in (512, 1024, 2048, 4096):
        steps = []
        for budget in (1.0, 0.5, 0.375, 0.25):
            ranks = ragged_ranks(*p.mean_v.shape, budget)
            cache = KVCache(p, ranks, 1, n + 1, **place)
            cache.data.normal_()

            def step(cache=cache, n=n):
                cache.length = n
                model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), cache=cache)
            steps.append(step)
        full, *small = timed(*steps, repeats=20)
        print(f"  {n:7,}   {1 / statistics.median(full):12,.0f}     " + " ".join(f"{ratio(s, full):24s}" for s in small))


def main():
    from model import arguments, blame, load, plan_arguments, plan_for, prepare, within
    parser = arguments(__doc__)
    plan_arguments(parser)
    parser.add_argument("--tokens", type=within(1, 10 ** 7), default=512, help="length of the cache that is shown [512]")
    parser.add_argument("--benchmark", action="store_true", help="time decoding, full against compressed")
    args = parser.parse_args()
    device, dtype = prepare(args)
    with blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    plan = plan_for(args, model)
    if args.benchmark:
        return benchmark(model)
    size = dict(batch=1, max_len=args.tokens, dtype=dtype, device=device)
    show_layout(KVCache(*plan, **size) if plan else KVCache.full(model.config, **size))
    show_bytes(model.config, args.tokens, dtype)


if __name__ == "__main__":
    main()
