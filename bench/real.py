"""How far several trainings of one model are from it, over long windows and by position.

Every folder is a training's (train.py), measured along its ranks.json where it has one. The plain
PCA in --pca, or in the first folder, is measured with uniform ranks; KL as a share of its stands
behind each. A folder may have a name, NAME=FOLDER, that the table and --picture say.

    python bench/real.py --ckpt DIR --seq 2048 --windows 8 --batch 1 --pca out_pca out_0 out_40
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
from support.pictures import picture
from support.plans import PROJECTIONS, order_in

BUDGETS = (0.75, 0.5, 0.375, 0.25)
TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 4)      # of KL


def curves_of(pca: Path | None, folders: list[str], model) -> dict:
    """{name: (projection, plan for a budget)}"""
    uniform = partial(uniform_ranks, config=model.config)
    named = [said.split("=", 1) if "=" in said else (said, said) for said in folders]
    of_pca = Projection.load((pca or Path(named[0][1])) / PROJECTIONS, "pca_")
    of_pca.check_fits(model.config)
    curves = {"PCA": (of_pca, uniform)}
    for name, folder in named:
        folder = Path(folder)
        p = Projection.load(folder / PROJECTIONS)
        p.check_fits(model.config)
        order = order_in(folder / "ranks.json", p, model.config)
        if order is None:
            curves[f"{name}, uniform"] = p, uniform
        else:
            curves[name] = p, partial(plan_at, order, model.config)
    return curves


def draw(results: dict, names: list[str], path: Path) -> None:
    """KL against the budget, and by position where half of the cache is left."""
    with picture(path, 2, width=11, height=4.2) as (by_budget, by_position):
        for name in names:
            kl = [results[name, budget]["kl"] for budget in BUDGETS]
            by_budget.plot([100 * budget for budget in BUDGETS], kl, marker="o", label=name)
            places = results[name, 0.5]["by_position"]
            by_position.plot(list(places), list(places.values()), marker="o", label=name)
        by_budget.set(xlabel="size of the KV cache, % of full", xticks=[75, 50, 37.5, 25],
                      ylabel="KL to the base model, nats per token")
        by_budget.invert_xaxis()
        by_position.set(xlabel="position in the window, half of the cache left")
        for axis in (by_budget, by_position):
            axis.set(yscale="log")
            axis.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        by_budget.legend(title="lower is better")


@torch.no_grad()
def main():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.out_argument(parser)
    cli.report_arguments(parser, batch=1, windows=8, seq=2048)
    parser.add_argument("--pca", type=Path, help="the folder of the PCA [the first folder]")
    parser.add_argument("--picture", type=Path, help="a .png to draw")
    parser.add_argument("folders", nargs="+", metavar="[NAME=]FOLDER")
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    with cli.blame("folders"):
        curves = curves_of(args.pca, args.folders, model)
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
    if args.picture:
        with cli.blame("--picture"):
            draw(results, list(curves), args.picture)


if __name__ == "__main__":
    cli.run_script(main)
