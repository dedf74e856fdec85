"""Search the ranks: which heads may be narrow, and which must stay wide.

MatryoshkaKV (arXiv 2410.14731), section 3.3 and Algorithm 1. A rank is how many of d
coordinates a head keeps, of keys or of values. A uniform rank wastes the cache, since heads differ
in what they can spare. Algorithm 1 starts with every rank at d. Each round it tries to lower each
rank, alone, by d/8, measures the KL on a calibration text, and keeps the one that costs least:

    repeat   h* = argmin_h KL(p_model ‖ p(ranks with rank h lowered by d/8)),   lower h*

A round takes a pass for each of up to 2·L·K candidates. The order goes down to 12.5%: every rank
keeps d/8, since a head without keys would attend blindly. The plan for any larger budget is made by
a prefix of it; a file's "path" is the order with its KLs.

    python search.py --exact --proj out_paper/projections.safetensors       # Algorithm 1: `exact`

One run took 13,523 passes on the demo, 6 layers of 4 heads; a model of 7B would take tens of
millions. Not in the paper: two sweeps of backward passes, as many however many heads there are. The
first gives train.py its start, `find_start`, the second an order, `find_order`.

    python search.py --proj out_paper/projections.safetensors   # -> ranks.json, .png beside it
    python search.py --pca                  # for the plain PCA in out/ -> out/ranks_pca.json, .png

train.py's default writes a ranks.json itself, the order that it trained along, and below 75% of the
cache that one is mostly the better (docs/results.md). So search.py is for projections without an
order, as those of the paper's recipe, and for plain PCA.
"""
import itertools
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from evaluate import describe, hooks_of, report
from model import Model, load, log_probabilities, products_in_bfloat16, wide
from projection import (
    BUDGETS,
    LEVELS,
    SIDES,
    Moments,
    Projection,
    check_levels,
    leading,
    plan_at,
    shape_of,
    uniform_ranks,
)
from support import cli, files, processes
from support.data import random_starts, random_windows, text_for
from support.pictures import draw_plan
from support.plans import PROJECTIONS, order_of, trained_order
from support.progress import Progress

# ------------------------------------------------------------------------------
# What a plan costs

class Cost:
    """The current plan `ranks`; KL(p_model ‖ p_plan) of plans on a text (B, T) at position 0.

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
        self.kl, self.inputs = self.measure(self.ranks, 0)          # 0; NaN of spoiled weights
        self.tried = None               # the last candidate, its plan, KL and layers' inputs

    def candidates(self) -> list[tuple[int, int, int]]:
        """Every rank that can still be lowered."""
        return [tuple(place) for place in (self.ranks > self.eighth).nonzero().tolist()]

    def if_lowered(self, candidate: tuple[int, int, int]) -> float:
        """The KL if this rank alone were lowered."""
        ranks = self.ranks.clone()
        ranks[candidate] -= self.eighth
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
        """Layers' inputs, (B, T, hidden) each, and normed states (B·T, hidden); as `measure`."""
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
# Algorithm 1

def exact(cost: Cost):
    """Algorithm 1: every candidate is measured in every round. Yields each as it is lowered."""
    while candidates := cost.candidates():
        best = min(candidates, key=cost.if_lowered)
        cost.lower(best)
        yield best


# ------------------------------------------------------------------------------
# Not in the paper: two sweeps of backward passes say which directions and which heads matter. Their
# number does not grow with the model's heads. Untrained, on SmolLM2-135M over windows of 2,048,
# start and order have a KL of .430 at 50%, plain PCA at the same rank everywhere 1.911
# (docs/results.md).

DRAWS = 2               # of the next token, at every position of a window


