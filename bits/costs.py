"""What a coordinate costs in so many bits: its steps, and the path of lowerings.

A coordinate in few bits is noisy, and smaller than it was: x̂ = (1 − ρ) x + n, with noise n of no
correlation to x; at 0 bits ρ is 1. The KL of a window of T tokens s is to second order
½ E[(Σ_s g_s (x̂_s − x_s))²], g the gradient of log p(y), y drawn from the model (find_order,
search.py). Noise knows nothing of other tokens' noise, and its squares add up; −ρ x is what a rank
cuts off, and is squared when it has been summed. Per token a coordinate costs

    ½ (E[g²] E[n²] + ρ² E[(Σ_s g_s x_s)²] / T)

where g and x come from a sweep of backward passes for U as it is (what_is_asked), ρ and n from
rounding a few of its windows (shrink_and_noise). All tokens are taken to be codes for all queries.
Keys have far outliers: for each number of bits a coordinate gets the cheapest of a few multiples of
the Δ that is best for a normal distribution (first_steps). A block costs its coordinates' noise,
and their mean ρ² times what cutting all of them would (block_costs). Bits are taken from blocks
where they cost least (find_path).
"""
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from bits.rounding import BITS, NORMAL, Rounding, on_grid, water_filling
from model import Model
from projection import LEVELS, Moments, Projection, shape_of
from search import DRAWS, Windows, sweep
from support import processes
from support.progress import Progress

FACTORS = 1.0, 1.2, 1.5, 2.0, 2.8, 4.0      # multiples of NORMAL that are tried
TRIED = 8                                   # windows that are rounded


class Asked(NamedTuple):
    """What a sweep says, (2, L, K, …) float64; all but `varies` along the columns of U."""
    varies: Tensor                      # (…, d, d): E[xᵀx] of keys and values without their means
    gradient: Tensor                    # (…, d): Σ g² / T
    cut: Tensor                         # (…, d): E[(Σ_s g_s x_s)²] / T
    cut_of_block: Tensor                # (…, 8): the same of Σ_c over a block


@torch.no_grad()
def what_is_asked(model: Model, windows: Windows, p: Projection) -> Asked:
    """A sweep for U as it is."""
    moments = Moments(model.config, model.device)
    L, K, d = shape_of(model.config)
    gradient = torch.zeros(2, L, K, d, dtype=torch.float64, device=model.device)
    cut, cut_of_block = torch.zeros_like(gradient), torch.zeros_like(gradient[..., :LEVELS])
    U = p.U_k, p.U_v
    for draw, side, layer, g, x in sweep(model, windows, p.mean_k, p.mean_v, p.whole, "sweep"):
        if draw == 0:
            moments.add(side, layer, x)
        U_l = U[side][layer].to(g)
        g = g @ U_l                                                 # (B, K, T, d)
        A = (g * (x.to(g) @ U_l)).sum(2).double()                   # (B, K, d)
        gradient[side, layer] += g.double().square().sum((0, 2))
        cut[side, layer] += A.square().sum(0)
        cut_of_block[side, layer] += A.unflatten(-1, (LEVELS, -1)).sum(-1).square().sum(0)
    n = windows.text.numel() * DRAWS
    sums = (processes.sum_over(total) / n for total in (gradient, cut, cut_of_block))
    return Asked(moments.sum_over_processes().second(), *sums)


