"""Search the ranks: which heads may be narrow, and which must stay wide.

MatryoshkaKV (arXiv 2410.14731), section 3.3 and Algorithm 1. A rank is how many of d
coordinates a head keeps, of keys or of values. A uniform rank wastes the cache, since heads differ
in what they can spare. Algorithm 1 starts with every rank at d. Each round it tries to lower each
rank, alone, by d/8, measures the KL on a calibration text, and keeps the one that costs least:

    repeat   h* = argmin_h KL(p_model ‖ p(ranks with rank h lowered by d/8)),   lower h*

A round takes a pass for each of up to 2·L·K candidates. The order goes down to 12.5%: every rank
keeps d/8, since a head without keys would attend blindly. The plan for any larger budget is made by
a prefix of it; a file's "path" is the order with its KLs.

    python search.py --exact                # Algorithm 1 as it is: `exact`

That is 11,000 passes for a model of 6 layers, and tens of millions for one of 7B. Not in the paper
are three ways to an order with fewer, below it in this file:

    `lazy`          Algorithm 1 that measures few candidates again
    `find_order`    4LK passes: what each rank costs alone, and second moments (train.py's order)
    `along`         none: projections trained along an order take that one

    python search.py                        # out/projections.safetensors -> out/ranks.json, .png
    python search.py --pca                  # for plain PCA -> out/ranks_pca.json, .png
"""
import heapq
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from evaluate import describe, hooks_of, measure, report
from model import Model, load, log_probabilities, wide
from projection import (
    BUDGETS,
    LEVELS,
    SIDES,
    Moments,
    Projection,
    output_weights,
    plan_at,
    readers,
    shape_of,
    uniform_ranks,
)
from support import cli, files, processes
from support.data import random_windows, text_for
from support.pictures import draw_plan
from support.plans import PROJECTIONS, order_of, trained_order
from support.progress import Progress

# ------------------------------------------------------------------------------
# What a plan costs

class Cost:
    """The current plan `ranks`; KL(p_model ‖ p_plan) of it and of other plans on a text (B, T).

    A candidate is (side, layer, head): a rank that could lose an eighth of d. Lowering a rank of
    layer l leaves the layers before it untouched: each layer's input under the current plan is
    kept, and a candidate runs layers from l on. A lowering may cost less than bfloat16's rounding,
    so states and logits are float32 or wider over whatever weights.
    """

    def __init__(self, model: Model, projection: Projection, tokens: Tensor):
        L, K, d = projection.mean_v.shape
        self.model, self.projection = model, projection
        self.eighth = d // LEVELS
        self.ranks = torch.full((2, L, K), d)
        self.passes = self.layer_passes = 0
        x = model.embed_tokens(tokens)
        self.inputs = [x.to(wide(x.dtype))]                         # of each layer, at `ranks`
        _, teacher = self.run_layers(self.ranks, 0)                 # the full plan is the model
        chunks = [log_p for _, log_p in log_probabilities(model, teacher)]
        self.teacher = torch.cat(chunks)                            # (B·T, vocab)
        self.kl, self.inputs = self.measure(self.ranks, 0)
        self.full_kl = self.kl
        self.tried = None               # the last candidate, its plan, KL and layers' inputs

    def candidates(self) -> list[tuple[int, int, int]]:
        """Every rank that can still be lowered."""
        return [tuple(place) for place in (self.ranks > self.eighth).nonzero().tolist()]

    def if_lowered(self, candidate: tuple[int, int, int], eighths: int = 1) -> float:
        """The KL if this rank alone were lowered."""
        ranks = self.ranks.clone()
        ranks[candidate] -= eighths * self.eighth
        kl, inputs = self.measure(ranks, first=candidate[1])
        self.tried = candidate, ranks, kl, inputs
        return kl

    def lower(self, candidate: tuple[int, int, int]) -> None:
        """Lower this rank in the current plan."""
        if self.tried is None or self.tried[0] != candidate:
            self.if_lowered(candidate)
        _, self.ranks, self.kl, self.inputs = self.tried
        self.tried = None

    def measure(self, ranks: Tensor, first: int):
        """KL, and layers' inputs, of a plan that is the current one in layers before `first`."""
        inputs, student = self.run_layers(ranks, first)
        total = 0.0
        for rows, log_q in log_probabilities(self.model, student):
            log_p = self.teacher[rows]
            kl = log_p.exp() * (log_p - log_q)
            total += kl.sum().item()
        return total / len(self.teacher), inputs

    def run_layers(self, ranks: Tensor, first: int):
        """Layers' inputs, and the normed states (B·T, hidden), with `first` as in `measure`."""
        model, project = self.model, self.projection.at(ranks)
        inputs, x = self.inputs[:first], self.inputs[first]
        cos_sin = model.rope.rows(0, x.shape[1], x.dtype, x.device)
        for i in range(first, len(model.layers)):
            inputs.append(x)
            x = model.layer(i, x, cos_sin, project)
        self.passes += 1
        self.layer_passes += len(inputs) - first
        return inputs, model.norm(x).flatten(0, 1)


