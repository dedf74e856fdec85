"""Say how many bits each block of coordinates deserves, and train for rounding.

Beyond the paper. rounding.py rounds a coordinate to few bits; which ones deserve how many is the
question of ranks again, with more answers: 0, 1, 2, 3, 4, 6 or 8 bits for a block of d/8.

  costs       A coordinate in few bits is noisy, and smaller than it was: x̂ = (1 − ρ) x + n, with n
              of no correlation to x; at 0 bits ρ is 1. KL is to second order half the square of
              what the gradient g makes of that over a window (find_order, search.py). Noise knows
              nothing of other tokens' noise, and its squares add up; −ρ x is what a rank cuts off,
              and is squared when it has been summed. Per token a coordinate costs

                  ½ (E[g²] E[n²] + ρ² E[(Σ_s g_s x_s)²] / T)

              where g and x come from a sweep of backward passes for U as it is.
  steps       Of each coordinate, for each number of bits: the cheapest of a few multiples of the
              step that is best for a normal distribution. Keys have far outliers.
  path        Bits are taken where they cost least, from 8 down to nothing (water_filling); a
              prefix of the path makes a plan for any budget.
  training    is train.py's own loop, with plans of random budgets along the path. Rounding has no
              gradient, so that of x is taken for it, up to the last code; beyond it there is none.
              What learns: all entries of A (rounding sees turns within a block too), means and
              steps. The path is found anew after a quarter of the steps, and after half of them.
  objective   the mean of log(KL + 0.0001): 0.001, as in train.py, would hide the KLs at 4 bits.

The start is the first chapter's, or the projections in --proj, trained for ranks.

    python -m bits.train                    # -> out/bits.safetensors, out/bits.json, out/bits.png
    python -m bits.train --proj out/projections.safetensors --steps 0       # no training: a sweep
    python generate.py --bits out/bits.json --budget 0.125 --prompt "Return the "
"""
import itertools
import math
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from bits import Bits
from bits.rounding import (
    BITS,
    FULL,
    GROUP,
    NORMAL,
    Rounding,
    bits_at,
    on_grid,
    water_filling,
)
from evaluate import describe, report
from model import Model, load, wide
from projection import LEVELS, Moments, Projection, Rotation, check_levels, shape_of
from search import DRAWS, Windows, find_start, mean_of_keys, positions_of, sweep
from support import cli, processes
from support.checkpoint import read_config
from support.data import held_out_passages, set_apart, text_for
from support.pictures import picture, show_bytes
from support.progress import Progress
from support.training import (
    Forecast,
    TrainingState,
    peak_memory,
    prepare_training,
    read_state,
    settings_of,
)
from train import VALID, Recipe, check, one_of_each, train

SHARES = (0.5, 0.375, 0.28125, 0.25, 0.1875, 0.15625, 0.125, 0.09375, 0.0625, 0.046875)


FACTORS = 1.0, 1.2, 1.5, 2.0, 2.8, 4.0      # multiples of NORMAL that are tried
TRIED = 8                                   # windows that they are tried on


class Asked(NamedTuple):
    """What a sweep says of coordinates along the columns of U, (2, L, K, …) float64."""
    varies: Tensor                      # (…, d, d): E[xᵀx], not along U
    gradient: Tensor                    # (…, d): E[g²]
    cut: Tensor                         # (…, d): E[(Σ_s g_s x_s)²] / T
    cut_of_block: Tensor                # (…, 8): the same of Σ_c over a block

    @staticmethod
    def of(tensors: dict) -> "Asked":
        return Asked(*(tensors[name] for name in Asked._fields))


