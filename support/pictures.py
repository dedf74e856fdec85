"""The pictures that scripts leave: curves of a report, and the heat maps of a plan."""
import contextlib
import math
from pathlib import Path

from torch import Tensor

from support.files import written_whole

CURVES = {      # name in files: heading in tables, label and style in pictures
    "pca": ("PCA", "PCA, uniform ranks", "C1", "s"),
    "trained": ("trained", "trained, uniform ranks", "C0", "o"),
    "uniform": ("uniform", "uniform ranks", "C0", "o"),
    "pca_ordered": ("PCA*", "PCA, ranks along the order", "C3", "v"),
    "trained_ordered": ("trained*", "trained, ranks along the order", "C2", "^"),
    "pca_searched": ("PCA*", "PCA, searched ranks", "C3", "v"),
    "searched": ("trained*", "trained, searched ranks", "C2", "^"),
    "bits": ("bits", "bits, trained", "C4", "D"),
}


@contextlib.contextmanager
def picture(path: Path, columns: int = 1, width: float = 10, height: float = 4, **options):
    """Yields the axes of a figure with so many panels, then saves it as a PNG, whole or not."""
    from matplotlib.figure import Figure  # slow to import, and needed at the end alone

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure.subplots(1, columns, **options)
    with written_whole(path) as file:
        figure.savefig(file, dpi=130, format="png")


def whole_recall(gain: float) -> float:
    """What makes a recall a percentage of the model's own; NaN where the model has none."""
    return 100 / gain if gain > 0 else math.nan


def draw_report(base: dict, rows: list[dict], path: Path) -> None:
    """KL, accuracy, and recall where it was measured, against the budget."""
    x = [100 * row["budget"] for row in rows]
    columns = 3 if "recall" in base else 2
    with picture(path, columns, width=5 * columns) as axes:
        distance, quality, *memory = axes
        for name in rows[0]:
            if name == "budget":
                continue
            _, label, color, marker = CURVES[name]
            style = {"label": label, "color": color, "marker": marker}
            kl = [row[name]["kl"] if row["budget"] < 1 else math.nan for row in rows]   # not log 0
            distance.plot(x, kl, **style)
            quality.plot(x, [100 * row[name]["accuracy"] for row in rows], **style)
            for axis in memory:
                recalls = [row[name]["recall"] for row in rows]
                axis.plot(x, [whole_recall(base["recall"]) * y for y in recalls], **style)
        distance.set(yscale="log", ylabel="KL to the base model, nats per token",
                     title="Distance from the base model")
        quality.axhline(100 * base["accuracy"], color="grey", linestyle="--", label="base model")
        quality.set(ylabel="accuracy of the next token, %", title="Quality on held-out text")
        for axis in memory:
            axis.axhline(100, color="grey", linestyle="--", label="base model")
            axis.set(ylabel="recall, % of the base model's", title="Passages said a second time")
        for axis in axes:
            axis.set(xlabel="size of the KV cache, % of full", xticks=x)
            axis.invert_xaxis()
            axis.grid(alpha=0.3)
            axis.legend()


def draw_plan(ranks: Tensor, d: int, curves: dict, path: Path) -> None:
    """A plan (2, L, K) as two heat maps; KL against the budget, {label: (budgets, KLs)}."""
    _, L, K = ranks.shape
    with picture(path, 3, width=13, width_ratios=[1, 1, 1.5]) as (keys, values, curve):
        for name, of_side, axis in zip(("keys", "values"), ranks, (keys, values), strict=True):
            image = axis.imshow(of_side.numpy(), vmin=0, vmax=d, aspect="auto", cmap="viridis")
            share = of_side.sum() / ranks.sum()
            axis.set(title=f"{name}: {share:.0%} of the cache", ylabel="layer",
                     xlabel="key-value head", xticks=range(0, K, max(1, K // 8)),
                     yticks=range(0, L, max(1, L // 8)))
        values.figure.colorbar(image, ax=values, label="rank")
        for label, (budgets, kl) in curves.items():
            marker = "o" if len(budgets) < 10 else None
            curve.plot([100 * budget for budget in budgets], kl, marker=marker, label=label)
        curve.set(yscale="log", ylim=(1e-5, None), xlabel="size of the KV cache, % of full",
                  ylabel="KL on the calibration text, nats per token")
        curve.invert_xaxis()
        curve.grid(alpha=0.3)
        curve.legend()


def show_bytes(axis) -> None:
    """A logarithmic axis of bytes, from many to few."""
    ticks = [5, 6.25, 9.4, 12.5, 18.75, 25, 37.5, 50, 75]
    axis.set(xscale="log", xlabel="bytes of a token, % of a 16-bit cache")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