# ------------------------------------------------------------------------------
# Algorithm 1. Like what stands in its place below, it yields the candidate that it has just lowered

def exact(cost: Cost):
    """Algorithm 1: every candidate is measured in every round."""
    while candidates := cost.candidates():
        best = min(candidates, key=cost.if_lowered)
        cost.lower(best)
        yield best


# ------------------------------------------------------------------------------
# Not in the paper: Algorithm 1 in a small share of its passes. On the demo 762 in place of 13,523,
# for a KL of .097 in place of .101 at 50%, .441 in place of .440 at 25% (docs/results.md).

NEARLY = 0.4        # how far above the least an increase may be, as a share of it
GROWTH = 1.5        # what the next eighth of a rank is taken to cost, by what the last one did


def lazy(cost: Cost):
    """Lazy greedy: what a candidate adds to the KL hardly changes when another rank is lowered.

    So all wait in a heap, keyed by what they added when last measured; only the top is measured
    again, and lowered if it is still the least, or nearly so.
    """
    noise = rounding_noise(cost)
    heap = [(increase(cost, candidate, noise), candidate) for candidate in cost.candidates()]
    heapq.heapify(heap)
    while heap:
        _, candidate = heapq.heappop(heap)
        key = increase(cost, candidate, noise)
        least = heap[0][0][0] if heap else key[0]
        if key[0] > least + NEARLY * least:             # no longer the cheapest: back to the others
            heapq.heappush(heap, (key, candidate))
            continue
        cost.lower(candidate)
        if cost.ranks[candidate] > cost.eighth:
            next_step = GROWTH * key[0], key[1]
            heapq.heappush(heap, (next_step, candidate))
        yield candidate


