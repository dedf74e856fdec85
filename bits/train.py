"""Train for rounding, and say how many bits each block of coordinates deserves.

Beyond the paper. rounding.py rounds a coordinate to few bits; which ones deserve how many is the
question of ranks again, with more answers: 0, 1, 2, 3, 4, 6 or 8 bits for a block of d/8.

  path        a block costs (how far rounding is off) × (who reads it) × (what its head matters).
              Water-filling (rounding.py) takes bits where that is cheapest, from 8 down to nothing;
              a prefix of the path makes a plan for any budget.
  matters     the KL, per error, with a head's keys, or values, alone at 2 bits, before training
              (2LK passes). But where all are rounded a block matters more, or less. So its part in
              the KL is measured too, around the path's plan at 9.4% of a 16-bit cache (parts_of_kl:
              backward passes tell all parts at once), and its cost becomes the geometric mean;
              twice.
  training    is train.py's own loop, with plans of random budgets along the path. Rounding has no
              gradient, so that of x is taken for it, up to the last code; beyond it there is none.
              What learns: all entries of A (rounding sees turns within a block too), means and
              spreads. The path is found anew after a quarter of the steps, and after half of them.
  objective   the mean of log(KL + 0.0001): 0.001, as in train.py, would hide the KLs at 4 bits.

The start is the query-aware basis over the calibration text; --proj takes the one in a file.

    python -m bits.train                    # -> out/bits.safetensors, out/bits.json, out/bits.png
    python generate.py --bits out/bits.json --budget 0.125 --prompt "Return the "
"""
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from bits import Bits
from bits.rounding import (
    BITS,
    ERROR,
    EXACT,
    FULL,
    GROUP,
    NewestExact,
    Rounding,
    bits_at,
    errors_at,
    same_bits,
    water_filling,
)
from bits.start import (
    Read,
    alone,
    calibrate,
    kl_of_each,
    output_weights,
    pairs_of_columns,
    query_aware,
)
from evaluate import describe, report
from model import Model, load, wide
from projection import LEVELS, Projection, Rotation, check_levels
from support import cli, processes
from support.checkpoint import read_config
from support.data import even_windows, held_out_passages, set_apart, text_for
from support.pictures import picture, show_bytes
from support.training import (
    TrainingState,
    peak_memory,
    prepare_training,
    read_state,
    settings_of,
)
from train import VALID, Recipe, check, distil, one_of_each, train

SHARES = (0.5, 0.375, 0.28125, 0.25, 0.1875, 0.15625, 0.125, 0.09375, 0.0625, 0.046875)
TRIED = 2               # bits of a head that is measured alone, while all others have 8
AROUND = 0.09375        # the budget around whose plan the parts of blocks are measured
WINDOWS = 32            # of training text to measure them in


# ------------------------------------------------------------------------------
# The path

def first_path(model: Model, rounding: Rounding, moments: Read, tokens, recipe: Recipe):
    """Before training: what each head matters (2, L, K), and the path from that alone.

    A path is lowerings (n, 2): the place of a block in the flattened (2, L, K, 8), and its bits
    after.
    """
    full = same_bits(max(BITS), model.config)
    hooks = []
    for plan in alone(full[..., 0], (TRIED,)):
        hooks.append(rounding.at(plan[..., None].expand_as(full)))
    kl = kl_of_each(model, hooks, tokens, recipe.batch, recipe.seq)
    error = block_errors(model, rounding, moments)
    of_head = ERROR[TRIED] * error.sum(-1)
    matters = kl.view_as(of_head) / of_head.clamp(min=1e-30)        # a dead one costs 0
    return matters, water_filling(matters[..., None] * error)


def path_around(model, rounding, moments, tokens, recipe, matters: Tensor, path: Tensor) -> Tensor:
    """A path whose costs are also measured around plans of the path before it."""
    costs = matters[..., None] * block_errors(model, rounding, moments)
    for _ in range(2):
        plan = bits_at(path, model.config, AROUND)
        parts = parts_of_kl(model, rounding, plan, tokens, recipe)
        ratio = parts / errors_at(plan) / costs.clamp(min=1e-30)
        ratio = ratio / ratio[ratio > 0].median()                   # both have a scale of their own
        ratio = ratio.nan_to_num(1).clamp(1 / 16, 16)               # beyond that it is noise
        costs = costs * ratio.sqrt()                                # the geometric mean
        path = water_filling(costs)
    return path


