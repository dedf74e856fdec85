"""Text from any budget: the whole road of a compressed cache, with its speed and its bytes.

    prefill     one pass over the prompt fills the cache, and gives the first new token
    decode      each further pass is of a single token, and reads the cache once

The plan is known here, so the cache's folded weights (folding.fold_head) take the place of the
originals, which are dropped. --shrink-to takes the cache to a smaller plan on the way: no layer
runs again, and decoding goes on.

    python generate.py --prompt "Return the "                       # the base model's full cache
    python generate.py --budget 0.375 --prompt "Return the "        # the same rank everywhere
    python generate.py --ranks out/ranks.json --budget 0.25 --prompt "Return the "
    python generate.py --ranks out/ranks.json --budget 1 --shrink-to 0.25 --at 50
    python generate.py --bits out/bits.json --budget 0.125 --prompt "Return the "    # rounded
"""
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import common
from bits import load_bits
from cache import KVCache
from distance import logits
from model import Model, load, pick
from plans import plan_arguments, plan_for, read_plan
from projection import uniform_ranks


@torch.inference_mode()
def decode(model: Model, cache: KVCache, tokens: list[int], count: int, temperature: float = 0.0,
           graph: bool = False):
    """Yields up to `count` tokens that follow `tokens`, or those up to the end of the sequence.

    The cache, of one sequence, must have room for len(tokens) + count − 1. `graph` is --graph.
    """
    new = torch.tensor([tokens], device=model.device)               # the prompt: prefill
    step = None
    for n in range(count):
        if graph and n == 1:
            step = fixed_step(model, cache, new, temperature)
        if graph and n == 2 and model.device.type == "cuda":        # the kernels are compiled
            step = recorded(step, model, cache)
        if step is None:
            new = following(model, cache, new, temperature)         # (1, 1)
        else:
            step()
        token = new.item()
        if token in model.config.eos_token_id:
            return
        yield token


def following(model: Model, cache: KVCache, tokens: Tensor, temperature: float) -> Tensor:
    """The token after `tokens` (1, T), (1, 1), which the cache takes up."""
    states = model.hidden(tokens, cache=cache)
    scores = logits(model.norm(states[:, -1]), model.lm_head.weight)
    return pick(scores, temperature)


# ------------------------------------------------------------------------------
# --graph. A GPU runs the kernels of a token faster than they are launched one by one; a CUDA graph
# is a recording of launches, which is launched whole. It has the same kernels work on the same
# memory again, so what changes from token to token lies on the GPU, and changes there.

def fixed_step(model: Model, cache: KVCache, token: Tensor, temperature: float):
    """A function that replaces `token` (1, 1) by its successor, in the same launches each time."""
    cache.fix_launches(model)

    def step() -> None:
        token.copy_(following(model, cache, token, temperature))

    return step


def recorded(step, model: Model, cache: KVCache):
    graph = torch.cuda.CUDAGraph()
    length = cache.length
    with torch.cuda.graph(graph):
        step()                                  # only recorded: on the GPU nothing changes
    cache.length = length

    def replay() -> None:
        cache.check_room(model, 1, 1)
        graph.replay()
        cache.length += 1

    return replay


def fold(model: Model, cache: KVCache) -> int:
    """Fold every layer now, and drop the weights that this replaces. Returns the bytes made."""
    size = 0
    for i, layer in enumerate(model.layers):
        weights = cache.fold(i, layer.self_attn)
        size += sum(W.nbytes for W in weights if W is not None)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, None)
    return size