def increase(cost: Cost, candidate: tuple[int, int, int], noise: float) -> tuple[float, float]:
    """What lowering a rank adds to the KL, at least the noise; and what orders those below it.

    That is the increase per eighth of a deeper cut, over as few eighths as rise above the noise:
    columns are sorted, so a deeper cut loses more.
    """
    added = cost.if_lowered(candidate) - cost.kl
    if added > noise:
        return added, 0.0
    lowered = cost.tried
    for eighths in range(2, int(cost.ranks[candidate]) // cost.eighth):
        added = cost.if_lowered(candidate, eighths) - cost.kl
        if added > noise:
            break
    else:
        eighths = LEVELS                    # it costs nothing, however low: before the others
    cost.tried = lowered
    return noise, added / eighths


def rounding_noise(cost: Cost) -> float:
    """What the KL moves by when a coordinate of each embedding does, by ± one last place.

    That is the place to which products round their inputs: TF32's where it is allowed.
    """
    x = cost.inputs[0]
    tf32 = torch.backends.cuda.matmul.allow_tf32
    unit = 2 ** -10 if tf32 else torch.finfo(x.dtype).eps
    moved = []
    for sign in (1, -1):
        cost.inputs[0] = x.clone()
        cost.inputs[0][..., 0] *= 1 + sign * unit
        kl, _ = cost.measure(cost.ranks, 0)
        moved.append(abs(kl - cost.kl))
    cost.inputs[0] = x
    return max(moved)


# ------------------------------------------------------------------------------
# Not in the paper: an order before anything is trained, by reverse water-filling, for train.py to
# draw its ranks along. On the demo the KL is then .079 at 50% and .326 at 25%, where
# training for one rank everywhere has .140 and .560 (docs/results.md).

MEASURED = 2, 6         # levels


@torch.no_grad()
def find_order(model: Model, p: Projection, moments: Moments, tokens, batch: int, seq: int):
    """An order (n,) of lowerings, places in the flattened (2, L, K), down to level 1 everywhere.

    The model is asked 4LK times, what each rank costs alone, cut to two levels; between and beyond
    them the cost follows from second moments. Projected keys make a head's scores wrong, values its
    output:

        error  = Σ E[xᵢxⱼ] E[yᵢyⱼ]      over pairs of the columns that are cut off
        KL     = c · error^p            c and p from the two levels measured, p near 1

    where x are the coordinates of what is cached, and y of who reads it: queries, or rows of W_o.
    Then the cheapest next eighth is taken, again and again: water-filling, which gives bits to
    Gaussians by their variance, read backwards.
    """
    full = uniform_ranks(1.0, model.config)
    eighth = model.config.head_dim // LEVELS
    plans = alone(full, [level * eighth for level in MEASURED])
    kl = kl_of_each(model, map(p.at, plans), tokens, batch, seq)
    error = errors(moments, p, output_weights(model))
    error = error.flatten(0, 2).cpu()                               # (2LK, 9)
    costs = costs_of(error, kl.view(-1, 2))
    steps = costs[:, 1:-1] - costs[:, 2:]                           # to levels 1, …, 7
    return cheapest_first(steps.flip(-1))


def alone(full: Tensor, values) -> list[Tensor]:
    """Plans like `full` but for one place, which has one of `values`: place by place."""
    plans = []
    for place in range(full.numel()):
        for value in values:
            plan = full.clone()
            plan.view(-1)[place] = value
            plans.append(plan)
    return plans


def kl_of_each(model: Model, hooks, tokens, batch: int, seq: int) -> Tensor:
    """The KL of each hook `project=` over four windows of training text: (n,) float64."""
    _, results = measure(model, tokens, dict(enumerate(hooks)), batch, seq, limit=4)
    kl = torch.tensor([result["kl"] for result in results.values()], dtype=torch.float64)
    return processes.sum_over(kl)                       # so that all have the same order


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
    read = torch.stack((moments.qq, readers(moments, W_o)))
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


# ------------------------------------------------------------------------------
# Not in the paper: no search at all for projections that were trained along an order. Searching
# behind the training loses, .081 for .079 at 50%, .335 for .326 at 25% (docs/results.md).

def along(cost: Cost, order: Tensor):
    """The order that the projections were trained along; where it was cut short, `lazy` goes on."""
    places = torch.unravel_index(order, cost.ranks.shape)
    for candidate in zip(*(of_axis.tolist() for of_axis in places), strict=True):
        cost.lower(candidate)
        yield candidate
    if cost.candidates():
        yield from lazy(cost)


# ------------------------------------------------------------------------------
# The script

def save(path: list, cost: Cost, config, budget: float, file: Path) -> None:
    """Write `path`, rows of [side, layer, head, KL after it], and the plan at `budget`."""
    evaluations = cost.passes
    ranks = plan_at(order_of(path, config), config, budget)
    full = ranks.numel() * config.head_dim
    taken = (full - int(ranks.sum())) // cost.eighth
    uniform_kl, _ = cost.measure(uniform_ranks(budget, config), 0)
    files.write_json(file, {
        "head_dim": config.head_dim,
        "budget": int(ranks.sum()) / full,
        "keys": ranks[0].tolist(),
        "values": ranks[1].tolist(),
        "kl": path[taken - 1][3] if taken else cost.full_kl,
        "uniform_kl": uniform_kl,
        "evaluations": evaluations,
        "path": path,
        "projections": cost.projection.hash(),
    })


def options():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.report_arguments(parser, batch=4, windows=32)
    cli.out_argument(parser, "the folder of --proj")
    add = parser.add_argument
    add("--proj", type=Path, default=Path("out", PROJECTIONS), help=f"[out/{PROJECTIONS}]")
    add("--budget", type=cli.within(0.125, 1.0), default=0.375,
        help="of the plan spelled out in the file, whose path always goes to 12.5%% [0.375]")
    add("--exact", action="store_true", help="Algorithm 1 as it is")
    add("--lazy", action="store_true", help="search, also if --proj was trained along an order")
    add("--pca", action="store_true", help="search for the plain PCA that is in --proj")
    args = parser.parse_args()
    args.out = args.out or args.proj.parent
    return args


@torch.no_grad()
def main():
    args = options()
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    files.check_folder(args.out)
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    config, order = model.config, None
    with cli.blame("--proj"):
        projection = Projection.load(args.proj, "pca_" if args.pca else "")
        projection.check_fits(config)
        projection = projection.to(device)
        if not (args.exact or args.lazy or args.pca):
            order = trained_order(args.proj, config)
    print(describe(args.ckpt, model))
    tokens, held_out = text_for(args, config)

    L, K, d = shape_of(config)
    heads = 2 * L * K
    rounds = heads * (LEVELS - 1)
    generator = torch.Generator().manual_seed(args.seed)
    text = random_windows(tokens, args.batch, args.seq, generator)
    cost = Cost(model, projection, text[:, :-1].to(device))
    if not cost.kl < 1e3:
        cli.fail(f"--ckpt: {args.ckpt}: the KL is {cost.kl}; are the weights whole?")
    print(f"{heads} ranks to lower in {rounds} rounds on {args.batch * args.seq:,} tokens")
    search = exact if args.exact else lazy
    if order is not None:
        print("The path is the order that these projections were trained along")
        search = partial(along, order=order)
    uniform = partial(uniform_ranks, config=config)
    budgets = [level / LEVELS for level in range(LEVELS - 1, 0, -1)]
    uniform_kl = {budget: cost.measure(uniform(budget), 0)[0] for budget in budgets}

    path, began = [], time.time()
    cost.passes = cost.layer_passes = 0
    file = args.out / ("ranks_pca.json" if args.pca else "ranks.json")
    progress = Progress(rounds, "lowering")
    reached = 1.0
    try:
        for side, layer, head in search(cost):
            path.append([SIDES[side], layer, head, cost.kl])
            reached = 1 - len(path) / (heads * LEVELS)
            progress(len(path), f"budget {reached:6.1%}  KL {cost.kl:.5f}  {cost.passes:,} passes")
    except KeyboardInterrupt:
        if not path:
            cli.fail("Stopped; nothing was saved", code=130)
    with cli.blame("--out"):
        save(path, cost, config, max(args.budget, reached), file)
    if len(path) < rounds:
        cli.fail(f"Stopped; {file} holds the path down to {reached:.1%}", code=130)
    print(f"{cost.passes:,} passes, {cost.layer_passes:,} layer evaluations, "
          f"{time.time() - began:.0f} s")

    plan = partial(plan_at, order_of(path, config), config)
    names = ("pca", "pca_searched") if args.pca else ("uniform", "searched")
    curves = {name: (projection, p) for name, p in zip(names, (uniform, plan), strict=True)}
    report(model, held_out, hooks_of(curves), [b for b in BUDGETS if b <= 0.75], args)
    picture = file.with_suffix(".png")
    with cli.blame("--out"):
        reached = [1 - (n + 1) / (heads * LEVELS) for n in range(len(path))]
        draw_plan(plan(args.budget), d, {"searched": (reached, [kl for *_, kl in path]),
                                         "uniform": (uniform_kl, uniform_kl.values())}, picture)
    print(f"Saved {file} and {picture}")


if __name__ == "__main__":
    cli.run_script(main)
