"""By how much a process really grows when the cache fills. Linux.

For each budget a fresh process loads the model, generates a little to warm up, then makes a cache,
fills every block of it, and compares its resident set before and after.

    python bench/resident_memory.py
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
from bench.tools import in_fresh_process, need_linux, process_memory
from cache import KVCache
from model import load
from projection import Projection, shape_of, uniform_ranks


def fill(ckpt: Path, budget: float, tokens: int) -> tuple[int, int]:
    """The bytes of `cache.data`, and those that the process grew by."""
    model = load(ckpt)
    L, K, d = shape_of(model.config)
    random = torch.randn(2, L, K, d, d)
    U_k, U_v = torch.linalg.qr(random).Q
    projection = Projection(U_k, U_v, torch.zeros(L, K, d))
    ranks = uniform_ranks(budget, model.config)
    prompt = torch.randint(3, model.config.vocab_size, (1, 512))
    model(prompt, cache=KVCache(projection, ranks, 1, 512))

    before = process_memory("VmRSS")
    cache = KVCache(projection, ranks, 1, tokens)
    cache.data.normal_()
    return cache.data.nbytes, process_memory("VmRSS") - before


def main():
    parser = common.arguments(__doc__)
    parser.add_argument("--tokens", type=common.within(1, 10 ** 7), default=65536,
                        help="that the cache holds [65536]")
    args = parser.parse_args()
    need_linux()
    with common.blame("--ckpt"):
        load(args.ckpt)
    print(f"{args.tokens:,} tokens, float32, on the CPU\n")
    print("   budget   bytes of cache.data   growth of the resident set   ratio")
    for budget in (1.0, 0.5, 0.25):
        held, grown = in_fresh_process(fill, args.ckpt, budget, args.tokens)
        print(f"   {budget:6.1%}   {held:19,}   {grown:26,}   {grown / held:.3f}", flush=True)


if __name__ == "__main__":
    common.run_script(main)
