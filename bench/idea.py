"""Draws figures/idea.png: the idea of this project in one picture.

A column is a head, of eight cells: its coordinates, the most important ones at the bottom. The
searched plan is made up, with the same total as the plan beside it; those that search.py finds are
in figures/ranks.png.

    python bench/idea.py
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import arguments
from projection import LEVELS
from support import cli
from support.pictures import picture

# Cells that are kept of every head: keys, values. The last two have the same total.
PANELS = {
    "the model's cache: 100%": ([8] * 6, [8] * 6),
    "same rank everywhere: 37.5%": ([3] * 6, [3] * 6),
    "a rank for every head: 37.5%": (
        [5, 2, 1, 7, 3, 2],
        [2, 4, 1, 2, 6, 1],
    ),
}
DARK = {"keys": (0.03, 0.19, 0.42), "values": (0.62, 0.21, 0.02)}
LIGHT = {"keys": (0.74, 0.85, 0.95), "values": (1.0, 0.85, 0.68)}
GAP = 0.6               # columns between keys and values
MARGIN = 0.9            # and at either end


def shade(side: str, level: int) -> tuple[float, ...]:
    """The colour of a cell, the darker the more important."""
    share = level / (LEVELS - 1)
    pairs = zip(DARK[side], LIGHT[side], strict=True)
    return tuple(dark + share * (light - dark) for dark, light in pairs)


def draw_head(axis, x: float, side: str, kept: int) -> None:
    """A column of cells: what is kept is filled, what is not only outlined."""
    from matplotlib.patches import Rectangle
    for level in range(LEVELS):
        corner = (x + 0.08, level + 0.06)
        filled = level < kept
        face = shade(side, level) if filled else "white"
        edge = "none" if filled else "#d5d5d5"
        axis.add_patch(Rectangle(corner, 0.84, 0.88, facecolor=face, edgecolor=edge))


def draw_panel(axis, title: str, plan) -> None:
    """All heads of a plan: (cells of keys, cells of values)."""
    x = 0
    for side, heads in zip(DARK, plan, strict=True):
        for j, kept in enumerate(heads):
            draw_head(axis, x + j, side, kept)
        middle = x + len(heads) / 2
        place = {"ha": "center", "va": "top"}
        text = f"{side} of {len(heads)} heads"
        axis.text(middle, -0.3, text, fontsize=12, color=shade(side, 1), **place)
        x += len(heads) + GAP
    axis.set_xlim(-MARGIN, x - GAP + MARGIN)
    axis.set_ylim(-1, LEVELS)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=14)
    axis.spines[:].set_visible(False)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "figures" / "idea.png",
                        help="[figures/idea.png]")
    args = parser.parse_args()
    columns = len(PANELS)
    with cli.blame("--out"), picture(args.out, columns, 11, 3.4) as axes:
        for axis, title in zip(axes, PANELS, strict=True):
            draw_panel(axis, title, PANELS[title])
        axes[0].set_ylabel("coordinates kept,\nmost important first  →", fontsize=12)
    print(f"Saved {args.out}")


if __name__ == "__main__":
    main()
