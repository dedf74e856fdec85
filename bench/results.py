"""Draws figures/results.png: how far the model with the small cache is from the model, at a glance.

Reads the evaluation.json of three folders, each what `python evaluate.py --out FOLDER` writes after
train.py:

    --order     python train.py                       trained along an order of lowerings
    --uniform   python train.py --uniform             trained for the same rank everywhere
    --start     python train.py --steps 0             not trained

The searched ranks of plain PCA are those of `python search.py --pca` in the first of the folders
that has them.

    python bench/results.py                           # from out/, out_uniform/ and out_start/
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import arguments
from support import cli
from support.files import read_json
from support.pictures import picture

FOLDERS = {"order": "out", "uniform": "out_uniform", "start": "out_start"}

CURVES = (              # folder, name in its file, label, colour, marker, line
    ("uniform", "pca", "PCA: no training, same rank everywhere", "C1", "s", "--"),
    ("uniform", "trained", "trained for equal ranks, same rank everywhere", "C0", "o", "--"),
    (None, "pca_searched", "PCA: no training, searched ranks", "C3", "v", "-"),
    ("start", "searched", "the sweeps' start: no training, ranks along its order", "C4", "D", "-"),
    ("order", "searched", "trained along an order, ranks along it", "C2", "^", "-"),
)


def kl_in(report: dict, name: str) -> dict[float, float] | None:
    """KL by budget of a curve, None where the report lacks it. The full cache has none to show."""
    rows = [row for row in report["budgets"] if row["budget"] < 1]
    if any(name not in row for row in rows):
        return None
    return {100 * row["budget"]: row[name]["kl"] for row in rows}


def find_curve(reports: dict, folder: str | None, name: str):
    """KL by budget of the curve in the report of a folder, or of the first that has it."""
    for key in [folder] if folder else reports:
        kl = kl_in(reports[key], name)
        if kl:
            return kl
    raise ValueError(f"no {name!r} in its evaluation.json; train.py and search.py write ranks, and "
                     "evaluate.py then reports on them")


def read_curves(folders: dict[str, Path]) -> list:
    """Every entry of CURVES with its KL by budget."""
    reports = {}
    for key, folder in folders.items():
        with cli.blame(f"--{key}"):
            reports[key] = read_json(folder / "evaluation.json")
    curves = []
    for curve in CURVES:
        key, name, *_ = curve
        with cli.blame(f"--{key or 'uniform'}"):
            curves.append((curve, find_curve(reports, key, name)))
    return curves


def draw(curves, path: Path) -> None:
    with cli.blame("--out"), picture(path, width=8, height=5) as axis:
        for (_, _, label, color, marker, line), kl in curves:
            style = {"color": color, "marker": marker, "label": label}
            axis.plot(kl.keys(), kl.values(), line, **style)
        axis.set(yscale="log", xticks=list(kl), xlabel="size of the KV cache, % of full",
                 ylabel="KL to the base model, nats per token")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
        axis.legend(title="lower is better")


def main():
    parser = arguments(__doc__)
    for key, folder in FOLDERS.items():
        parser.add_argument(f"--{key}", type=Path, default=Path(folder), help=f"[{folder}]")
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "results.png",
                        help="[figures/results.png]")
    args = parser.parse_args()
    curves = read_curves({key: getattr(args, key) for key in FOLDERS})
    draw(curves, args.out)
    for (_, _, label, *_), kl in curves:
        print(f"{label:54s}" + "".join(f"{value:9.4f}" for value in kl.values()))
    print(f"Saved {args.out}")


if __name__ == "__main__":
    main()
