"""A training's state, which `--resume` goes on from, and what the training will take.

Memory is predicted before anything is loaded, time from the first steps.
"""
import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import CHUNK
from support import processes
from support.cli import blame, choose_amp, fail, keep_freed_memory, prepare
from support.files import (
    check_folder,
    fingerprint,
    fingerprint_of_model,
    hash_of,
    hold_folder,
    open_safetensors,
    read_tensors,
    write_tensors,
)

BEGAN = time.time()


# ------------------------------------------------------------------------------
# The state

class Saved(NamedTuple):
    """What a file of TrainingState holds."""
    tensors: dict[str, Tensor]          # beside the module
    learnt: dict[str, Tensor]           # its parameters, and Adam's moments of them
    facts: dict


class TrainingState:
    """What a training is: a module, Adam's moments, facts for its report, tensors beside them.

    settings: what must be as it was for a resumed training to end where the undisturbed one would
    have, by the names of options. facts: "step", "loss" and whatever else is JSON. tensors: what
    the module cannot be made again without; they may be replaced on the way. saved: what to go on
    from. Each process has a state; the first one saves.
    """

    def __init__(self, file: Path, module: nn.Module, settings: dict, tensors: dict[str, Tensor],
                 saved: Saved | None = None):
        self.file, self.module, self.tensors = file, module, tensors
        for parameter in module.parameters():           # a step may see none of them
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.Adam(module.parameters())
        self.facts = {"step": 0, "loss": [], "config": settings}
        self.saved_step, self.save_at = 0, 0.0          # when to save: the first step at once
        if saved:
            self.restore(saved.learnt)
            self.facts, self.saved_step = saved.facts, saved.facts["step"]

    @property
    def step(self) -> int:
        return self.facts["step"]

    def save_if_due(self, every: float, last: bool) -> None:
        """Save after the first step, then `every` so many seconds, and after the last step."""
        if processes.RANK == 0 and (last or time.time() >= self.save_at):
            self.save(every)

    def save(self, every: float = 30) -> None:
        began = time.time()
        tensors = dict(self.tensors)
        for name, parameter in self.module.named_parameters():
            tensors[f"parameter.{name}"] = parameter
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        said = json.dumps(self.facts)
        with blame("--out"):
            write_tensors(self.file, tensors, {"said": said, "hash": hash_of_state(tensors, said)})
        self.saved_step = self.step
        if every:                                       # all processes wait: at most 2% of the time
            self.save_at = time.time() + max(every, 49 * (time.time() - began))

    def restore(self, learnt: dict[str, Tensor]) -> None:
        """Put parameters and Adam's moments where `save` found them."""
        for name, parameter in self.module.named_parameters():
            parameter.data.copy_(learnt[f"parameter.{name}"])
            adam = f"adam.{name}."
            for key in [key for key in learnt if key.startswith(adam)]:
                moment = key.removeprefix(adam)                 # Adam keeps its step on the CPU
                value = learnt[key] if moment == "step" else learnt[key].to(parameter)
                self.optimizer.state[parameter][moment] = value

    def stopped(self) -> None:
        """Leave after Ctrl-C, and say how to go on."""
        where = f"the same command with --resume continues from step {self.saved_step}"
        fail(f"Stopped; {where if self.saved_step else 'nothing was saved yet'}", code=130)

    def remove(self) -> None:
        """The training is over."""
        self.file.unlink(missing_ok=True)


def state_file(args, name: str) -> Path:
    """Where a training keeps its state; fails if a stopped one's is there and --resume is not said.
    """
    file = args.out / f"{name}.state.safetensors"
    if file.exists() and not args.resume:
        fail(f"--out: {file} is of a training that was stopped: --resume goes on with it; to begin "
             "anew delete it, or take another folder")
    return file


@contextlib.contextmanager
def reporting(state: TrainingState):
    """Around a report: Ctrl-C loses nothing but that, and the line says so."""
    try:
        if not state.file.exists():                     # there was no step
            state.save()
        yield
    except KeyboardInterrupt:
        fail(f"Stopped in the report: what was learnt is in {state.file.parent}, and the same "
             "command with --resume makes the report", code=130)


