"""Say how many bits each block of coordinates deserves, and train for rounding.

Beyond the paper. rounding.py rounds a coordinate to few bits; which ones deserve how many is the
question of ranks again, with more answers: 0, 1, 2, 3, 4, 6 or 8 bits for a block of d/8.

  path        Bits are taken where they cost least, from 8 down to nothing (costs.py); a prefix of
              the path makes a plan for any budget.
  training    is train.py's own loop, with plans of random budgets along the path. Rounding has no
              gradient, so that of x is taken for it, up to the last code; beyond it there is none.
              What learns: all entries of A (rounding sees turns within a block too), means and
              the Δ. The path is found anew after a quarter of the training, and after half of it.
  objective   the mean of log(KL + 0.0001): 0.001, as in train.py, would hide the KLs at 4 bits.

The start is the first chapter's, or the projections in --proj, trained for ranks.

    python -m bits.train                    # -> out/bits.safetensors, out/bits.json, out/bits.png
    python -m bits.train --proj out/projections.safetensors --steps 0       # no training: a sweep
    python generate.py --bits out/bits.json --budget 0.125 --prompt "Return the "
"""
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from bits import Bits
from bits.costs import deviations, find_path, first_steps, what_is_asked
from bits.rounding import FULL, GROUP, Rounding, bits_at
from evaluate import describe, report
from model import Model, load, wide
from projection import Projection, Rotation, check_levels
from search import Windows, find_start, mean_of_keys, positions_of
from support import cli, processes
from support.checkpoint import read_config
from support.data import held_out_passages, set_apart, text_for
from support.pictures import picture, show_bytes
from support.training import (
    Forecast,
    TrainingState,
    peak_memory,
    prepare_training,
    read_state,
    reporting,
    settings_of,
    state_file,
)
from train import VALID, Recipe, check, one_of_each, train

SHARES = (0.5, 0.375, 0.28125, 0.25, 0.1875, 0.15625, 0.125, 0.09375, 0.0625, 0.046875)


# ------------------------------------------------------------------------------
# Training

class TrainedRounding(nn.Module):
    """A Rounding that learns: calling it gives the one at the current parameters."""

    def __init__(self, start: Projection, varies: Tensor, steps: Tensor):
        super().__init__()
        self.rotation = Rotation(start, within_blocks=True)
        self.mean_k = nn.Parameter(start.mean_k.clone())
        self.varies = varies.to(start.mean_v)                       # (2, L, K, d, d)
        in_deviations = steps / deviations(start, varies)[..., None]
        self.log_steps = nn.Parameter(in_deviations.log().to(start.mean_v))

    def forward(self, dtype: torch.dtype | None = None) -> Rounding:
        p = self.rotation(dtype)
        p.mean_k = self.mean_k.to(p.mean_v)
        deviation = deviations(p, self.varies)[..., None]
        return Rounding(p, deviation * self.log_steps.exp().to(deviation))

    def at(self, bits: Tensor, of_step: Tensor | None = None):
        """The hook of sequences with plans (2, L, B, K, 8); rounding sees all entries of A."""
        return self().at(bits)


def draw_bits(B: int, config, generator: Generator, path: Tensor) -> Tensor:
    """The plans (2, L, B, K, 8) of B budgets, 0.75 to 4.5 bits on average; even in the log."""
    low, high = math.log(0.75), math.log(4.5)
    means = (low + (high - low) * one_of_each(B, generator)).exp()
    plans = [bits_at(path, config, mean / FULL) for mean in means.tolist()]
    return torch.stack(plans, dim=2)


# ------------------------------------------------------------------------------
# The script

OPTIONS = ("steps", "batch", "seq", "lr", "seed", "dtype", "amp", "positions", "sweep_windows",
           "begin")
PATHS = ("ckpt", "data", "proj")