@torch.no_grad()
def what_is_asked(model: Model, windows: Windows, p: Projection) -> Asked:
    """A sweep for U as it is."""
    moments = Moments(model.config, model.device)
    L, K, d = shape_of(model.config)
    gradient = torch.zeros(2, L, K, d, dtype=torch.float64, device=model.device)
    cut, cut_of_block = torch.zeros_like(gradient), torch.zeros_like(gradient[..., :LEVELS])
    U = p.U_k, p.U_v
    for draw, side, layer, g, x in sweep(model, windows, p.mean_k, p.mean_v, p.whole, "sweep"):
        if draw == 0:
            moments.add(side, layer, x)
        U_l = U[side][layer].to(g)
        g = g @ U_l                                                 # (B, K, T, d)
        A = (g * (x.to(g) @ U_l)).sum(2).double()                   # (B, K, d)
        gradient[side, layer] += g.double().square().sum((0, 2))
        cut[side, layer] += A.square().sum(0)
        cut_of_block[side, layer] += A.unflatten(-1, (LEVELS, -1)).sum(-1).square().sum(0)
    n = windows.text.numel() * DRAWS
    sums = (processes.sum_over(total) / n for total in (gradient, cut, cut_of_block))
    return Asked(moments.sum_over_processes().second(), *sums)


@torch.no_grad()
def shrink_and_noise(model: Model, windows: Windows, p: Projection, steps: Tensor):
    """ρ and E[n²], (n, 2, L, K, d, 7) float64 each, of n tries of steps, (n, 2, L, K, d, 7)."""
    by_x, square = torch.zeros(2, *steps.shape, dtype=torch.float64, device=model.device)
    tops = [torch.full((steps.shape[-2],), (2 ** b - 1) / 2).to(steps) for b in BITS]
    of_x = torch.zeros_like(by_x[0, ..., 0])

    def observe(layer: int, _, k: Tensor, v: Tensor, turn) -> None:
        k = turn(k - p.mean_k[layer][:, None].to(k))
        v = v - p.mean_v[layer][:, None].to(v)
        for side, (x, U) in enumerate(((k, p.U_k), (v, p.U_v))):
            x = x[:, :, p.whole:].to(U) @ U[layer]                  # (B, K, T, d)
            of_x[side, layer] += x.square().sum((0, 2))
            for n, of_try in enumerate(steps[:, side, layer, :, None]):     # (K, 1, d, 7)
                for b, (step, top) in enumerate(zip(of_try.unbind(-1), tops, strict=True)):
                    x_hat = on_grid(x, step, top)
                    by_x[n, side, layer, ..., b] += (x * x_hat).sum((0, 2))
                    square[n, side, layer, ..., b] += x_hat.square().sum((0, 2))
        count.add_(x[:, 0, :, 0].numel() / model.config.num_hidden_layers)

    count = torch.zeros(1, dtype=torch.float64)
    enough = math.ceil(TRIED / windows.batch / processes.WORLD)
    progress = Progress(enough, "trying steps")
    for number, batch in enumerate(itertools.islice(windows, enough), 1):
        windows.states(model, batch, observe=observe)
        progress(number, "", windows.text[batch].numel())
    count, by_x, square, of_x = (processes.sum_over(x) for x in (count, by_x, square, of_x))
    of_x = of_x[..., None].clamp(min=1e-30)
    kept = by_x / of_x                                              # 1 − ρ
    return 1 - kept, (square - kept * by_x) / count.to(model.device)


def first_steps(model: Model, windows: Windows, p: Projection, asked: Asked) -> Tensor:
    """The cheapest of FACTORS for each coordinate and number of bits: steps (2, L, K, d, 7)."""
    normal = deviations(p, asked.varies)[..., None] * torch.tensor(NORMAL).to(p.mean_v)
    tries = torch.stack([factor * normal for factor in FACTORS])
    shrink, noise = shrink_and_noise(model, windows, p, tries)
    costs = asked.gradient[..., None] * noise + asked.cut[..., None] * shrink ** 2
    return tries.gather(0, costs.argmin(0, keepdim=True))[0]


def deviations(p: Projection, varies: Tensor) -> Tensor:
    """√E[x²] (2, L, K, d) along the columns of U, of E[xᵀx] (2, L, K, d, d)."""
    U = torch.stack((p.U_k, p.U_v))
    return (U * (varies.to(U) @ U)).sum(-2).clamp(min=1e-12).sqrt()


