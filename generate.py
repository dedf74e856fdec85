"""Text from any budget: the whole road of a compressed cache, with its speed and its bytes.

    prefill     one pass over the prompt fills the cache, and gives the first new token
    decode      each further pass is of a single token, and reads the cache once

The plan is known here and stays, so the folded weights W_v' and W_o' (projection.fold_values) take
the place of the originals, which are dropped.

    python generate.py --prompt "Return the "                       # the base model's full cache
    python generate.py --budget 0.375 --prompt "Return the "        # the same rank everywhere
    python generate.py --ranks out/ranks.json --budget 0.25 --prompt "Return the "
"""
import sys
import time

import torch

import common
from cache import KVCache, plan_arguments, plan_for
from evaluate import logits
from model import Model, load, pick
from projection import uniform_ranks


@torch.inference_mode()
def decode(model: Model, cache: KVCache, tokens: list[int], count: int, temperature: float = 0.0):
    """Yields up to `count` tokens that follow `tokens`, or those up to the end of the sequence.

    The cache, of one sequence, must have room for len(tokens) + count − 1.
    """
    new = torch.tensor([tokens], device=model.device)               # the prompt: prefill
    for _ in range(count):
        states = model.hidden(new, cache=cache)
        scores = logits(model.norm(states[:, -1]), model.lm_head.weight)
        new = pick(scores, temperature)                             # (1, 1)
        token = new.item()
        if token in model.config.eos_token_id:
            return
        yield token


def fold(model: Model, cache: KVCache) -> int:
    """Fold the values of every layer now, and drop the weights that this replaces; bytes made."""
    size = 0
    for i, layer in enumerate(model.layers):
        weights = cache.fold(i, layer.self_attn)
        size += sum(W.nbytes for W in weights if W is not None)
        layer.self_attn.v_proj = layer.self_attn.o_proj = None
    return size


def main():
    parser = common.arguments(__doc__)
    plan_arguments(parser)
    common.prompt_arguments(parser)
    args = parser.parse_args()
    device, dtype = common.prepare(args)
    with common.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
        tokenizer = common.load_tokenizer(args.ckpt, model.config.vocab_size)
    projection, ranks = plan_for(args, model)
    with common.blame("--prompt"):
        prompt = common.encode_prompt(tokenizer, args.prompt)
    cache = KVCache(projection, ranks, 1, len(prompt) + args.tokens, dtype, device)
    is_full = bool((ranks == model.config.head_dim).all())
    folded = 0 if is_full else fold(model, cache)

    times = [time.perf_counter()]

    def timed(tokens):
        for token in tokens:
            times.append(time.perf_counter())
            yield token

    new_tokens = timed(decode(model, cache, prompt, args.tokens, args.temperature))
    made = common.show(tokenizer, prompt, new_tokens)
    times.append(time.perf_counter())

    full = uniform_ranks(1.0, model.config).sum().item() * cache.max_len * dtype.itemsize
    said = [f"prefill {len(prompt)} tokens at {len(prompt) / (times[1] - times[0]):,.0f} tokens/s"]
    if len(made) > 2:           # the second token is not timed: Triton compiles the kernel for it
        speed = (len(made) - 2) / (times[-1] - times[2])
        said.append(f"decode {len(made) - 2} at {speed:,.0f} tokens/s")
    said.append(f"cache {cache.data.nbytes:,} bytes for {cache.max_len} tokens, "
                f"{cache.data.nbytes / full:.1%} of the full {full:,}")
    if folded:
        said.append(f"values folded into {folded:,} bytes of weights")
    print("; ".join(said), file=sys.stderr)


if __name__ == "__main__":
    common.run_script(main)
