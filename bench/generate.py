"""How fast this project generates, against transformers' `generate` in the same process.

Both continue the same 448 tokens of held-out text greedily by 128, prefill included, with the same
weights and no end of sequence: this project with the full cache and with 37.5% of it at a made-up
plan in which all heads differ, transformers with its own full cache. They take turns; medians over
the rounds, the least and the largest in brackets. Also said is how many of the new tokens are the
same in both with the full cache: all of them, unless two tokens are equally likely to the last
digit.

    pip install transformers        # nothing else in this project needs it
    python bench/generate.py
"""
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import ragged_ranks, ratio, timed
from cache import KVCache
from model import Model, generate, load
from projection import Projection, shape_of
from support import cli
from support.data import encode, python_documents
from support.tokenizer import load_tokenizer

PROMPT, NEW = 448, 128
BUDGETS = (1.0, 0.375)


def their_model(path: Path, model: Model):
    """transformers' model of the same folder, which will not stop at an end of sequence."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError:
        cli.fail("transformers is not installed: pip install transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return theirs.eval().to(model.device, model.dtype)


def our_generation(model: Model, prompt: list[int], budget: float):
    """A call that returns the new tokens, with a cache of this budget."""
    projection = Projection.identity(model.config).to(model.device)
    ranks = ragged_ranks(*shape_of(model.config), budget)
    cache = KVCache(projection, ranks, 1, PROMPT + NEW, model.dtype, model.device)

    def new_tokens() -> list[int]:
        cache.length = 0
        return list(generate(model, prompt, NEW, cache=cache))

    return new_tokens


def their_generation(theirs, prompt: list[int]):
    tokens = torch.tensor([prompt], device=theirs.device)
    everything = torch.ones_like(tokens)

    def new_tokens() -> list[int]:
        made = theirs.generate(tokens, attention_mask=everything, max_new_tokens=NEW,
                               do_sample=False)
        return made[0, PROMPT:].tolist()

    return new_tokens


def main():
    parser = cli.arguments(__doc__)
    count = cli.within(1, 10 ** 6)
    parser.add_argument("--rounds", type=count, default=5, help="[5]")
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    with cli.blame("--ckpt"):
        model, tokenizer = load(args.ckpt, device, dtype), load_tokenizer(args.ckpt)
    theirs = their_model(args.ckpt, model)
    model.config = replace(model.config, eos_token_id=())
    _, held_out = python_documents()
    tokens = encode(tokenizer, held_out[:50])
    prompt = tokens[:PROMPT].tolist()

    ours = [our_generation(model, prompt, budget) for budget in BUDGETS]
    calls = [*ours, their_generation(theirs, prompt)]
    pairs = zip(calls[0](), calls[-1](), strict=True)
    same = sum(mine == theirs for mine, theirs in pairs)
    print(f"{args.ckpt}: {PROMPT} tokens continued by {NEW}; with the full cache {same} of them "
          "are those of transformers\n")
    *seconds, of_theirs = timed(calls, args.rounds, repeats=1)
    print(f"{'new tokens/s':>36s}    time / transformers")
    for budget, of_ours in zip(BUDGETS, seconds, strict=True):
        name = f"here, {budget:.1%} of the cache"
        speed = NEW / statistics.median(of_ours)
        print(f"  {name:26s} {speed:7,.0f}    {ratio(of_ours, of_theirs)}")
    print(f"  {'transformers':26s} {NEW / statistics.median(of_theirs):7,.0f}")


if __name__ == "__main__":
    cli.run_script(main)
