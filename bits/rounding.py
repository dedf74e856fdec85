"""Bits in place of ranks: each coordinate of the cache rounded to as few bits as it deserves.

Beyond the paper. A rank keeps a coordinate in 16 bits or not at all; between the two lies rounding.
Keys lose their turned mean, values their mean, and both go through U (projection.py has all of
these): x = R_n (k − m) U, with k before RoPE at position n, and x = (v − μ) U. Coordinate j becomes
one of 2^b codes:

    code = round(x / Δ + top), clamped to 0 … 2^b − 1        top = (2^b − 1) / 2
    x̂    = (code − top) Δ

and k̂ = x̂ Uᵀ + R_n m, v̂ = x̂ Uᵀ + μ. The values x̂ lie evenly around zero, which is none of them (a
mid-rise quantiser); but at 0 bits x̂ is zero. Each coordinate has a step Δ of its own for each
number of bits. Steps belong to the model, not to a token: they cost no bytes. Coordinates come in
blocks of d/8, and all of a block have the same bits. A plan of bits is (2, L, K, 8), one of BITS
for each block; its mean / 16 is its budget, the share of a 16-bit cache.

The first tokens of a sequence are never rounded: they are whole, as for ranks. In groups of 32 from
token 0 on, as in KIVI (arXiv 2402.02750), all others become codes, once their group is complete. A
token sees its own group, 1 to 32 tokens up to itself, as it is, and of the groups before it the
codes. What is held as it is comes on top of a budget, whatever the length.

A path lists lowerings, each of one block to its next fewer bits. It starts at 8 bits everywhere, a
budget of 50%; a prefix makes a plan.
"""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import causal_attention
from projection import LEVELS, SIDES, Projection, shape_of
from search import cheapest_first
from support import files

BITS = (0, 1, 2, 3, 4, 6, 8)
GROUP = 32              # tokens that become codes together
FULL = 16               # bits of a number that is not rounded

# For each of BITS the step with the least mean square error for a normal distribution with a
# deviation of 1, as J. Max computes it in "Quantizing for Minimum Distortion" (1960);
# tests/test_rounding.py integrates. At 0 bits any will do: unrounded tokens / Δ meet q · Δ.
NORMAL = (1.0, 1.596, 0.9957, 0.5860, 0.3352, 0.1041, 0.0308)


class Rounding:
    """Projections, with a mean of the keys, and steps (2, L, K, d, 7): Δ for each of BITS."""

    def __init__(self, p: Projection, steps: Tensor):
        shape = 2, *p.mean_v.shape, len(BITS)
        if p.mean_k is None:
            raise ValueError("no tensor mean_k")
        if tuple(steps.shape) != shape:
            raise ValueError(f"steps of shape {list(steps.shape)}; expected {list(shape)}")
        if not (steps.isfinite() & (steps > 0)).all():
            raise ValueError("steps that are no positive numbers")
        self.p = p
        self.U = p.U_k, p.U_v
        self.steps = steps

    def at(self, bits: Tensor):
        """The hook `project=` that simulates a plan, with an attention of its own.

        bits is (2, L, K, 8), or (2, L, B, K, 8), where every sequence has a plan of its own.
        """
        check_bits(bits, self.p)

        p = self.p

        def round_both(layer: int, k: Tensor, v: Tensor, turn):
            m = p.mean_k[layer][:, None].to(k)                      # (K, 1, d)
            k_hat = self.rounded(0, layer, turn(k - m), bits[0, layer])
            k_hat = k_hat + turn(m.expand(k.shape[1:]))
            mean = p.mean_v[layer][:, None].to(v)
            v_hat = self.rounded(1, layer, v - mean, bits[1, layer]) + mean
            return p.with_whole(turn(k), k_hat), p.with_whole(v, v_hat)

        return NewestExact(round_both)

    def rounded(self, side: int, layer: int, x: Tensor, bits: Tensor) -> Tensor:
        """Keys or values (B, K, T, d) without their mean, at bits (…, K, 8) of their blocks."""
        U = self.U[side][layer]
        x_hat = on_grid(x.to(U) @ U, *self.grid(side, layer, bits))
        return (x_hat @ U.mT).to(x)

    def grid(self, side: int, layer: int, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Δ and top (…, K, 1, d) of a layer's keys or values at bits (…, K, 8) of its blocks."""
        return grid(bits, self.steps[side, layer])

    def to(self, device, dtype=None) -> "Rounding":
        return Rounding(self.p.to(device, dtype), self.steps.to(device, dtype))

    def hash(self) -> str:
        """What bits.json says it was made for."""
        return files.hash_of(*self.p.tensors().values(), self.steps, text=str(self.p.whole))

    def save(self, path: Path) -> None:
        """Write a safetensors file: projections as train.py writes them, and the steps."""
        self.p.save(path, beside={"steps": self.steps})

    @staticmethod
    def load(path: Path) -> "Rounding":
        """Read what `save` wrote. ValueError names the file."""
        p, tensors = Projection.load(path), files.read_tensors(path)
        try:
            return Rounding(p, tensors["steps"].float())
        except KeyError as missing:
            raise ValueError(f"{path}: no tensor {missing}; did bits.train write it?") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}; did bits.train write it?") from None


