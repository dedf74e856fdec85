"""Text from any budget: the whole road of a compressed cache, with its speed and its bytes.

    prefill     one pass over the prompt fills the cache, and gives the first new token
    decode      each further pass is of a single token, and reads the cache once

The plan is known here, so the cache's folded weights (cache.fold) take the place of the originals,
which are dropped. With --shrink-to, which takes the cache to a smaller plan on the way, they stay,
to be folded again; no layer runs again.

    python generate.py --prompt "Return the "                       # the base model's full cache
    python generate.py --budget 0.375 --prompt "Return the "        # out/projections.safetensors
    python generate.py --ranks out/ranks.json --budget 0.25 --prompt "Return the "
    python generate.py --budget 1 --shrink-to 0.25 --at 50
    python generate.py --ckpt DIR --chat --prompt "What is a list?" # by the folder's chat template
    python generate.py --bits out/bits.json --budget 0.125 --prompt "Return the "    # rounded
"""
import sys
import time
from pathlib import Path

from cache import KVCache
from model import Model, generate, load
from projection import LEVELS, uniform_ranks
from support import cli
from support.plans import plan_arguments, plans_for
from support.tokenizer import chat_prompt, encode_prompt, load_tokenizer, show


def fold(model: Model, cache, drop: bool) -> None:
    """Fold every layer now; `drop` the weights that this replaces."""
    for i, layer in enumerate(model.layers):
        at = layer.self_attn
        cache.fold(i, at)
        if drop:
            at.q_proj = at.k_proj = at.v_proj = at.o_proj = None


def options():
    parser = cli.arguments(__doc__)
    plan_arguments(parser, lowest=0.01)
    parser.add_argument("--bits", type=Path, help="a file of bits.train; --budget goes below 0.125")
    cli.prompt_arguments(parser)
    parser.add_argument("--chat", action="store_true",
                        help="--prompt is a user's turn, put as the folder's chat template says")
    parser.add_argument("--shrink-to", type=cli.within(1 / LEVELS, 1.0),
                        help="the budget that the cache shrinks to on the way")
    parser.add_argument("--at", type=cli.within(1, 10 ** 6),
                        help="after how many new tokens it does [half of --tokens]")
    args = parser.parse_args()
    if args.bits and (args.ranks or args.proj or args.shrink_to is not None):
        cli.fail("--bits: goes with none of --ranks, --proj and --shrink-to")
    if args.bits is None and (args.budget or 1) < 1 / LEVELS:
        cli.fail(f"--budget {args.budget}: ranks go down to {1 / LEVELS}, and only --bits below")
    if args.shrink_to is None and args.at:
        cli.fail("--at: says when the cache shrinks; add --shrink-to")
    if args.shrink_to is None:
        return args
    if args.ranks is None and args.budget is None:
        args.budget = 1.0
    if args.shrink_to > (args.budget or 1):
        cli.fail(f"--shrink-to {args.shrink_to}: is above the --budget that the cache begins with")
    if args.tokens == 1:
        cli.fail("--tokens 1: leaves no time to shrink (--shrink-to)")
    args.at = args.at or args.tokens // 2
    if args.at >= args.tokens:
        cli.fail(f"--at {args.at}: is not before the last of --tokens {args.tokens}")
    return args


def cache_of(args, model: Model, room: int):
    """The cache asked for, and the plan that it shrinks to, which counts with --shrink-to alone."""
    if args.bits:
        from bits import load_bits  # the second chapter, for those who ask for it
        with cli.blame("--bits"):
            bits = load_bits(args.bits)
            bits.rounding.p.check_fits(model.config)
            say_how_far("--bits", bits.rounding.p.positions, room)
            return bits.cache(args.budget or 0.125, 1, room, model.dtype, model.device), None
    projection, ranks, smaller = plans_for(args, model, args.budget, args.shrink_to)
    say_how_far("--proj", projection.positions, room)
    if args.shrink_to is not None and (smaller > ranks).any():
        cli.fail(f"--shrink-to {args.shrink_to}: is above the budget that the cache begins with")
    return KVCache(projection, ranks, 1, room, model.dtype, model.device), smaller


def say_how_far(option: str, positions: int, room: int) -> None:
    """A line where the text may go further than what its cache was made for."""
    if 0 < positions < room:
        print(f"{option}: was made at positions below {positions:,}, and this text may go up to "
              f"{room:,}: the further behind, the more is lost", file=sys.stderr)


def main():
    args = options()
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
        tokenizer = load_tokenizer(args.ckpt, model.config.vocab_size)
    with cli.blame("--chat"):
        text = chat_prompt(args.ckpt, args.prompt, tokenizer) if args.chat else args.prompt
    with cli.blame("--prompt"):
        prompt = encode_prompt(tokenizer, text)
    room = len(prompt) + args.tokens
    room = (room + 15) // 16 * 16               # so that the kernel loads 16 bytes at a time
    cache, smaller = cache_of(args, model, room)
    fold(model, cache, drop=args.shrink_to is None)
    full = uniform_ranks(1.0, model.config).sum().item() * room
    full *= 2 if args.bits else dtype.itemsize          # bits: of a 16-bit cache, as everywhere

    def size() -> str:
        return f"{cache.data.nbytes:,} bytes, {cache.data.nbytes / full:.1%} of the full {full:,}"

    said = [f"cache for {room} tokens: {size()}"]
    if args.bits:
        said.append(f"{cache.newest.nbytes:,} bytes for the newest {cache.newest.shape[-1]} "
                    f"tokens, {cache.first.nbytes:,} for {cache.whole} whole first ones")

    times = [time.perf_counter()]

    def watched(tokens):
        for count, token in enumerate(tokens, 1):
            times.append(time.perf_counter())
            yield token
            if not args.bits:
                cache.settle()
            if count == args.at:                                # between two passes
                cache.shrink(smaller)
                said.append(f"after {count} new tokens {size()}")

    tokens = generate(model, prompt, args.tokens, args.temperature, cache)
    made = show(tokenizer, prompt, watched(tokens))
    times.append(time.perf_counter())

    speed = len(prompt) / (times[1] - times[0])
    speeds = [f"prefill {len(prompt)} tokens at {speed:,.0f} tokens/s"]
    timed = len(made) - 2       # the second token is not timed: Triton compiles the kernel for it
    if timed > 0:
        speed = timed / (times[-1] - times[2])
        included = ", shrinking included" if args.at else ""
        speeds.append(f"decode {timed} at {speed:,.0f} tokens/s{included}")
    if not args.bits and cache.first.nbytes:
        said.append(f"{cache.first_nbytes:,} bytes for {cache.projection.whole} whole first tokens")
    folded = sum(weights.nbytes for weights in cache.folded)
    said.append(f"attention's weights folded: {folded:,} bytes")
    print("; ".join(speeds + said), file=sys.stderr)


if __name__ == "__main__":
    cli.run_script(main)
