"""An order of lowerings, found without a search: reverse water-filling.

Which rank should lose its next eighth? Algorithm 1 (search.py) asks the model every time. Here it
is asked 4LK times in all, what each rank costs alone, cut to two levels; between and beyond them
the cost follows from second moments. Projected keys make a head's scores wrong, values its output:

    error  = Σ E[xᵢxⱼ] E[yᵢyⱼ]      over pairs of the columns that are cut off
    KL     = c · error^p            c and p from the two levels measured, p near 1

where x are the coordinates of what is cached, and y of who reads it: queries, or rows of W_o. Then
the cheapest next eighth is taken, again and again: water-filling, which gives bits to Gaussians by
their variance, read backwards. train.py needs an order before anything is trained; this one does.

    python order.py         # plans of the demo model, untrained
"""
import torch
from torch import Tensor

import common
from data import data_arguments, text_for
from distance import measure
from model import Model, load
from projection import LEVELS, SIDES, Moments, Projection, calibrate, plan_at, uniform_ranks

MEASURED = 2, 6         # levels


def output_weights(model: Model) -> list[Tensor]:
    """W_o (hidden, H·d) of every layer, as stored."""
    return [layer.self_attn.o_proj.weight for layer in model.layers]


def errors(moments: Moments, p: Projection, W_o: list[Tensor]) -> Tensor:
    """How far off a head's scores, and outputs, are at levels 0 … 8: (2, L, K, 9).

    By the equation above, up to a factor for each head, and as if what is cached knew nothing of
    who reads it. float64.
    """
    pairs = pairs_of_columns(moments, p, W_o)
    by_level = []
    for level in range(LEVELS + 1):
        r = level * pairs.shape[-1] // LEVELS
        cut_off = pairs[..., r:, r:]
        by_level.append(cut_off.sum((-1, -2)))
    return torch.stack(by_level, dim=-1)


def pairs_of_columns(moments: Moments, p: Projection, W_o: list[Tensor]) -> Tensor:
    """E[xᵢxⱼ] E[yᵢyⱼ] for columns i and j: (2, L, K, d, d) float64.

    Up to a factor for each head, since y is summed: c, or a weight, takes it up.
    """
    cached = torch.stack(moments.covariances())                     # (2, L, K, d, d)
    read = torch.stack((moments.qq, moments.readers(W_o)))
    U = torch.stack((p.U_k, p.U_v)).double()
    x = U.mT @ cached @ U
    y = U.mT @ read @ U
    return x * y


def costs_of(error: Tensor, kl: Tensor) -> Tensor:
    """What each rank costs at levels 0 … 8, (2LK, 9), of its errors and its KL at two levels."""
    error = error.clamp(min=1e-30).log()
    kl = kl.clamp(min=1e-12).log()
    measured = error[:, MEASURED]
    power = kl.diff() / measured.diff()                             # (2LK, 1)
    power = power.nan_to_num(1).clamp(0.5, 2)                       # beyond that it is noise
    first_kl = kl[:, :1]
    first_error = measured[:, :1]
    costs = first_kl + power * (error - first_error)
    costs = costs.exp()
    costs[:, LEVELS] = 0                                            # nothing is cut off
    return costs


def cheapest_first(steps: Tensor) -> Tensor:
    """An order (n,) of places, from what each place's next steps cost, (places, steps)."""
    steps = steps.cummax(-1).values                     # a cheap one waits behind a dear one
    cheapest = steps.flatten().argsort(stable=True)
    return cheapest // steps.shape[1]


def kl_of_each(model: Model, plans: list, hook, tokens, args) -> Tensor:
    """The KL of `hook(plan)` for each plan, over four windows of training text: (n,) float64."""
    hooks = dict(enumerate(map(hook, plans)))
    _, results = measure(model, tokens, hooks, args.batch, args.seq, limit=4)
    kl = [result["kl"] for result in results.values()]
    kl = torch.tensor(kl, dtype=torch.float64)
    return common.sum_over_processes(kl)                # so that all have the same order


def alone(full: Tensor, values: tuple) -> list[Tensor]:
    """Plans like `full` but for one place, which has one of `values`: place by place."""
    plans = []
    for place in range(full.numel()):
        for value in values:
            plan = full.clone()
            plan.view(-1)[place] = value
            plans.append(plan)
    return plans


@torch.no_grad()
def find_order(model: Model, p: Projection, moments: Moments, tokens, args) -> Tensor:
    """An order (n,) of lowerings, places in the flattened (2, L, K), down to level 1 everywhere."""
    full = uniform_ranks(1.0, model.config)
    eighth = model.config.head_dim // LEVELS
    plans = alone(full, [level * eighth for level in MEASURED])
    kl = kl_of_each(model, plans, p.at, tokens, args)
    error = errors(moments, p, output_weights(model))
    error = error.flatten(0, 2).cpu()                               # (2LK, 9)
    costs = costs_of(error, kl.view(-1, 2))
    steps = costs[:, 1:-1] - costs[:, 2:]                           # to levels 1, …, 7
    return cheapest_first(steps.flip(-1))


# ------------------------------------------------------------------------------
# The script

def main():
    parser = common.arguments(__doc__)
    data_arguments(parser)
    args = parser.parse_args()
    args.batch = 8
    args.seq = 256
    device, dtype = common.prepare(args)
    with common.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    tokens, _ = text_for(args, model.config)
    moments = calibrate(model, tokens, args.batch, args.seq, args.seed)
    start = moments.query_aware(output_weights(model))
    start = start.to(device)
    order = find_order(model, start, moments, tokens, args)
    for budget in (0.75, 0.5, 0.25):
        ranks = plan_at(order, model.config, budget)
        print(f"\nThe plan at {budget:.0%}: ranks of the heads of each layer")
        for side, name in enumerate(SIDES):
            for i, of_layer in enumerate(ranks[side]):
                print(f"  {name:6s} layer {i:2d}  ", *of_layer.tolist())


if __name__ == "__main__":
    common.run_script(main)
