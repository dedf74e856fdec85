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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
from data import data_arguments, random_windows, text_for
from model import load
from projection import LEVELS, Projection, shape_of
from search import Cost, lazy

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


def order_of_lowerings(cost: Cost, count: int) -> list:
    """The first `count` candidates that the search lowers."""
    progress = common.Progress(count, "lowering")
    order = []
    for candidate in lazy(cost):
        order.append(candidate)
        progress(len(order), f"KL {cost.kl:.2e}  {cost.passes} passes")
        if len(order) == count:
            return order


@torch.no_grad()
def main():
    parser = common.arguments(__doc__)
    data_arguments(parser)
    parser.add_argument("--windows", type=common.within(1, 64), default=4, help="of 256 tokens [4]")
    args = parser.parse_args()
    common.prepare(args)
    common.keep_freed_memory()
    args.seq = 256
    exact, low = load(args.ckpt), load(args.ckpt, dtype=torch.bfloat16)
    with common.blame("--out"):
        projection = Projection.load(args.out / "projections.safetensors")
    tokens, _ = text_for(args, exact.config)
    generator = torch.Generator().manual_seed(args.seed)
    text = random_windows(tokens, args.windows, args.seq, generator)[:, :-1]

    L, K, d = shape_of(exact.config)
    count = int(2 * L * K * LEVELS * (1 - BUDGETS[-1]))
    cost = Cost(exact, projection, text)
    print(f"float32: noise {cost.noise:.1e}", flush=True)
    expected = order_of_lowerings(cost, count)
    torch.backends.cuda.matmul.allow_tf32 = True        # as common.prepare has it on a GPU
    with PlainAttention(), RoundedProducts():
        cost = Cost(low, projection, text)
        print(f"bfloat16 weights, TF32 products: noise {cost.noise:.1e}", flush=True)
        found = order_of_lowerings(cost, count)

    same = Counter(expected[:SHARED]) & Counter(found[:SHARED])
    print(f"Of the first {SHARED} lowerings {same.total()} are the same")
    cost = Cost(exact, projection, text)
    for budget in BUDGETS:
        taken = round((1 - budget) * 2 * L * K * LEVELS)
        kl = [cost.measure(plan(order[:taken], L, K, d), 0)[0] for order in (expected, found)]
        print(f"{budget:.1%}: KL {kl[0]:.3e} by float32's order, {kl[1]:.3e} by the other, "
              f"ratio {kl[1] / kl[0]:.3f}")


def plan(order: list, L: int, K: int, d: int) -> Tensor:
    ranks = torch.full((2, L, K), d)
    for candidate in order:
        ranks[candidate] -= d // LEVELS
    return ranks


if __name__ == "__main__":
    common.run_script(main)