class Leaves:
    """The hook `project=` that changes nothing, and is where gradients are taken.

    To keys after RoPE, R k with R = `turn`, and to values it adds zeros, (B, K, T, d). What a plan
    would project is kept as x[layer]: R (k − mean_k) and v − mean_v, (B, K, T − whole, d) each; a
    mean that is None is not subtracted.
    """

    def __init__(self, mean_k: Tensor | None, mean_v: Tensor | None, whole: int):
        self.mean_k, self.mean_v, self.whole = mean_k, mean_v, whole
        self.zeros, self.x = {}, {}

    def __call__(self, layer: int, k: Tensor, v: Tensor, turn):
        turned, x = turn(k), k
        if self.mean_k is not None:
            x = k - self.mean_k[layer][:, None].to(k)
        y = v if self.mean_v is None else v - self.mean_v[layer][:, None].to(v)
        self.x[layer] = [z[:, :, self.whole:].detach() for z in (turn(x), y)]
        if layer not in self.zeros:                     # there already where layers are recomputed
            self.zeros[layer] = [torch.zeros_like(z, requires_grad=True) for z in (turned, v)]
        zeros_k, zeros_v = self.zeros[layer]
        return turned + zeros_k, v + zeros_v


class Windows:
    """The windows of the sweeps: `count` random ones, at positions below `positions` (RoPE's).

    amp: the model's products in bfloat16 over float32 weights. recompute: layers again in the
    backward pass, so that a sweep takes no more memory than a training step does.
    """

    def __init__(self, tokens, count: int, batch: int, seq: int, positions: int, seed: int,
                 amp: bool = False, recompute: bool = False):
        generator = torch.Generator().manual_seed(seed)
        self.text = random_windows(tokens, count, seq, generator)[:, :-1]
        self.starts = random_starts(count, seq, positions, generator)
        self.batch, self.seed, self.amp, self.recompute = batch, seed, amp, recompute

    def __iter__(self):
        """Batches, as the numbers (B,) of windows; of several processes each takes some."""
        batches = torch.arange(len(self.text)).split(self.batch)
        return itertools.islice(batches, processes.RANK, None, processes.WORLD)

    def __len__(self) -> int:
        """How many batches this process takes."""
        batches = math.ceil(len(self.text) / self.batch)
        return len(range(processes.RANK, batches, processes.WORLD))

    def states(self, model: Model, batch: Tensor, **hook) -> Tensor:
        """The model's states (B, T, hidden) after its last norm; hook: what `hidden` takes."""
        text = self.text[batch].to(model.device)
        with products_in_bfloat16(model.device, self.amp):
            return model.norm(model.hidden(text, start=self.starts[batch], **hook))


def positions_of(args, config) -> int:
    """--positions, or what the model was made for, up to 8192: windows lie anywhere below."""
    most = config.max_position_embeddings
    for option in ("positions", "seq"):
        if (asked := getattr(args, option) or 1) > most:
            cli.fail(f"--{option} {asked}: the model was made for {most}")
    return args.positions or min(8192, most)


def sweep(model: Model, windows: Windows, mean_k, mean_v, whole: int, what: str):
    """Yields (draw, side, layer, g, x) of a backward pass for every batch and draw.

    x: keys R (k − mean_k) or values v − mean_v, as `Leaves` keeps them. g: the gradient at them of
    Σ_t log p(y_t), with y_t drawn from the model's own p(· | text so far) and not fed back. Both
    (B, K, T − whole, d).
    """
    progress = Progress(len(windows), what)
    for number, batch in enumerate(windows, 1):
        leaves = Leaves(mean_k, mean_v, whole)
        with torch.enable_grad():
            states = windows.states(model, batch, project=leaves, recompute=windows.recompute)
        by_window = []
        for window, of_window in zip(batch.tolist(), states.detach(), strict=True):
            # What is drawn follows from the seed and the window, however many processes there are.
            generator = torch.Generator(model.device).manual_seed(windows.seed * 1_000_003 + window)
            with products_in_bfloat16(model.device, windows.amp):
                by_window.append(drawn_gradients(model, of_window, generator))
        by_state = torch.stack(by_window, dim=1)                    # (DRAWS, B, T, hidden)
        zeros = [z for layer in sorted(leaves.zeros) for z in leaves.zeros[layer]]
        for draw, gradient in enumerate(by_state):
            found = torch.autograd.grad(states, zeros, gradient, retain_graph=draw < DRAWS - 1)
            for leaf, g in enumerate(found):
                layer, side = divmod(leaf, 2)
                g, x = g[:, :, whole:], leaves.x[layer][side]
                yield draw, side, layer, g.to(wide(g.dtype)), x.to(wide(x.dtype))
        progress(number, f"{DRAWS} draws", windows.text[batch].numel())


