"""What compilers make of the kernels, and how fast a GPU runs them.

For each kind of GPU (no GPU is needed): the registers of a thread and what is spilled from them,
the shared memory of a program and what a program may have there, and how many bytes a load from the
cache takes at a time: 16 is the most. Then registers and spills of the kernel that merges. One line
for each dtype and shape, of plain projections; and of those with a mean of the keys and 4 whole
tokens, as train.py makes them ("+ m").

With a GPU also the time of a whole call, merging the stretches included, over lengths of context at
the layer of two 7B models, for a full cache and for made-up plans in which all heads differ, and
again with a mean and 4 whole tokens: bytes of the cache per second against what a copy reaches, and
the time against PyTorch's scaled_dot_product_attention over the full cache.

    python bench/kernel.py                      # all; with a GPU, the timings and kernel.png
    python bench/kernel.py --capability 90      # compile for an H100 or H200 alone
"""
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import in_fresh_process, ragged_ranks
from support import cli
from support.pictures import picture

os.environ["TRITON_INTERPRET"] = "0"        # nothing compiles in an interpreted process
try:
    import kernel
except ImportError as error:
    cli.fail(f"bench/kernel.py: {error}")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Compute capability: KB of shared memory that a program may have.
GPUS = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}

SHAPES = (                                  # dtype, d, G
    ("bf16", 128, 1),
    ("bf16", 128, 4),
    ("bf16", 64, 2),
    ("bf16", 256, 4),
    ("fp16", 128, 4),
    ("fp32", 128, 4),
)
POINTERS = {                                # those of one dtype whatever the cache's
    "table": "i64",
    "span": "i64",
    "acc_out": "fp32",
    "stats_out": "fp32",
    "acc_in": "fp32",
    "stats_in": "fp32",
    "mean": "fp32",
    "turns": "fp32",
}
LIKE_THE_CACHE = ("q", "cache", "out", "raw", "first_keys")
WHOLE = 4                                   # first tokens, where there is a mean
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ------------------------------------------------------------------------------
# The compiler's report

def report(capability: int) -> list[str]:
    """The lines on a kind of GPU, from a process of its own: a compiler may end in an abort."""
    try:
        return in_fresh_process(lines_on, capability)
    except BrokenProcessPool:
        return [f"  sm_{capability}  does not compile: Triton's compiler crashed"]


def lines_on(capability: int) -> list[str]:
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):                   # a compiler that fails prints the whole program
        os.dup2(silence, stream)
    return [line_on(capability, *shape, has_mean) for shape in SHAPES for has_mean in (False, True)]


def line_on(capability: int, dtype: str, d: int, G: int, has_mean: bool) -> str:
    what = f"  sm_{capability}  {dtype}  d = {d:<3d}  G = {G}  {'+ m' if has_mean else '':3s}   "
    try:
        decode, merge = (compile_for(capability, each, dtype, d, G, has_mean)
                         for each in (kernel.decode_kernel, kernel.merge_kernel))
        registers, spills = assemble(decode.asm["ptx"])
        of_merge, spills_of_merge = assemble(merge.asm["ptx"])
    except Exception as error:              # Triton, LLVM and ptxas each have their own
        return f"{what}does not compile: {gist(error)}"
    shared = f"{decode.metadata.shared / 1024:.0f}"
    if capability in GPUS:
        shared += f" of {GPUS[capability]}"
    widths = load_widths(decode.asm["ptx"])
    return (f"{what}{registers:3d} registers, {spills} bytes spilled, {shared} KB shared, "
            f"{' and '.join(widths)}-byte loads; merging {of_merge}, {spills_of_merge}")


