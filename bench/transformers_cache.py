"""MatryoshkaCache's logits against model.py's, and a step of it against DynamicCache's.

Also BitsCache, for --bits FILE. Bytes are those that stay: first and newest tokens are among them.

    pip install transformers==5.24.0
    python bench/transformers_cache.py --ckpt ../smollm2
"""
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from adapters.transformers_cache import AutoModelForCausalLM, DynamicCache, MatryoshkaCache
from bench.tools import ratio, spread, timed
from model import load
from projection import Projection, plan_at
from support import cli
from support.data import even_windows, load_data
from support.plans import read_ranks

ROTATIONS = ROOT / "rotations" / "smollm2-135m" / "projections.safetensors"


def check(args, model) -> None:
    """Print how far logits are from those of model.py with keys and values projected."""
    mine, p = load(args.ckpt, model.device, model.dtype), Projection.load(ROTATIONS)
    p = p.to(model.device)
    order = read_ranks(ROTATIONS.with_name("ranks.json"), mine.config).order
    _, held_out = load_data(None, args.ckpt, mine.config.vocab_size)
    texts = {"12 texts": even_windows(held_out, 12, 69), "random ids": torch.randint(1000, (2, 70))}
    for budget in (1.0, 0.5, 0.25):
        ranks = plan_at(order, mine.config, budget)
        for name, tokens in texts.items():
            tokens = tokens.to(model.device)
            expected = mine(tokens, project=p.at(ranks))
            cache = MatryoshkaCache(model, p, ranks=ranks)
            found = torch.cat([model(part, cache=cache).logits
                               for part in tokens.split([3, 20, 1, 46], dim=1)], dim=1)
            print(f"{budget:.0%}, {name}: logits differ from model.py's by "
                  f"{(found - expected).abs().max():.1e}, of up to {expected.abs().max():.0f}")


@torch.inference_mode()
def main():
    parser = cli.arguments(__doc__)
    add = parser.add_argument
    add("--tokens", type=cli.within(8, 10 ** 6), default=1024, help="in the cache [1024]")
    add("--bits", type=Path, help="a bits.json: BitsCache at 25 and 12.5%% too")
    add("--rounds", type=cli.within(1, 1000), default=5, help="[5]")
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    model = AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=dtype).to(device).eval()
    caches = {"DynamicCache": DynamicCache(config=model.config)}
    for budget in (1.0, 0.5, 0.25):
        caches[f"{budget:.0%}"] = MatryoshkaCache(model, ROTATIONS, budget=budget)
    for budget in (0.25, 0.125) if args.bits else ():
        from adapters.transformers_bits import BitsCache
        caches[f"bits {budget:.1%}"] = BitsCache(model, args.bits, budget)
    check(args, model)
    prompt = torch.randint(1000, (1, args.tokens), device=device)
    token = prompt[:, :1]

    for cache in caches.values():
        model(prompt, cache=cache, logits_to_keep=1)
    steps = [partial(model, token, cache=cache) for cache in caches.values()]
    seconds = timed(steps, args.rounds, 10)             # each makes its cache a token longer
    print(f"{args.tokens} tokens and more, {dtype}: milliseconds of a step, and of DynamicCache's")
    for (name, cache), of in zip(caches.items(), seconds, strict=True):
        kept = cache.nbytes if isinstance(cache, MatryoshkaCache) else sum(
            x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        print(f"{name:>13s} {spread([1e3 * s for s in of], '.1f')}  {ratio(of, seconds[0])}  "
              f"{kept:,} bytes stay")


if __name__ == "__main__":
    cli.run_script(main)
