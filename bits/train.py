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

    python bits.py                          # -> out/bits.safetensors, out/bits.json, out/bits.png
    python generate.py --bits out/bits.json --budget 0.125 --prompt "Return the "
"""
import math
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Generator, Tensor, nn

import common
from data import data_arguments, set_apart, text_for
from distance import measure, recall, spread_windows, wide
from evaluate import (
    describe,
    held_out_passages,
    passage_arguments,
    report_arguments,
    show_bytes,
    whole_recall,
)
from model import Model, load, read_config
from order import alone, kl_of_each, output_weights, pairs_of_columns
from packed import PackedCache
from projection import LEVELS, Moments, Projection, Rotation, calibrate
from rounding import (
    BITS,
    ERROR,
    EXACT,
    GROUP,
    WHOLE,
    Rounding,
    bits_at,
    errors_at,
    grouped_attention,
    path_of_rows,
    path_to_rows,
    same_bits,
    water_filling,
)
from train import VALID, distillation, one_of_each, train

BUDGETS = (0.5, 0.375, 0.28125, 0.25, 0.1875, 0.15625, 0.125, 0.09375, 0.0625, 0.046875)
TRIED = 2               # bits of a head that is measured alone, while all others have 8
AROUND = 0.09375        # the budget around whose plan the parts of blocks are measured
WINDOWS = 32            # of training text to measure them in


# ------------------------------------------------------------------------------
# The path

def first_path(model: Model, rounding: Rounding, moments: Moments, tokens, args):
    """Before training: what each head matters (2, L, K), and the path from that alone.

    A path is lowerings (n, 2): the place of a block in the flattened (2, L, K, 8), and its bits
    after.
    """
    full = same_bits(max(BITS), model.config)
    plans = []
    for plan in alone(full[..., 0], (TRIED,)):
        plans.append(plan[..., None].expand_as(full))
    kl = kl_of_each(model, plans, rounding.at, tokens, args)
    error = block_errors(model, rounding, moments)
    of_head = ERROR[TRIED] * error.sum(-1)
    matters = kl.view_as(of_head) / of_head.clamp(min=1e-30)        # a dead one costs 0
    return matters, water_filling(matters[..., None] * error)


def path_around(model, rounding, moments, tokens, args, matters: Tensor, path: Tensor) -> Tensor:
    """A path whose costs are also measured around plans of the path before it."""
    costs = matters[..., None] * block_errors(model, rounding, moments)
    for _ in range(2):
        plan = bits_at(path, model.config, AROUND)
        parts = parts_of_kl(model, rounding, plan, tokens, args)
        ratio = parts / errors_at(plan) / costs.clamp(min=1e-30)
        ratio = ratio / ratio[ratio > 0].median()                   # both have a scale of their own
        ratio = ratio.nan_to_num(1).clamp(1 / 16, 16)               # beyond that it is noise
        costs = costs * ratio.sqrt()                                # the geometric mean
        path = water_filling(costs)
    return path


def block_errors(model: Model, rounding: Rounding, moments: Moments) -> Tensor:
    """(How far a block is off at no bits) × (who reads it), (2, L, K, 8), up to a head's factor."""
    by_pair = pairs_of_columns(moments, rounding.p, output_weights(model))
    by_column = by_pair.diagonal(dim1=-2, dim2=-1).cpu()            # (2, L, K, d)
    by_block = by_column.unflatten(-1, (LEVELS, -1)).sum(-1)
    return by_block.clamp(min=0)                                    # of a dead head, rounding noise


def parts_of_kl(model: Model, rounding: Rounding, plan: Tensor, tokens, args) -> Tensor:
    """The part of each block in the KL at a plan, (2, L, K, 8) float64, up to a common factor.

    Let all errors e of a block be scaled, x̂ = x + α e. Errors of different blocks know little of
    each other, so the KL is about a sum of terms α², one for each block, and its slope in a block's
    α, at α = 1, is twice that block's term. One backward pass has them all. e itself is held fixed.
    """
    scale = torch.ones(plan.shape, dtype=torch.float64, device=model.device, requires_grad=True)
    hook = scaled_errors(rounding, plan, scale)
    text = spread_windows(tokens, WINDOWS, args.seq)
    for block in text.split(args.batch)[common.RANK::common.WORLD]:
        with torch.enable_grad():
            kl, _ = distillation(model, block, hook, args)
            (args.seq * kl.sum()).backward()            # a sum: a mean's may be 0 in float16
    parts = torch.zeros_like(scale) if scale.grad is None else scale.grad
    parts = common.sum_over_processes(parts).cpu()
    if not parts.isfinite().all():
        common.fail("The parts of the KL are not numbers: take a smaller --lr or another --dtype")
    return parts


