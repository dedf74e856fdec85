"""Search the ranks: which heads may be narrow, and which must stay wide.

MatryoshkaKV (arXiv 2410.14731), section 3.3 and Algorithm 1. A rank is how many of d
coordinates a head keeps, of keys or of values. A uniform rank wastes the cache, since heads differ
in what they can spare. Algorithm 1 starts with every rank at d. Each round it tries to lower each
rank, alone, by d/8, measures the KL on a calibration text, and keeps the one that costs least:

    repeat   h* = argmin_h KL(p_model ‖ p(ranks with rank h lowered by d/8)),   lower h*

A round takes a pass for each of up to 2·L·K candidates (`--exact`). The default finds nearly the
same order of lowerings with a small share of the passes, by two observations:

  lazy        What a candidate adds to the KL hardly changes when some other rank is lowered. So all
              candidates wait in a heap, keyed by the increase they had when last measured; only the
              one on top is measured again, and lowered if it is still the least, or nearly so.
  from l up   Lowering a rank of layer l leaves the layers before it untouched. Each layer's input
              under the current plan is kept; a candidate runs layers from l on (--exact too).

A lowering may cost less than rounding moves the KL. So states and logits are float32 or wider over
whatever weights; on a GPU, products over 2-byte weights are TF32. The noise that is left is
measured. Increases below it are ordered by those of a deeper cut, per eighth: columns are sorted,
so a deeper cut loses more, and its increase is not noise.

Projections that train.py trained along an order need no search: that order is the path, as on other
text it is better than what a search finds on 1,024 tokens afterwards (docs/results.md). Then only
its KLs are measured; `--lazy` searches all the same.

The order goes down to 12.5%: every rank keeps d/8, since a head without keys would attend blindly.
The plan for any larger budget is made by a prefix of it; a file's "path" is the order with its KLs.

    python search.py                        # out/projections.safetensors -> out/ranks.json, .png
    python search.py --budget 0.25 --exact  # Algorithm 1 as it is; --lazy: the search above
    python search.py --pca                  # for plain PCA -> out/ranks_pca.json, .png
"""
import heapq
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import common
from data import data_arguments, random_windows, text_for
from distance import log_probabilities, wide
from evaluate import describe, draw_plan, report, report_arguments
from model import Model, load
from plans import order_of
from projection import BUDGETS, LEVELS, SIDES, Projection, plan_at, shape_of, uniform_ranks

NEARLY = 0.4        # how far above the least an increase may be, as a share of it
GROWTH = 1.5        # what the next eighth of a rank is taken to cost, by what the last one did


# ------------------------------------------------------------------------------
# What a plan costs