@torch.no_grad()
def drawn_gradients(model: Model, states: Tensor, generator) -> Tensor:
    """∂ log p(y) / ∂ state for DRAWS of y ~ p at each of the normed states (n, hidden).

    (DRAWS, n, hidden): of the logits it is onehot(y) − p.
    """
    W = model.lm_head.weight
    gradients = states.new_empty(DRAWS, *states.shape)
    for rows, log_p in log_probabilities(model, states):
        p = log_p.exp()
        if not p.isfinite().all():
            raise ValueError("the model's probabilities are not numbers: are the weights whole?")
        drawn = torch.multinomial(p, DRAWS, replacement=True, generator=generator)
        for gradient, y in zip(gradients, drawn.T, strict=True):
            by_logits = -p
            by_logits.scatter_add_(1, y[:, None], torch.ones_like(p[:, :1]))
            gradient[rows] = by_logits.to(W.dtype) @ W
    return gradients


@torch.no_grad()
def find_start(model: Model, windows: Windows, whole: int) -> Projection:
    """A pass for the mean and the first sweep: what varies, and what the answer hangs on.

    U₀ are the eigenvectors of C_x / tr C_x + C_g / tr C_g over all tokens but the first `whole`:
    C_x is E[xᵀx] of keys, x = R (k − m), and the covariance of values; C_g is E[gᵀg].
    """
    mean_k = mean_of_keys(model, windows, whole)
    moments = Moments(model.config, model.device)
    by_gradient = torch.zeros_like(moments.squares)                 # Σ gᵀg
    for draw, side, layer, g, x in sweep(model, windows, mean_k, None, whole, "first sweep"):
        g = g.double()
        by_gradient[side, layer] += (g.mT @ g).sum(0)
        if draw == 0:
            moments.add(side, layer, x)
    moments.sum_over_processes()
    processes.sum_over(by_gradient)
    # Of keys E[xᵀx] with the mean that x still has: of a cut key only R m is put back, and the loss
    # of x's own mean would shift all scores but those of whole tokens, which softmax would see.
    varies = torch.stack((moments.second()[0], moments.covariance()[1]))
    U_k, U_v = leading(unit_trace(varies) + unit_trace(by_gradient))
    return Projection(U_k, U_v, moments.mean()[1].float(), mean_k, whole)


@torch.no_grad()
def mean_of_keys(model: Model, windows: Windows, whole: int) -> Tensor:
    """m (L, K, d): the mean of keys before RoPE, pooled over positions, the first `whole` left out.
    """
    L, K, d = shape_of(model.config)
    mean_k = torch.zeros(L, K, d, dtype=torch.float64, device=model.device)
    count = torch.zeros(1, dtype=torch.float64)

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, turn) -> None:
        mean_k[layer] += k[:, :, whole:].double().sum((0, 2))
        count.add_(k[:, 0, whole:, 0].numel() / L)

    progress = Progress(len(windows), "mean of keys")
    for number, batch in enumerate(windows, 1):
        windows.states(model, batch, observe=observe)
        progress(number, "", windows.text[batch].numel())
    mean_k = processes.sum_over(mean_k) / processes.sum_over(count).to(model.device)
    return mean_k.float()


def unit_trace(matrix: Tensor) -> Tensor:
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    return matrix / trace[..., None, None].clamp(min=1e-30)         # of a dead head 0


