"""Bits in place of ranks: each coordinate of the cache rounded to as few bits as it deserves.

Beyond the paper. A rank keeps a coordinate in 16 bits or not at all; between the two lies rounding.
Keys and values are turned as before, x = (k − μ) U, and coordinate j becomes one of 2^b codes:

    code = round(x / Δ + top), clamped to 0 … 2^b − 1        top = (2^b − 1) / 2
    x̂    = (code − top) Δ                                    Δ = STEP[b] · s_j

The codes lie evenly around zero, which is none of them (a mid-rise quantiser); at 0 bits x̂ is 0,
so that k̂ is the mean. A coordinate's spread s_j belongs to the model and not to a token: it costs
no bytes. Coordinates come in blocks of d/8, and all of a block have the same bits. A plan of bits
is (2, L, K, 8), one of BITS for each block; its mean / 16 is its budget, the share of a 16-bit
cache.

The first tokens of a sequence, which every later one attends to, are exact: x in bfloat16. They
come on top of a budget.

A path lists lowerings, one block after the other to the next fewer bits; a prefix makes a plan.
"""
from pathlib import Path

import torch
from torch import Tensor

import common
from projection import LEVELS, SIDES, Projection, shape_of

BITS = (0, 1, 2, 3, 4, 6, 8)
EXACT = 4               # tokens at the beginning of a sequence
WHOLE = 16              # bits of a number that is not rounded

# Of b bits, for a normal distribution with a spread of 1: the step with the least mean square
# error, and that error. The values that J. Max computes in "Quantizing for Minimum Distortion"
# (1960); tests/test_rounding.py integrates them.
STEP = {0: 1.0, 1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 6: 0.1041, 8: 0.0308}
ERROR = {0: 1.0, 1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 6: 0.001040, 8: 0.0000877}