def step_memory(c, batch: int, seq: int, dtype: torch.dtype, recompute: bool) -> dict[str, float]:
    """Bytes that a step holds at its peak, as `peak_memory` of ranks has them, by what holds them.

    Rounding keeps some eight times a layer's keys and values for the backward pass, and attention
    to the newest group as it is a copy of all tokens up to it, T/64 + 1/2 copies of each of both.
    """
    parts = peak_memory(c, batch, seq, dtype, recompute)
    del parts["projectors"]
    of_token = c.num_key_value_heads * c.head_dim * (
        8 * wide(dtype).itemsize + (seq / GROUP + 1) * dtype.itemsize)
    layers = 1 if recompute else c.num_hidden_layers
    parts["rounding"] = layers * batch * seq * of_token
    return parts


def draw_picture(rows: list[dict], path) -> None:
    """KL against bytes."""
    with picture(path, width=6) as axis:
        x = [100 * row["budget"] for row in rows]
        axis.plot(x, [row["kl"] for row in rows], color="C4", marker="D", label="bits")
        axis.set(yscale="log", ylabel="KL to the base model, nats per token")
        show_bytes(axis)
        axis.legend()


def options():
    parser = cli.arguments(__doc__, several=True)
    cli.data_arguments(parser)
    cli.report_arguments(parser, batch=4, seq=512)
    cli.passage_arguments(parser)
    cli.out_argument(parser, "the folder of --proj, else out")
    cli.sweep_arguments(parser)
    cli.amp_argument(parser)
    add = parser.add_argument
    add("--proj", type=Path, help="projections to start from [the start of train.py]")
    add("--steps", type=cli.within(0, 10 ** 7), default=120, help="0: no training [120]")
    add("--lr", type=cli.within(0.0, 1e6), help="Adam's peak rate [0.75 / head_dim]")
    add("--resume", action="store_true", help="continue the training that stopped in --out")
    parser.set_defaults(checkpoint=None, accumulate=1, check_every=100)
    args = parser.parse_args()
    args.out = args.out or (args.proj.parent if args.proj else Path("out"))
    return args


WHOLE = 4               # first tokens, where --proj says nothing of them


def with_mean(p: Projection, model: Model, windows: Windows) -> Projection:
    """Projections with a mean of the keys and whole tokens; those of --recipe paper have neither.
    """
    if p.mean_k is not None:
        return p
    return Projection(p.U_k, p.U_v, p.mean_v, mean_of_keys(model, windows, WHOLE).cpu(), WHOLE)


def begin(args, model: Model, windows: Windows) -> dict[str, Tensor]:
    """What a training begins with, for its state: a start, its steps, and a path."""
    if args.proj:
        with cli.blame("--proj"):
            start = Projection.load(args.proj)
            start.check_fits(model.config)
        if args.seq <= start.whole:
            cli.fail(f"--seq {args.seq}: all are whole first tokens of --proj; take longer windows")
        start = with_mean(start, model, windows)
    else:
        start = find_start(model, windows, WHOLE)
    start = start.to(model.device, wide(model.dtype))
    asked = what_is_asked(model, windows, start)
    steps = first_steps(model, windows, start, asked)
    return start.tensors("start.") | {
        "whole": torch.tensor(start.whole), "varies": asked.varies, "steps": steps,
        "path": find_path(model, windows, Rounding(start, steps), asked)}


@torch.no_grad()
def learnt(state: TrainingState, model: Model, args) -> Bits:
    """What has been learnt so far, with the path of now."""
    rounding = state.module(torch.float64).to(None, torch.float32)
    rounding.p.positions = max(args.positions, args.seq)
    return Bits(rounding, state.tensors["path"], model.config)


@torch.no_grad()
def finish(state: TrainingState, model: Model, held_out, args, passages) -> None:
    """Save, report, and save with the report."""
    bits, file = learnt(state, model, args), args.out / "bits.json"
    on_top = bits.rounding.p.whole + 2 * GROUP          # tokens held as they are
    said = {"seq": args.seq, "loss": state.facts["loss"]}
    with cli.blame("--out"):
        bits.save(file, said)                           # whatever becomes of the report
    print(f"\nWindows of {args.seq} tokens; the {2 * GROUP} newest and the first "
          f"{bits.rounding.p.whole} come on top, {on_top / args.seq:.1%}")
    with reporting(state):
        _, rows = report(model, held_out, {"bits": bits.at}, SHARES, args, passages)
    flat = []
    for row in rows:
        share = bits.plan(row["budget"]).double().mean().item() / FULL
        in_all = share + on_top / args.seq
        flat.append({"budget": share, "in_all": in_all} | row["bits"])
    with cli.blame("--out"):
        bits.save(file, said | {"budgets": flat})
        draw_picture(flat, file.with_suffix(".png"))
    state.remove()
    print(f"Saved {file.with_suffix('.safetensors')}, {file} and {file.with_suffix('.png')}")


