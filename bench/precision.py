"""What the sweeps make of a bfloat16 model, whose layers run as they do on a GPU, against float32.

The start and its order of lowerings are found twice with the same weights (the demo's are
bfloat16): in float32, and with states and gradients in bfloat16. A third time, in float32 with
other draws of the next tokens, shows what chance does. Of each: the KL on held-out text, always in
float32, along its own order; how many of the first lowerings are the same; and how much of the
leading half of each head's columns the same half of float32's explains, the mean of all heads.

    python bench/precision.py                       # some minutes
"""
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import describe, measure
from model import load
from projection import Projection, plan_at
from search import Windows, find_order, find_start, positions_of
from support import cli
from support.data import text_for

BUDGETS = (0.75, 0.5, 0.375, 0.25)
WHOLE = 4                   # train.py's default


def shared_lowerings(order: Tensor, other: Tensor) -> float:
    """Which share of the first half of an order is in the first half of another."""
    half = len(order) // 2
    same = Counter(order[:half].tolist()) & Counter(other[:half].tolist())
    return same.total() / half


def shared_columns(p: Projection, other: Projection) -> float:
    """|U_rᵀ U′_r|² / r of r = d / 2, the mean over keys' and values' heads: 1 if they agree."""
    r = p.U_k.shape[-1] // 2
    shares = []
    for U, U_other in ((p.U_k, other.U_k), (p.U_v, other.U_v)):
        products = U[..., :r].mT @ U_other[..., :r]
        shares.append(products.square().sum((-1, -2)) / r)
    return torch.stack(shares).mean().item()


@torch.no_grad()
def main():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.out_argument(parser)
    cli.report_arguments(parser, windows=32)
    cli.sweep_arguments(parser)
    args = parser.parse_args()
    cli.prepare(args)
    cli.keep_freed_memory()
    with cli.blame("--ckpt"):
        exact, low = load(args.ckpt), load(args.ckpt, dtype=torch.bfloat16)
    positions = positions_of(args, exact.config)
    print(describe(args.ckpt, exact))
    tokens, held_out = text_for(args, exact.config)

    found, hooks = {}, {}
    for name, model, other in (("float32", exact, 0), ("bfloat16", low, 0),
                               ("float32, other draws", exact, 1)):
        windows = Windows(tokens, args.sweep_windows, args.batch, args.seq, positions, args.seed)
        windows.seed += other                           # of the draws; the text is the same
        p = find_start(model, windows, WHOLE)
        order = find_order(model, p, windows)
        found[name] = p, order
        hooks |= {(name, b): p.at(plan_at(order, exact.config, b)) for b in BUDGETS}
    _, results = measure(exact, held_out, hooks, args.batch, args.seq, args.windows)
    print("\nKL, the start along its order" + " " * 10 + "".join(f"{b:>9.1%}" for b in BUDGETS)
          + "    same lowerings, same columns")
    p_exact, order_exact = found["float32"]
    for name, (p, order) in found.items():
        kl = "".join(f"{results[name, b]['kl']:9.5f}" for b in BUDGETS)
        print(f"  {name:37s}{kl}    {shared_lowerings(order, order_exact):14.1%}, "
              f"{shared_columns(p, p_exact):12.4f}")


if __name__ == "__main__":
    cli.run_script(main)