def scaled_errors(rounding: Rounding, plan: Tensor, scale: Tensor):
    """The hook x̂ = x + α e: `rounding.at(plan)` where scale, the α of every block, is 1."""
    width = rounding.spread.shape[-1] // LEVELS

    def project(layer: int, k: Tensor, v: Tensor):
        scaled = []
        for side, x in enumerate((k, v)):
            coordinates = rounding.coordinates(side, layer, x)
            with torch.no_grad():
                error = rounding.to_grid(side, layer, coordinates, plan[side, layer]) - coordinates
            factor = scale[side, layer].repeat_interleave(width, -1)[:, None]       # (K, 1, d)
            coordinates = coordinates + factor.to(error) * error
            scaled.append(rounding.turned_back(side, layer, coordinates).to(x))
        return *scaled, partial(grouped_attention, newest=(k, v))

    return project


# ------------------------------------------------------------------------------
# Training

class TrainedRounding(nn.Module):
    """A Rounding that learns: calling it gives the one at the current parameters."""

    def __init__(self, start: Projection, moments: Moments):
        super().__init__()
        self.rotation = Rotation(start, within_blocks=True)
        mean_k = moments.k / moments.tokens[:, None, None]
        self.mean_k = nn.Parameter(mean_k.to(start.mean_v))
        covariances = torch.stack(moments.covariances())
        self.covariances = covariances.to(start.mean_v)             # (2, L, K, d, d)
        zeros = torch.zeros_like(self.covariances[..., 0])
        self.log_factor = nn.Parameter(zeros)                       # log(spread / deviation)

    def forward(self, dtype: torch.dtype | None = None) -> Rounding:
        p = self.rotation(dtype)
        U = torch.stack((p.U_k, p.U_v))
        variance = (U * (self.covariances.to(U) @ U)).sum(-2)       # along each column
        deviation = variance.clamp(min=1e-12).sqrt()
        spread = deviation * self.log_factor.exp().to(U)
        return Rounding(p, self.mean_k.to(U), spread)


def draw_bits(B: int, config, generator: Generator, path: Tensor) -> Tensor:
    """The plans (2, L, B, K, 8) of B budgets, 0.75 to 4.5 bits on average; even in the log."""
    low, high = math.log(0.75), math.log(4.5)
    means = (low + (high - low) * one_of_each(B, generator)).exp()
    plans = [bits_at(path, config, mean / WHOLE) for mean in means.tolist()]
    return torch.stack(plans, dim=2)


def bits_hook(rounding: TrainedRounding, bits: Tensor, batch: int):
    """`train`'s hook: the plans of this process's sequences; all parameters are seen."""
    mine = bits[:, :, common.my_share(batch)]
    return rounding().at(mine), None


class Run:
    """A training's state as `train` takes it, with the path and what each head matters."""

    # What must be as it was for a resumed training to end where the undisturbed one would have.
    SETTINGS = (
        "ckpt", "data", "proj", "steps", "batch", "seq", "lr", "seed", "dtype", "train_tokens",
        "processes")
    STATE = "bits.state.safetensors"

    def __init__(self, args, rounding: TrainedRounding):
        args.processes = common.WORLD
        self.args, self.rotation = args, rounding
        for parameter in rounding.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.Adam(rounding.parameters())
        config = {name: str(getattr(args, name)) for name in self.SETTINGS}
        self.said = {"step": 0, "loss": [], "config": config}
        self.file = args.out / self.STATE
        self.saved_step, self.save_at = 0, 0.0          # when to save: the first step at once

    def save(self) -> None:
        began = time.time()
        tensors = {"path": self.path, "matters": self.matters}
        common.save_state(self.file, self.rotation, self.optimizer, tensors, self.said)
        self.saved_step = self.said["step"]
        self.save_at = time.time() + max(30, 49 * (time.time() - began))    # at most 2% of the time

    def resume(self) -> None:
        """Go on from what `save` wrote. ValueError if there is none, or one of other settings."""
        tensors, said = common.load_state(self.file)
        common.check_same(self.file, said["config"], self.said["config"])
        common.restore_state(self.rotation, self.optimizer, tensors)
        self.path, self.matters = tensors["path"], tensors["matters"]
        self.said, self.saved_step = said, said["step"]


# ------------------------------------------------------------------------------
# What is saved, and read again

