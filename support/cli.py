"""The command line: options that scripts share, the device they run on, and errors of one line.

An error of the user is one line on stderr and exit code 2: the option as it was typed, the file,
and what is wrong.
"""
import argparse
import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch

from support import processes

DEMO = Path(__file__).resolve().parent.parent / "demo"


# ------------------------------------------------------------------------------
# Errors

def fail(message: str, code: int = 2) -> NoReturn:
    """Say one line on stderr and leave; exit code 2 is an error of the user."""
    print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def blame(option: str):
    """Turn an error about what the user passed into `fail`, with the option as typed in front."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(f"{option}: {error}")
    except KeyError as error:
        fail(f"{option}: the file has no entry {error}")


def run_script(main) -> None:
    """Run a script's main; Ctrl-C, and memory that does not suffice, are said in one line.

    So is an output that takes no more. One that lacks a character gets its number.
    """
    if sys.stdout is None:                              # closed by who called
        sys.stdout = open(os.devnull, "w")              # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail("Stopped", code=130)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        if isinstance(error, BrokenPipeError):                          # `| head` has read enough
            raise SystemExit(141) from None
        fail(str(error))
    except RuntimeError as error:
        of_cpu = "not enough memory" in str(error) or "alloc_cpu" in str(error)     # has no class
        if not isinstance(error, torch.OutOfMemoryError) and not of_cpu:
            raise
        fail("--device: its memory does not suffice; a smaller --batch, --seq or --tokens takes "
             "less, and for train.py --accumulate or --checkpoint")


# ------------------------------------------------------------------------------
# Options

def arguments(doc: str, several: bool = False) -> argparse.ArgumentParser:
    """A parser with a script's docstring as its help, and with the options of all scripts.

    `several`: the script may run in several processes (torchrun).
    """
    if processes.WORLD > 1 and not several:
        fail("torchrun: only train.py and bits.train run in several processes; use python")
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--ckpt", type=Path, default=DEMO, help="folder of the checkpoint [demo]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="[cuda if there, else cpu]")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32", "float64"],
                        help="[bfloat16 on cuda, float16 before sm_80, float32 on cpu]")
    parser.add_argument("--seed", type=within(0, 2 ** 32), default=0, help="[0]")
    return parser


def within(low, high):
    """An argparse type: a number of the type of `low`, from `low` to `high`."""
    def parse(text: str):
        value = type(low)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = type(low).__name__
    return parse


def data_arguments(parser) -> None:
    parser.add_argument("--data", type=Path,
                        help=".txt, .jsonl, .bin or .npy [Python's own documentation]")
    parser.add_argument("--begin", action="store_true", help="each window begins with the "
                        "tokenizer's beginning of sequence, as prompts of LLaMA, Gemma do")


def out_argument(parser, default: str = "out") -> None:
    """--out: the folder for what is written, token ids among it; None where `default` is words."""
    parser.add_argument("--out", type=Path, default=None if " " in default else Path(default),
                        help=f"folder for what is written, token ids among it [{default}]")


def report_arguments(parser, batch: int = 8, windows: int = 64, seq: int | None = 256) -> None:
    add = parser.add_argument
    add("--batch", type=within(1, 10 ** 5), default=batch, help=f"sequences at a time [{batch}]")
    add("--seq", type=within(2, 10 ** 6), default=seq,
        help=f"tokens of each [{seq or 'what the model was made for, at most 2048'}]")
    add("--windows", type=within(1, 10 ** 6), default=windows,
        help=f"windows of --seq held-out tokens to report on [{windows}]")


def sweep_arguments(parser) -> None:
    add = parser.add_argument
    add("--positions", type=within(1, 10 ** 8), help="sweeps and training place their windows "
        "anywhere below [what the model was made for, at most 8192]")
    add("--sweep-windows", type=within(1, 10 ** 6), default=64,
        help="windows of --seq tokens of the sweeps [64]")


def amp_argument(parser) -> None:
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction,
                        help="matrix products in bfloat16 over float32 weights, but for reports "
                        "[where the CPU has units for them; --recipe paper: no]")


def passage_arguments(parser, least: int = 0) -> None:
    none = "" if least else "; 0 for none"
    parser.add_argument("--passages", type=within(least, 10 ** 6), default=500,
                        help=f"held-out passages to say twice, for the recall{none} [500]")


class OneText(argparse.Action):
    """An option that takes one text, also from stdin."""

    def __call__(self, parser, args, values, option):
        if len(values) > 1:
            parser.error(f"{option}: one text at a time: sequences of a batch have one length")
        try:
            if values == ["-"] and sys.stdin is None:
                parser.error(f"{option} -: there is no standard input")
            args.prompt = sys.stdin.read() if values == ["-"] else values[0]
        except UnicodeDecodeError as error:
            parser.error(f"{option}: not UTF-8 text ({error})")


def prompt_arguments(parser) -> None:
    add = parser.add_argument
    add("--prompt", default="Return the ", nargs="+", action=OneText, help="text to continue; - "
        "reads it from stdin")
    add("--tokens", type=within(1, 10 ** 6), default=100, help="how many new ones at most [100]")
    add("--temperature", type=within(0.0, 100.0), default=0.0,
        help="0 takes the likeliest token [0]")


# ------------------------------------------------------------------------------
# The machine

def prepare(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and dtype asked for, PyTorch set up; fails where the device is not there."""
    torch.manual_seed(args.seed)
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):      # others lack float64, which calibration sums in
            fail(f"--device {args.device}: only cpu and cuda are supported")
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:     # torchrun: a GPU each
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f"--device {args.device}: not a device of this machine or this build of PyTorch")
    if device.type == "cuda":
        return device, prepare_cuda(device, args.dtype)
    return device, getattr(torch, args.dtype or "float32")


def prepare_cuda(device: torch.device, name: str | None) -> torch.dtype:
    """Set PyTorch up for this GPU; the dtype of that name, or the one that suits it."""
    if device.index is not None:            # who asks for memory or time means this GPU
        torch.cuda.set_device(device)
    if name is None and torch.cuda.get_device_capability() < (8, 0):
        print("This GPU has no units for bfloat16: --dtype float16", file=sys.stderr)
        name = "float16"
    dtype = getattr(torch, name or "bfloat16")
    # cuDNN's attention builds a graph for each new shape, and a ragged prefill has dozens.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # float32 products may round their inputs to TF32's 11 bits: 2-byte weights are exact in it.
    torch.backends.cuda.matmul.allow_tf32 = dtype.itemsize == 2
    return dtype


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next step.

    glibc hands blocks above 32 MB back and gets them back page by page, zeroed: a third of a
    training step on a CPU. Elsewhere (macOS, Windows, musl) this does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)                     # no block of its own mapping
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)     # never shrink the heap
    except (OSError, AttributeError, TypeError):
        pass


def choose_amp(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Decide --amp where the user did not, and say so; fails where weights are not float32."""
    if args.amp and dtype != torch.float32:
        fail(f"--amp: is for float32 weights, not {str(dtype).removeprefix('torch.')}")
    if args.amp is None:
        args.amp = device.type == "cpu" and dtype == torch.float32 and has_bfloat16_units()
        if args.amp and processes.RANK == 0:
            print("Products in bfloat16, for which this CPU has units (--no-amp: in float32)")


def has_bfloat16_units() -> bool:
    """Whether this CPU has units for bfloat16 products, as Linux says (AVX512-BF16, AMX, ARM's)."""
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
