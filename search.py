"""Search the ranks: which heads may be narrow, and which must stay wide (paper, section 3.3 and Algorithm 1).

A uniform rank wastes the cache: heads, layers, keys and values differ in what they can spare. Algorithm 1 starts with every
rank at d. Each round it lowers, in turn, every rank by d/8, measures the KL to the model on a calibration text, and keeps
the one lowering that costs least:

    repeat   h* = argmin_h KL(p_model ‖ p(ranks with head h lowered by d/8));   lower h*   until the budget is reached

A round takes a forward pass for each of the 2·L·K candidates (`--exact`). The default finds nearly the same path with a
small share of the passes, by two observations:

  lazy        What a candidate adds to the KL hardly changes when some other head is lowered. So all candidates wait in a
              heap, keyed by the increase they had when they were last measured; only the one on top is measured
              again, and lowered if it is still the least, or within a tenth of that.
  from l up   Lowering a head of layer l leaves the layers below untouched. Each layer's input under the current plan is
              kept, and a candidate of layer l runs only the layers from l up.

Counted on the demo (48 ranks, 336 rounds; `python search.py`): 758 passes, 2.1 for each lowering after one for each rank,
of 0.61 of the layers on average; Algorithm 1 takes 13,819 along that path. LLaMA-2-7B has 2,048 ranks and 14,336 rounds: at the
same rates some 32,000 passes and 630,000 layer evaluations, against 25 million passes. A pass over 1,024 tokens is 13.5 TFLOP; at
an assumed 200 TFLOP/s that is under half an hour against some twenty days. (Predicted, not measured: a 7B model may need more
than 2.1.)

The order of lowerings is a nested path, always found down to 12.5%: a plan for any larger budget is a prefix of it. A rank
never falls below d/8: a head that kept nothing would attend blindly, and the block that holds it would be empty.

    python search.py                                   # out/projections.safetensors of the demo -> out/ranks.json, ranks.png
    python search.py --budget 0.25 --exact             # Algorithm 1 as it is
    python model.py --ranks out/ranks.json --budget 0.5 --prompt "..."
"""
import heapq
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from model import Model, arguments, blame, load, prepare, within
from projection import BUDGETS, SIDES, STEPS, Projection, path_order, plan_on_path, uniform_ranks, write_file
from train import check_folder, evaluate, log_probabilities, random_windows, text_for


# ---------------------------------------------------------------------------------------------------------------------
# What a plan costs

