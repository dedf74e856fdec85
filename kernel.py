"""Two Triton kernels: decoding attention over the compressed, ragged cache.

Decoding adds one new token per sequence. On a GPU such a step does few operations for each number
of the cache that it reads, so behind a long context its time is the bytes of the cache over the
memory's bandwidth: a compressed cache pays only if the kernel reads its bytes, each of them once.
The cache is a matrix of rows (cache.py): a row is one coordinate of one sequence, max_len numbers.
Every head has ranks of its own: r rows of keys for each sequence, r' of values, and a table says
where and how many. Loads beyond a head's rank are masked: it costs its own bytes, though arithmetic
runs over d, rounded up.

    program (b, j, z) owns sequence b, key-value head j, and the z-th of Z stretches of the context:

    for tiles of tokens in that stretch:                # keys and values are read here, once
        scores = q kᵀ / sqrt(d)                         # for the G query heads of the group at once
        m_new  = max(m, max scores)                     # the largest score so far; m after the tile
        acc    = acc · exp(m − m_new) + exp(scores − m_new) v
        l      = l · exp(m − m_new) + Σ exp(scores − m_new)
    write acc, m, l                                     # this stretch's share of the answer

q, k and v are coordinates: the cache holds the first r columns of k U_k and of v U_v, the caller
passes q U_k, and what comes out is in the values' coordinates: W_o' takes it (fold_head). Where
keys are cached without their turned mean, scores get q · R_n m back, from the same tiles of tokens.
Of the first tokens, where they are whole, what the ranks cut off of the keys is read from a block
of its own; for the values cut off, `KVCache.output` wants these tokens' weights. They come as one
more coordinate for each first token, r, r + 1, …: it is 1 at its own and 0 at all others.

Why stretches: one sequence of Mistral-7B has 8 key-value heads, and a GPU has a hundred
multiprocessors; the context is cut so that all have work. A second, small kernel merges the shares,
each rescaled to the largest m, and writes them as W_o' takes them: behind a short context it is
launches that take the time.
Why the running maximum: exp overflows without one. Why float32 for scores, l and acc: a sum of
100,000 terms in bfloat16 soon stands still. Only exp(scores − m_new) is rounded, to multiply v.

    python kernel.py            # checks it against a float64 reference, on the GPU if there is one
    python bench/kernel.py      # times it, or compiles it for GPUs that are not here
"""
import contextlib
import itertools
import math
import os

import torch
from torch import Tensor

from support import cli

if not torch.cuda.is_available():               # Triton's interpreter runs the kernel in Python;
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before Triton is imported
try:
    import triton
    import triton.language as tl
except ImportError:
    lacking = "triton is missing (it exists for Linux); everything but the kernel works without it"
    if __name__ == "__main__":
        cli.fail(f"kernel.py: {lacking}")
    raise ImportError(lacking) from None


# ------------------------------------------------------------------------------
# The kernels

