"""By how much a process really grows when the cache fills, and what shrinking gives back. Linux.

For each budget a fresh process loads the model, generates a little to warm up, then makes a cache,
fills every block of it, and compares its resident set before and after. The last one fills the full
cache and then shrinks it to a quarter.

    python bench/resident_memory.py
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import in_fresh_process, need_linux, resident
from cache import KVCache
from model import load
from projection import Projection, shape_of, uniform_ranks
from support import cli


def fill(ckpt: Path, budget: float, tokens: int, smaller: float | None) -> tuple[int, int]:
    """The bytes of `cache.data`, and those that the process grew by, filled (and shrunk)."""
    model = load(ckpt)
    L, K, d = shape_of(model.config)
    random = torch.randn(2, L, K, d, d)
    U_k, U_v = torch.linalg.qr(random).Q
    projection = Projection(U_k, U_v, torch.zeros(L, K, d))
    ranks = uniform_ranks(budget, model.config)
    prompt = torch.randint(3, model.config.vocab_size, (1, 512))
    model(prompt, cache=KVCache(projection, ranks, 1, 512))

    before = resident()
    cache = KVCache(projection, ranks, 1, tokens)
    cache.data.normal_()
    cache.length = tokens
    if smaller is not None:
        cache.shrink(uniform_ranks(smaller, model.config))
    return cache.data.nbytes, resident() - before


def main():
    parser = cli.arguments(__doc__)
    parser.add_argument("--tokens", type=cli.within(1, 10 ** 7), default=65536,
                        help="that the cache holds [65536]")
    args = parser.parse_args()
    need_linux()
    with cli.blame("--ckpt"):
        load(args.ckpt)
    print(f"{args.tokens:,} tokens, float32, on the CPU\n")
    print("           budget   bytes of cache.data   growth of the resident set   ratio")
    for budget, smaller in ((1.0, None), (0.5, None), (0.25, None), (1.0, 0.25)):
        held, grown = in_fresh_process(fill, args.ckpt, budget, args.tokens, smaller)
        name = f"{budget:.1%}" if smaller is None else f"{budget:.0%} → {smaller:.1%}"
        print(f"   {name:>14s}   {held:19,}   {grown:26,}   {grown / held:.3f}", flush=True)


if __name__ == "__main__":
    cli.run_script(main)
