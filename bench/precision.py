"""What the search makes of bfloat16 weights on a GPU, emulated on a CPU, against float32.

On a GPU the search's states and logits are float32, over bfloat16 weights; the inputs of its
products are rounded to the 11 bits of TF32, in which the weights are exact. Here the same code runs
on a CPU, every product's inputs rounded like that, and the order of lowerings that it finds is set
against the one found in float32 with the same weights (the demo's are bfloat16): how many of the
first 50 lowerings are the same, and the KL, measured in float32, of the plans at 87.5 and 75%.

    python train.py --lr 0 --steps 1 --out OUT      # the start without training: a minute
    python bench/precision.py --out OUT             # some minutes more
"""
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import load
from projection import LEVELS, Projection, plan_at
from search import Cost, lazy, rounding_noise
from support import cli
from support.data import random_windows, text_for
from support.plans import PROJECTIONS
from support.progress import Progress

SHARED = 50                 # lowerings that are compared
BUDGETS = (0.875, 0.75)     # of the plans that are compared


def rounded(x: Tensor) -> Tensor:
    """float32 to TF32: the nearest number of 11 significant bits."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 2 ** 12) & -2 ** 13).view(torch.float32)


class RoundedProducts(TorchDispatchMode):
    """Matrix products of rounded inputs, summed in float32."""

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.PRODUCTS:
            args = [rounded(x) for x in args]
        return function(*args, **(kwargs or {}))


class PlainAttention(TorchFunctionMode):
    """Attention by two matrix products, which RoundedProducts sees."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return attention(*args)
        return function(*args, **(kwargs or {}))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q (B, H, T, d) over k and v (B, K, T, d)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return weights @ v


def order_of_lowerings(cost: Cost, count: int) -> Tensor:
    """The first `count` that the search finds, places in the flattened (2, L, K)."""
    progress = Progress(count, "lowering")
    order = []
    for candidate in islice(lazy(cost), count):
        order.append(int(np.ravel_multi_index(candidate, cost.ranks.shape)))
        progress(len(order), f"KL {cost.kl:.2e}  {cost.passes} passes")
    return torch.tensor(order)


@torch.no_grad()
def main():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.out_argument(parser)
    parser.add_argument("--windows", type=cli.within(1, 64), default=4, help="of 256 tokens [4]")
    args = parser.parse_args()
    cli.prepare(args)
    cli.keep_freed_memory()
    args.seq = 256
    exact, low = load(args.ckpt), load(args.ckpt, dtype=torch.bfloat16)
    with cli.blame("--out"):
        projection = Projection.load(args.out / PROJECTIONS)
    tokens, _ = text_for(args, exact.config)
    generator = torch.Generator().manual_seed(args.seed)
    text = random_windows(tokens, args.windows, args.seq, generator)[:, :-1]

    cost = Cost(exact, projection, text)
    count = int(cost.ranks.numel() * LEVELS * (1 - BUDGETS[-1]))
    print(f"float32: noise {rounding_noise(cost):.1e}", flush=True)
    expected = order_of_lowerings(cost, count)
    torch.backends.cuda.matmul.allow_tf32 = True        # as support.cli.prepare has it on a GPU
    with PlainAttention(), RoundedProducts():
        cost = Cost(low, projection, text)
        print(f"bfloat16 weights, TF32 products: noise {rounding_noise(cost):.1e}", flush=True)
        found = order_of_lowerings(cost, count)

    same = Counter(expected[:SHARED].tolist()) & Counter(found[:SHARED].tolist())
    print(f"Of the first {SHARED} lowerings {same.total()} are the same")
    cost = Cost(exact, projection, text)
    for budget in BUDGETS:
        plans = [plan_at(order, exact.config, budget) for order in (expected, found)]
        kl = [cost.measure(plan, 0)[0] for plan in plans]
        print(f"{budget:.1%}: KL {kl[0]:.3e} by float32's order, {kl[1]:.3e} by the other, "
              f"ratio {kl[1] / kl[0]:.3f}")


if __name__ == "__main__":
    cli.run_script(main)