@triton.jit
def decode_kernel(
    q, cache, table, span, acc_out, stats_out,
    raw, mean, turns, first_keys,
    q_sequence, q_head, raw_sequence, raw_head, max_len, scale,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    HAS_MEAN: tl.constexpr, WHOLE_KEYS: tl.constexpr, WHOLE_VALUES: tl.constexpr,
):
    """Attention of the G queries of each of K heads to the tokens of `span`, in Z stretches.

    q (B, K, G, D), its first two strides given; cache (rows, max_len) of q's dtype; table and span
    are decode_attention's. Writes float32 acc_out (B, K, Z, G, COLUMNS) and stats_out (B, K, Z, G,
    2): m, l; of a stretch beyond the end 0, −inf, 0. ROWS, COLUMNS: `constants`.

    HAS_MEAN: raw like q, the queries before U_k; mean (K, D) and turns (D, max_len), float32.
    WHOLE_KEYS: how many tokens first_keys (K, B, D, ·) holds, or 0. WHOLE_VALUES: of how many
    first tokens weights are wanted.
    """
    b = tl.program_id(0)
    j = tl.program_id(1)
    z = tl.program_id(2)
    Z = tl.num_programs(2)
    key_rank = tl.load(table + 2 * K + j)
    value_rank = tl.load(table + 3 * K + j)
    key_row = tl.load(table + j) + b * key_rank         # 64 bits: a cache may have 2³¹ numbers
    value_row = tl.load(table + K + j) + b * value_rank
    begin = tl.load(span).to(tl.int32)
    end = tl.load(span + 1).to(tl.int32)

    g = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row = (g < G)[:, None]
    is_key = column < key_rank
    is_value = column < value_rank
    keys = cache + (key_row + column)[:, None] * max_len
    values = cache + (value_row + column)[:, None] * max_len

    is_column = column < D
    block = j * tl.num_programs(0) + b              # of first tokens
    whole_keys = first_keys + (block * D + column)[:, None] * WHOLE_KEYS

    q_at = q + b * q_sequence + j * q_head + g[:, None] * D + column
    queries = tl.load(q_at, mask=is_row & is_column, other=0.0)     # (ROWS, COLUMNS)
    if HAS_MEAN:            # q_a m_a + q_b m_b for the cos of a pair, q_b m_a − q_a m_b for its sin
        half, partner = column % (D // 2), (column + D // 2) % D
        raw_at = raw + b * raw_sequence + j * raw_head + g[:, None] * D
        q_own = tl.load(raw_at + column, mask=is_row & is_column, other=0.0).to(tl.float32)
        q_other = tl.load(raw_at + partner, mask=is_row & is_column, other=0.0).to(tl.float32)
        m_a = tl.load(mean + j * D + half)
        m_b = tl.load(mean + j * D + half + D // 2)
        by_turn = q_own * m_a + q_other * tl.where(column < D // 2, m_b, -m_b)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)

    # Tiles begin at multiples of TILE. Loads run on to a multiple of 16 tokens, so that a thread
    # loads 16 bytes at a time where max_len is such a one; what is not seen is masked in s and v.
    tiles = tl.cdiv(end, TILE) - begin // TILE
    stretch = tl.cdiv(tiles, Z)                 # tiles of each
    low = (begin // TILE + z * stretch) * TILE
    high = tl.minimum(low + stretch * TILE, end)
    loaded = tl.minimum((high + 15) // 16 * 16, max_len)
    for start in range(low, high, TILE):
        token = start + tl.arange(0, TILE)
        is_there = (token < loaded)[None, :]
        is_seen = (token >= begin) & (token < high)

        k_mask = is_key[:, None] & is_there
        k = tl.load(keys + token, mask=k_mask, other=0.0)           # (COLUMNS, TILE)
        if WHOLE_KEYS > 0:
            is_whole = is_column[:, None] & (token < WHOLE_KEYS)[None, :]
            k += tl.load(whole_keys + token, mask=is_whole, other=0.0)
        s = tl.dot(queries, k, input_precision="ieee")              # no TF32
        if HAS_MEAN:
            turn_at = turns + column[:, None] * max_len + token
            turn = tl.load(turn_at, mask=is_column[:, None] & is_there, other=0.0)
            s += tl.dot(by_turn, turn, input_precision="ieee")
        s = tl.where(is_seen, s * scale, float("-inf"))             # (ROWS, TILE)

        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp(s - m_new[:, None])
        rescale = tl.exp(m - m_new)
        l = l * rescale + tl.sum(p, axis=1)
        m = m_new

        v_mask = is_value[:, None] & is_there
        v = tl.load(values + token, mask=v_mask, other=0.0)         # (COLUMNS, TILE)
        if WHOLE_VALUES > 0:
            is_own = (column - value_rank)[:, None] == token[None, :]
            v = tl.where(is_own & (token < WHOLE_VALUES)[None, :], 1.0, v)
        v = tl.where(is_seen, v, 0.0)           # beyond the last token anything may lie, NaN too
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), tl.trans(v), input_precision="ieee")

    share = ((b * K + j) * Z + z) * G + g       # this program's rows of what it writes
    acc_at = acc_out + share[:, None] * COLUMNS + column
    tl.store(acc_at, acc, mask=is_row)
    stats_at = stats_out + share * 2
    tl.store(stats_at, m, mask=g < G)
    tl.store(stats_at + 1, l, mask=g < G)


@triton.jit(do_not_specialize=["Z"])            # else recompiled for 1 and 16·n
def merge_kernel(
    acc_in, stats_in, table, out, Z, width,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    COLUMNS: tl.constexpr, WHOLE_VALUES: tl.constexpr, SHARES: tl.constexpr = 16,
):
    """Sets the Z shares of each query against one another, and writes what `output` takes.

    out (B, width), in the cache's dtype. Program (b, j, g) owns one query. The first share has a
    token: m does not stay −inf.
    """
    b = tl.program_id(0)
    j = tl.program_id(1)
    g = tl.program_id(2)
    value_rank = tl.load(table + 3 * K + j)
    place = tl.load(table + 4 * K + j)
    weights_place = tl.load(table + 5 * K + j)
    column = tl.arange(0, COLUMNS)
    is_value = column < value_rank
    token = column - value_rank                 # whose weight a column beyond the rank is
    wanted = tl.where(value_rank < D, WHOLE_VALUES, 0)
    is_weight = (token >= 0) & (token < wanted)

    m = float("-inf")
    l = 0.0
    acc = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, Z, SHARES):
        z = start + tl.arange(0, SHARES)
        is_there = z < Z
        share = ((b * K + j) * Z + z) * G + g
        stats_at = stats_in + share * 2
        acc_at = acc_in + share[:, None] * COLUMNS + column
        acc_mask = is_there[:, None] & (is_value | is_weight)
        m_z = tl.load(stats_at, mask=is_there, other=float("-inf"))
        l_z = tl.load(stats_at + 1, mask=is_there, other=0.0)
        acc_z = tl.load(acc_at, mask=acc_mask, other=0.0)           # (SHARES, COLUMNS)

        m_new = tl.maximum(m, tl.max(m_z, axis=0))
        weight = tl.exp(m_z - m_new)
        rescale = tl.exp(m - m_new)
        l = l * rescale + tl.sum(l_z * weight, axis=0)
        acc = acc * rescale + tl.sum(acc_z * weight[:, None], axis=0)
        m = m_new

    out_at = out + b * width + place + g * value_rank + column
    tl.store(out_at, acc / l, mask=is_value)
    weights_at = out + b * width + weights_place + g * WHOLE_VALUES
    tl.store(weights_at + token, acc / l, mask=is_weight)
    tl.store(weights_at + column, 0.0, mask=(column >= wanted) & (column < WHOLE_VALUES))


# ------------------------------------------------------------------------------
# Their wrapper

def decode_attention(
    q: Tensor, rows: Tensor, table: Tensor, span: Tensor, tokens: int, width: int, scale: float,
    raw: Tensor | None = None, mean: Tensor | None = None, turns: Tensor | None = None,
    first_keys: Tensor | None = None, whole_values: int = 0, stretches: int | None = None,
) -> Tensor:
    """Attention of one new token's queries over a layer of the cache: (B, width), in q's dtype.

    q (B, K, G, d) is q U_k, its last two dimensions contiguous; rows (n, max_len) is the cache, of
    q's dtype. table (6, K) int64, heads in the order of their keys: first rows of keys and of
    values, key ranks, value ranks, where a head's numbers begin among the `width` of the result
    (in the order of values), where the weights of the first `whole_values` tokens do, (G,
    whole_values), 0 for heads at rank d. span (2,) int64, begin and end, stays on the device:
    `tokens`, about their number, decides into how many `stretches` they are cut. mean (K, d), with
    raw, queries before U_k, like q, and turns (d, max_len), float32; first_keys (K, B, d, whole) of
    q's dtype: what cache.py says of them. ValueError where q, rows and table do not fit.
    """
    B, K, G, d = q.shape
    max_len = rows.shape[1]
    if d % 8 or q.dtype != rows.dtype or table.shape != (6, K):
        raise ValueError(f"q {list(q.shape)} {q.dtype}, rows {rows.dtype}, table "
                         f"{list(table.shape)}; expected a head_dim that is a multiple of 8, one "
                         f"dtype, and a table of shape {[6, K]}")
    dtype = q.dtype
    if not q.is_cuda and dtype == torch.bfloat16:       # the interpreter's tl.dot cannot do it
        q, rows = q.float(), rows.float()
        first_keys = None if first_keys is None else first_keys.float()
    whole_keys = 0 if first_keys is None else first_keys.shape[-1]
    sizes = constants(K, G, d, q.dtype, mean is not None, whole_keys, whole_values)
    raw = q if mean is None else raw            # stand-ins, never read, for what is absent
    given = [rows if x is None else x for x in (mean, turns, first_keys)]
    Z = stretches or enough_stretches(B * K, tokens, q.device)
    wide = {"dtype": torch.float32, "device": q.device}
    acc = torch.empty(B, K, Z, G, sizes["COLUMNS"], **wide)
    stats = torch.empty(B, K, Z, G, 2, **wide)
    out = q.new_empty(B, width)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        decode_kernel[(B, K, Z)](
            q, rows, table, span, acc, stats, raw, *given,
            *q.stride()[:2], *raw.stride()[:2], max_len, scale, **sizes)
        merge_kernel[(B, K, G)](
            acc, stats, table, out, Z, width,
            K, G, d, sizes["COLUMNS"], whole_values)
    return out.to(dtype)


def enough_stretches(heads: int, tokens: int, device) -> int:
    """About four programs for each multiprocessor, and some 256 tokens or more for each program."""
    processors = 2                              # in the interpreter: any few
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = math.ceil(4 * processors / heads)
    return max(1, min(wanted, tokens // 256))


def constants(K: int, G: int, d: int, dtype, has_mean: bool = False, whole_keys: int = 0,
              whole_values: int = 0) -> dict:
    """What decode_kernel is compiled for.

    ROWS and COLUMNS are powers of 2, 16 or more, as tensor cores have it (Triton 3.9 takes fewer
    rows too): they hold G queries, and d coordinates or the weights of first tokens behind the
    largest rank below d. A tile is at most 32 KB of keys, values and turns, counting 128 columns
    where there are fewer, or 16 tokens; Triton pipelines three.
    """
    columns = max(16, d, d - d // 8 + whole_values)
    sizes = {"K": K, "G": G, "D": d}
    sizes["ROWS"] = max(16, triton.next_power_of_2(G))
    sizes["COLUMNS"] = triton.next_power_of_2(columns)
    sizes |= {"HAS_MEAN": has_mean, "WHOLE_KEYS": whole_keys, "WHOLE_VALUES": whole_values}
    per_token = max(128, sizes["COLUMNS"]) * (2 * dtype.itemsize + 4 * has_mean)    # k, v; turns
    sizes["TILE"] = max(16, 2 ** ((2 ** 15 // per_token).bit_length() - 1))     # a power of 2 too
    return sizes


# ------------------------------------------------------------------------------
# The reference

def reference(q, rows, table, span, tokens, width, scale, raw=None, mean=None, turns=None,
              first_keys=None, whole_values=0) -> Tensor:
    """What the two kernels compute, in plain PyTorch and float64, head by head."""
    B, _, G, d = q.shape
    out = torch.zeros(B, width, dtype=torch.float64, device=q.device)
    begin, end = span.tolist()

    def block(first: int, r: int) -> Tensor:
        """All d coordinates of a head, 0 beyond r: (B, d, tokens)."""
        found = torch.zeros(B, d, end - begin, dtype=torch.float64, device=q.device)
        found[:, :r] = rows[first:first + B * r, begin:end].view(B, r, -1)
        return found

    for j, numbers in enumerate(table.T.tolist()):
        first_key, first_value, r_k, r_v, first_out, first_weight = numbers
        keys, values = block(first_key, r_k), block(first_value, r_v)
        if first_keys is not None:
            cut = first_keys[j, ..., begin:end].double()
            keys[..., :cut.shape[-1]] += cut
        scores = q[:, j].double() @ keys                        # (B, G, tokens)
        if mean is not None:
            a, b = mean[j].double()[:, None].chunk(2)           # (d/2, 1)
            cos, sin = turns[:, begin:end].double().chunk(2)    # (d/2, tokens)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin))      # R_n m
            scores = scores + raw[:, j].double() @ turned
        weights = (scores * scale).softmax(-1)
        of_head = weights @ values.mT                           # (B, G, d)
        out[:, first_out:first_out + G * r_v] = of_head[..., :r_v].flatten(1)
        if r_v < d:
            of_first = out[:, first_weight:first_weight + G * whole_values].view(B, G, -1)
            seen = weights[..., :max(whole_values - begin, 0)]
            of_first[..., begin:begin + seen.shape[-1]] = seen
    return out


# ------------------------------------------------------------------------------
# The check

def example(
    B: int, K: int, G: int, d: int,
    max_len: int, begin: int, end: int,
    dtype: torch.dtype, device="cpu", whole: int = 0,
) -> tuple:
    """Random arguments of decode_attention; NaN wherever nothing may be seen.

    With `whole` first tokens there is a mean of the keys too.
    """
    ranks = d // 8 * torch.randint(1, 9, (2, K))
    gap = 3                                     # a layer's blocks, with rows between them
    sizes = B * ranks.flatten() + gap
    firsts = sizes.cumsum(0) - sizes + gap
    rows = torch.full((int(sizes.sum()) + gap, max_len), torch.nan)
    for first, r in zip(firsts.tolist(), ranks.flatten().tolist(), strict=True):
        rows[first:first + B * r, begin:end].normal_()
    widths = G * ranks[1]                       # of each head's numbers in the result
    first_out = widths.cumsum(0) - widths
    width = int(widths.sum())
    first_weight = width + G * whole * torch.arange(K)
    table = torch.stack((*firsts.view(2, K), *ranks, first_out, first_weight))
    q, raw = torch.randn(2, B, K, G + 1, d)     # a cache passes queries with a key beside them
    q, raw = (x.to(device, dtype)[:, :, :G] for x in (q, raw))
    rows = rows.to(device, dtype)
    span = torch.tensor([begin, end], device=device)
    given = (q, rows, table.to(device), span, end - begin, width + K * G * whole, d ** -0.5)
    if not whole:
        return given
    angle = torch.arange(1, d // 2 + 1)[:, None] / d * torch.arange(max_len)
    turns = torch.cat((angle.cos(), angle.sin()))
    cut = torch.full((K, B, d, whole), torch.nan)
    cut[..., begin:end].normal_()
    for j, r in enumerate(ranks[0].tolist()):
        cut[j, :, :r] = 0
    mean = torch.randn(K, d).to(device)
    return (*given, raw, mean, turns.to(device), cut.to(device, dtype), whole)


BOUNDS = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
GRID = list(itertools.product((64, 128, 256), (1, 2, 4, 8)))        # d, G
CASES = (       # B, begin, end, stretches, whole: never whole tiles, with stretches that stay empty
    (1, 0, 1, 1, 0), (3, 0, 2, 1, 4), (1, 0, 31, 20, 0), (3, 0, 33, 2, 1), (1, 5, 63, 1, 0),
    (3, 0, 65, 3, 4), (1, 171, 300, 2, 16), (3, 2, 70, 2, 4),
    (1, 0, 4105, 40, 4), (1, 0, 697, None, 0),          # end + 7 is a multiple of 16, as in use
)


def worst_error(G: int, d: int, dtype, device) -> float:
    """The largest error over CASES, as a share of the largest value; infinite if NaN leaked in."""
    worst = 0.0
    for B, begin, end, stretches, whole in CASES:
        inputs = example(B, 2, G, d, end + 7, begin, end, dtype, device, whole)
        expected = reference(*inputs)
        error = (decode_attention(*inputs, stretches=stretches) - expected).abs().max()
        error = (error / expected.abs().max()).item()
        worst = math.inf if math.isnan(error) else max(worst, error)
    return worst


def main():
    parser = cli.arguments(__doc__)
    device, _ = cli.prepare(parser.parse_args())
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        cli.fail("--device cpu: where there is a GPU, set TRITON_INTERPRET=1")
    print(f"The kernel against its reference on {device}: largest error / largest value\n")
    for dtype, bound in BOUNDS.items():
        for d, G in GRID:
            worst = worst_error(G, d, dtype, device)
            print(f"  {str(dtype):15s} d = {d:<4d} G = {G}   {worst:.1e} < {bound:.0e}", flush=True)
            if not worst < bound:
                cli.fail(f"kernel.py: error {worst:.1e} is above {bound:.0e}", code=1)
    print("\nAll within bounds.")


if __name__ == "__main__":
    cli.run_script(main)