class Cost:
    """The current plan `ranks`; KL(p_model ‖ p_plan) of it and of other plans on a text (B, T).

    A candidate is (side, layer, head): a rank that could lose an eighth of d.
    """

    def __init__(self, model: Model, projection: Projection, tokens: Tensor):
        L, K, d = projection.mean_v.shape
        self.model = model
        self.projection = projection
        self.eighth = d // LEVELS
        self.ranks = torch.full((2, L, K), d)
        self.passes = self.layer_passes = 0
        x = model.embed(tokens)
        self.norm = model.widened(model.norm, wide(x.dtype))
        self.inputs = [x.to(wide(x.dtype))]                         # of each layer, at `ranks`
        _, student = self.run(self.ranks, 0)                        # the full plan: the teacher
        chunks = [log_p for _, log_p in log_probabilities(model, student)]
        self.teacher = torch.cat(chunks)                            # (B·T, vocab)
        self.kl, self.inputs = self.measure(self.ranks, 0)
        self.full_kl = self.kl
        self.noise = self.measure_noise()
        self.tried = None               # the last candidate, its plan, KL and layers' inputs

    def run(self, ranks: Tensor, first: int):
        """Layers' inputs, and the normed states (B·T, hidden), with `first` as in `measure`."""
        project = self.projection.at(ranks)
        inputs, x = self.inputs[:first], self.inputs[first]
        for i in range(first, len(self.model.layers)):
            inputs.append(x)
            x = self.model.layer(i, x, project)
        self.passes += 1
        self.layer_passes += len(inputs) - first
        return inputs, self.norm(x).flatten(0, 1)

    def measure(self, ranks: Tensor, first: int):
        """KL, and layers' inputs, of a plan that is the current one in layers before `first`."""
        inputs, student = self.run(ranks, first)
        total = 0.0
        for rows, log_q in log_probabilities(self.model, student):
            log_p = self.teacher[rows]
            kl = log_p.exp() * (log_p - log_q)
            total += kl.sum().item()
        return total / len(self.teacher), inputs

    def measure_noise(self) -> float:
        """What the KL moves by when a coordinate of each embedding does, by ± one last place.

        That is the place to which products round their inputs: TF32's where it is allowed.
        """
        x = self.inputs[0]
        tf32 = torch.backends.cuda.matmul.allow_tf32
        unit = 2 ** -10 if tf32 else torch.finfo(x.dtype).eps
        moved = []
        for sign in (1, -1):
            self.inputs[0] = x.clone()
            self.inputs[0][..., 0] *= 1 + sign * unit
            kl, _ = self.measure(self.ranks, 0)
            moved.append(abs(kl - self.kl))
        self.inputs[0] = x
        return max(moved)

    def if_lowered(self, candidate: tuple[int, int, int], eighths: int = 1) -> float:
        """The KL if this rank alone were lowered."""
        ranks = self.ranks.clone()
        ranks[candidate] -= eighths * self.eighth
        kl, inputs = self.measure(ranks, first=candidate[1])
        self.tried = candidate, ranks, kl, inputs
        return kl

    def increase(self, candidate: tuple[int, int, int]) -> tuple[float, float]:
        """What lowering it adds to the KL, at least the noise; and what orders those below it.

        That is the increase per eighth, over as few eighths as rise above the noise.
        """
        increase = self.if_lowered(candidate) - self.kl
        if increase > self.noise:
            return increase, 0.0
        lowered = self.tried
        for eighths in range(2, int(self.ranks[candidate]) // self.eighth):
            increase = self.if_lowered(candidate, eighths) - self.kl
            if increase > self.noise:
                break
        else:
            eighths = LEVELS                    # it costs nothing, however low: before the others
        self.tried = lowered
        return self.noise, increase / eighths

    def lower(self, candidate: tuple[int, int, int]) -> None:
        """Lower this rank in the current plan."""
        if self.tried is None or self.tried[0] != candidate:
            self.if_lowered(candidate)
        _, self.ranks, self.kl, self.inputs = self.tried
        self.tried = None

    def candidates(self) -> list[tuple[int, int, int]]:
        """Every rank that can still be lowered."""
        return [tuple(place) for place in (self.ranks > self.eighth).nonzero().tolist()]


# ------------------------------------------------------------------------------
# The two searches, and none; each yields the candidate that it has just lowered

def exact(cost: Cost):
    """Algorithm 1: every candidate is measured in every round."""
    while candidates := cost.candidates():
        best = min(candidates, key=cost.if_lowered)
        cost.lower(best)
        yield best


def lazy(cost: Cost):
    """Lazy greedy: only the top is remeasured; one now cheaper than its key waits its turn."""
    heap = [(cost.increase(candidate), candidate) for candidate in cost.candidates()]
    heapq.heapify(heap)
    while heap:
        _, candidate = heapq.heappop(heap)
        key = cost.increase(candidate)
        least = heap[0][0][0] if heap else key[0]
        if key[0] > least + NEARLY * least:             # no longer the cheapest: back to the others
            heapq.heappush(heap, (key, candidate))
            continue
        cost.lower(candidate)
        if cost.ranks[candidate] > cost.eighth:
            next_step = GROWTH * key[0], key[1]
            heapq.heappush(heap, (next_step, candidate))
        yield candidate


def along(cost: Cost, order: Tensor):
    """No search: the order of lowerings that the projections were trained along."""
    places = torch.unravel_index(order, cost.ranks.shape)
    for candidate in zip(*(of_axis.tolist() for of_axis in places), strict=True):
        cost.lower(candidate)
        yield candidate


def order_beside(proj: Path, config) -> Tensor | None:
    """The order in the train.json beside projections, if they were trained along one."""
    file = proj.parent / "train.json"
    if not file.exists():
        return None
    order = common.read_json(file).get("order")
    if order is None:
        return None
    heads = uniform_ranks(1.0, config).numel()
    every = sorted(list(range(heads)) * (LEVELS - 1))
    if not isinstance(order, list) or sorted(order, key=str) != sorted(every, key=str):
        raise ValueError(f"{file}: an order for another model")
    return torch.tensor(order)


# ------------------------------------------------------------------------------
# Output

def save(path: list, cost: Cost, config, budget: float, file: Path) -> None:
    """Write `path`, rows of [side, layer, head, KL after it], and the plan at `budget`."""
    evaluations = cost.passes
    ranks = plan_at(order_of(path, config), config, budget)
    full = ranks.numel() * config.head_dim
    taken = (full - int(ranks.sum())) // cost.eighth
    uniform_kl, _ = cost.measure(uniform_ranks(budget, config), 0)
    common.write_json(file, {
        "head_dim": config.head_dim,
        "budget": int(ranks.sum()) / full,
        "keys": ranks[0].tolist(),
        "values": ranks[1].tolist(),
        "kl": path[taken - 1][3] if taken else cost.full_kl,
        "uniform_kl": uniform_kl,
        "evaluations": evaluations,
        "path": path,
    })


# ------------------------------------------------------------------------------
# The script

def options():
    parser = common.arguments(__doc__)
    data_arguments(parser)
    report_arguments(parser, batch=4, windows=32)
    add = parser.add_argument
    add("--proj", type=Path, default=Path("out/projections.safetensors"),
        help="[out/projections.safetensors]")
    add("--budget", type=common.within(0.125, 1.0), default=0.375,
        help="of the plan spelled out in the file, whose path always goes to 12.5%% [0.375]")
    add("--exact", action="store_true", help="Algorithm 1 as it is")
    add("--lazy", action="store_true", help="search, also if --proj was trained along an order")
    add("--pca", action="store_true", help="search for the plain PCA that is in --proj")
    return parser.parse_args()


@torch.no_grad()
def main():
    args = options()
    device, dtype = common.prepare(args)
    common.keep_freed_memory()
    common.check_folder(args.out)
    with common.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    config = model.config
    with common.blame("--proj"):
        projection = Projection.load(args.proj, "pca_" if args.pca else "")
        projection.check_fits(config)
        projection = projection.to(device)
    order = None
    if not (args.exact or args.lazy or args.pca):
        with common.blame("--proj"):
            order = order_beside(args.proj, config)
    print(describe(args.ckpt, model))
    tokens, held_out = text_for(args, config)

    L, K, d = shape_of(config)
    heads = 2 * L * K
    rounds = heads * (LEVELS - 1)
    generator = torch.Generator().manual_seed(args.seed)
    text = random_windows(tokens, args.batch, args.seq, generator)
    cost = Cost(model, projection, text[:, :-1].to(device))
    if not cost.kl < 1e3:
        common.fail(f"--ckpt: {args.ckpt}: the KL is {cost.kl}; are the weights whole?")
    print(f"{heads} ranks to lower in {rounds} rounds on {args.batch * args.seq:,} tokens; "
          f"rounding moves the KL by {cost.noise:.1e}")
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
    progress = common.Progress(rounds, "lowering")
    reached = 1.0
    try:
        for side, layer, head in search(cost):
            path.append([SIDES[side], layer, head, cost.kl])
            reached = 1 - len(path) / (heads * LEVELS)
            progress(len(path), f"budget {reached:6.1%}  KL {cost.kl:.5f}  {cost.passes:,} passes")
    except KeyboardInterrupt:
        if not path:
            common.fail("Stopped; nothing was saved", code=130)
    with common.blame("--out"):
        save(path, cost, config, max(args.budget, reached), file)
    if len(path) < rounds:
        common.fail(f"Stopped; {file} holds the path down to {reached:.1%}", code=130)
    print(f"{cost.passes:,} passes, {cost.layer_passes:,} layer evaluations, "
          f"{time.time() - began:.0f} s")

    plan = partial(plan_at, order_of(path, config), config)
    ranks = plan(args.budget)
    names = ("pca", "pca_searched") if args.pca else ("uniform", "searched")
    curves = {name: (projection, p) for name, p in zip(names, (uniform, plan), strict=True)}
    report(model, held_out, curves, args, [b for b in BUDGETS if b <= 0.75])
    picture = file.with_suffix(".png")
    with common.blame("--out"):
        draw_plan(ranks, d, [kl for *_, kl in path], uniform_kl, picture)
    print(f"Saved {file} and {picture}")


if __name__ == "__main__":
    common.run_script(main)