def gist(error: Exception) -> str:
    """The line of a compiler's message that says what is wrong, else its first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    fatal = [line for line in lines if "fatal" in line]
    line = (fatal or lines)[0]
    return " ".join(line.split())


def compile_for(capability: int, function, dtype: str, d: int, G: int, has_mean: bool):
    """Triton's result for a kernel and 8 key-value heads, of which G query heads read each."""
    names = function.arg_names
    whole = WHOLE if has_mean else 0
    constants = kernel.constants(8, G, d, DTYPES[dtype], has_mean)
    constants |= {"SHARES": 16, "WHOLE_KEYS": whole, "WHOLE_VALUES": whole}
    constants = {name: value for name, value in constants.items() if name in names}
    pointers = {name: kind for name, kind in POINTERS.items() if name in names}
    pointers |= {name: dtype for name in LIKE_THE_CACHE if name in names}
    signature = dict.fromkeys(names, "i32")
    signature |= {name: f"*{kind}" for name, kind in pointers.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    if "scale" in names:
        signature["scale"] = "fp32"
    place = {name: (index,) for index, name in enumerate(names)}
    values = {place[name]: value for name, value in constants.items()}
    numbers = ("max_len", "q_head", "raw_head", "width")
    multiples = [*pointers, *(name for name in numbers if name in names)]
    aligned = {place[name]: [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(function, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def assemble(ptx: str) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, as the assembler says."""
    from triton.backends.nvidia.compiler import get_ptxas
    target = re.search(r"^\.target (sm_(\d+)\w*)", ptx, re.MULTILINE)
    ptxas = get_ptxas(int(target[2])).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target[1]}", file, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    registers = re.search(r"Used (\d+) registers", done.stderr)[1]
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    return int(registers), sum(map(int, spills))


def load_widths(ptx: str) -> list[str]:
    """Bytes that the loads from the cache take.

    From sm_80 on they go to shared memory (cp.async), some tiles ahead; before, through registers.
    The loads of 64 bits are those from the table.
    """
    ahead = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (0x\w+)", ptx)
    widths = {int(size, 16) for size in ahead}
    if not ahead:
        loads = re.findall(r"ld\.global[\w.]*?(?:\.v(\d))?\.b(8|16|32)\b", ptx)
        for count, bits in loads:
            widths.add(int(count or 1) * int(bits) // 8)
    return [str(width) for width in sorted(widths)]


# ------------------------------------------------------------------------------
# Time, on a GPU

LAYERS = {                                  # K, G, d
    "LLaMA-2-7B": (32, 1, 128),
    "Mistral-7B-v0.3": (8, 4, 128),
}
CASES = [(1.0, False), *itertools.product((0.5, 0.375, 0.25), (False, True))]   # budget, a mean
LENGTHS = [2 ** n for n in range(10, 18)]


def milliseconds(step) -> list[float]:
    """The median of many calls, and what a fifth of them are below and above; L2 is cleared."""
    return triton.testing.do_bench(step, quantiles=[0.5, 0.2, 0.8])


def copy_speed(device) -> float:
    """GB/s, read and written."""
    block = torch.empty(2 ** 30, dtype=torch.uint8, device=device)
    return 2 * block.nbytes / milliseconds(block.clone)[0] / 1e6


def one_layer(q: Tensor, length: int, budget: float, has_mean: bool) -> tuple:
    """Arguments of decode_attention: q and a layer of a cache of random numbers."""
    _, K, G, d = q.shape
    ranks = ragged_ranks(1, K, d, budget)[:, 0]                     # (2, K)
    sizes = ranks.flatten()
    firsts = (sizes.cumsum(0) - sizes).view(2, K)
    ends = G * ranks[1].cumsum(0)
    whole = WHOLE if has_mean else 0
    weights = ends[-1] + G * whole * torch.arange(K)
    table = torch.stack((*firsts, *ranks, ends - G * ranks[1], weights))
    rows = q.new_empty(int(sizes.sum()), length).normal_()
    span = torch.tensor([0, length]).to(q.device)
    width = int(ends[-1]) + K * G * whole
    given = q, rows, table.to(q.device), span, length, width, d ** -0.5
    if not has_mean:
        return given
    mean = torch.randn(K, d, device=q.device)
    turns = torch.randn(d, length, device=q.device)
    first_keys = q.new_empty(K, 1, d, WHOLE).normal_()
    return *given, q, mean, turns, first_keys, whole


def time_pytorch(q: Tensor, length: int) -> float:
    """Milliseconds of PyTorch's attention over a full cache."""
    _, K, G, d = q.shape
    k = q.new_empty(1, K, length, d).normal_()
    v = torch.randn_like(k)
    q = q.view(1, K * G, 1, d)
    attend = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=G > 1)
    return milliseconds(attend)[0]


def time_layer(name: str, length: int, copy: float, dtype, device) -> dict:
    """Print a line for every budget. Returns {(budget, has a mean): time / PyTorch's}."""
    K, G, d = LAYERS[name]
    q = torch.randn(1, K, G, d, dtype=dtype, device=device)
    full = time_pytorch(q, length)
    ratios = {}
    for budget, has_mean in CASES:
        inputs = one_layer(q, length, budget, has_mean)
        rows = inputs[1]
        times = milliseconds(partial(kernel.decode_attention, *inputs))
        speed = rows.nbytes / times[0] / 1e6
        middle, low, high = (ms / full for ms in times)
        ratios[budget, has_mean] = middle
        with_mean = "+ m" if has_mean else ""
        print(f"  {name:16s} {length:9,}   {budget:6.1%} {with_mean:3s}   {times[0]:10.3f}  "
              f"{speed:6,.0f}   {speed / copy:6.0%}     {middle:.3f} [{low:.3f} … {high:.3f}]",
              flush=True)
    return ratios


def time_all(dtype, device, path: Path) -> None:
    copy = copy_speed(device)
    print(f"\n{torch.cuda.get_device_name(device)}: a copy reaches {copy:,.0f} GB/s. "
          f"{str(dtype).removeprefix('torch.')}, batch 1, medians [20% … 80% of the calls]\n")
    print("  layer              context    cache         call, ms    GB/s   of copy     "
          "time / scaled_dot_product_attention, full cache")
    ratios = {}
    for name in LAYERS:
        for length in LENGTHS:
            ratios[name, length] = time_layer(name, length, copy, dtype, device)
    draw(ratios, path)
    print(f"\nSaved {path}")


def draw(ratios: dict, path: Path) -> None:
    with cli.blame("--out"), picture(path, 2, sharey=True) as axes:
        for axis, name in zip(axes, LAYERS, strict=True):
            for n, (budget, has_mean) in enumerate(CASES):
                values = [ratios[name, length][budget, has_mean] for length in LENGTHS]
                label = f"{budget:.1%} of the cache" + (", m and whole tokens" if has_mean else "")
                axis.plot(LENGTHS, values, ":" if has_mean else "-", marker="o", label=label,
                          color=f"C{(n + 1) // 2}")
            axis.set(xscale="log", title=name, xlabel="tokens of context",
                     ylabel="time / PyTorch's attention, full cache")
            axis.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS], rotation=45)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend()


def main():
    parser = cli.arguments(__doc__)
    parser.add_argument("--capability", type=cli.within(10, 999), action="append",
                        help=f"compile for GPUs of this one {list(GPUS)}")
    parser.add_argument("--out", type=Path, default=Path("kernel.png"),
                        help="where the picture of the timings goes [kernel.png]")
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    print(f"Compiled by Triton {triton.__version__}:\n")
    for capability in args.capability or GPUS:
        print(*report(capability), sep="\n", flush=True)
    if device.type == "cpu":
        print("\nNothing was timed: that takes a GPU.")
        return
    if dtype.itemsize > 4:
        cli.fail("--dtype float64: the kernel computes in float32")
    with torch.cuda.device(device):
        time_all(dtype, device, args.out)


if __name__ == "__main__":
    cli.run_script(main)