def read_state(file: Path, settings: dict) -> Saved:
    """What `save` wrote. ValueError if it is not, or if it is a state of other settings."""
    with open_safetensors(file) as opened:
        metadata = opened.metadata() or {}
    said, found = metadata.get("said", ""), read_tensors(file)
    if metadata.get("hash") != hash_of_state(found, said):
        raise ValueError(f"{file}: not the state of a training as it was written, or one of "
                         "another version; without it the training begins anew")
    facts = json.loads(said)
    for name, value in settings.items():
        before = facts["config"].get(name, "")          # "": no such option when it was saved
        if before != value and name.endswith("_hash"):
            raise ValueError(f"{file}: was made with other contents of "
                             f"--{name.removesuffix('_hash')}")
        if before != value:
            raise ValueError(f"{file}: was made with {named(name, before)}, not "
                             f"{named(name, value)}")
    tensors, learnt = {}, {}
    for name, tensor in found.items():
        side = learnt if name.startswith(("parameter.", "adam.")) else tensors
        side[name] = tensor
    return Saved(tensors, learnt, facts)


def hash_of_state(tensors: dict[str, Tensor], said: str) -> str:
    names = sorted(tensors)
    return hash_of(*(tensors[name] for name in names), text=" ".join(names) + said)


def named(setting: str, value) -> str:
    """A setting as a user knows it: most are options."""
    if setting == "train_tokens":
        return f"{value} tokens of training text (--data)"
    if setting == "processes":
        return f"{value} processes (torchrun)"
    if setting == "draw":
        return {"levels": "--uniform", "along": "an order of ranks"}.get(value, "--recipe paper")
    option = "--" + setting.replace("_", "-")
    if value in (None, "") or isinstance(value, bool):
        return option if value else f"no {option}"
    return f"{option} {value}"


def settings_of(args, options: tuple, paths: tuple, tokens, held_out) -> dict:
    """The settings of a TrainingState, of the options of these names; paths in full.

    And, as the same path may hold something else by then, hashes of weights and text. What else a
    training began with, --ranks or --start, stands in its state.
    """
    settings = {name: getattr(args, name) for name in options}
    hashes = {"ckpt_hash": fingerprint_of_model(args.ckpt),
              "data_hash": fingerprint(tokens, held_out)}
    for name in paths:
        path = getattr(args, name)
        settings[name] = str(path.resolve()) if path else ""
    return settings | {"train_tokens": len(tokens), "processes": processes.WORLD} | hashes


# ------------------------------------------------------------------------------
# Before a training

