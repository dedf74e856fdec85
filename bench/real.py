"""How far several trainings of one model are from it, over long windows and by position.

Every folder is a training's (train.py), measured along its ranks.json where it has one; `pca` in
it is measured with uniform ranks, from the first folder alone. KL as a share of that PCA's stands
behind it.

    python bench/real.py --ckpt DIR --seq 2048 --windows 8 --batch 1 out_pca out_0 out_40
"""
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import describe, measure
from model import load
from projection import Projection, plan_at, uniform_ranks
from support import cli
from support.data import text_for
from support.plans import PROJECTIONS, order_in

BUDGETS = (0.75, 0.5, 0.375, 0.25)


def curves_of(folders: list[Path], model) -> dict:
    """{name: (projection, plan for a budget)}"""
    uniform = partial(uniform_ranks, config=model.config)
    curves = {}
    for folder in folders:
        p = Projection.load(folder / PROJECTIONS)
        p.check_fits(model.config)
        if not curves:
            curves["PCA"] = Projection.load(folder / PROJECTIONS, "pca_"), uniform
        order = order_in(folder / "ranks.json", p, model.config)
        if order is None:
            curves[f"{folder}, uniform"] = p, uniform
        else:
            curves[str(folder)] = p, partial(plan_at, order, model.config)
    return curves


@torch.no_grad()
def main():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.out_argument(parser)
    cli.report_arguments(parser, batch=1, windows=8, seq=2048)
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    with cli.blame("folders"):
        curves = curves_of(args.folders, model)
    print(describe(args.ckpt, model))
    _, held_out = text_for(args, model.config)
    hooks = {(name, budget): p.to(device).at(plan(budget))
             for name, (p, plan) in curves.items() for budget in BUDGETS}
    base, results = measure(model, held_out, hooks, args.batch, args.seq, args.windows)
    print(f"{args.windows} windows of {args.seq}: perplexity {base['perplexity']:.3f}\n")
    print(f"{'KL':40s}" + "".join(f"{budget:>17.1%}" for budget in BUDGETS))
    for name in curves:
        cells = [(results[name, b]["kl"], results[name, b]["kl"] / results["PCA", b]["kl"])
                 for b in BUDGETS]
        print(f"  {name:38s}" + "".join(f"   {kl:.4f} ({share:.3f})" for kl, share in cells))
    print("\nKL by position")
    for name in curves:
        for budget in BUDGETS:
            places = results[name, budget]["by_position"].items()
            print(f"  {name:38s} {budget:6.1%}  " + "  ".join(f"{p} {kl:.4f}" for p, kl in places))


if __name__ == "__main__":
    cli.run_script(main)
