"""What several of these scripts need: options, trainings, made-up plans, timing, processes."""
import argparse
import hashlib
import multiprocessing
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from model import Model, wide
from projection import LEVELS, Projection
from search import Windows, find_start
from support import cli
from support.training import TrainingState, linux_says
from train import Recipe


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser with a script's docstring as its help, for scripts that run no model."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = cli.fail
    return parser


def pip(*command) -> None:
    """Run pip; one line if it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *command, "--quiet",
                           "--disable-pip-version-check"], capture_output=True, text=True)
    if done.returncode:
        cli.fail(f"pip {command[0]} {command[-1]}: {done.stderr.strip().splitlines()[-1]}")


def check_hash(name: str, content: bytes, expected: str) -> None:
    """Fail unless the content of a file is what is known."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        cli.fail(f"{name}: its sha256 is {found}, not {expected}")


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
# Training as train.py --uniform does, without what it saves and reports

def training_arguments(parser, steps: int) -> None:
    count = cli.within(1, 10 ** 7)
    parser.add_argument("--steps", type=count, default=steps, help=f"[{steps}]")
    parser.add_argument("--lr", type=cli.within(0.0, 1e6), help="[0.5 / head_dim]")


def recipe_of(args, config, **more) -> Recipe:
    lr = 0.5 / config.head_dim if args.lr is None else args.lr
    return Recipe(args.steps, args.batch, args.seq, lr, floor=1e-3, seed=args.seed, **more)


def sweep_start(args, model: Model, tokens, whole: int = 4) -> Projection:
    """The start of train.py --positions 1."""
    windows = Windows(tokens, 32, args.batch, args.seq, 1, args.seed)
    return find_start(model, windows, whole).to(model.device, wide(model.dtype))


def unsaved_state(module: nn.Module) -> TrainingState:
    """What `train.train` trains; its file is never written."""
    return TrainingState(Path("unsaved"), module, settings={}, tensors={})


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
# Memory, as Linux says it: not by getrusage, where a child begins with its parent's peak

def in_fresh_process(function, *arguments):
    """What function(*arguments) returns in a process of its own, so that its memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def resident() -> int:
    """Bytes of this process in memory."""
    return linux_says("self/status", "VmRSS")


def peak() -> int:
    """The most bytes of this process that were in memory at a time."""
    return linux_says("self/status", "VmHWM")


def need_linux() -> None:
    if not resident():
        cli.fail("memory is read from /proc/self/status, which only Linux has")