def options():
    parser = common.arguments(__doc__)
    plan_arguments(parser, lowest=0.01)
    parser.add_argument("--bits", type=Path, help="a file of bits.py; --budget goes below 0.125")
    common.prompt_arguments(parser)
    parser.add_argument("--shrink-to", type=common.within(0.125, 1.0),
                        help="the budget that the cache shrinks to on the way")
    parser.add_argument("--at", type=common.within(1, 10 ** 6),
                        help="after how many new tokens it does [half of --tokens]")
    parser.add_argument("--graph", action="store_true",
                        help="decode by a CUDA graph; not yet timed on a GPU")
    args = parser.parse_args()
    if args.bits and (args.ranks or args.graph or args.shrink_to is not None):
        common.fail("--bits: goes with none of --ranks, --graph and --shrink-to")
    if args.bits is None and (args.budget or 1) < 0.125:
        common.fail(f"--budget {args.budget}: ranks go down to 0.125; below that only --bits does")
    if args.graph and args.shrink_to is not None:
        common.fail("--graph: is recorded for one layout of the cache; not with --shrink-to")
    if args.shrink_to is None and args.at:
        common.fail("--at: says when the cache shrinks; add --shrink-to")
    if args.shrink_to is None:
        return args
    if args.ranks is None and args.budget is None:
        args.budget = 1.0
    args.at = args.at or max(1, args.tokens // 2)
    if args.at >= args.tokens:
        common.fail(f"--at {args.at}: is not before the last of --tokens {args.tokens}")
    return args


def smaller_plan(args, model: Model, ranks: Tensor) -> Tensor:
    """The plan of --shrink-to; fails unless it is at or below `ranks`, that of the cache."""
    smaller = uniform_ranks(args.shrink_to, model.config)
    if args.ranks is not None:
        with common.blame("--ranks"):
            _, smaller = read_plan(args.ranks, model.config, args.shrink_to)
    if (smaller > ranks).any():
        common.fail(f"--shrink-to {args.shrink_to}: is above the budget that the cache begins with")
    return smaller


def main():
    args = options()
    device, dtype = common.prepare(args)
    with common.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
        tokenizer = common.load_tokenizer(args.ckpt, model.config.vocab_size)
    with common.blame("--prompt"):
        prompt = common.encode_prompt(tokenizer, args.prompt)
    room = len(prompt) + args.tokens
    room = (room + 15) // 16 * 16               # rows of 16-byte pieces, which a GPU loads whole
    smaller = None
    if args.bits:
        with common.blame("--bits"):
            bits = load_bits(args.bits)
            bits.rounding.p.check_fits(model.config)
            cache = bits.cache(args.budget or 0.125, 1, room, dtype, device)
    else:
        projection, ranks = plan_for(args, model)
        smaller = smaller_plan(args, model, ranks) if args.shrink_to else None
        cache = KVCache(projection, ranks, 1, room, dtype, device)
    folded = fold(model, cache)
    full = uniform_ranks(1.0, model.config).sum().item() * cache.max_len
    full *= 2 if args.bits else dtype.itemsize          # bits: of a 16-bit cache, as everywhere

    def size() -> str:
        return f"{cache.data.nbytes:,} bytes, {cache.data.nbytes / full:.1%} of the full {full:,}"

    said, times = [f"cache for {room} tokens: {size()}"], [time.perf_counter()]
    if args.bits:
        said.append(f"{cache.newest.nbytes:,} bytes for the newest {cache.newest.shape[-1]} tokens")

    def watched(tokens):
        for count, token in enumerate(tokens, 1):
            times.append(time.perf_counter())
            yield token
            if smaller is not None and count == args.at:        # between two passes
                cache.shrink(smaller)
                said.append(f"after {count} new tokens {size()}")

    tokens = decode(model, cache, prompt, args.tokens, args.temperature, args.graph)
    new_tokens = watched(tokens)
    made = common.show(tokenizer, prompt, new_tokens)
    times.append(time.perf_counter())

    speed = len(prompt) / (times[1] - times[0])
    said.insert(0, f"prefill {len(prompt)} tokens at {speed:,.0f} tokens/s")
    if len(made) > 2:           # the second token is not timed: Triton compiles the kernel for it
        speed = (len(made) - 2) / (times[-1] - times[2])
        said.insert(1, f"decode {len(made) - 2} at {speed:,.0f} tokens/s")
    said.append(f"attention's weights folded into {folded:,} bytes")
    print("; ".join(said), file=sys.stderr)


if __name__ == "__main__":
    common.run_script(main)
