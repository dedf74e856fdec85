"""What each part of the method is worth: KL to the base model on held-out text, at uniform ranks.

    python bench/ablations.py start         # no training: channels, PCA, the query-aware start
    python bench/ablations.py sides         # keys alone compressed, or values, in OUT
    python bench/ablations.py fixed         # no Matryoshka: every sequence at one rank, 37.5%
    python bench/ablations.py free          # no orthogonality: U itself learns, no Cayley map
    python bench/ablations.py default       # train.py --uniform, to compare them with

Each prints a line for every row. They exist to be compared with one another: the same text, the
same steps (--steps 100 shows all that is in the documentation).
"""
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
import train
from bench.tools import complete_training, training_arguments
from data import data_arguments, text_for
from distance import measure
from evaluate import report_arguments
from model import Model, load
from order import output_weights
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

SMALLER = BUDGETS[1:]


# ------------------------------------------------------------------------------
# No training

def starts(moments: Moments, model: Model) -> dict[str, Projection]:
    return {
        "channels": channels(moments),
        "PCA": moments.pca(),
        "query-aware start": moments.query_aware(output_weights(model)),
    }


def channels(moments: Moments) -> Projection:
    """Whole coordinates, none mixed: U is a permutation.

    Keys in the order of key energy times query energy, values in the order of their variance.
    """
    _, cov_v = moments.covariances()
    U_k = permutation(diagonal(moments.kk) * diagonal(moments.qq))
    U_v = permutation(diagonal(cov_v))
    return Projection(U_k, U_v, moments.mean_v())


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

class Free(Rotation):
    """U = U₀ + A with any A: U_r U_rᵀ is then no projection."""

    def __init__(self, start: Projection):
        super().__init__(start)
        self.A_k = nn.Parameter(torch.zeros_like(start.U_k))
        self.A_v = nn.Parameter(torch.zeros_like(start.U_v))

    def forward(self, dtype: torch.dtype | None = None) -> Projection:
        start = self.start.to(None, dtype)
        U_k = start.U_k + self.A_k.to(dtype)
        U_v = start.U_v + self.A_v.to(dtype)
        return Projection(U_k, U_v, self.mean_v.to(dtype))


def free_hook(rotation: Free, ranks: Tensor):
    """`train.train`'s hook: all entries of A are seen."""
    return rotation().at(ranks), None


def draw_one_level(B: int, config, _) -> Tensor:
    """Always 37.5%: (2, L, B, K)."""
    L, K, d = shape_of(config)
    return torch.full((2, L, B, K), 3 * d // LEVELS)


def do_nothing(step: int) -> None:
    """For `train.train`, which calls it after every step: nothing is saved or checked."""


def trained(name: str, args, model: Model, tokens) -> Projection:
    """What train.py --uniform, or a training that lacks something, makes of the start."""
    run = train.begin(args, model, tokens, None)
    draw = draw_one_level if name == "fixed" else train.draw_levels
    hook = partial(train.ranks_hook, batch=args.batch)
    if name == "free":
        run.rotation = Free(run.start)
        run.optimizer = torch.optim.Adam(run.rotation.parameters())
        hook = free_hook
    train.train(run, model, tokens, draw, hook, 1e-3, after_step=do_nothing)
    return run.projection()


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
        with common.blame("--out"):
            projection = Projection.load(args.out / "projections.safetensors")
            projection.check_fits(config)
        projection = projection.to(model.device)
        return {(f"{name} alone", budget): projection.at(one_side(side, budget, config))
                for side, name in enumerate(SIDES) for budget in SMALLER}
    if args.name == "start":
        moments = calibrate(model, tokens, args.batch, args.seq, args.seed)
        projections = starts(moments, model)
    else:
        projections = {args.name: trained(args.name, args, model, tokens)}
    return {(name, budget): projection.at(uniform_ranks(budget, config))
            for name, projection in projections.items() for budget in SMALLER}


def main():
    parser = common.arguments(__doc__)
    names = ("start", "sides", "fixed", "free", "default")
    parser.add_argument("name", choices=names)
    data_arguments(parser)
    report_arguments(parser)
    training_arguments(parser, steps=200)
    args = parser.parse_args()
    device, dtype = common.prepare(args)
    common.keep_freed_memory()
    with common.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    tokens, held_out = text_for(args, model.config)
    complete_training(args, model.config, dtype, tokens)
    hooks = hooks_for(args, model, tokens)
    _, results = measure(model, held_out, hooks, args.batch, args.seq, args.windows)
    print(" " * 20 + "".join(f"{budget:>9.1%}" for budget in SMALLER))
    for row in dict.fromkeys(name for name, _ in hooks):
        kl = [results[row, budget]["kl"] for budget in SMALLER]
        print(f"{row:20s}" + "".join(f"{x:9.5f}" for x in kl))


if __name__ == "__main__":
    common.run_script(main)
