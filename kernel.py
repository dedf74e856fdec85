"""One Triton kernel: decoding attention over the compressed, ragged cache.

Decoding adds one new token per sequence. On a GPU such a step does few operations for each number
of the cache that it reads, so its time is the bytes of the cache over the memory's bandwidth: a
compressed cache pays only if the kernel reads its bytes, and each of them once. Every head has
ranks of its own: its keys are a block (batch, max_len, r) somewhere in one flat tensor (cache.py),
its values another, and a table says where and how wide. Loads beyond a head's rank are masked: a
head costs its own bytes, though arithmetic runs over d columns.

    program (b, j, z) owns sequence b, key-value head j, and the z-th of Z stretches of the context:

    for tiles of tokens in that stretch:                # keys and values are read here, once
        scores = q kᵀ / sqrt(d)                         # for the G query heads of the group at once
        m_new  = max(m, max scores)                     # the largest score so far; m after the tile
        acc    = acc · exp(m − m_new) + exp(scores − m_new) v
        l      = l · exp(m − m_new) + Σ exp(scores − m_new)
    write acc, m, l                                     # this stretch's share of the answer

q, k and v are coordinates: the cache holds the first r columns of k U_k and of v U_v, the caller
passes q U_k, and what comes out is in the values' coordinates: W_o' takes it (fold_values).

Why stretches: one sequence of Mistral-7B has 8 key-value heads, and a GPU has a hundred
multiprocessors; the context is cut so that all have work. The shares are merged after the kernel.
Why the running maximum: exp overflows without one; each stretch has its own, and `merge` sets them
against one another. Why float32 for scores, l and acc: a sum of 100,000 terms in bfloat16 stands
still after the first few hundred. Only exp(scores − m_new) is rounded, to multiply v.

    python kernel.py            # checks it against a float64 reference, on the GPU if there is one
    python bench/kernel.py      # times it, or compiles it for GPUs that are not here
"""
import contextlib
import itertools
import math
import os

import torch
from torch import Tensor

import common

if not torch.cuda.is_available():               # Triton's interpreter runs the kernel in Python;
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before Triton is imported
try:
    import triton
    import triton.language as tl
except ImportError:
    lacking = "triton is missing (it exists for Linux); everything but the kernel works without it"
    if __name__ == "__main__":
        common.fail(f"kernel.py: {lacking}")
    raise ImportError(lacking) from None


# ------------------------------------------------------------------------------
# The kernel