def prepare_training(args, config, need) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a training; checks --out and the memory; meets the other processes.

    need(dtype, recompute): the bytes that a step holds at its peak, by what holds them. Decides
    --checkpoint where the user did not.
    """
    device, dtype = prepare(args)
    keep_freed_memory()
    args.dtype = str(dtype).removeprefix("torch.")
    choose_amp(args, device, dtype)
    if processes.RANK == 0:
        check_folder(args.out)
        hold_folder(args.out)
    processes.join(device)
    plan_memory(args, need, device, dtype)
    return device, dtype


def plan_memory(args, need, device: torch.device, dtype: torch.dtype) -> None:
    """Say what a step will take; decide --checkpoint where the user did not; fail if too large."""
    free = free_memory(device)
    if args.checkpoint is None:
        args.checkpoint = sum(need(dtype, False).values()) > 0.8 * free
    parts = need(dtype, args.checkpoint)
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts.items())
    how = ", layers recomputed in the backward pass" if args.checkpoint else ""
    print(f"Memory of a step, predicted: {listed}; {total / 1e6:,.0f} MB in all{how}", flush=True)
    if total > free:
        fail(f"--batch {args.batch} --seq {args.seq}: a step needs about {total / 1e9:.1f} GB and "
             f"{free / 1e9:.1f} GB are free on {device}; take a smaller --batch or --seq")


def peak_memory(c, batch: int, seq: int, dtype: torch.dtype, recompute: bool) -> dict[str, float]:
    """Bytes that a training step holds at its peak, by what holds them. c: the model's config.

    Frozen linear layers keep no input for the backward pass. The layer whose turn it is holds
    gradients and results on the way beside what it keeps. `recompute` is --checkpoint.
    """
    hidden, inner, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    H, K, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    tokens, size = batch * seq, dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32).itemsize

    attention = 2 * hidden * H * d + 2 * hidden * K * d
    embeddings = c.vocab_size * hidden * (1 if c.tie_word_embeddings else 2)
    weights = L * (attention + 3 * hidden * inner) + embeddings
    # Numbers per token: the inputs of both norms and the normed states; q and what attention gives;
    # k and v before and after projection; three of the MLP.
    kept = 4 * hidden + 2 * H * d + 4 * K * d + 3 * inner
    on_the_way = 6 * hidden + 4 * inner
    # Some 16 matrices per head: start, A, its gradient, Adam's moments, the Cayley map's graph.
    projections = 16 * L * K * d * d
    projectors = 4 * batch * K * d * d              # U_r and P of every sequence, keys and values
    return {
        "weights": weights * size,
        "projections": projections * 4,
        "projectors": projectors * wide * (1 if recompute else L),
        "between layers": tokens * hidden * size * (L if recompute else 1),
        "within layers": tokens * size * (kept * (1 if recompute else L) + on_the_way),
        "loss": 6 * min(CHUNK, tokens) * c.vocab_size * wide + 5 * tokens * hidden * size,
    }


def free_memory(device: torch.device) -> float:
    """Bytes that a process can still get; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = linux_says("meminfo", "MemAvailable")
    return available / processes.WORLD if available else math.inf


def linux_says(file: str, entry: str) -> int:
    """Bytes that an entry of /proc/FILE stands for; 0 where there is none."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
        value = dict(line.split(":", 1) for line in lines)[entry]
        return 1024 * int(value.split()[0])
    except (OSError, KeyError, ValueError):
        return 0


# ------------------------------------------------------------------------------
# In its first steps

class Forecast:
    """Called after each step of a training: after the fourth it says what the run will take.

    Beside its steps a run is what went before them, validations, four passes of a batch each, and
    the report: one for the model, and one for each of its `hooks`. A step is about 8/3 of a pass.
    left: steps to go, fewer where a run is resumed.
    """

    def __init__(self, args, device: torch.device, left: int, hooks: int):
        self.args, self.device = args, device
        self.left, self.hooks = left, hooks
        self.before = time.time() - BEGAN
        self.warm = self.done = 0

    def __call__(self) -> None:
        self.done += 1
        if self.done == 1:                              # the slowest
            self.warm = time.time()
        if self.done == 4:
            self.say((time.time() - self.warm) / 3)

    def say(self, step: float) -> None:
        args = self.args
        one_pass = step * 3 / 8 / args.accumulate
        report = math.ceil(args.windows / args.batch) * (1 + self.hooks)
        validation = 4 * math.ceil(8 / args.batch)
        around = self.before + one_pass * (report + validation)
        each = step + one_pass * validation / args.check_every
        minutes = (around + self.left * each) / 60
        fit = int((20 * 60 - around) / each)
        longest = "--windows" if one_pass * report > self.before else "--sweep-windows"
        advice = f"fewer {longest} would shorten it"
        if fit > 0:
            advice = f"--steps {fit} would fit in 20"
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self.device)
        else:
            peak = linux_says("self/status", "VmHWM")
        memory = f", {peak / 1e9:.2f} GB at the peak" if peak else ""
        print(f"\nMeasured: {step:.2f} s a step{memory}. The run takes about {minutes:.1f} "
              f"minutes, {around / 60:.1f} of them before and after its steps; {advice}",
              file=sys.stderr, flush=True)
