"""One Triton kernel: decoding attention over the compressed, ragged cache.

One new token per sequence. On a GPU such a step does few operations for every number of the cache that it reads (two for
each query head that shares it), so its time is the bytes of the cache over the memory's bandwidth, and a compressed cache
pays exactly if the kernel reads the compressed bytes, each once. All sequences have the same length, but every head has
ranks of its own (cache.py): its keys are a block (batch, max_len, r) somewhere in one flat tensor, its values another, and
a table says where and how wide. Loads beyond a head's rank are masked: a head of rank 16 costs the bytes of rank 16.
(The arithmetic still runs over d columns. It is not what takes the time.)

    program (b, j, z)  owns sequence b, key-value head j, and the z-th of Z stretches of the context:

    for tiles of BLOCK tokens in that stretch:                         # keys and values are read here, once
        scores = q kᵀ / sqrt(d)                                        # the G query heads of the group ride together
        m, l, acc = online softmax: rescale by exp(m_old − m_new), add exp(scores − m_new) and exp(scores − m_new) v
    write acc, m, l                                                    # this stretch's share of the answer

q, k and v are coordinates, r numbers each: the cache holds k U_r and v U_r, the caller passes q U, and what comes out is
still in the coordinates of the values, for W_o' = W_o U_r to take (projection.py).

Why stretches: one sequence of Mistral-7B has 8 key-value heads, and a GPU has a hundred multiprocessors; the context is
cut so that all have work. The shares are merged after the kernel, in PyTorch: G·d numbers for each stretch of 256 tokens
or more. Why the running maximum: exp overflows without one, and a stretch cannot know the largest score of the others.
Why float32 for scores, l and acc: a sum of 100,000 terms in bfloat16 stands still after the first few hundred. Only the
weights are rounded to the cache's dtype, for the second product.

    python kernel.py        # checks; then, with a GPU, timings and kernel.png; without, what the compiler makes of it
"""
import contextlib
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

COMPILE = __name__ == "__main__" and "--compile" in sys.argv     # a child process that compiles for GPUs that are not here
if not torch.cuda.is_available() and not COMPILE:
    os.environ["TRITON_INTERPRET"] = "1"                         # run the kernel in Python; must be set before triton is imported
try:
    import triton
    import triton.language as tl
except ImportError:
    print("kernel.py: triton is missing (it exists for Linux); everything but this kernel works without it", file=sys.stderr)
    raise SystemExit(2) if __name__ == "__main__" else ImportError("triton is missing")


# ---------------------------------------------------------------------------------------------------------------------
# The kernel

@triton.jit(do_not_specialize=["first", "length", "stretch"])     # they grow with every token: compile once for all
def decode_kernel(q, cache, out, stats, table, counter, max_len, first, length, stretch, scale,
                  K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr, COUNT: tl.constexpr):
    """q (B, K, G, D) queries; cache flat; out (B, K, Z, G, D) and stats (B, K, Z, G, 2) float32, the shares' acc and (m, l).

    table (4, K) int64 in units of STEP = d/8 numbers: key offsets, value offsets, key ranks, value ranks. Attends to tokens
    first … length − 1 (a sliding window begins at `first`). ROWS and COLUMNS are G and D rounded up to what tl.dot takes.
    """
    b, j, z = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    # Multiplying by STEP here, not in the table, tells the compiler that every row begins at a multiple of it: 16-byte
    # loads where d/8 numbers are 16 bytes or more (bfloat16 at d = 64).
    r_k, r_v = tl.load(table + 2 * K + j) * STEP, tl.load(table + 3 * K + j) * STEP
    keys = cache + tl.load(table + j) * STEP + b * max_len * r_k          # int64: a cache may have more than 2³¹ numbers
    values = cache + tl.load(table + K + j) * STEP + b * max_len * r_v

    g, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    wanted = (g < G)[:, None] & (column < r_k)[None, :]
    queries = tl.load(q + ((b * K + j) * G + g)[:, None] * D + column[None, :], mask=wanted, other=0.0)   # (ROWS, COLUMNS)
    m = tl.full((ROWS,), float("-inf"), tl.float32)                       # largest score so far
    l = tl.zeros((ROWS,), tl.float32)                                     # Σ exp(score − m)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)                           # Σ exp(score − m) · value
    begin = first + z * stretch
    end = tl.minimum(begin + stretch, length)
    for start in range(begin, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        held = n < end
        k_mask = (column < r_k)[:, None] & held[None, :]
        k = tl.load(keys + n[None, :].to(tl.int64) * r_k + column[:, None], mask=k_mask, other=0.0)       # (COLUMNS, BLOCK)
        if WIDEN:                                                         # the interpreter's tl.dot cannot do bfloat16
            s = tl.dot(queries.to(tl.float32), k.to(tl.float32))
        else:
            s = tl.dot(queries, k, input_precision="ieee")                # float32 stays float32, not TF32
        s = tl.where(held[None, :], s * scale, float("-inf"))             # (ROWS, BLOCK)
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp(s - m_new[:, None])
        rescale = tl.exp(m - m_new)
        l = l * rescale + tl.sum(p, axis=1)
        v_mask = held[:, None] & (column < r_v)[None, :]
        v = tl.load(values + n[:, None].to(tl.int64) * r_v + column[None, :], mask=v_mask, other=0.0)     # (BLOCK, COLUMNS)
        if WIDEN:
            acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype).to(tl.float32), v.to(tl.float32))
        else:
            acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
        if COUNT:
            tl.atomic_add(counter, tl.sum(k_mask.to(tl.int64)) + tl.sum(v_mask.to(tl.int64)))

    share = ((b * K + j) * tl.num_programs(2) + z) * G + g                # this program's rows of out and stats
    tl.store(out + share[:, None] * D + column[None, :], acc, mask=(g < G)[:, None] & (column < D)[None, :])
    tl.store(stats + share * 2, m, mask=g < G)
    tl.store(stats + share * 2 + 1, l, mask=g < G)
    if COUNT:
        tl.atomic_add(counter + 1, tl.sum(wanted.to(tl.int64)))


