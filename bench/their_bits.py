"""The quantised caches that people run, in transformers, against bits: distance at equal bytes.

transformers 5.24 keeps a cache in 4 or 2 bits by optimum-quanto or HQQ, and in 8 by its own fp8. On
held-out windows each reads groups of 32 tokens behind one another: a group attends to itself as it
is and to those before it as stored, just as bits do (bits/rounding.py). Their caches quantise the
whole past anew with each group, and so it is here; with their default, every 128 tokens.

Bytes are those of the tensors that stay behind random keys and values in bfloat16, scales and zeros
included, and a newest group of 32 tokens in 16 bits for all; bits hold two, and whole first tokens.
KL is the distance from the model, in nats per token. Bits are those in --out.

    python -m venv ../theirs && ../theirs/bin/pip install -r requirements.txt accelerate \\
        transformers==5.24.0 optimum-quanto==0.2.7 hqq==0.2.8.post1
    ../theirs/bin/python bench/their_bits.py --ckpt DIR --out DIR
"""
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.generate import their_model
from bits import load_bits
from bits.rounding import FULL, GROUP
from evaluate import by_token, describe
from model import load
from projection import shape_of
from support import cli
from support.data import even_windows, text_for
from support.progress import Progress

LENGTHS = 256, 4096, 131072
BACKENDS = {
    "fp8": ("fp8", {}),
    "quanto, 4 bits": ("quanto", {"nbits": 4}),
    "HQQ, 4 bits": ("hqq", {"nbits": 4}),
    "HQQ, 4 bits, by token": ("hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1}),
    "quanto, 2 bits": ("quanto", {"nbits": 2}),
    "HQQ, 2 bits": ("hqq", {"nbits": 2}),
    "HQQ, 2 bits, by token": ("hqq", {"nbits": 2, "axis_key": 1, "axis_value": 1}),
}
SHARES = 0.5, 0.3125, 0.28125, 0.25, 0.1875, 0.15625, 0.125, 0.0625


def their_cache(config, backend: str, options: dict):
    """A cache that quantises whenever a group is complete."""
    from transformers import QuantizedCache
    if backend != "fp8":
        options = options | {"residual_length": GROUP}
    return QuantizedCache(backend, config, **options)


def stored(x) -> int:
    """Bytes of the tensors in whatever a cache holds."""
    if isinstance(x, Tensor):
        if hasattr(x, "__tensor_flatten__"):            # quanto's: several in one
            return sum(stored(getattr(x, name)) for name in x.__tensor_flatten__()[0])
        return x.nbytes
    if isinstance(x, dict):
        return sum(map(stored, x.values()))
    return sum(map(stored, x)) if isinstance(x, (list, tuple)) else 0


def their_bytes(config, backend: str, options: dict, tokens: int) -> float:
    """Share of a 16-bit cache that so many tokens take, of one layer of random numbers."""
    L, K, d = shape_of(config)
    layer = their_cache(config, backend, options).layers[0]
    x = torch.randn(2, 1, K, tokens, d, dtype=torch.bfloat16)
    layer.update(*x)
    return (sum(map(stored, vars(layer).values())) + newest_bytes(K, d)) / x.nbytes


def newest_bytes(K: int, d: int) -> int:
    return 2 * 2 * K * GROUP * d


def our_bytes(bits, share: float, tokens: int) -> float:
    L, K, d = shape_of(bits.config)
    fixed = 2 * L * K * d * (2 * GROUP + bits.rounding.p.whole)     # numbers of 16 bits
    packed = bits.plan(share).double().mean().item() / FULL
    return packed + fixed / (2 * L * K * d * tokens)


def by_groups(forward, window: Tensor) -> Tensor:
    """Log-probabilities (T, vocab) of a window (T), read group by group."""
    parts = [forward(group[None])[0] for group in window.split(GROUP)]
    return torch.cat(parts).float().log_softmax(-1)


@torch.no_grad()
def main():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.out_argument(parser)
    cli.report_arguments(parser, windows=8)
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    with cli.blame("--out"):
        bits = load_bits(args.out / "bits.json")
        bits.rounding.p.check_fits(model.config)
    theirs = their_model(args.ckpt, model)
    print(describe(args.ckpt, model))
    _, held_out = text_for(args, model.config)
    text = even_windows(held_out, args.windows, args.seq).to(device)

    def their_forward(name: str):
        cache = their_cache(theirs.config, *BACKENDS[name])
        return lambda x: theirs(x, past_key_values=cache, use_cache=True).logits

    def our_forward(share: float):
        cache = bits.cache(share, 1, args.seq, dtype, device)
        return lambda x: model(x, cache=cache)

    # By name: what makes a fresh cache, and the bytes of so many tokens.
    rows = {name: (partial(their_forward, name), partial(their_bytes, theirs.config, *of))
            for name, of in BACKENDS.items()}
    rows |= {f"bits, {share:.2%}": (partial(our_forward, share), partial(our_bytes, bits, share))
             for share in SHARES}
    totals = {name: [] for name in rows}
    progress, done = Progress(len(text) * len(rows), "windows"), 0
    for window in text:
        x, y = window[:-1], window[1:]
        log_p = model(x[None])[0].float().log_softmax(-1)
        p, likeliest = log_p.exp(), log_p.argmax(-1)
        for name, (fresh, _) in rows.items():
            log_q = by_groups(fresh(), x)
            totals[name].append(by_token(p, log_p, log_q, y, likeliest))
            progress(done := done + 1)

    print("\n" + " " * 24 + "share of 16 bits, of so many tokens\n" + " " * 24
          + "".join(f"{n:>9,}" for n in LENGTHS) + "        KL   99.9%   same likeliest")
    for name, found in totals.items():
        kl, _, _, same = torch.cat(found, dim=1)
        shown = "".join(f"{rows[name][1](n):9.2%}" for n in LENGTHS)
        print(f"  {name:22s}{shown}   {kl.mean():.5f}  {kl.quantile(0.999):6.3f}   "
              f"{same.mean():.2%}", flush=True)


if __name__ == "__main__":
    cli.run_script(main)