def block_errors(model: Model, rounding: Rounding, moments: Read) -> Tensor:
    """(How far a block is off at no bits) × (who reads it), (2, L, K, 8), up to a head's factor."""
    by_pair = pairs_of_columns(moments, rounding.p, output_weights(model))
    by_column = by_pair.diagonal(dim1=-2, dim2=-1).cpu()            # (2, L, K, d)
    by_block = by_column.unflatten(-1, (LEVELS, -1)).sum(-1)
    return by_block.clamp(min=0)                                    # of a dead head, rounding noise


def parts_of_kl(model: Model, rounding: Rounding, plan: Tensor, tokens, recipe: Recipe) -> Tensor:
    """The part of each block in the KL at a plan, (2, L, K, 8) float64, up to a common factor.

    Let all errors e of a block be scaled, x̂ = x + α e. Errors of different blocks know little of
    each other, so the KL is about a sum of terms α², one for each block, and its slope in a block's
    α, at α = 1, is twice that block's term. One backward pass has them all. e itself is held fixed.
    """
    scale = torch.ones(plan.shape, dtype=torch.float64, device=model.device, requires_grad=True)
    hook = scaled_errors(rounding, plan, scale)
    text = even_windows(tokens, WINDOWS, recipe.seq)
    for block in text.split(recipe.batch)[processes.RANK::processes.WORLD]:
        with torch.enable_grad():
            kl, _ = distil(model, block, hook, recipe)
            (recipe.seq * kl.sum()).backward()          # a sum: a mean's may be 0 in float16
    parts = torch.zeros_like(scale) if scale.grad is None else scale.grad
    parts = processes.sum_over(parts).cpu()
    if not parts.isfinite().all():
        cli.fail("The parts of the KL are not numbers: take a smaller --lr or another --dtype")
    return parts


def scaled_errors(rounding: Rounding, plan: Tensor, scale: Tensor):
    """The hook x̂ = x + α e: `rounding.at(plan)` where scale, the α of every block, is 1."""
    width = rounding.spread.shape[-1] // LEVELS

    def with_error(layer: int, k: Tensor, v: Tensor):
        scaled = []
        for side, x in enumerate((k, v)):
            coordinates = rounding.coordinates(side, layer, x)
            with torch.no_grad():
                error = rounding.to_grid(side, layer, coordinates, plan[side, layer]) - coordinates
            factor = scale[side, layer].repeat_interleave(width, -1)[:, None]       # (K, 1, d)
            coordinates = coordinates + factor.to(error) * error
            scaled.append(rounding.turned_back(side, layer, coordinates).to(x))
        return scaled

    return NewestExact(with_error)


# ------------------------------------------------------------------------------
# Training

class TrainedRounding(nn.Module):
    """A Rounding that learns: calling it gives the one at the current parameters."""

    def __init__(self, start: Projection, moments: Read):
        super().__init__()
        self.rotation = Rotation(start, within_blocks=True)
        self.mean_k = nn.Parameter(moments.mean()[0].to(start.mean_v))
        self.covariances = moments.covariance().to(start.mean_v)    # (2, L, K, d, d)
        zeros = torch.zeros_like(self.covariances[..., 0])
        self.log_factor = nn.Parameter(zeros)                       # log(spread / deviation)

    def forward(self, dtype: torch.dtype | None = None) -> Rounding:
        p = self.rotation(dtype)
        U = torch.stack((p.U_k, p.U_v))
        variance = (U * (self.covariances.to(U) @ U)).sum(-2)       # along each column
        deviation = variance.clamp(min=1e-12).sqrt()
        spread = deviation * self.log_factor.exp().to(U)
        return Rounding(p, self.mean_k.to(U), spread)

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