@torch.no_grad()
def find_order(model: Model, p: Projection, windows: Windows) -> Tensor:
    """The second sweep: an order for U as it is, trained or not, (7 · 2LK,) places in (2, L, K).

    A rank of r, all others full, moves the x_s of each token s that is not whole by
    δ_s = −x_s (I − P). For small δ a window's KL is ½ E_y[(Σ_s g_s·δ_s)²]: its Hessian is the
    Fisher information E_y[gᵀg], with g all the g_s in one row. The y of all positions are drawn at
    once: they are independent, and each ∂ log p(y_t) has mean 0, so that products of two vanish.
    With A_c = Σ_s (g_s U)_c (x_s U)_c the sum over s is −Σ_{c ≥ r} A_c, so a rank of r costs, per
    token,

        ½ mean over windows and draws of (Σ_{c ≥ r} A_c)² / T

    for every head and every multiple of d/8 at once. Costs of heads are taken to add up: the
    cheapest next eighth, again and again, is the order.
    """
    L, K, d = shape_of(model.config)
    T = windows.text.shape[1]
    U = p.U_k, p.U_v
    costs = torch.zeros(2, L, K, LEVELS, dtype=torch.float64)   # of cutting 1, 2, …, 8 eighths
    for _, side, layer, g, x in sweep(model, windows, p.mean_k, p.mean_v, p.whole, "order"):
        if side == 0 and p.mean_k is None:
            # Softmax sees no shift of all scores, so Σ_s g_s = 0: the same sum, with less rounding.
            x = x - x.mean((0, 2), keepdim=True)
        U_l = U[side][layer].to(g)
        A = ((g @ U_l) * (x.to(g) @ U_l)).sum(2)                    # (B, K, d)
        by_eighth = A.unflatten(-1, (LEVELS, -1)).sum(-1).double()
        tails = by_eighth.flip(-1).cumsum(-1)
        costs[side, layer] += (tails ** 2).sum(0).cpu()
    costs = processes.sum_over(costs) / (2 * T * len(windows.text) * DRAWS)
    steps = costs.flatten(0, 2).diff(dim=-1, prepend=torch.zeros(2 * L * K, 1).double())
    return cheapest_first(steps[:, :-1])                # the first d/8 columns stay


def cheapest_first(steps: Tensor) -> Tensor:
    """An order (n,) of places, from what each place's next steps cost, (places, steps)."""
    steps = steps.cummax(-1).values                     # a cheap one waits behind a dear one
    cheapest = steps.flatten().argsort(stable=True)
    return cheapest // steps.shape[1]


# ------------------------------------------------------------------------------
# The script

def path_by_algorithm_1(cost: Cost) -> list:
    """Rows of [side, layer, head, KL after it], down to an eighth or until Ctrl-C."""
    path, rounds = [], cost.ranks.numel() * (LEVELS - 1)
    progress = Progress(rounds, "lowering")
    try:
        for side, layer, head in exact(cost):
            path.append([SIDES[side], layer, head, cost.kl])
            reached = 1 - len(path) / (cost.ranks.numel() * LEVELS)
            progress(len(path), f"budget {reached:6.1%}  KL {cost.kl:.5f}  {cost.passes:,} passes")
    except KeyboardInterrupt:
        if not path:
            cli.fail("Stopped; nothing was saved", code=130)
    return path


def path_by_sweep(model: Model, p: Projection, windows: Windows, cost: Cost) -> list:
    """The same rows, of `find_order`; a KL is measured where a budget of eighths is reached."""
    order = find_order(model, p, windows)
    path = rows_of(order, model.config)
    for level in range(1, LEVELS):
        taken = level * cost.ranks.numel() - 1
        ranks = plan_at(order, model.config, 1 - level / LEVELS)
        path[taken][3], _ = cost.measure(ranks, 0)
    return path


def rows_of(order: Tensor, config) -> list:
    """An order as a path that a file has, with KLs that are not known."""
    L, K, _ = shape_of(config)
    places = torch.stack(torch.unravel_index(order, (2, L, K)), dim=1)
    return [[SIDES[side], layer, head, None] for side, layer, head in places.tolist()]


def ranks_file(path: list, p: Projection, config, budget: float, kl: dict | None = None) -> dict:
    """What OUT/ranks.json holds: the path, the plan at `budget`, and what was measured of it."""
    ranks = plan_at(order_of(path, config), config, budget)
    full = ranks.numel() * config.head_dim
    return {
        "head_dim": config.head_dim,
        "levels": LEVELS,
        "budget": int(ranks.sum()) / full,
        "keys": ranks[0].tolist(),
        "values": ranks[1].tolist(),
        **(kl or {"kl": None, "uniform_kl": None, "evaluations": None}),
        "path": path,
        "projections": p.hash(),
    }


def options():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.report_arguments(parser, batch=4, windows=32)
    cli.out_argument(parser, "the folder of --proj")
    add = parser.add_argument
    add("--proj", type=Path, default=Path("out", PROJECTIONS), help=f"[out/{PROJECTIONS}]")
    add("--budget", type=cli.within(1 / LEVELS, 1.0), default=0.375,
        help="of the plan spelled out in the file, whose path goes to 1/8 [0.375]")
    add("--exact", action="store_true", help="Algorithm 1 as it is")
    cli.sweep_arguments(parser)
    cli.amp_argument(parser)
    add("--pca", action="store_true", help="search for the plain PCA that is in --proj")
    args = parser.parse_args()
    args.out = args.out or args.proj.parent
    return args