@triton.jit(do_not_specialize=["begin", "end", "stretch"])      # else recompiled for 1 and 16·n
def decode_kernel(
    q, cache, table, acc_out, stats_out,
    max_len, begin, end, stretch, scale,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):
    """Attention of the G queries of each of K heads to tokens begin … end − 1, in Z stretches.

    q (B, K, G, D); cache flat, of q's dtype; table (4, K) int64 in units of D/8 numbers: where the
    keys of a head begin, where its values begin, its key rank, its value rank. Writes float32
    acc_out (B, K, Z, G, D) and stats_out (B, K, Z, G, 2): m and l. ROWS and COLUMNS are G and D
    rounded up to what tl.dot takes.
    """
    b = tl.program_id(0).to(tl.int64)           # a cache may have more than 2³¹ numbers
    j = tl.program_id(1)
    z = tl.program_id(2)
    pair = b * K + j                            # a sequence and a key-value head

    # Multiplying by D/8 here, not in the table, tells the compiler that rows begin at multiples of
    # it: 16-byte loads where D/8 numbers are a multiple of 16 bytes (bfloat16, D = 64 or 128).
    key_offset = tl.load(table + j) * (D // 8)
    value_offset = tl.load(table + K + j) * (D // 8)
    ranks = table + 2 * K + j
    key_rank = tl.load(ranks) * (D // 8)
    value_rank = tl.load(ranks + K) * (D // 8)
    keys = cache + key_offset + b * max_len * key_rank
    values = cache + value_offset + b * max_len * value_rank

    g = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row = (g < G)[:, None]
    is_key = column < key_rank
    is_value = column < value_rank

    row = pair * G + g                         # of q, among the B·K·G queries
    q_at = q + row[:, None] * D + column
    queries = tl.load(q_at, mask=is_row & is_key, other=0.0)        # (ROWS, COLUMNS)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)

    first = begin + z * stretch
    last = tl.minimum(first + stretch, end)
    for start in range(first, last, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < last
        token = token.to(tl.int64)

        k_at = keys + token * key_rank + column[:, None]
        k_mask = is_key[:, None] & inside
        k = tl.load(k_at, mask=k_mask, other=0.0)                   # kᵀ, (COLUMNS, TILE)
        s = tl.dot(queries, k, input_precision="ieee")              # no TF32
        s = tl.where(inside, s * scale, float("-inf"))                # (ROWS, TILE)

        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp(s - m_new[:, None])
        rescale = tl.exp(m - m_new)
        l = l * rescale + tl.sum(p, axis=1)
        m = m_new

        v_at = values + token[:, None] * value_rank + column
        v_mask = inside[:, None] & is_value
        v = tl.load(v_at, mask=v_mask, other=0.0)                   # (TILE, COLUMNS)
        pv = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        acc = acc * rescale[:, None] + pv

    share = (pair * tl.num_programs(2) + z) * G + g        # this program's rows of what it writes
    acc_at = acc_out + share[:, None] * D + column
    tl.store(acc_at, acc, mask=is_row & (column < D))
    stats_at = stats_out + share * 2
    tl.store(stats_at, m, mask=g < G)
    tl.store(stats_at + 1, l, mask=g < G)


# ------------------------------------------------------------------------------
# Its wrapper

def decode_attention(
    q: Tensor, data: Tensor, table: Tensor,
    max_len: int, length: int, scale: float,
    begin: int = 0, stretches: int | None = None,
) -> Tensor:
    """Attention of one new token's queries over a layer of the cache: (B, K, G, d), in q's dtype.

    q (B, K, G, d) is q U_k; data, the flat cache tensor, of q's dtype; table (4, K) int64 in
    units of d/8: key offsets, value offsets, key ranks, value ranks. Attends to tokens begin …
    length − 1, in at most `stretches`. The result is in the coordinates of the values, zero beyond
    each head's value rank. ValueError for shapes or dtypes that do not fit.
    """
    B, K, G, d = q.shape
    if not 0 <= begin < length <= max_len:
        raise ValueError(f"tokens {begin} … {length - 1} of a cache of {max_len}")
    if d % 8 or q.dtype != data.dtype or table.shape != (4, K):
        raise ValueError(f"q {list(q.shape)} {q.dtype}, data {data.dtype}, table "
                         f"{list(table.shape)}; expected a head_dim that is a multiple of 8, one "
                         f"dtype, and a table of shape {[4, K]}")
    dtype = q.dtype
    if not q.is_cuda and dtype == torch.bfloat16:       # the interpreter's tl.dot cannot do it
        q, data = q.float(), data.float()

    sizes = shapes(K, G, d, q.dtype)
    tokens, tile = length - begin, sizes["TILE"]
    if stretches is None:
        stretches = enough_stretches(B * K, tokens, q.device)
    stretch = triton.cdiv(tokens, stretches * tile) * tile      # whole tiles
    Z = triton.cdiv(tokens, stretch)                            # each has at least one token

    acc = q.new_empty(B, K, Z, G, d, dtype=torch.float32)
    stats = q.new_empty(B, K, Z, G, 2, dtype=torch.float32)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        decode_kernel[(B, K, Z)](
            q.contiguous(), data, table, acc, stats,
            max_len, begin, length, stretch, scale, **sizes)
    return merge(acc, stats).to(dtype)


def merge(acc: Tensor, stats: Tensor) -> Tensor:
    """Attention from the shares (B, K, Z, G, d): each rescaled to the largest m, over Σ l."""
    m, l = stats.split(1, dim=-1)                               # (B, K, Z, G, 1)
    weight = torch.exp(m - m.amax(2, keepdim=True))
    total = (acc * weight).sum(2)
    return total / (l * weight).sum(2)


def enough_stretches(groups: int, tokens: int, device) -> int:
    """About four programs for each multiprocessor, and at least 256 tokens for each program."""
    processors = 2                              # in the interpreter: any few
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(math.ceil(4 * processors / groups), tokens // 256))


def shapes(K: int, G: int, d: int, dtype):
    """The constants. A tile is at most 32 KB of keys and values; Triton pipelines three."""
    sizes = {"K": K, "G": G, "D": d}
    sizes["ROWS"] = max(16, triton.next_power_of_2(G))
    sizes["COLUMNS"] = max(16, triton.next_power_of_2(d))
    tile = min(128, 2 ** 14 // sizes["COLUMNS"])
    sizes["TILE"] = tile // dtype.itemsize
    return sizes


# ------------------------------------------------------------------------------
# The reference

def reference(q, data, table, max_len, length, scale, begin=0) -> Tensor:
    """The same in plain PyTorch and float64, head by head."""
    B, K, G, d = q.shape
    out = torch.zeros_like(q, dtype=torch.float64)

    def block(offset: int, r: int) -> Tensor:
        whole = data[offset:offset + B * max_len * r]
        whole = whole.view(B, max_len, r).double()
        return whole[:, begin:length]

    for j, numbers in enumerate(table.T * (d // 8)):
        k_offset, v_offset, r_k, r_v = numbers.tolist()
        keys = block(k_offset, r_k)                             # (B, tokens, r)
        values = block(v_offset, r_v)
        queries = q[:, j, :, :r_k].double()                     # (B, G, r)
        weights = (queries @ keys.mT * scale).softmax(-1)
        out[:, j, :, :r_v] = weights @ values
    return out


# ------------------------------------------------------------------------------
# The check

def example(
    B: int, K: int, G: int, d: int,
    max_len: int, length: int, begin: int,
    dtype: torch.dtype, device="cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, a cache of random ranks with NaN wherever nothing may be read, its table."""
    eighth = d // 8
    gap = torch.full((3 * eighth,), torch.nan)
    ranks = torch.randint(1, 9, (2, K)) * eighth
    data, offsets = [gap], []
    for r in ranks.flatten().tolist():          # a layer's blocks, with gaps between them
        block = torch.full((B, max_len, r), torch.nan)
        block[:, begin:length].normal_()
        offsets.append(sum(len(part) for part in data))
        data += [block.flatten(), gap]
    offsets = torch.tensor(offsets).view(2, K)
    table = torch.cat((offsets, ranks)) // eighth
    q = torch.randn(B, K, G, d)
    data = torch.cat(data)
    return q.to(device, dtype), data.to(device, dtype), table.to(device)


BOUNDS = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
GRID = list(itertools.product((64, 128, 256), (1, 2, 4, 8)))        # d, G
CASES = (       # B, length, begin, stretches: never whole tiles
    (1, 1, 0, 1), (3, 2, 0, 1), (1, 31, 0, 1), (3, 33, 0, 2), (1, 63, 5, 1), (3, 65, 0, 3),
    (1, 4097, 0, 7), (1, 300, 171, 2), (1, 700, 0, None),
)


def worst_error(G: int, d: int, dtype, device) -> float:
    """The largest error over CASES, as a share of the largest value; infinite if NaN leaked in."""
    worst = 0.0
    for B, length, begin, stretches in CASES:
        max_len = length + 7
        q, data, table = example(B, 2, G, d, max_len, length, begin, dtype, device)
        inputs = q, data, table, max_len, length, d ** -0.5, begin
        expected = reference(*inputs)
        error = decode_attention(*inputs, stretches) - expected
        error = (error.abs().max() / expected.abs().max()).item()
        worst = math.inf if math.isnan(error) else max(worst, error)
    return worst


def main():
    parser = common.arguments(__doc__)
    common.moved(parser, "--compile", "--out", to="python bench/kernel.py")
    device, _ = common.prepare(parser.parse_args())
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        common.fail("--device cpu: where there is a GPU, set TRITON_INTERPRET=1")
    print(f"The kernel against its reference on {device}: largest error / largest value\n")
    for dtype, bound in BOUNDS.items():
        for d, G in GRID:
            worst = worst_error(G, d, dtype, device)
            print(f"  {str(dtype):15s} d = {d:<4d} G = {G}   {worst:.1e}", flush=True)
            if not worst < bound:
                common.fail(f"kernel.py: error {worst:.1e} is above {bound:.0e}", code=1)
    print("\nAll within bounds: 1e-5 in float32, 2e-3 in float16, 1e-2 in bfloat16.")


if __name__ == "__main__":
    common.run_script(main)