OPTIONS = ("steps", "batch", "seq", "lr", "seed", "dtype")
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
    cli.report_arguments(parser, batch=4, seq=None)
    cli.passage_arguments(parser)
    cli.out_argument(parser, "the folder of --proj, else out")
    add = parser.add_argument
    add("--proj", type=Path, help="projections to start from [the query-aware basis]")
    add("--steps", type=cli.within(1, 10 ** 7), default=120, help="[120]")
    add("--lr", type=cli.within(0.0, 1e6), help="Adam's peak rate [0.75 / head_dim]")
    add("--resume", action="store_true", help="continue the training that stopped in --out")
    parser.set_defaults(amp=False, checkpoint=None)
    args = parser.parse_args()
    args.out = args.out or (args.proj.parent if args.proj else Path("out"))
    return args


def begin(args, model: Model, tokens) -> tuple[TrainedRounding, Read]:
    """What a training begins with, and what is known of its text."""
    start = None
    if args.proj:
        with cli.blame("--proj"):
            start = Projection.load(args.proj)
            start.check_fits(model.config)
    moments = calibrate(model, tokens, args.batch, args.seq, args.seed)
    start = start or query_aware(moments, output_weights(model))
    start = start.to(model.device, wide(model.dtype))
    return TrainedRounding(start, moments), moments


@torch.no_grad()
def learnt(state: TrainingState, config) -> Bits:
    """What has been learnt so far, with the path of now."""
    rounding = state.module(torch.float64).to(None, torch.float32)
    return Bits(rounding, state.tensors["path"], config)


@torch.no_grad()
def finish(state: TrainingState, model: Model, held_out, args, passages) -> None:
    """Save, report, and save with the report."""
    bits, file = learnt(state, model.config), args.out / "bits.json"
    said = {"seq": args.seq, "loss": state.facts["loss"]}
    with cli.blame("--out"):
        bits.save(file, said)                           # whatever becomes of the report
    print(f"\nWindows of {args.seq} tokens; up to {GROUP} newest ones and the first {EXACT} come "
          f"on top, {(EXACT + GROUP) / args.seq:.1%}")
    _, rows = report(model, held_out, {"bits": bits.at}, SHARES, args, passages)
    flat = []
    for row in rows:
        share = bits.plan(row["budget"]).double().mean().item() / FULL
        in_all = share + (EXACT + GROUP) / args.seq
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
    if args.seq is None:        # keys drift with their position, so windows are as long as can be
        args.seq = min(config.max_position_embeddings, 2048)
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
    recipe = Recipe(args.steps, args.batch, args.seq, args.lr, floor=1e-4, seed=args.seed,
                    recompute=args.checkpoint)
    began, saved = time.time(), None
    file = args.out / "bits.state.safetensors"
    if args.resume:
        with cli.blame("--resume"):
            saved = read_state(file, settings)
    with cli.blame("--ckpt"):
        rounding, moments = begin(args, model, tokens)
    with cli.blame("--resume"):
        state = TrainingState(file, rounding, settings, saved.tensors if saved else {}, saved)
    if not saved:
        with cli.blame("--ckpt"), torch.no_grad():
            matters, path = first_path(model, rounding(), moments, tokens, recipe)
        state.tensors = {"matters": matters, "path": path}
    print(f"Calibrated, with a path of {len(state.tensors['path'])} lowerings, in "
          f"{time.time() - began:.0f} s", flush=True)

    def draw(B: int, config, generator: Generator) -> Tensor:
        return draw_bits(B, config, generator, state.tensors["path"])

    def after_step(step: int) -> None:
        if step in (args.steps // 4, args.steps // 2):
            with torch.no_grad():
                now = rounding()
            state.tensors["path"] = path_around(model, now, moments, tokens, recipe,
                                                **state.tensors)
        if processes.RANK == 0 and len(valid) and (step % 100 == 0 or step == args.steps):
            bits = learnt(state, config)
            hooks = {f"{budget:.2%}": bits.at(budget) for budget in (0.25, 0.125, 0.0625)}
            check(state, model, valid, hooks, recipe)
        state.save_if_due(every=30, last=step == args.steps)            # never half of a step

    try:
        train(model, state, tokens, draw, recipe, after_step)
    except KeyboardInterrupt:
        state.stopped()
    if processes.RANK == 0:
        print(f"\nCalibration, paths and training took {time.time() - began:.0f} s")
        finish(state, model, held_out, args, passages)
    processes.leave()


if __name__ == "__main__":
    cli.run_script(main)