@torch.no_grad()
def shrink_and_noise(model: Model, windows: Windows, p: Projection, steps: Tensor, what: str):
    """ρ and E[n²], (tries, 2, L, K, d, 7) float64 each, of several steps, of the same shape."""
    count = torch.zeros(1, dtype=torch.float64)
    by_x, square = torch.zeros(2, *steps.shape, dtype=torch.float64, device=model.device)
    tops = [torch.full((steps.shape[-2],), (2 ** b - 1) / 2).to(steps) for b in BITS]
    of_x = torch.zeros_like(by_x[0, ..., 0])

    def observe(layer: int, _, k: Tensor, v: Tensor, turn) -> None:
        k = turn(k - p.mean_k[layer][:, None].to(k))
        v = v - p.mean_v[layer][:, None].to(v)
        count.add_(k[:, 0, p.whole:, 0].numel() / model.config.num_hidden_layers)
        # At 8 bits noise is a small difference of sums: these in float64, products not in bfloat16.
        with torch.autocast(k.device.type, enabled=False):
            for side, (x, U) in enumerate(((k, p.U_k), (v, p.U_v))):
                measure(side, layer, x[:, :, p.whole:].to(U) @ U[layer])

    def measure(side: int, layer: int, x: Tensor) -> None:          # (B, K, T, d)
        of_x[side, layer] += x.double().square().sum((0, 2))
        for i, of_try in enumerate(steps[:, side, layer, :, None]):         # (K, 1, d, 7)
            for b, (step, top) in enumerate(zip(of_try.unbind(-1), tops, strict=True)):
                x_hat = on_grid(x, step, top).double()
                by_x[i, side, layer, ..., b] += (x * x_hat).sum((0, 2))
                square[i, side, layer, ..., b] += x_hat.square().sum((0, 2))

    enough = min(math.ceil(TRIED / windows.batch / processes.WORLD), len(windows))
    progress = Progress(enough, what)
    for number, batch in enumerate(itertools.islice(windows, enough), 1):
        windows.states(model, batch, observe=observe)
        progress(number, "", windows.text[batch].numel())
    count, by_x, square, of_x = (processes.sum_over(x) for x in (count, by_x, square, of_x))
    of_x = of_x[..., None].clamp(min=1e-30)
    kept = by_x / of_x                                              # 1 − ρ
    return 1 - kept, (square - kept * by_x) / count.to(model.device)


def first_steps(model: Model, windows: Windows, p: Projection, asked: Asked) -> Tensor:
    """The cheapest of FACTORS for each coordinate and number of bits: steps (2, L, K, d, 7)."""
    normal = deviations(p, asked.varies)[..., None] * torch.tensor(NORMAL).to(p.mean_v)
    tries = torch.stack([factor * normal for factor in FACTORS])
    shrink, noise = shrink_and_noise(model, windows, p, tries, "trying steps")
    costs = asked.gradient[..., None] * noise + asked.cut[..., None] * shrink ** 2
    return tries.gather(0, costs.argmin(0, keepdim=True))[0]


def deviations(p: Projection, varies: Tensor) -> Tensor:
    """√E[x²] (2, L, K, d) along the columns of U, of E[xᵀx] (2, L, K, d, d)."""
    U = torch.stack((p.U_k, p.U_v))
    return (U * (varies.to(U) @ U)).sum(-2).clamp(min=1e-12).sqrt()


def block_costs(asked: Asked, shrink: Tensor, noise: Tensor) -> Tensor:
    """What blocks cost at each of BITS, (2, L, K, 8, 7): noise of coordinates, and a common ρ²."""
    def of_block(by_column: Tensor) -> Tensor:
        return by_column.unflatten(3, (LEVELS, -1)).sum(4)

    cut = asked.cut[..., None]
    common = of_block(cut * shrink ** 2) / of_block(cut).clamp(min=1e-30)
    of_noise = of_block(asked.gradient[..., None] * noise)
    return (of_noise + asked.cut_of_block[..., None] * common).cpu() / 2


@torch.no_grad()
def find_path(model: Model, windows: Windows, rounding: Rounding, asked: Asked) -> Tensor:
    """Lowerings (n, 2): the place of a block in the flattened (2, L, K, 8), and its bits after."""
    found = shrink_and_noise(model, windows, rounding.p, rounding.steps[None], "measuring errors")
    return water_filling(block_costs(asked, *(x[0] for x in found)))