def block_costs(asked: Asked, shrink: Tensor, noise: Tensor) -> Tensor:
    """What blocks cost at each of BITS, (2, L, K, 8, 7): noise of coordinates, and a common ρ²."""
    def of_block(by_column: Tensor) -> Tensor:
        return by_column.unflatten(3, (LEVELS, -1)).sum(4)

    cut = asked.cut[..., None]
    common = of_block(cut * shrink ** 2) / of_block(cut).clamp(min=1e-30)
    of_noise = of_block(asked.gradient[..., None] * noise)
    return (of_noise + asked.cut_of_block[..., None] * common).cpu() / 2


@torch.no_grad()
def find_path(model: Model, windows: Windows, rounding: Rounding, asked: Asked) -> Tensor:
    """Lowerings (n, 2): the place of a block in the flattened (2, L, K, 8), and its bits after."""
    found = shrink_and_noise(model, windows, rounding.p, rounding.steps[None])
    return water_filling(block_costs(asked, *(x[0] for x in found)))


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

OPTIONS = ("steps", "batch", "seq", "lr", "seed", "dtype", "amp", "positions", "sweep_windows")
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
        axis.plot(x, [row["kl"] for row in rows], color="C4", marker="D", label="bits, trained")
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
    add("--steps", type=cli.within(0, 10 ** 7), default=120, help="0: the path alone [120]")
    add("--lr", type=cli.within(0.0, 1e6), help="Adam's peak rate [0.75 / head_dim]")
    add("--resume", action="store_true", help="continue the training that stopped in --out")
    parser.set_defaults(checkpoint=None, accumulate=1, check_every=100)
    args = parser.parse_args()
    args.out = args.out or (args.proj.parent if args.proj else Path("out"))
    return args


WHOLE = 4               # first tokens, where --proj says nothing of them


def begin(args, model: Model, windows: Windows) -> dict[str, Tensor]:
    """What a training begins with, for its state: a start, what is asked of it, and its steps."""
    if args.proj:
        with cli.blame("--proj"):
            start = Projection.load(args.proj)
            start.check_fits(model.config)
        if start.mean_k is None:                        # of --recipe paper
            start.whole, start.mean_k = WHOLE, mean_of_keys(model, windows, WHOLE)
    else:
        start = find_start(model, windows, WHOLE)
    start = start.to(model.device, wide(model.dtype))
    asked = what_is_asked(model, windows, start)
    return start.tensors("start.") | asked._asdict() | {
        "whole": torch.tensor(start.whole), "steps": first_steps(model, windows, start, asked)}


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
    unrounded = bits.rounding.p.whole + GROUP
    said = {"seq": args.seq, "loss": state.facts["loss"]}
    with cli.blame("--out"):
        bits.save(file, said)                           # whatever becomes of the report
    print(f"\nWindows of {args.seq} tokens; up to {GROUP} newest ones and the first "
          f"{bits.rounding.p.whole} come on top, {unrounded / args.seq:.1%}")
    _, rows = report(model, held_out, {"bits": bits.at}, SHARES, args, passages)
    flat = []
    for row in rows:
        share = bits.plan(row["budget"]).double().mean().item() / FULL
        in_all = share + unrounded / args.seq
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
    file = args.out / "bits.state.safetensors"
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

    def new_path(asked: Asked) -> None:
        with torch.no_grad():
            tensors["path"] = find_path(model, windows, rounding(), asked)

    if not saved:
        new_path(Asked.of(tensors))
    print(f"Calibrated, with a path of {len(state.tensors['path'])} lowerings, in "
          f"{time.time() - began:.0f} s", flush=True)

    forecast = Forecast(args, device, args.steps - state.step, len(SHARES))

    def draw(B: int, config, generator: Generator) -> Tensor:
        return draw_bits(B, config, generator, state.tensors["path"])

    def after_step(step: int) -> None:
        if step in (args.steps // 4, args.steps // 2):
            new_path(what_is_asked(model, windows, learnt(state, model, args).rounding.p))
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
    if processes.RANK == 0:
        print(f"\nThe sweep, paths and training took {time.time() - began:.0f} s")
        finish(state, model, held_out, args, passages)
    processes.leave()


if __name__ == "__main__":
    cli.run_script(main)
