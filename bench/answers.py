"""Questions whose answers stand far back, or follow from a text: what a smaller cache still knows.

Of --count questions one half is a list of 24 people and what each keeps, said once, and once more
up to one of them: the four choices are what four of them keep. The other half is 150 words of
held-out text, and the choices are its next ten words and those behind three other places. All are
drawn with --seed and written to OUT/answers.jsonl, which `evaluate.py --tasks` takes as well. They
go through the real caches, of ranks as train.py left them in --out and, with --bits FILE, of bits.

    python bench/answers.py --ckpt ../smollm2 --out out_smollm2 --bits out_smollm2/bits.json
"""
import json
import random
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bits import load_bits
from bits.rounding import GROUP
from cache import KVCache
from evaluate import choice_scores, describe, tokens_of
from model import load
from projection import Projection, plan_at, uniform_ranks
from support import cli, files
from support.data import load_data
from support.plans import PROJECTIONS, order_beside
from support.progress import Progress
from support.tokenizer import load_tokenizer

NAMES = """Anna Boris Carla David Elena Felix Greta Hugo Irene Jonas Klara Leo Maria Nils Olga Peter
Rosa Simon Tina Ugo Vera Walter Xenia Yusuf Zoe Arthur Bella Cyril Dora Emil""".split()
THINGS = "coins stamps shells books keys stones letters maps ribbons buttons".split()
COLOURS = "red blue green white black yellow brown grey".split()
PLACES = "box bag drawer basket cupboard chest jar".split()


def look_up(draw: random.Random, people: int = 24) -> dict:
    names = draw.sample(NAMES, people)
    kept = [f" {draw.randint(11, 99)} {draw.choice(THINGS)} in a {draw.choice(COLOURS)} "
            f"{draw.choice(PLACES)}." for _ in names]
    asked, *others = draw.sample(range(people), 4)
    choices = [kept[i] for i in (asked, *others)]
    draw.shuffle(choices)
    said = [f"{name} keeps{what}" for name, what in zip(names, kept, strict=True)]
    text = " ".join([*said, "Once more:", *said[:asked], f"{names[asked]} keeps"])
    return {"context": text, "choices": choices, "label": choices.index(kept[asked])}


def next_words(draw: random.Random, words: list[str], before: int = 150, after: int = 10) -> dict:
    at, *others = draw.sample(range(before, len(words) - after), 4)
    choices = [" " + " ".join(words[i:i + after]) for i in (at, *others)]
    right = choices[0]
    draw.shuffle(choices)
    return {"context": " ".join(words[at - before:at]), "choices": choices,
            "label": choices.index(right)}


def share_right(model, questions: list, tokens: list, make_cache, what: str) -> list[float]:
    """Of look-ups, and of next words."""
    cache = make_cache(max(len(whole) for wholes, _, _ in tokens for whole in wholes))
    right, progress = torch.zeros(2), Progress(len(questions), what)
    for number, (question, of_question) in enumerate(zip(questions, tokens, strict=True)):
        scores = choice_scores(model, *of_question, cache)
        right[number % 2] += scores.argmax() == question["label"]
        progress(number + 1)
    return (2 * right / len(questions)).tolist()


@torch.no_grad()
def main():
    parser = cli.arguments(__doc__)
    cli.out_argument(parser)
    add = parser.add_argument
    add("--bits", type=Path, help="a file of bits.train")
    add("--count", type=cli.within(2, 10 ** 4), default=200, help="questions [200]")
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    model, tokenizer = load(args.ckpt, device, dtype), load_tokenizer(args.ckpt)
    config = model.config
    print(describe(args.ckpt, model))
    _, held_out = load_data(None, args.ckpt, config.vocab_size)
    words = tokenizer.decode(held_out.tolist()).split()
    draw, questions, tokens = random.Random(args.seed), [], []
    while len(questions) < args.count:
        question = next_words(draw, words) if len(questions) % 2 else look_up(draw)
        wholes, shared, begin = tokens_of(tokenizer, question)
        if max(len(whole) for whole in wholes) - shared <= GROUP:   # so far bits go back at least
            questions.append(question)
            tokens.append((wholes, shared, begin))
    with files.written_whole(args.out / "answers.jsonl") as file:
        file.write("".join(json.dumps(question) + "\n" for question in questions).encode())
    long = sum(shared for _, shared, _ in tokens) / len(tokens)
    print(f"{len(questions)} questions, {long:.0f} tokens before the choices")

    p = Projection.load(args.out / PROJECTIONS).to(device)
    _, order = order_beside(args.out / PROJECTIONS, p, config)
    said = {"dtype": dtype, "device": device}
    caches = {"the model": partial(KVCache, p, uniform_ranks(1.0, config), 1, **said)}
    for budget in (0.75, 0.5, 0.25):
        caches[f"ranks {budget:.1%}"] = partial(KVCache, p, plan_at(order, config, budget), 1,
                                                **said)
    for budget in (0.25, 0.125, 0.0625) if args.bits else ():
        bits = load_bits(args.bits)
        caches[f"bits {budget:.2%}"] = partial(bits.cache, budget, 1, **said)
    print(f"{'right, %':15s}{'looked up':>12s}{'next words':>12s}")
    for name, make in caches.items():
        found = share_right(model, questions, tokens, make, name)
        print(f"{name:15s}" + "".join(f"{100 * share:12.1f}" for share in found), flush=True)


if __name__ == "__main__":
    cli.run_script(main)