# ---------------------------------------------------------------------------------------------------------------------
# Its wrapper

def decode_attention(q: Tensor, data: Tensor, table: Tensor, max_len: int, length: int, scale: float, first: int = 0,
                     stretches: int | None = None, counter: Tensor | None = None) -> Tensor:
    """Attention of one new token's queries over a layer of the cache.

    q (B, K, G, d), times U_k, of the cache's dtype; data, the flat cache tensor; table (4, K) int64 in units of d/8 (key
    offsets, value offsets, key ranks, value ranks). Attends to tokens first … length − 1. Returns (B, K, G, d) in q's dtype, in
    the coordinates of the values, zero beyond each head's value rank.
    """
    B, K, G, d = q.shape
    if not 0 <= first < length <= max_len:
        raise ValueError(f"tokens {first} … {length - 1} of a cache of {max_len}")
    if d % 8 or q.dtype != data.dtype or table.shape != (4, K):
        raise ValueError(f"q {list(q.shape)} {q.dtype}, data {data.dtype}, table {list(table.shape)}; expected a head_dim that is a "
                         f"multiple of 8, one dtype, and a table of shape {[4, K]}")
    BLOCK = BLOCKS["fp32" if q.element_size() > 2 else "bf16"]
    if stretches is None:                                          # about four programs for each multiprocessor
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
        stretches = max(1, min(math.ceil(4 * processors / (B * K)), (length - first) // 256))
    stretch = triton.cdiv(triton.cdiv(length - first, stretches), BLOCK) * BLOCK
    stretches = triton.cdiv(length - first, stretch)               # each has at least one token
    out = torch.empty(B, K, stretches, G, d, dtype=torch.float32, device=q.device)
    stats = torch.empty(B, K, stretches, G, 2, dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():       # triton launches on the current one
        decode_kernel[(B, K, stretches)](q.contiguous(), data, out, stats, table, counter, max_len, first, length, stretch, scale,
                                         WIDEN=not q.is_cuda, COUNT=counter is not None, **shapes(K, G, d, BLOCK))
    m, l = stats.unsqueeze(-2).unbind(-1)                          # (B, K, Z, G, 1)
    weight = torch.exp(m - m.amax(2, keepdim=True))                # each stretch against the largest score of all
    return ((out * weight).sum(2) / (l * weight).sum(2)).to(q.dtype)


BLOCKS = {"bf16": 64, "fp32": 32}   # tokens a tile: 32 KB of keys and values at d = 128, three tiles in flight


def shapes(K: int, G: int, d: int, BLOCK: int) -> dict[str, int]:
    return dict(K=K, G=G, D=d, STEP=d // 8, ROWS=max(16, triton.next_power_of_2(G)),
                COLUMNS=max(16, triton.next_power_of_2(d)), BLOCK=BLOCK)


# ---------------------------------------------------------------------------------------------------------------------
# The reference

def reference(q: Tensor, data: Tensor, table: Tensor, max_len: int, length: int, scale: float, first: int = 0) -> Tensor:
    """The same in plain PyTorch and float64, head by head."""
    B, K, G, d = q.shape
    out = torch.zeros(B, K, G, d, dtype=torch.float64, device=q.device)
    for j, (k0, v0, r_k, r_v) in enumerate((table.T * (d // 8)).tolist()):
        keys = data[k0:k0 + B * max_len * r_k].view(B, max_len, r_k)[:, first:length].double()
        values = data[v0:v0 + B * max_len * r_v].view(B, max_len, r_v)[:, first:length].double()
        weights = (q[:, j, :, :r_k].double() @ keys.mT * scale).softmax(-1)
        out[:, j, :, :r_v] = weights @ values
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The check

def example(B: int, K: int, G: int, d: int, max_len: int, length: int, first: int, dtype: torch.dtype, ranks=None,
            device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, a cache with NaN wherever nothing may be read, and its table; `ranks` (2, K), else random ones."""
    step = d // 8
    ranks = torch.randint(1, 9, (2, K)) * step if ranks is None else ranks
    data, starts = [torch.full((5 * step,), torch.nan)], []
    for r in ranks.flatten().tolist():                             # a layer's blocks, with gaps of NaN between them
        block = torch.full((B, max_len, r), torch.nan)
        block[:, first:length] = torch.randn(B, length - first, r)
        starts.append(sum(x.numel() for x in data))
        data += [block.flatten(), torch.full((3 * step,), torch.nan)]
    table = torch.stack([*torch.tensor(starts).view(2, K), *ranks]) // step
    q = torch.randn(B, K, G, d).to(device, dtype)
    return q, torch.cat(data).to(device, dtype), table.to(device)


def check(device: str) -> None:
    """The kernel against the float64 reference on the same (rounded) inputs, over a grid of shapes."""
    torch.manual_seed(0)
    print(f"Correctness on {device}{', in the interpreter' if device == 'cpu' else ''}: largest error / largest value\n")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
    for dtype, bound in tolerance.items():
        for d in (64, 128):
            for G in (1, 2, 4, 8):
                worst = 0.0
                for B, length, first, stretches in ((1, 1, 0, 1), (3, 2, 0, 1), (1, 31, 0, 1), (3, 33, 0, 2), (1, 63, 5, 1),
                                                    (3, 65, 0, 3), (1, 4097, 0, 7), (1, 300, 171, 2), (1, 700, 0, None)):
                    q, data, table = example(B, 2, G, d, length + 7, length, first, dtype, device=device)
                    arguments = q, data, table, length + 7, length, d ** -0.5, first
                    got, expected = decode_attention(*arguments, stretches=stretches), reference(*arguments)
                    error = ((got - expected).abs().max() / expected.abs().max()).item()
                    worst = max(worst, error) if error == error else math.inf          # NaN leaked in
                print(f"  {str(dtype).removeprefix('torch.'):9s} d = {d:<4d} G = {G}   {worst:.1e}", flush=True)
                if not worst < bound:
                    print(f"kernel.py: error {worst:.1e} is above {bound:.0e}", file=sys.stderr)
                    raise SystemExit(1)


def count_bytes(device: str) -> None:
    """What the kernel's own masks let through, against what the plan holds."""
    B, K, G, d, length = 2, 4, 2, 64, 200
    q, data, table = example(B, K, G, d, length, length, 0, torch.float32, device=device)
    counter = torch.zeros(2, dtype=torch.int64, device=device)
    decode_attention(q, data, table, length, length, 1.0, stretches=2, counter=counter)
    loaded, query_bytes = (4 * counter).tolist()
    plan, partial = 4 * B * length * int(table[2:].sum()) * (d // 8), 4 * 2 * B * K * G * (d + 2)
    print(f"\nBytes loaded at ragged ranks {(table[2:] * (d // 8)).flatten().tolist()}: {loaded:,} of the cache, and the ranks "
          f"say {plan:,}; a full cache {8 * B * length * K * d:,}.\nBeside them {query_bytes:,} of queries (once a stretch), and "
          f"{partial:,} written as shares of 2 stretches.")
    if loaded != plan:
        print("kernel.py: the kernel does not read as many bytes as the ranks say", file=sys.stderr)
        raise SystemExit(1)


# ---------------------------------------------------------------------------------------------------------------------
# Without a GPU: compile for two of them, and read what came out

def compile_for(capability: int, dtype: str, d: int, G: int) -> str:
    """One line from the compiler's PTX and the assembler's report on it."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    names = decode_kernel.arg_names
    pointers = {"q": dtype, "cache": dtype, "out": "fp32", "stats": "fp32", "table": "i64", "counter": "i64"}
    constants = shapes(8, G, d, BLOCKS[dtype]) | dict(WIDEN=False, COUNT=False)
    kinds = {name: "*" + kind for name, kind in pointers.items()} | {"scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(decode_kernel, {name: kinds.get(name, "i32") for name in names},
                       {(names.index(name),): value for name, value in constants.items()},
                       {(names.index(name),): [["tt.divisibility", 16]] for name in pointers})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        said = subprocess.run([get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}{'a' * (capability >= 90)}", ptx,
                               "-o", os.devnull], capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", said)[1], re.findall(r"(\d+) bytes spill", said)
    # Loads from the cache go through shared memory (cp.async), asynchronously and several tiles ahead.
    sizes = sorted({int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (0x\w+)",
                                                         compiled.asm["ptx"])})
    return (f"sm_{capability}: {registers} registers, {sum(map(int, spills))} bytes of spills, {compiled.metadata.shared:,} bytes of "
            f"shared memory, {' and '.join(map(str, sizes))}-byte loads  ({dtype}, d = {d}, G = {G})")


# ---------------------------------------------------------------------------------------------------------------------
# With a GPU: time

def benchmark(picture: Path) -> None:
    """Against a copy (the memory's speed) and against scaled_dot_product_attention over the full cache, in one run."""
    from triton.testing import do_bench
    median = lambda step: do_bench(step, return_mode="median")                       # milliseconds; clears the L2 cache
    block = torch.empty(2 ** 30, dtype=torch.uint8, device="cuda")
    copy = 2 * block.numel() / median(lambda: block.clone()) / 1e6                   # GB/s, read and written
    print(f"\n{torch.cuda.get_device_name()}: a copy reaches {copy:,.0f} GB/s. bfloat16, batch 1, medians.\n")
    print("  layout              context   cache     call, ms   GB/s   of copy   time / scaled_dot_product_attention, full cache")
    curves = {}
    for name, K, G, d in (("LLaMA-2-7B", 32, 1, 128), ("Mistral-7B-v0.3", 8, 4, 128)):
        for length in (2 ** n for n in range(10, 18)):
            q = torch.randn(1, K * G, 1, d, dtype=torch.bfloat16, device="cuda")
            k, v = torch.randn(2, 1, K, length, d, dtype=torch.bfloat16, device="cuda")
            full = median(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=G > 1))
            for budget in (1.0, 0.5, 0.375, 0.25):
                level = round(8 * budget)
                ranks = torch.tensor([min(8, level + i % 2) if i // 2 % 2 else max(1, level - i % 2) for i in range(2 * K)])
                ranks = (ranks if budget < 1 else torch.full((2 * K,), 8)).view(2, K) * (d // 8)     # ragged, the same sum
                starts = ((ranks.flatten().cumsum(0) - ranks.flatten()) * length).view(2, K)
                table = (torch.cat((starts, ranks)) // (d // 8)).cuda()
                data = torch.randn(int(ranks.sum()) * length, dtype=torch.bfloat16, device="cuda")
                turned = q.view(1, K, G, d)
                ms = median(lambda: decode_attention(turned, data, table, length, length, d ** -0.5))
                speed = data.nbytes / ms / 1e6
                print(f"  {name:16s}  {length:9,}   {budget:5.1%}   {ms:10.3f}   {speed:5,.0f}   {speed / copy:6.0%}    {ms / full:.3f}")
                curves.setdefault((name, budget), []).append((length, ms / full))
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for (name, budget), points in curves.items():
        axis = axes[name.startswith("M")]
        axis.plot(*zip(*points), marker="o", label=f"{budget:.1%} of the cache")
        axis.set(xscale="log", title=name, xlabel="tokens of context", ylabel="time / attention over the full cache")
        axis.legend()
    figure.savefig(picture, dpi=130)
    print(f"\nSaved {picture}")


def main():
    from model import arguments, fail, prepare
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=Path("kernel.png"), help="where the picture of the timings goes [kernel.png]")
    parser.add_argument("--compile", action="store_true", help="only compile for GPUs and report")
    args = parser.parse_args()
    device, _ = prepare(args)
    if args.compile:
        for capability in (80, 90):
            for dtype, d, G in (("bf16", 128, 1), ("bf16", 128, 4), ("bf16", 64, 2), ("fp32", 128, 4)):
                print("  " + compile_for(capability, dtype, d, G), flush=True)
        return
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        fail("--device cpu: on a machine with a GPU set TRITON_INTERPRET=1 to run the kernel in the interpreter")
    check(device.type)
    count_bytes(device.type)
    if device.type == "cuda":
        return benchmark(args.out)
    print("\nNo GPU here, so no timings. What the compiler makes of the kernel for two of them:\n", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--compile"], env=environment)   # nothing compiles in an interpreted process
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
