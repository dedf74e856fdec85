"""What the compressed cache costs in time: one step of decoding, against the full cache.

First one attention step at the shape of a LLaMA-2-7B layer (32 heads, d = 128), batch 1: this
project's cache, full and at made-up plans in which all heads differ, and PyTorch's
scaled_dot_product_attention over the full cache. Then whole steps of the model, projections and
MLP included, behind contexts of several lengths, of projections with a mean of the keys and 4 whole
tokens, as train.py makes them; beside them the floor, one product with each matrix of the model,
and, where it is installed, transformers with its DynamicCache. Then what mean and whole tokens add
at 37.5%, and a prefill. All that is compared takes turns in one process; ratios are medians over
the rounds, the least and the largest in brackets.

    python bench/cache.py                       # the demo; on a GPU the Triton kernel attends
    python bench/cache.py --rounds 1            # a quick look
    python bench/cache.py --ckpt DIR --batch 8 --dtype bfloat16
"""
import importlib.util
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.generate import their_model
from bench.tools import ragged_ranks, ratio, timed
from cache import KVCache
from model import Model, last_logits, load
from projection import Projection, shape_of
from support import cli

HEADS, D = 32, 128                              # LLaMA-2-7B's
LENGTHS = (512, 4096)
ROOM = 128              # tokens that a cache could still take: in use rows are not read to the end
BUDGETS = (1.0, 0.5, 0.375, 0.25)
WHOLE = {           # (a mean of the keys, whole tokens): name
    (False, 0): "neither",
    (True, 0): "a mean",
    (True, 4): "a mean and 4 whole",
}


def attention_step(budget: float, tokens: int, both):
    """A call that appends the last of `tokens` to a layer's cache at this budget, and attends."""
    eye = torch.eye(D).expand(1, HEADS, D, D)
    projection = Projection(eye, eye, torch.zeros(1, HEADS, D))
    ranks = ragged_ranks(1, HEADS, D, budget)
    cache = KVCache(projection, ranks, 1, tokens + ROOM, both.dtype, both.device)
    cache.data.normal_()
    cache.length = tokens - 1
    cache.span[1].fill_(tokens)
    width = int(ranks[1].sum())
    v = both.new_empty(1, 1, width).normal_()
    return lambda: cache.attend(0, both, v)


def time_attention(tokens: int, rounds: int, dtype, device) -> None:
    def random(length: int):
        return torch.randn(1, HEADS, length, D, dtype=dtype, device=device)

    q, k = random(1), random(1)
    keys, values = random(tokens), random(tokens)
    budgets = (1.0, 0.375, 0.25)
    both = torch.stack((q, k), dim=2)                               # (1, HEADS, 2, 1, D)
    steps = [attention_step(budget, tokens, both) for budget in budgets]
    steps.append(lambda: F.scaled_dot_product_attention(q, keys, values))
    *ours, pytorch = timed(steps, rounds, repeats=5)

    print(f"One attention step, {HEADS} heads of {D}, {tokens:,} tokens, {dtype_name(dtype)}: "
          f"PyTorch's over the full cache takes {1e3 * statistics.median(pytorch):.2f} ms\n")
    print("    bytes    time / full cache here       time / scaled_dot_product_attention")
    for budget, seconds in zip(budgets, ours, strict=True):
        print(f"   {budget:6.1%}    {ratio(seconds, ours[0]):27s}  {ratio(seconds, pytorch)}")


def model_step(model: Model, budget: float, length: int, has_mean: bool = False, whole: int = 0,
               batch: int = 1):
    """A call that decodes one token behind `length` others."""
    p = Projection.identity(model.config)
    mean_k = torch.randn_like(p.mean_v) if has_mean else None
    projection = Projection(p.U_k, p.U_v, p.mean_v, mean_k, whole)
    ranks = ragged_ranks(*shape_of(model.config), budget)
    cache = KVCache(projection, ranks, batch, length + ROOM, model.dtype, model.device)
    cache.data.normal_()
    cache.first.normal_()
    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    def step() -> None:
        cache.length = length
        model(token, cache=cache)

    step()
    cache.settle()                              # as generate.py does behind the prompt
    return step


def products_alone(model: Model, batch: int):
    """A call that multiplies once with each matrix of the model: the floor of a step."""
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    rows = [W.new_ones(batch, W.shape[1]) for W in matrices]

    def step() -> None:
        for x, W in zip(rows, matrices, strict=True):
            F.linear(x, W)

    return step


