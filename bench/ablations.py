"""What each part of the method is worth: KL to the base model on held-out text, at uniform ranks.

    python bench/ablations.py start         # no training: channels, PCA, the sweeps' start
    python bench/ablations.py sides         # keys alone compressed, or values, in OUT
    python bench/ablations.py fixed         # no Matryoshka: every sequence at one rank, 37.5%
    python bench/ablations.py free          # no orthogonality: U itself learns, no Cayley map
    python bench/ablations.py default       # train.py --uniform, to compare them with

Each prints a line for every row. They exist to be compared with one another: the same text, the
same steps (--steps 100 shows all that is in the documentation).
"""
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import recipe_of, sweep_start, training_arguments, unsaved_state
from evaluate import measure
from model import Model, load
from projection import (
    BUDGETS,
    LEVELS,
    SIDES,
    Moments,
    Projection,
    Rotation,
    calibrate,
    shape_of,
    uniform_ranks,
)
from support import cli
from support.data import text_for
from support.plans import PROJECTIONS
from train import draw_levels, learnt, train

SMALLER = BUDGETS[1:]


# ------------------------------------------------------------------------------
# No training

def starts(args, model: Model, tokens) -> dict[str, Projection]:
    """Plain ones, and those of the sweeps with no token whole, and with four."""
    moments = calibrate(model, tokens, args.batch, args.seq, args.seed)
    return {
        "channels": channels(moments),
        "PCA": moments.pca(),
        "sweeps": sweep_start(args, model, tokens, whole=0),
        "sweeps, 4 whole": sweep_start(args, model, tokens),
    }


def channels(moments: Moments) -> Projection:
    """Whole coordinates, none mixed, in the order of their variance: U is a permutation."""
    U_k, U_v = permutation(diagonal(moments.covariance()))
    return Projection(U_k.float(), U_v.float(), moments.mean()[1].float())


def diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def permutation(energy: Tensor) -> Tensor:
    """Columns of the identity (..., d, d), that of the largest energy (..., d) first."""
    order = energy.argsort(dim=-1, descending=True)
    d = energy.shape[-1]
    eye = torch.eye(d, device=energy.device)
    return eye[order].mT.contiguous()


# ------------------------------------------------------------------------------
# Trainings that lack something

class Free(nn.Module):
    """In place of Rotation: U itself learns, and U_r U_rᵀ is no projection; and the means μ."""

    def __init__(self, start: Projection):
        super().__init__()
        self.start = start
        self.U_k, self.U_v, self.mean_v = (
            nn.Parameter(x.clone()) for x in (start.U_k, start.U_v, start.mean_v))

    def forward(self, dtype: torch.dtype | None = None) -> Projection:
        start = self.start
        p = Projection(self.U_k, self.U_v, self.mean_v, start.mean_k, start.whole)
        return p.to(None, dtype)

    def at(self, ranks: Tensor, of_step: Tensor | None = None):
        return self().at(ranks)


def draw_one_level(B: int, config, _) -> Tensor:
    """Always 37.5%: (2, L, B, K)."""
    L, K, d = shape_of(config)
    return torch.full((2, L, B, K), 3 * d // LEVELS)


def do_nothing(step: int) -> None:
    """For `train`, which calls it after every step: nothing is saved or checked."""


def trained(name: str, args, model: Model, tokens) -> Projection:
    """What train.py --uniform, or a training that lacks something, makes of the start."""
    start = sweep_start(args, model, tokens)
    state = unsaved_state(Free(start) if name == "free" else Rotation(start))
    draw = draw_one_level if name == "fixed" else draw_levels
    train(model, state, tokens, draw, recipe_of(args, model.config), after_step=do_nothing)
    return learnt(state)


# ------------------------------------------------------------------------------
# The script

def one_side(side: int, budget: float, config) -> Tensor:
    """A plan that compresses keys (0) or values (1) alone."""
    plan = uniform_ranks(1.0, config)
    plan[side] = uniform_ranks(budget, config)[side]
    return plan


def hooks_for(args, model: Model, tokens) -> dict:
    """The hook `project=` for every row and budget of the table: {(row, budget): hook}."""
    config = model.config
    if args.name == "sides":
        with cli.blame("--out"):
            projection = Projection.load(args.out / PROJECTIONS)
            projection.check_fits(config)
        projection = projection.to(model.device)
        return {(f"{name} alone", budget): projection.at(one_side(side, budget, config))
                for side, name in enumerate(SIDES) for budget in SMALLER}
    if args.name == "start":
        projections = starts(args, model, tokens)
    else:
        projections = {args.name: trained(args.name, args, model, tokens)}
    return {(name, budget): projection.at(uniform_ranks(budget, config))
            for name, projection in projections.items() for budget in SMALLER}


def main():
    parser = cli.arguments(__doc__)
    names = ("start", "sides", "fixed", "free", "default")
    parser.add_argument("name", choices=names)
    cli.data_arguments(parser)
    cli.out_argument(parser)
    cli.report_arguments(parser)
    training_arguments(parser, steps=200)
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    tokens, held_out = text_for(args, model.config)
    hooks = hooks_for(args, model, tokens)
    _, results = measure(model, held_out, hooks, args.batch, args.seq, args.windows)
    print(" " * 20 + "".join(f"{budget:>9.1%}" for budget in SMALLER))
    for row in dict.fromkeys(name for name, _ in hooks):
        kl = [results[row, budget]["kl"] for budget in SMALLER]
        print(f"{row:20s}" + "".join(f"{x:9.5f}" for x in kl))


if __name__ == "__main__":
    cli.run_script(main)
