"""What several of these scripts need: options, made-up plans, timing by turns, fresh processes."""
import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

import common
from projection import LEVELS


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser with a script's docstring as its help, for scripts that run no model."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = common.fail
    return parser


def training_arguments(parser, steps: int) -> None:
    count = common.within(1, 10 ** 7)
    parser.add_argument("--steps", type=count, default=steps, help=f"[{steps}]")
    parser.add_argument("--lr", type=common.within(0.0, 1e6), help="[0.5 / head_dim]")


def complete_training(args, config, dtype: torch.dtype, tokens) -> None:
    """What train.Run asks of its args beside the options above: the defaults of train.py."""
    defaults = {
        "recipe": "ours",
        "uniform": True,
        "ce": 0.0,
        "accumulate": 1,
        "amp": False,
        "checkpoint": False,
        "ranks": None,
    }
    for name, value in defaults.items():
        vars(args).setdefault(name, value)
    if args.lr is None:
        args.lr = 0.5 / config.head_dim
    args.dtype = str(dtype).removeprefix("torch.")
    args.train_tokens = len(tokens)


def ragged_ranks(L: int, K: int, d: int, budget: float) -> Tensor:
    """A made-up plan (2, L, K) of exactly this budget: heads differ, keys get 70% of the steps."""
    generator = torch.Generator().manual_seed(0)
    wanted = 2 * L * K * LEVELS * budget
    levels = torch.ones(2, L, K, dtype=torch.long)
    while levels.sum() < wanted:
        side = int(torch.rand(1, generator=generator) > 0.7)
        layer = torch.randint(L, (1,), generator=generator)
        head = torch.randint(K, (1,), generator=generator)
        if levels[side, layer, head] < LEVELS:
            levels[side, layer, head] += 1
    return levels * (d // LEVELS)


# ------------------------------------------------------------------------------
# Time

def timed(steps: list, rounds: int, repeats: int) -> list[list[float]]:
    """Seconds of each step in every round, the median of `repeats` there.

    The steps take turns, so that what else the machine does hits all of them. A first call of each,
    which warms up, is not counted.
    """
    for step in steps:
        step()
    seconds = [[] for _ in steps]
    for _ in range(rounds):
        for of_step, step in zip(seconds, steps, strict=True):
            times = [seconds_of(step) for _ in range(repeats)]
            of_step.append(statistics.median(times))
    return seconds


def seconds_of(step) -> float:
    synchronize()
    began = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spread(values: list[float], form: str) -> str:
    """The median, and the least and the largest in brackets."""
    numbers = statistics.median(values), min(values), max(values)
    return "{} [{} … {}]".format(*(format(x, form) for x in numbers))


def ratio(seconds: list[float], of: list[float]) -> str:
    """The spread of `seconds / of`, round by round."""
    pairs = zip(seconds, of, strict=True)
    return spread([a / b for a, b in pairs], ".3f")


# ------------------------------------------------------------------------------
# Memory

def in_fresh_process(function, *arguments):
    """What function(*arguments) returns in a process of its own, so that its memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def process_memory(entry: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at its peak. Linux.

    Not getrusage, where a child begins with its parent's peak.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    value = dict(line.split(":", 1) for line in lines)[entry]
    return 1024 * int(value.split()[0])


def need_linux() -> None:
    if not Path("/proc/self/status").exists():
        common.fail("memory is read from /proc/self/status, which only Linux has")