class Rounding:
    """Projections U, and of what is turned by them the means and spreads.

    p: Projection, whose mean_v the values are turned around; mean_k (L, K, d) likewise; spread
    (2, L, K, d), keys and values, in turned coordinates.
    """

    def __init__(self, p: Projection, mean_k: Tensor, spread: Tensor):
        L, K, d = p.mean_v.shape
        found = tuple(mean_k.shape), tuple(spread.shape)
        if found != ((L, K, d), (2, L, K, d)):
            raise ValueError(f"mean_k and spread of shapes {found}; expected (L, K, d) and "
                             f"(2, L, K, d) with (L, K, d) = {(L, K, d)}")
        self.p = p
        self.U = p.U_k, p.U_v
        self.mean = mean_k, p.mean_v
        self.spread = spread

    def at(self, bits: Tensor):
        """The hook `project=` that simulates a plan: (layer, k, v) -> (k̂, v̂), of the same shapes.

        bits is (2, L, K, 8), or (2, L, B, K, 8), where every sequence has a plan of its own.
        """
        check_bits(bits, self.p)

        def project(layer: int, k: Tensor, v: Tensor):
            k_hat = self.rounded(0, layer, k, bits[0, layer])
            v_hat = self.rounded(1, layer, v, bits[1, layer])
            return k_hat, v_hat

        return project

    def rounded(self, side: int, layer: int, x: Tensor, bits: Tensor) -> Tensor:
        """x̂ of keys or values (B, K, T, d), by the equations above."""
        U = self.U[side][layer]
        mean = self.mean[side][layer][:, None]                      # (K, 1, d)
        step, top = self.grid(side, layer, bits)
        coordinates = (x.to(U) - mean) @ U
        exact = coordinates[:, :, :EXACT].bfloat16()
        code = to_code(coordinates[:, :, EXACT:], step, top)
        coordinates = torch.cat((exact.to(U), (code - top) * step), dim=2)
        x_hat = coordinates @ U.mT + mean
        return x_hat.to(x)

    def grid(self, side: int, layer: int, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Δ and top (…, K, 1, d) of a layer's keys or values at bits (…, K, 8) of its blocks."""
        return grid(bits, self.spread[side, layer])

    def tensors(self) -> dict[str, Tensor]:
        return self.p.tensors() | {"mean_k": self.mean[0], "spread": self.spread}

    @staticmethod
    def of(tensors: dict) -> "Rounding":
        return Rounding(Projection.of(tensors), tensors["mean_k"], tensors["spread"])

    def to(self, device, dtype=None) -> "Rounding":
        return Rounding.of({name: x.to(device, dtype) for name, x in self.tensors().items()})

    def save(self, path: Path) -> None:
        common.write_tensors(path, self.tensors())

    @staticmethod
    def load(path: Path) -> "Rounding":
        """Read what `save` wrote. ValueError names the file."""
        tensors = common.read_tensors(path)
        try:
            return Rounding.of(tensors)
        except KeyError as missing:
            raise ValueError(f"{path}: no tensor {missing}; did bits.py write it?") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def grid(bits: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Δ and top, (…, K, 1, d), for bits (…, K, 8) of blocks of coordinates with spread (K, d)."""
    d = spread.shape[-1]
    bits = bits.to(spread.device).repeat_interleave(d // LEVELS, -1)
    steps = [STEP.get(b, 0.0) for b in range(max(BITS) + 1)]
    steps = torch.tensor(steps).to(spread)
    step = steps[bits] * spread                                     # (…, K, d)
    top = (2.0 ** bits.to(spread) - 1) / 2
    return step[..., None, :], top[..., None, :]


def to_code(x: Tensor, step: Tensor, top: Tensor) -> Tensor:
    """Codes of coordinates x (…, T, d): whole numbers from 0 to 2 · top."""
    code = RoundThrough.apply(x / step + top)
    code = code.clamp(torch.zeros_like(top), 2 * top)
    return code * (top > 0)             # at 0 bits x̂ is constant, and passes no gradient either


class RoundThrough(torch.autograd.Function):
    """x rounded, with the gradient of x itself: straight through, as rounding has none of its own.

    The clamp behind it has: beyond the last code nothing is passed on.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


# ------------------------------------------------------------------------------
# Plans of bits

def check_bits(bits: Tensor, p: Projection) -> None:
    """ValueError unless bits is (2, L, K, 8) or (2, L, B, K, 8), integers out of BITS."""
    L, K, d = p.mean_v.shape
    outer, inner = tuple(bits.shape[:2]), tuple(bits.shape[-2:])
    if bits.ndim not in (4, 5) or outer + inner != (2, L, K, LEVELS) or d % LEVELS:
        raise ValueError(f"bits of shape {list(bits.shape)}; expected (2, L, K, {LEVELS}) with "
                         f"(L, K) = {(L, K)}, and head_dim {d} in {LEVELS} blocks")
    if strange := set(bits.unique().tolist()) - set(BITS):
        raise ValueError(f"{min(strange)} bits: not one of {BITS}")


def same_bits(bits: int, config) -> Tensor:
    L, K, _ = shape_of(config)
    return torch.full((2, L, K, LEVELS), bits)


def bits_at(path: Tensor, config, budget: float) -> Tensor:
    """The largest plan (2, L, K, 8) within the budget: a prefix of the path.

    path (n, 2): the place of a block in the flattened plan, and its bits from then on. ValueError
    if it ends above the budget.
    """
    plan = same_bits(max(BITS), config)
    place, after = path.T
    next_more = dict(zip(BITS, BITS[1:], strict=False))
    saved = torch.tensor([next_more[b] - b for b in after.tolist()])
    left = plan.sum() - saved.cumsum(0)
    most = budget * WHOLE * plan.numel() + 1e-6
    taken = 0
    if plan.sum() > most:
        taken = int((left > most).sum()) + 1
    if taken > len(path):
        end = left[-1] / plan.numel() / WHOLE
        raise ValueError(f"a path that ends at {end:.1%}, above the budget of {budget:.1%}")
    flat = plan.view(-1).scatter_reduce(0, place[:taken], after[:taken], "amin")
    return flat.view_as(plan)


def path_to_rows(path: Tensor, config) -> list:
    """A path as a file has it: [side, layer, head, block, bits after it]."""
    L, K, _ = shape_of(config)
    rows = []
    for place, after in path.tolist():
        head, block = divmod(place, LEVELS)
        layer, head = divmod(head, K)
        side, layer = divmod(layer, L)
        rows.append([SIDES[side], layer, head, block, after])
    return rows


def path_of_rows(rows: list, config) -> Tensor:
    """The same, read. ValueError unless each row takes a block to the next fewer bits."""
    L, K, _ = shape_of(config)
    now = {}
    path = []
    try:
        for side, layer, head, block, after in rows:
            row = SIDES.index(side) * L + range(L).index(layer)
            row = row * K + range(K).index(head)
            place = row * LEVELS + range(LEVELS).index(block)
            before = now.get(place, max(BITS))
            if after != BITS[BITS.index(before) - 1] or before == 0:
                raise ValueError(f"{before} bits followed by {after}")
            now[place] = after
            path.append((place, after))
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a path of bits for this model ({error})") from None
    return torch.tensor(path).view(-1, 2)