class Bits:
    """What bits.py made of a model: a Rounding and the path of its plans, for any budget."""

    def __init__(self, rounding: Rounding, path: Tensor, config):
        rounding.p.check_fits(config)
        self.rounding, self.path, self.config = rounding, path, config

    def at(self, budget: float):
        """The hook `project=` at a budget, the share of a 16-bit cache."""
        return self.rounding.at(self.plan(budget))

    def plan(self, budget: float) -> Tensor:
        return bits_at(self.path, self.config, budget)

    def cache(self, budget: float, batch: int, max_len: int, dtype=torch.float32, device="cpu"):
        """A PackedCache at the largest plan within the budget."""
        return PackedCache(self.rounding, self.plan(budget), batch, max_len, dtype, device)

    def save(self, file: Path, said: dict) -> None:
        self.rounding.save(file.with_suffix(".safetensors"))
        common.write_json(file, {
            "head_dim": self.config.head_dim,
            "exact": EXACT,
            "newest": GROUP,
            "path": path_to_rows(self.path, self.config),
        } | said)


def load_bits(file: str | Path) -> Bits:
    """Read OUT/bits.json and the .safetensors beside it. ValueError names the file."""
    file = Path(file)
    said = common.read_json(file)
    rounding = Rounding.load(file.with_suffix(".safetensors"))
    L, K, d = rounding.p.mean_v.shape
    shape = SimpleNamespace(num_hidden_layers=L, num_key_value_heads=K, head_dim=d)
    try:
        for name, here in {"head_dim": d, "exact": EXACT, "newest": GROUP}.items():
            if said[name] != here:
                raise ValueError(f"{name} {said[name]}, for {here}")
        return Bits(rounding, path_of_rows(said["path"], shape), shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not what bits.py writes ({error})") from None


# ------------------------------------------------------------------------------
# The report

def total_share(mean_bits: float, T: int) -> float:
    """What a cache for T tokens takes, in 16 bits its exact and newest ones; of a 16-bit cache."""
    return mean_bits / WHOLE + (EXACT + GROUP) / T


class Clamped:
    """The hook of a plan, which also counts the coordinates that lie beyond their last code."""

    def __init__(self, rounding: Rounding, plan: Tensor):
        self.project = rounding.at(plan)
        self.rounding, self.plan = rounding, plan
        self.beyond = self.count = 0

    def __call__(self, layer: int, k: Tensor, v: Tensor):
        for side, x in enumerate((k, v)):
            coordinates = self.rounding.coordinates(side, layer, x[:, :, EXACT:])
            step, top = self.rounding.grid(side, layer, self.plan[side, layer])
            beyond = (coordinates / step).abs() > top + 0.5
            stored = (top > 0).expand_as(beyond)
            self.beyond += (beyond & stored).sum().item()
            self.count += stored.sum().item()
        return self.project(layer, k, v)


@torch.no_grad()
def report(model: Model, held_out, bits: Bits, args, passages) -> list[dict]:
    """Measure and print a row for every budget; recall on passages (N, n), if any."""
    hooks = {budget: Clamped(bits.rounding, bits.plan(budget)) for budget in BUDGETS}
    base, results = measure(model, held_out, hooks, args.batch, args.seq, args.windows)
    print(f"\nHeld-out text in windows of {args.seq}, base model: perplexity "
          f"{base['perplexity']:.3f}, accuracy {base['accuracy']:.2%}\n")
    whole = whole_recall(recall(model, passages)) if passages is not None else math.nan
    columns = "      KL   perplexity   accuracy     same   recall"
    print(f"  a token   in all |  bits | {columns} | clamped")
    rows = []
    for budget, result in results.items():
        mean = bits.plan(budget).double().mean().item()
        clamped = hooks[budget].beyond / max(1, hooks[budget].count)
        row = {"budget": mean / WHOLE, "in_all": total_share(mean, args.seq), "clamped": clamped}
        left = math.nan                                             # of the model's own, in %
        if passages is not None:
            row["recall"] = recall(model, passages, bits.at(budget))
            left = row["recall"] * whole
        rows.append(row | result)
        print(f"  {row['budget']:7.2%}  {row['in_all']:7.2%} | {mean:5.2f} | {result['kl']:8.5f}   "
              f"{result['perplexity']:10.3f}   {result['accuracy']:8.2%}  {result['same']:7.2%}  "
              f"{left:6.2f}% | {clamped:7.2%}")
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """KL against bytes."""
    with common.picture(path, width=6) as axis:
        x = [100 * row["budget"] for row in rows]
        axis.plot(x, [row["kl"] for row in rows], color="C4", marker="D", label="bits, trained")
        axis.set(yscale="log", ylabel="KL to the base model, nats per token")
        show_bytes(axis)
        axis.legend()


# ------------------------------------------------------------------------------
# The script

def options():
    parser = common.arguments(__doc__, several=True)
    data_arguments(parser)
    report_arguments(parser, batch=4, seq=None)
    passage_arguments(parser)
    add = parser.add_argument
    add("--proj", type=Path, help="projections to start from [the query-aware basis]")
    add("--steps", type=common.within(1, 10 ** 7), default=120, help="[120]")
    add("--lr", type=common.within(0.0, 1e6), help="Adam's peak rate [0.75 / head_dim]")
    add("--resume", action="store_true", help="continue the training that stopped in --out")
    parser.set_defaults(accumulate=1, ce=0.0, amp=False, checkpoint=None)
    return parser.parse_args()


def begin(args, model: Model, tokens):
    """The start and what is known of its text: (rounding, moments)."""
    start = None
    if args.proj:
        with common.blame("--proj"):
            start = Projection.load(args.proj)
            start.check_fits(model.config)
    moments = calibrate(model, tokens, args.batch, args.seq, args.seed)
    start = start or moments.query_aware(output_weights(model))
    start = start.to(model.device, wide(model.dtype))
    return TrainedRounding(start, moments), moments


def main():
    args = options()
    with common.blame("--ckpt"):
        config = read_config(args.ckpt / "config.json")
    if args.seq is None:        # keys drift with their position, so windows are as long as can be
        args.seq = min(config.max_position_embeddings, 2048)
    if args.seq <= GROUP:
        common.fail(f"--seq {args.seq}: the newest {GROUP} tokens are exact; take longer windows")
    if args.lr is None:
        args.lr = 0.75 / config.head_dim
    device, dtype = common.prepare_training(args, config, LEVELS)
    with common.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    print(describe(args.ckpt, model))
    tokens, held_out = text_for(args, config)
    args.train_tokens = len(tokens)
    tokens, valid = set_apart(tokens, VALID * args.seq + 1)
    passages = held_out_passages(args, held_out, config)
    began = time.time()
    with common.blame("--ckpt"):
        rounding, moments = begin(args, model, tokens)
    run = Run(args, rounding)
    if args.resume:
        with common.blame("--resume"):
            run.resume()
    else:
        with common.blame("--ckpt"), torch.no_grad():
            run.matters, run.path = first_path(model, rounding(), moments, tokens, args)
    seconds = time.time() - began
    print(f"Calibrated, with a path of {len(run.path)} lowerings, in {seconds:.0f} s")

    def trained() -> Bits:
        with torch.no_grad():
            return Bits(rounding(torch.float64).to(None, torch.float32), run.path, config)

    def after_step(step: int) -> None:
        if step in (args.steps // 4, args.steps // 2):
            with torch.no_grad():
                now = rounding()
            run.path = path_around(model, now, moments, tokens, args, run.matters, run.path)
        if common.RANK == 0 and len(valid) and (step % 100 == 0 or step == args.steps):
            now = trained()
            hooks = {budget: now.at(budget) for budget in (0.25, 0.125, 0.0625)}
            _, results = measure(model, valid, hooks, args.batch, args.seq, VALID)
            shown = {f"{budget:.2%}": round(result["kl"], 5) for budget, result in results.items()}
            print(f"\nKL on validation text: {shown}", file=sys.stderr)
        if common.RANK == 0 and (step == args.steps or time.time() >= run.save_at):
            run.save()                          # between steps: never half of one

    def draw_plans(B: int, config, generator: Generator) -> Tensor:
        return draw_bits(B, config, generator, run.path)

    hook = partial(bits_hook, batch=args.batch)
    try:
        train(run, model, tokens, draw_plans, hook, 1e-4, after_step)
    except KeyboardInterrupt:
        where = f"the same command with --resume continues from step {run.saved_step}"
        common.fail(f"Stopped; {where if run.saved_step else 'nothing was saved yet'}", code=130)
    if common.RANK == 0:
        print(f"\nCalibration, paths and training took {time.time() - began:.0f} s")
        bits = trained()
        file = args.out / "bits.json"
        said = {"seq": args.seq, "loss": run.said["loss"]}
        with common.blame("--out"):
            bits.save(file, said)                       # whatever becomes of the report
        rows = report(model, held_out, bits, args, passages)
        with common.blame("--out"):
            bits.save(file, said | {"budgets": rows})
            draw(rows, file.with_suffix(".png"))
        run.file.unlink(missing_ok=True)                # the training is over
        print(f"Saved {file.with_suffix('.safetensors')}, {file} and {file.with_suffix('.png')}")
    common.leave_processes()


if __name__ == "__main__":
    common.run_script(main)
