"""What the parts of bits/ are worth, and what its packed cache costs.

    ladder      KL on held-out text of the same bits everywhere and of bits along a path, untrained;
                of a path on the basis that train.py trained for ranks; of what bits.train trained
    position    KL by quarters of --seq; and where the newest tokens are not exact either, of which
                the first quarter has the larger share
    other text  how much larger the KL is on Python's sources than on its documentation, for bits
                and for int4 and int2 with a scale per token and head, the newest group exact
    speed       a decode step behind --length tokens, against the full cache: the mean of 32, and a
                group is packed on the way; medians of --runs pairs
    memory      how much the resident set grows, against what the cache says it takes

    python bench/rounding.py                        # what train.py and bits.train left in out/
"""
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.equal_bytes import by_token, twice
from bench.tools import resident
from bits import load_bits
from bits.costs import find_path, first_steps, what_is_asked
from bits.rounding import FULL, GROUP, bits_at, same_bits
from bits.train import TrainedRounding, with_mean
from cache import KVCache
from evaluate import describe, measure
from model import load, log_probabilities
from projection import Projection, uniform_ranks
from search import Windows, find_start, positions_of
from support import cli
from support.data import encode, even_windows, python_documents, text_for
from support.plans import PROJECTIONS
from support.tokenizer import load_tokenizer

BUDGETS = 0.25, 0.1875, 0.125, 0.09375, 0.0625


def untrained(model, windows: Windows, start: Projection):
    """A rounding of a start, and a path, as bits.train --steps 0 makes them."""
    asked = what_is_asked(model, windows, start)
    steps = first_steps(model, windows, start, asked)
    rounding = TrainedRounding(start, asked.varies, steps)()
    return rounding, find_path(model, windows, rounding, asked)


def ladder(model, held_out, trained, by_basis: dict, args) -> None:
    config = model.config
    rows = {}
    for name, (rounding, path) in by_basis.items():
        for budget in BUDGETS:
            if name == "untrained" and budget * FULL in (1, 2, 3, 4):
                same = same_bits(int(budget * FULL), config)
                rows["the same bits everywhere, untrained", budget] = rounding.at(same)
            plan = bits_at(path, config, budget)
            rows[f"bits along a path, basis {name}", budget] = rounding.at(plan)
    for budget in BUDGETS:
        rows["bits along a path, trained for bits", budget] = trained.at(budget)
    _, results = measure(model, held_out, rows, args.batch, args.seq, args.windows)
    print("\nKL" + " " * 43 + "".join(f"{budget:>9.2%}" for budget in BUDGETS))
    for name in dict.fromkeys(name for name, _ in rows):
        found = [results.get((name, budget)) for budget in BUDGETS]
        shown = [f"{result['kl']:9.4f}" if result else " " * 8 + "-" for result in found]
        print(f"  {name:42s} " + "".join(shown))


def kl_by_quarter(model, x: Tensor, project) -> list[float]:
    total = torch.zeros(4, dtype=torch.float64)
    for part in x.split(4):
        teacher, student = (model.norm(model.hidden(part, hook)).flatten(0, 1)
                            for hook in (None, project))
        kl = [(log_p.exp() * (log_p - log_q)).sum(-1)
              for _, log_p, log_q in log_probabilities(model, teacher, student)]
        total += torch.cat(kl).view(len(part), 4, -1).mean(2).sum(0)
    return (total / len(x)).tolist()


def position(model, held_out, trained, by_basis: dict, args) -> None:
    x = even_windows(held_out, args.windows, args.seq)[:, :-1]
    rows = {"trained for bits": trained.at}
    for name, (rounding, path) in by_basis.items():
        rows[name] = partial(at_budget, rounding, path, model.config)
    print(f"\nKL by position, quarters of {args.seq} tokens, at 12.5%; the newest {GROUP} are")
    for name, at in rows.items():
        for kept, hook in twice(at(0.125)).items():
            quarters = kl_by_quarter(model, x, hook)
            shown = "".join(f"{kl:9.4f}" for kl in quarters)
            ratio = quarters[3] / quarters[0]
            print(f"  {name:28s} {kept:7s} {shown}   last / first {ratio:.2f}")


def at_budget(rounding, path, config, budget: float):
    return rounding.at(bits_at(path, config, budget))