def their_step(theirs, length: int, batch: int):
    """The step of transformers 5.24 behind `length` random tokens, in its DynamicCache."""
    from transformers import DynamicCache
    cache, c = DynamicCache(config=theirs.config), theirs.config
    like = {"dtype": theirs.dtype, "device": theirs.device}
    for i in range(c.num_hidden_layers):
        cache.update(*torch.randn(2, batch, c.num_key_value_heads, length, c.head_dim, **like), i)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=theirs.device)

    def step() -> None:
        theirs(token, cache=cache, use_cache=True)
        cache.crop(-1)

    return step


def time_model(model: Model, theirs, batch: int, rounds: int) -> None:
    others = ["products alone"] + ["transformers"] * (theirs is not None)
    heads = [f"{budget:.1%}" for budget in BUDGETS[1:]] + others
    print("   context   100%, tokens/s" + "".join(f"    {head:21s}" for head in heads).rstrip())
    for length in LENGTHS:
        steps = [model_step(model, 1.0, length, batch=batch)]
        steps += [model_step(model, budget, length, True, 4, batch) for budget in BUDGETS[1:]]
        steps.append(products_alone(model, batch))
        if theirs is not None:
            steps.append(their_step(theirs, length, batch))
        full, *rest = timed(steps, rounds, repeats=10)
        ratios = "".join(f"    {ratio(seconds, full):21s}" for seconds in rest)
        speed = batch / statistics.median(full)
        print(f"   {length:7,}   {speed:14,.1f}{ratios.rstrip()}", flush=True)


def time_whole(model: Model, batch: int, rounds: int) -> None:
    """At 37.5%, with and without a mean of the keys, and whole tokens, against the full cache."""
    print("   context" + "".join(f"    {name:21s}" for name in WHOLE.values()).rstrip())
    for length in LENGTHS:
        steps = [model_step(model, 1.0, length, batch=batch)]
        steps += [model_step(model, 0.375, length, *kind, batch) for kind in WHOLE]
        full, *others = timed(steps, rounds, repeats=10)
        ratios = "".join(f"    {ratio(seconds, full):21s}" for seconds in others)
        print(f"   {length:7,}{ratios.rstrip()}", flush=True)


def time_prefill(model: Model, theirs, rounds: int) -> None:
    """Milliseconds to the first token behind a prompt, and against transformers."""
    config = model.config
    p = Projection.identity(config)
    turned = Projection(p.U_k, p.U_v, p.mean_v, torch.randn_like(p.mean_v), 4)

    def ours(budget: float, prompt):
        ranks = ragged_ranks(*shape_of(config), budget)
        cache = KVCache(turned, ranks, 1, prompt.shape[1], model.dtype, model.device)

        def step() -> None:
            cache.length = 0
            last_logits(model, model.hidden(prompt, cache=cache)[:, -1])

        return step

    print("    prompt   100%, ms          37.5%" + " " * 19 + "transformers" * (theirs is not None))
    for length in LENGTHS:
        prompt = torch.randint(config.vocab_size, (1, length), device=model.device)
        steps = [ours(1.0, prompt), ours(0.375, prompt)]
        if theirs is not None:
            steps.append(lambda x=prompt: theirs(x, use_cache=True, logits_to_keep=1))
        full, *rest = timed(steps, rounds, repeats=1)
        ratios = "".join(f"    {ratio(seconds, full):21s}" for seconds in rest)
        print(f"   {length:7,}   {1e3 * statistics.median(full):8,.0f}      {ratios.rstrip()}",
              flush=True)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def main():
    parser = cli.arguments(__doc__)
    count = cli.within(1, 10 ** 6)
    parser.add_argument("--rounds", type=count, default=5, help="[5]")
    parser.add_argument("--tokens", type=count, default=8192,
                        help="in the cache of the attention step [8192]")
    parser.add_argument("--batch", type=count, default=1, help="sequences of a whole step [1]")
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    theirs = their_model(args.ckpt, model) if importlib.util.find_spec("transformers") else None
    time_attention(args.tokens, args.rounds, dtype, device)
    print(f"\nA step of {args.ckpt}, {dtype_name(dtype)}, batch {args.batch}: tokens/s with the "
          "full cache, and time against it\n")
    time_model(model, theirs, args.batch, args.rounds)
    print("\nTime at 37.5% against the full cache, of projections with neither a mean of the keys "
          "nor whole\ntokens, with one, and with both\n")
    time_whole(model, args.batch, args.rounds)
    print("\nPrefill of one prompt, first token included: milliseconds, and time against that\n")
    time_prefill(model, theirs, args.rounds)


if __name__ == "__main__":
    cli.run_script(main)
