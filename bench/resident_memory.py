"""How much a process really grows by when the cache fills: run by hand, on Linux.

For each budget a fresh process loads the demo, generates a little to warm up, then makes a cache of 65,536 tokens, fills
every block of it, and reports its resident set before and after.

    python tests/resident_memory.py
"""
import subprocess
import sys
from pathlib import Path

TOKENS = 65536


def resident() -> int:
    """Bytes of this process in memory."""
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])


def fill(budget: float) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch
    from cache import KVCache
    from model import DEMO, load
    from projection import Projection, uniform_ranks
    model = load(DEMO)
    c = model.config
    L, K, d = c.num_hidden_layers, c.num_key_value_heads, c.head_dim
    p = Projection(*torch.linalg.qr(torch.randn(2, L, K, d, d)).Q, torch.zeros(L, K, d))
    ranks = uniform_ranks(budget, c)

    model(torch.randint(3, c.vocab_size, (1, 512)), cache=KVCache(p, ranks, 1, 1024))
    before = resident()
    cache = KVCache(p, ranks, 1, TOKENS)
    for groups in cache.groups:
        for _, keys, values in groups:
            keys.normal_()
            values.normal_()
    print(cache.data.nbytes, resident() - before)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        fill(float(sys.argv[1]))
    else:
        print(f"budget   cache.data, bytes   growth of the resident set   ratio    ({TOKENS:,} tokens, float32)")
        for budget in (1.0, 0.5, 0.25):
            held, grown = map(int, subprocess.run([sys.executable, __file__, str(budget)], capture_output=True, text=True,
                                                  check=True).stdout.split())
            print(f"{budget:6.1%}   {held:17,}   {grown:26,}   {grown / held:.3f}")