class Cost:
    """KL to the model on a calibration text (B, T): of the current plan `ranks`, and of candidates one step below it."""

    def __init__(self, model: Model, projection: Projection, tokens: Tensor):
        self.model, self.projection, self.passes, self.layer_passes = model, projection, 0, 0
        L, K, d = projection.mean_v.shape
        self.step, self.ranks = d // STEPS, torch.full((2, L, K), d)
        self.teacher = model.norm(model.hidden(tokens)).flatten(0, 1)
        self.inputs = [model.embed(tokens)] + [None] * (L - 1)      # of every layer, under the current plan
        self.kl, self.inputs = self.measure(self.ranks, 0)          # not quite zero in bfloat16: the noise floor
        self.last = None

    def measure(self, ranks: Tensor, first: int) -> tuple[float, list[Tensor]]:
        """KL of a plan that differs from the current one only in layers from `first` on, and its layers' inputs."""
        inputs, project, x = self.inputs[:first], self.projection.at(ranks), self.inputs[first]
        for i in range(first, len(self.inputs)):
            inputs.append(x)
            x = self.model.layer(i, x, project)
        self.passes, self.layer_passes = self.passes + 1, self.layer_passes + len(inputs) - first
        total = 0.0
        for _, log_p, log_q in log_probabilities(self.model, self.teacher, self.model.norm(x).flatten(0, 1)):
            total += (log_p.exp() * (log_p - log_q)).sum().item()
        return total / len(self.teacher), inputs

    def of(self, candidate: tuple[int, int, int]) -> float:
        """KL if the head (side, layer, head) alone were lowered by one step."""
        ranks = self.ranks.clone()
        ranks[candidate] -= self.step
        self.last = candidate, ranks, *self.measure(ranks, candidate[1])
        return self.last[2]

    def lower(self, candidate: tuple[int, int, int]) -> None:
        """Make it the current plan."""
        if self.last is None or self.last[0] != candidate:
            self.of(candidate)
        _, self.ranks, self.kl, self.inputs = self.last
        self.last = None

    def candidates(self) -> list[tuple[int, int, int]]:
        """Every (side, layer, head) that can still be lowered."""
        return [tuple(c) for c in (self.ranks > self.step).nonzero().tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# The two searches; each yields the head that it has just lowered

def exact(cost: Cost):
    """Algorithm 1: every candidate is measured in every round."""
    while candidates := cost.candidates():
        best = min(candidates, key=cost.of)
        cost.lower(best)
        yield best


NEARLY = 0.1   # how far above the least an increase may be, as a share of it; 0 takes a sixth more passes and gains nothing


def lazy(cost: Cost):
    """Lazy greedy: only the candidate that looks cheapest is measured again."""
    heap = [(cost.of(c) - cost.kl, c) for c in cost.candidates()]
    heapq.heapify(heap)
    while heap:
        _, candidate = heapq.heappop(heap)
        increase = cost.of(candidate) - cost.kl
        if heap and increase > heap[0][0] + NEARLY * abs(heap[0][0]):  # no longer the cheapest: back among the others
            heapq.heappush(heap, (increase, candidate))
            continue
        cost.lower(candidate)
        if cost.ranks[candidate] > cost.step:                       # its next step is taken to cost what this one did
            heapq.heappush(heap, (increase, candidate))
        yield candidate


# ---------------------------------------------------------------------------------------------------------------------
# Output

def save(path: list, config, budget: float, kl: float, uniform_kl: float, evaluations: int, file: Path) -> None:
    """ranks.json: the whole path, and the plan at `budget` spelled out; `kl` is that of the full plan."""
    ranks, d = plan_on_path(path_order(path, config), config, budget), config.head_dim
    taken = int((d - ranks).sum()) // (d // STEPS)
    write_file(file, json.dumps({
        "head_dim": d, "budget": ranks.sum().item() / (ranks.numel() * d), "keys": ranks[0].tolist(), "values": ranks[1].tolist(),
        "kl": path[taken - 1][3] if taken else kl, "uniform_kl": uniform_kl, "evaluations": evaluations, "path": path}).encode())


def draw(path: list, config, budget: float, uniform: list[tuple[float, float]], file: Path) -> None:
    """The plan as two heat maps, and the path's KL beside that of uniform ranks."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ranks = plan_on_path(path_order(path, config), config, budget)
    _, L, K = ranks.shape
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", width_ratios=[1, 1, 1.5])
    for side, axis in enumerate(axes[:2]):
        image = axis.imshow(ranks[side], vmin=0, vmax=config.head_dim, aspect="auto", cmap="viridis")
        axis.set(title=f"{SIDES[side]}: {ranks[side].sum() / ranks.sum():.0%} of the cache", xlabel="key-value head",
                 ylabel="layer", xticks=range(0, K, max(1, K // 8)), yticks=range(0, L, max(1, L // 8)))
    figure.colorbar(image, ax=axes[1], label="rank")
    one = 1 / (ranks.numel() * STEPS)
    axes[2].plot([100 * (1 - one * (i + 1)) for i in range(len(path))], [entry[3] for entry in path], label="searched")
    axes[2].plot([100 * b for b, _ in uniform], [kl for _, kl in uniform], marker="o", label="uniform ranks")
    axes[2].set(yscale="log", ylim=(1e-5, None), xlabel="size of the KV cache, % of full", ylabel="KL on the calibration text, nats a token")
    axes[2].invert_xaxis()
    axes[2].grid(alpha=0.3)
    axes[2].legend()
    part = file.with_name(file.name + ".part")
    figure.savefig(part, dpi=130, format="png")
    part.replace(file)
    plt.close(figure)


def print_table(base: dict, results: dict) -> None:
    print(f"\nHeld-out text, base model: perplexity {base['perplexity']:.3f}, accuracy {100 * base['accuracy']:.2f}%\n")
    print("  cache  |  KL to the base model        |     perplexity      |    accuracy, %")
    print("         |   uniform   searched  ratio  |   uniform  searched |  uniform  searched")
    for budget in TABLE:
        u, s = results["uniform", budget], results["searched", budget]
        print(f"  {budget:6.1%} | {u['kl']:9.5f}  {s['kl']:9.5f}  {s['kl'] / max(u['kl'], 1e-12):5.2f}  | {u['perplexity']:9.3f} "
              f"{s['perplexity']:9.3f} | {100 * u['accuracy']:8.2f}  {100 * s['accuracy']:8.2f}")
    print()


TABLE = [b for b in BUDGETS if 0.25 <= b <= 0.75]


@torch.no_grad()
def main():
    parser = arguments(__doc__)
    parser.add_argument("--proj", type=Path, default=Path("out/projections.safetensors"), help="[out/projections.safetensors]")
    parser.add_argument("--data", type=Path, help=".txt, .jsonl, .bin or .npy [Python's own documentation]")
    parser.add_argument("--budget", type=within(0.125, 1.0), default=0.375, help="of the plan that is written beside the path [0.375]")
    parser.add_argument("--exact", action="store_true", help="Algorithm 1 as it is: every candidate in every round")
    parser.add_argument("--batch", type=within(1, 10 ** 5), default=4, help="sequences of the calibration text [4]")
    parser.add_argument("--seq", type=within(2, 10 ** 6), default=256, help="tokens of each [256]")
    parser.add_argument("--runs", type=within(1, 10 ** 6), default=64, help="runs of --seq held-out tokens to report on [64]")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for ranks.json and ranks.png [out]")
    args = parser.parse_args()
    device, dtype = prepare(args)
    check_folder(args.out)
    with blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    with blame("--proj"):
        projection = Projection.load(args.proj)
        projection.check_fits(model.config)
        projection = projection.to(device)
    tokens, held = text_for(args, model)
    L, K, d = projection.mean_v.shape
    n = 2 * L * K

    generator = torch.Generator().manual_seed(args.seed)
    text = random_windows(tokens, args.batch, args.seq, generator)[:, :-1].to(device)
    began = time.time()
    cost = Cost(model, projection, text)
    seconds = time.time() - began
    rounds = n * (STEPS - 1)
    guess = rounds * n if args.exact else 3 * rounds
    print(f"{n} ranks to lower in {rounds} rounds on {text.numel():,} tokens. Algorithm 1 takes up to {rounds * n:,} forward passes; "
          f"this search about {guess:,}, {guess * seconds / 2 / 60 * (0.6 if not args.exact else 1):.1f} minutes. "
          f"KL of the full plan: {cost.kl:.1e}")
    uniform = [(b / STEPS, cost.measure(uniform_ranks(b / STEPS, model.config), 0)[0]) for b in range(STEPS - 1, 0, -1)]
    path, algorithm_1, shown, floor = [], 0, 0.0, cost.kl
    reached = lambda: 1 - len(path) / (n * STEPS)

    def write(evaluations: int) -> None:
        budget = max(args.budget, reached())
        uniform_kl = cost.measure(uniform_ranks(budget, model.config), 0)[0]
        save(path, model.config, budget, floor, uniform_kl, evaluations, args.out / "ranks.json")

    cost.passes = cost.layer_passes = 0
    try:
        candidates = len(cost.candidates())
        for side, layer, head in (exact if args.exact else lazy)(cost):
            path.append([SIDES[side], layer, head, cost.kl])
            algorithm_1, candidates = algorithm_1 + candidates, len(cost.candidates())
            now, terminal = time.time(), sys.stderr.isatty()
            if now - shown > (0.2 if terminal else 10) or len(path) == rounds:
                shown, left = now, (now - began) / len(path) * (rounds - len(path))
                line = (f"budget {reached():6.1%}  KL {cost.kl:.5f}  {cost.passes:,} passes  "
                        f"{left / 60:.1f} min left")
                print(f"\r{line:<79s}" if terminal else line, end="" if terminal and len(path) < rounds else "\n",
                      file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if path:
            with blame("--out"):
                write(cost.passes)
        print(f"\nStopped; {args.out / 'ranks.json'} holds the path down to {reached():.1%}" if path else "\nStopped; nothing was saved", file=sys.stderr)
        raise SystemExit(130)
    evaluations = cost.passes
    print(f"{cost.passes:,} passes, {cost.layer_passes:,} layer evaluations, {time.time() - began:.0f} s; Algorithm 1 takes "
          f"{algorithm_1:,} passes, {algorithm_1 * L:,} layer evaluations along this path")
    plan = lambda budget: plan_on_path(path_order(path, model.config), model.config, budget)
    ranks = plan(args.budget)
    with blame("--out"):
        write(evaluations)
    ends = [f"{(ranks[s] == d // STEPS).sum()} of {L * K} {SIDES[s]} at {d // STEPS}, {(ranks[s] == d).sum()} at {d}" for s in (0, 1)]
    print(f"At {args.budget:.1%}: {'; '.join(ends)}")
    plans = {("uniform", b): projection.at(uniform_ranks(b, model.config)) for b in TABLE}
    plans |= {("searched", b): projection.at(plan(b)) for b in TABLE}
    base, results = evaluate(model, held, plans, args.batch, args.seq, args.runs)
    print_table(base, results)
    with blame("--out"):
        draw(path, model.config, args.budget, uniform, args.out / "ranks.png")
    print(f"Saved {args.out / 'ranks.json'} and {args.out / 'ranks.png'}")


if __name__ == "__main__":
    main()