def main():
    args = options()
    with cli.blame("--ckpt"):
        config = read_config(args.ckpt / "config.json")
        check_levels(config.head_dim)
    args.positions = positions_of(args, config)
    if args.seq <= GROUP:
        cli.fail(f"--seq {args.seq}: the newest {GROUP} tokens are exact; take longer windows")
    if args.lr is None:
        args.lr = 0.75 / config.head_dim
    device, dtype = prepare_training(args, config,
                                     partial(step_memory, config, args.batch, args.seq))
    file = state_file(args, "bits")
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    print(describe(args.ckpt, model))
    tokens, held_out = text_for(args, config)
    settings = settings_of(args, OPTIONS, PATHS, tokens, held_out)
    tokens, valid = set_apart(tokens, VALID * args.seq + 1)
    passages = held_out_passages(args, held_out, config)
    # The objective is the mean of log(KL + 0.0001): the 0.001 of train.py would hide KLs at 4 bits.
    recipe = Recipe(args.steps, args.batch, args.seq, args.lr, floor=1e-4, amp=args.amp,
                    positions=args.positions, seed=args.seed, recompute=args.checkpoint)
    began, saved = time.time(), None
    if args.resume:
        with cli.blame("--resume"):
            saved = read_state(file, settings)
    windows = Windows(tokens, args.sweep_windows, args.batch, args.seq, args.positions, args.seed,
                      args.amp, args.checkpoint)
    with cli.blame("--ckpt"):
        tensors = saved.tensors if saved else begin(args, model, windows)
    with cli.blame("--resume"):
        start = Projection.of(tensors, "start.", int(tensors["whole"])).to(device)
        varies, steps = (tensors[name].to(device) for name in ("varies", "steps"))
        rounding = TrainedRounding(start, varies, steps)
        state = TrainingState(file, rounding, settings, tensors, saved)
        lowerings = len(tensors["path"])
    if not saved:
        print(f"Calibrated, with a path of {lowerings} lowerings, in "
              f"{time.time() - began:.0f} s", flush=True)

    forecast = Forecast(args, device, args.steps - state.step, len(SHARES))

    def draw(B: int, config, generator: Generator) -> Tensor:
        return draw_bits(B, config, generator, tensors["path"])

    def after_step(step: int) -> None:
        if step in (args.steps // 4, args.steps // 2):
            now = learnt(state, model, args).rounding
            asked = what_is_asked(model, windows, now.p)
            tensors["path"] = find_path(model, windows, now, asked)
        if processes.RANK == 0:
            forecast()
        at_check = step == args.steps or step % args.check_every == 0
        if processes.RANK == 0 and len(valid) and at_check:
            bits = learnt(state, model, args)
            hooks = {f"{budget:.2%}": bits.at(budget) for budget in (0.25, 0.125, 0.0625)}
            check(state, model, valid, hooks, recipe)
        state.save_if_due(every=30, last=step == args.steps)            # never half of a step

    try:
        train(model, state, tokens, draw, recipe, after_step)
    except KeyboardInterrupt:
        state.stopped()
    except ValueError as error:                         # of steps that have grown without bound
        cli.fail(f"--lr {args.lr}: {error}. Start again with a smaller one")
    if processes.RANK == 0:
        print(f"\nThe sweep, paths and training took {time.time() - began:.0f} s")
        finish(state, model, held_out, args, passages)
    processes.leave()


if __name__ == "__main__":
    cli.run_script(main)