def other_text(model, held_out, trained, args) -> None:
    _, sources = python_documents(sources=True)
    tokenizer = load_tokenizer(args.ckpt, model.config.vocab_size)
    other = encode(tokenizer, sources)
    hooks = {f"bits {budget:.2%}": trained.at(budget) for budget in (0.25, 0.125, 0.0625)}
    hooks |= {f"int{bits}": twice(partial(by_token, bits=bits))["exact"] for bits in (4, 2)}
    kls = []
    for text in (held_out, other):
        _, results = measure(model, text, hooks, args.batch, args.seq, args.windows)
        kls.append({name: result["kl"] for name, result in results.items()})
    print("\nKL on            documentation    sources    ratio")
    for name in hooks:
        own, others = kls[0][name], kls[1][name]
        print(f"  {name:14s} {own:13.5f} {others:10.5f} {others / own:8.2f}")


def step_time(model, cache, length: int) -> float:
    """Seconds of GROUP decode steps behind `length` tokens of whatever is in the cache."""
    token = torch.tensor([[5]])
    cache.length = length
    began = time.perf_counter()
    for _ in range(GROUP):
        model(token, cache=cache)
    return time.perf_counter() - began


def speed(model, trained, args) -> None:
    n = args.length
    full = KVCache(
        Projection.identity(model.config), uniform_ranks(1.0, model.config), 1, n + GROUP)
    full.data.normal_()
    print(f"\nA decode step at {n:,} tokens, share of the full cache's time (float32)")
    for budget in (0.25, 0.125, 0.0625):
        packed = trained.cache(budget, 1, n + GROUP)
        packed.data.random_(0, 256)
        packed.first.normal_()
        packed.newest.normal_()
        ratios = []
        for _ in range(args.runs):
            ours, its = step_time(model, packed, n), step_time(model, full, n)
            ratios.append(ours / its)
        ratios.sort()
        median = ratios[len(ratios) // 2]
        held = (packed.newest.numel() + packed.first.numel()) * 2           # in 16 bits
        print(f"  {budget:7.2%}  {median:.3f} [{ratios[0]:.3f} … {ratios[-1]:.3f}]   "
              f"{packed.data.nbytes + held:,} bytes for {full.data.nbytes // 2:,} in 16 bits")


def memory(model, trained, tokens: int = 65536) -> None:
    """Fill a cache with random codes; what a pass needs beside it comes and goes."""
    trained.cache(0.125, 1, 64).data.random_(0, 256)        # what PyTorch needs once
    before = resident()
    cache = trained.cache(0.125, 1, tokens)
    cache.data.random_(0, 256)
    grown = resident() - before
    print(f"\n{tokens:,} tokens at 12.5%: data {cache.data.nbytes:,} bytes, the resident set grew "
          f"by {grown:,}: {grown / cache.data.nbytes:.3f}")


@torch.no_grad()
def main():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.out_argument(parser)
    cli.report_arguments(parser, batch=4, seq=512)
    cli.sweep_arguments(parser)
    count = cli.within(1, 10 ** 6)
    parser.add_argument("--length", type=count, default=4096, help="[4096]")
    parser.add_argument("--runs", type=count, default=5, help="[5]")
    args = parser.parse_args()
    if args.seq % 4 or args.seq // 4 <= GROUP:
        cli.fail(f"--seq {args.seq}: is to be four quarters, each longer than the newest {GROUP} "
                 "tokens, which are exact")
    cli.prepare(args)
    with cli.blame("--ckpt"):
        model = load(args.ckpt)
    with cli.blame("--out"):
        trained = load_bits(args.out / "bits.json")
        trained.rounding.p.check_fits(model.config)
        start = Projection.load(args.out / PROJECTIONS)
        start.check_fits(model.config)
    print(describe(args.ckpt, model))
    tokens, held_out = text_for(args, model.config)
    memory(model, trained)
    speed(model, trained, args)
    cli.keep_freed_memory()
    windows = Windows(tokens, args.sweep_windows, args.batch, args.seq,
                      positions_of(args, model.config), args.seed)
    start = with_mean(start, model, windows)
    by_basis = {"untrained": untrained(model, windows, find_start(model, windows, start.whole)),
                "trained for ranks": untrained(model, windows, start)}
    ladder(model, held_out, trained, by_basis, args)
    position(model, held_out, trained, by_basis, args)
    if args.data is None:
        other_text(model, held_out, trained, args)


if __name__ == "__main__":
    cli.run_script(main)