@torch.no_grad()
def main():
    args = options()
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    cli.choose_amp(args, device, dtype)
    files.check_folder(args.out)
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
        check_levels(model.config.head_dim)
    config = model.config
    with cli.blame("--proj"):
        projection = Projection.load(args.proj, "pca_" if args.pca else "")
        projection.check_fits(config)
        projection = projection.to(device)
    if args.positions and projection.mean_k is None:
        cli.fail(f"--positions: {args.proj} has no mean_k{' for --pca' if args.pca else ''}, and "
                 "such projections are made at position 0")
    positions = 1 if projection.mean_k is None else positions_of(args, config)
    if args.seq <= projection.whole:
        cli.fail(f"--seq {args.seq}: the first {projection.whole} tokens stay whole (--proj), and "
                 "windows must be longer")
    print(describe(args.ckpt, model))
    tokens, held_out = text_for(args, config)

    generator = torch.Generator().manual_seed(args.seed)
    text = random_windows(tokens, args.batch, args.seq, generator)
    cost = Cost(model, projection, text[:, :-1].to(device))
    if math.isnan(cost.kl):
        cli.fail(f"--ckpt: {args.ckpt}: the KL is {cost.kl}; are the weights whole?")
    uniform = partial(uniform_ranks, config=config)
    budgets = [level / LEVELS for level in range(LEVELS - 1, 0, -1)]
    uniform_kl = {budget: cost.measure(uniform(budget), 0)[0] for budget in budgets}
    began, cost.passes = time.time(), 0
    rounds = cost.ranks.numel() * (LEVELS - 1)
    if args.exact:
        print(f"{cost.ranks.numel()} ranks to lower in {rounds} rounds on {text[:, 1:].numel():,} "
              "tokens", flush=True)
        path = path_by_algorithm_1(cost)
    else:
        windows = Windows(tokens, args.sweep_windows, args.batch, args.seq, positions, args.seed,
                          args.amp)
        path = path_by_sweep(model, projection, windows, cost)
    passes = cost.passes

    reached = 1 - len(path) / (cost.ranks.numel() * LEVELS)
    budget = max(args.budget, reached)
    order = order_of(path, config)
    plan = partial(plan_at, order, config)
    kl, uniform_kl_here = (cost.measure(ranks, 0)[0] for ranks in (plan(budget), uniform(budget)))
    measured = {"kl": kl, "uniform_kl": uniform_kl_here, "evaluations": passes}
    file = args.out / ("ranks_pca.json" if args.pca else "ranks.json")
    if len(path) < rounds and file.exists():            # it may hold a whole one
        file = file.with_stem(file.stem + "_stopped")
    with cli.blame("--out"):
        files.write_json(file, ranks_file(path, projection, config, budget, measured))
    if len(path) < rounds:
        cli.fail(f"Stopped; {file} holds the path down to {reached:.1%}", code=130)
    print(f"The order: {time.time() - began:.0f} s, {passes:,} plans measured")

    beside = args.out == args.proj.parent and not args.pca
    if beside and trained_order(args.proj, projection, config) is not None:
        print(f"{file}: took the place of the order that the training went along, which train.json "
              "still has: below 75% mostly the better one", file=sys.stderr)
    names = ("pca", "pca_searched") if args.pca else ("uniform", "searched")
    curves = {name: (projection, p) for name, p in zip(names, (uniform, plan), strict=True)}
    report(model, held_out, hooks_of(curves), [b for b in BUDGETS if b <= 0.75], args)
    measured = [(1 - (n + 1) / (cost.ranks.numel() * LEVELS), row[3])
                for n, row in enumerate(path) if row[3] is not None]
    picture = file.with_suffix(".png")
    with cli.blame("--out"):
        draw_plan(plan(args.budget), config.head_dim, {
            "searched": tuple(zip(*measured, strict=True)),
            "uniform": (uniform_kl, uniform_kl.values())}, picture)
    print(f"Saved {file} and {picture}")


if __name__ == "__main__":
    cli.run_script(main)