class NewestExact:
    """A hook `project=`, (layer, k, v, turn) -> ((k̂, R k), (v̂, v)), pairs for its own attention.

    There a query sees the tokens of its own group as they are, those before as they are stored.
    """

    def __init__(self, stored):
        self.stored = stored

    def __call__(self, layer: int, k: Tensor, v: Tensor, turn):
        k_hat, v_hat = self.stored(layer, k, v, turn)
        return (k_hat, turn(k)), (v_hat, v)

    @staticmethod
    def attention(q: Tensor, keys: tuple, values: tuple, window: int | None) -> Tensor:
        """Causal attention to one's own group as it is, and to those before it as stored.

        q (B, H, T, d); keys k̂ and k, values v̂ and v, (B, K, T, d). Returns (B, H, T, d).
        """
        outputs = []
        for start in range(0, q.shape[2], GROUP):
            own = slice(start, start + GROUP)
            k, v = (torch.cat((stored[:, :, :start], as_is[:, :, own]), dim=2)
                    for stored, as_is in (keys, values))
            outputs.append(causal_attention(q[:, :, own], k, v, window))
        return torch.cat(outputs, dim=2)


def grid(bits: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Δ and top, (…, K, 1, d), for bits (…, K, 8) of blocks of coordinates with steps (K, d, 7)."""
    bits = bits.to(steps.device).repeat_interleave(steps.shape[-2] // LEVELS, -1)   # (…, K, d)
    which = torch.searchsorted(torch.tensor(BITS, device=bits.device), bits)
    step = steps.expand(*bits.shape, -1).gather(-1, which[..., None])[..., 0]
    top = (2.0 ** bits.to(steps) - 1) / 2
    return step[..., None, :], top[..., None, :]


def on_grid(x: Tensor, step: Tensor, top: Tensor) -> Tensor:
    """x̂ of coordinates x (…, T, d)."""
    return (to_code(x, step, top) - top) * step


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
    most = budget * FULL * plan.numel() + 1e-6
    taken = 0
    if plan.sum() > most:
        taken = int((left > most).sum()) + 1
    if taken > len(path):
        end = left[-1] / plan.numel() / FULL
        raise ValueError(f"a path that ends at {end:.1%}, above the budget of {budget:.1%}")
    flat = plan.view(-1).scatter_reduce(0, place[:taken], after[:taken], "amin")
    return flat.view_as(plan)


def water_filling(costs: Tensor) -> Tensor:
    """The path of blocks with costs (2, L, K, 8, 7) at each of BITS, the cheapest bit first."""
    per_bit = -costs.diff(dim=-1) / torch.tensor(BITS).diff()       # of lowerings to 0, …, 6
    place = cheapest_first(per_bit.flatten(0, -2).flip(-1))         # (places, 6), 8 first
    return torch.stack((place, after_each(place)), dim=1)


def after_each(place: Tensor) -> Tensor:
    """The bits that a block has after each lowering of a path."""
    now = [len(BITS) - 1] * (int(place.max()) + 1)
    after = []
    for block in place.tolist():
        now[block] -= 1
        after.append(BITS[now[block]])
    return torch.tensor(after)


def path_to_rows(path: Tensor, config) -> list:
    """A path as a file has it: [side, layer, head, block, bits after it]."""
    L, K, _ = shape_of(config)
    place, after = path.T
    places = torch.unravel_index(place, (2, L, K, LEVELS))
    rows = torch.stack((*places, after), dim=1)
    return [[SIDES[side], *rest] for side, *rest in rows.tolist()]


def path_of_rows(rows: list, config) -> Tensor:
    """The path (n, 2) in a file. ValueError for a row that is no block's next fewer bits."""
    L, K, _ = shape_of(config)
    now = {}
    path = []
    try:
        for side, *place, after in rows:
            if not all(type(number) is int for number in (*place, after)):
                raise ValueError(f"{place} and {after} are no whole numbers")
            where = SIDES.index(side), *place
            place = np.ravel_multi_index(where, (2, L, K, LEVELS))
            before = now.get(place, max(BITS))
            if after != BITS[BITS.index(before) - 1] or before == 0:
                raise ValueError(f"{before} bits followed by {after}")
            now[place] = after
            path.append((place, after))
        if not path:
            raise ValueError("it is empty")
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a path of bits for this model ({error})") from None
    return torch.tensor(np.array(path))
