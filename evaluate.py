"""The report: how far the compressed models in a folder are from the model, on held-out text.

    distance    KL, perplexity, accuracy, and recall: held-out passages of 64 tokens, followed by
                themselves, and how much of what the model gains in the second copy is left
                (distance.py)
    questions   multiple choice by log-likelihood, through the real cache: the measure of the paper
                (MatryoshkaKV, arXiv 2410.14731, section 4.1)

A curve of the report is a projection with a plan, the ranks of all heads, for every budget, the
share of the cache kept.

    python evaluate.py                                  # what train.py and search.py left in out/
    python evaluate.py --tasks demo/questions.jsonl

Reads projections.safetensors in the --out folder, and where they are train.json, ranks.json and
ranks_pca.json (`search.py --pca`); writes evaluation.json and .png. A line of --tasks is
{"context": text, "choices": [texts], "label": number of the right one, from 0}.
"""
import itertools
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import common
from cache import KVCache
from data import data_arguments, text_for
from distance import PASSAGE, logits, measure, recall, spread_windows
from model import Model, load
from plans import read_plan
from projection import BUDGETS, LEVELS, SIDES, Projection, uniform_ranks

# ------------------------------------------------------------------------------
# Multiple choice

def read_questions(path: Path) -> list[dict]:
    """Those of a .jsonl. ValueError names a bad line."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
            check_question(question)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f'{path}: line {number} is not {{"context": text, "choices": [two '
                             'texts or more], "label": number of the right one, from 0}') from None
        questions.append(question)
    if not questions:
        raise ValueError(f"{path}: holds no question")
    return questions


def check_question(question: dict) -> None:
    choices, label = question["choices"], question["label"]
    texts = [question["context"], *choices] if isinstance(choices, list) else [None]
    if not all(isinstance(text, str) for text in texts) or not all(choices) or len(choices) < 2:
        raise ValueError
    if type(label) is not int or not 0 <= label < len(choices):
        raise ValueError


@torch.no_grad()
def choice_scores(model: Model, tokenizer, question: dict, cache: KVCache) -> Tensor:
    """log p(choice | context) of every choice, summed over its tokens: (choices,).

    What all of context + choice begin with is prefilled once; the rest follows as one batch. A
    choice's tokens are those behind as many as the context has, at least one; a space that ends the
    context belongs to the choices.
    """
    def ids(text: str) -> list[int]:
        return common.with_beginning(tokenizer, tokenizer.encode(text))

    context_tokens = len(ids(question["context"].rstrip()))
    wholes = [ids(question["context"] + choice) for choice in question["choices"]]
    same = 0                                        # tokens that all share, and each has one more
    most = min(context_tokens, *(len(whole) - 1 for whole in wholes))
    while same < most and len({whole[same] for whole in wholes}) == 1:
        same += 1
    if not same:
        raise ValueError("the tokenizer has no beginning of sequence, and nothing goes before "
                         f"{question['choices'][0]!r}")
    ends = [whole[same:] for whole in wholes]
    longest = max(map(len, ends))

    cache.length = 0
    prefix = torch.tensor([wholes[0][:same]], device=model.device)
    states = model.hidden(prefix, cache=cache)[:, -1:].expand(len(ends), -1, -1)
    if longest > 1:
        padded = [end[:-1] + [0] * (longest - len(end)) for end in ends]    # zeros are never seen
        wider = spread(cache, len(ends), longest - 1)
        after = model.hidden(torch.tensor(padded, device=model.device), cache=wider)
        states = torch.cat((states, after), dim=1)
    log_p = logits(model.norm(states), model.lm_head.weight).log_softmax(-1)

    scores = []
    for row, end, whole in zip(log_p, ends, wholes, strict=True):
        first = min(context_tokens, len(whole) - 1) - same      # what is before is context
        scores.append(row[torch.arange(first, len(end)), end[first:]].sum())
    return torch.stack(scores)


def spread(cache: KVCache, batch: int, more: int) -> KVCache:
    """A cache of `batch` copies of the one sequence in `cache`, with room for `more` tokens."""
    n = cache.length
    wider = KVCache(cache.projection, cache.ranks, batch, n + more, cache.dtype, cache.device)
    wider.folded = cache.folded
    wider.length = n
    for place in itertools.product(*map(range, cache.ranks.shape)):     # side, layer, head
        wider.block(*place)[..., :n] = cache.block(*place)[..., :n]
    return wider


def answer(model: Model, tokenizer, questions: list[dict], projection: Projection, ranks: Tensor):
    """The share of questions whose right choice scores highest: by sum, and by sum per character.

    Of equal choices the first is taken.
    """
    room = max(len(tokenizer.encode(q["context"])) for q in questions) + 1
    cache = KVCache(projection, ranks, 1, room, model.dtype, model.device)
    right = torch.zeros(2)
    for q in questions:
        scores = choice_scores(model, tokenizer, q, cache).cpu()
        by_character = scores / torch.tensor([len(choice) for choice in q["choices"]])
        right += torch.tensor([x.argmax() == q["label"] for x in (scores, by_character)])
    accuracy, accuracy_by_character = (right / len(questions)).tolist()
    return {"accuracy": accuracy, "accuracy_by_character": accuracy_by_character}


# ------------------------------------------------------------------------------
# The report: named curves, each a projection with a plan for every budget

CURVES = {      # name in files: heading in tables, label and style in pictures
    "pca": ("PCA", "PCA, uniform ranks", "C1", "s"),
    "trained": ("trained", "trained, uniform ranks", "C0", "o"),
    "uniform": ("uniform", "uniform ranks", "C0", "o"),
    "pca_ordered": ("PCA*", "PCA, ranks along the order", "C3", "v"),
    "trained_ordered": ("trained*", "trained, ranks along the order", "C2", "^"),
    "pca_searched": ("PCA*", "PCA, searched ranks", "C3", "v"),
    "searched": ("trained*", "trained, searched ranks", "C2", "^"),
}


def write_report(model, held_out, curves: dict, args, path: Path, said: dict, more=dict,
                 passages=None) -> None:
    """Report on `curves`; write rows, `said` and what `more` gives to `path`, and a picture."""
    base, rows = report(model, held_out, curves, args, passages=passages)
    said = said | more() | {"base": base, "budgets": rows}
    with common.blame("--out"):
        common.write_json(path, said, indent=1)
        draw(base, rows, path.with_suffix(".png"))
    print(f"Saved {path} and {path.with_suffix('.png')}")


def report(model: Model, held_out: np.ndarray, curves: dict, args, budgets=BUDGETS, passages=None):
    """Measure `curves`, {name: (projection, function from a budget to a plan)}, and print a table.

    passages (N, n): what recall is measured on, if at all.
    Returns what the base model has, and a row for every budget.
    """
    hooks = {}
    for name, (projection, plan) in curves.items():
        hooks |= {(name, b): projection.at(plan(b)) for b in budgets if b < 1}
    with common.blame("--ckpt"):
        base, results = measure(model, held_out, hooks, args.batch, args.seq, args.windows)
    # At full ranks a curve is the model itself.
    full = {"kl": 0.0} | base | {"same": 1.0, "kl_99.9": 0.0}
    if passages is not None:
        base["recall"] = full["recall"] = recall(model, passages)
        for key, hook in hooks.items():
            results[key]["recall"] = recall(model, passages, hook)
    rows = [{"budget": budget} | {name: results.get((name, budget), full) for name in curves}
            for budget in budgets]
    print_table(base, rows)
    return base, rows


def print_table(base: dict, rows: list[dict]) -> None:
    """Two tables side by side would be too wide: means first, then what is lost of the model."""
    print(f"\nHeld-out text, base model: perplexity {base['perplexity']:.3f}, accuracy "
          f"{base['accuracy']:.2%}")
    print_columns(rows, [("KL to the base model", "kl", ".5f", 1),
                         ("perplexity", "perplexity", ".3f", 1),
                         ("accuracy, %", "accuracy", ".2f", 100)])
    lost = [("same likeliest, %", "same", ".2f", 100),
            ("KL, 99.9th percentile", "kl_99.9", ".4f", 1)]
    if "recall" in base:
        print(f"\nRecall of the base model: passages said a second time gain {base['recall']:.2%}")
        lost.append(("recall, % of base", "recall", ".2f", whole_recall(base["recall"])))
    print_columns(rows, lost)
    own_plan = {"pca_ordered", "trained_ordered", "pca_searched", "searched"}
    print("\n* with its own rank for every head\n" if own_plan & rows[0].keys() else "")


def whole_recall(gain: float) -> float:
    """What makes a recall a percentage of the model's own; NaN where the model has none."""
    return 100 / gain if gain > 0 else math.nan


def print_columns(rows: list[dict], columns: list) -> None:
    """Of every column, (title, key, format, factor), what each curve has at each budget."""
    names = [name for name in rows[0] if name != "budget"]
    headings = "".join(f"{CURVES[name][0]:>11s}" for name in names)
    print("\n   cache" + "".join(f" | {title:^{len(headings)}s}" for title, *_ in columns))
    print("        " + f" | {headings}" * len(columns))
    for row in rows:
        line = f"  {row['budget']:6.1%}"
        for _, key, form, scale in columns:
            line += " | " + "".join(f"{scale * row[name][key]:11{form}}" for name in names)
        print(line)


def draw(base: dict, rows: list[dict], path: Path) -> None:
    """KL, accuracy, and recall where it was measured, against the budget."""
    x = [100 * row["budget"] for row in rows]
    columns = 3 if "recall" in base else 2
    with common.picture(path, columns, width=5 * columns) as axes:
        distance, quality, *memory = axes
        for name in rows[0]:
            if name == "budget":
                continue
            _, label, color, marker = CURVES[name]
            style = {"label": label, "color": color, "marker": marker}
            kl = [row[name]["kl"] if row["budget"] < 1 else math.nan for row in rows]   # not log 0
            distance.plot(x, kl, **style)
            quality.plot(x, [100 * row[name]["accuracy"] for row in rows], **style)
            for axis in memory:
                recalls = [row[name]["recall"] for row in rows]
                axis.plot(x, [whole_recall(base["recall"]) * y for y in recalls], **style)
        distance.set(yscale="log", ylabel="KL to the base model, nats per token",
                     title="Distance from the base model")
        quality.axhline(100 * base["accuracy"], color="grey", linestyle="--", label="base model")
        quality.set(ylabel="accuracy of the next token, %", title="Quality on held-out text")
        for axis in memory:
            axis.axhline(100, color="grey", linestyle="--", label="base model")
            axis.set(ylabel="recall, % of the base model's", title="Passages said a second time")
        for axis in axes:
            axis.set(xlabel="size of the KV cache, % of full", xticks=x)
            axis.invert_xaxis()
            axis.grid(alpha=0.3)
            axis.legend()


def draw_plan(ranks: Tensor, d: int, searched_kl: list, uniform_kl: dict, path: Path) -> None:
    """A plan (2, L, K) as two heat maps; the KL after each lowering, against uniform ranks."""
    _, L, K = ranks.shape
    with common.picture(path, 3, width=13, width_ratios=[1, 1, 1.5]) as (keys, values, curve):
        for side, axis in enumerate((keys, values)):
            image = axis.imshow(ranks[side].numpy(), vmin=0, vmax=d, aspect="auto", cmap="viridis")
            share = ranks[side].sum() / ranks.sum()
            axis.set(title=f"{SIDES[side]}: {share:.0%} of the cache", ylabel="layer",
                     xlabel="key-value head", xticks=range(0, K, max(1, K // 8)),
                     yticks=range(0, L, max(1, L // 8)))
        values.figure.colorbar(image, ax=values, label="rank")
        one = 100 / (ranks.numel() * LEVELS)
        sizes = [100 - one * (n + 1) for n in range(len(searched_kl))]
        curve.plot(sizes, searched_kl, label="searched")
        curve.plot([100 * b for b in uniform_kl], uniform_kl.values(), marker="o", label="uniform")
        curve.set(yscale="log", ylim=(1e-5, None), xlabel="size of the KV cache, % of full",
                  ylabel="KL on the calibration text, nats per token")
        curve.invert_xaxis()
        curve.grid(alpha=0.3)
        curve.legend()


def show_bytes(axis) -> None:
    """A logarithmic axis of bytes, from many to few."""
    ticks = [5, 6.25, 9.4, 12.5, 18.75, 25, 37.5, 50, 75]
    axis.set(xscale="log", xlabel="bytes of a token, % of a 16-bit cache")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.grid(alpha=0.3)


def report_tasks(model: Model, curves: dict, args) -> dict:
    """Multiple choice at every budget, through the real cache."""
    with common.blame("--tasks"):
        questions = read_questions(args.tasks)
        tokenizer = common.load_tokenizer(args.ckpt, model.config.vocab_size)
        n = len(questions)
        print(f"{args.tasks}: {n} questions, accuracy by summed log-likelihood "
              "(and by log-likelihood per character), %\n")
        unturned = Projection.identity(model.config)
        full = uniform_ranks(1.0, model.config)
        base = answer(model, tokenizer, questions, unturned, full)
        print("   cache  " + "".join(f"{name:>17s}" for name in ("base", *curves)))
        rows = []
        for budget in BUDGETS:
            row = {name: answer(model, tokenizer, questions, projection, plan(budget))
                   for name, (projection, plan) in curves.items()}
            rows.append({"budget": budget} | row)
            shown = [f"{100 * r['accuracy']:6.2f} ({100 * r['accuracy_by_character']:5.2f})"
                     for r in (base, *row.values())]
            print(f"  {budget:6.1%}  " + "".join(f"{text:>17s}" for text in shown), flush=True)
    return {"tasks": {"file": str(args.tasks), "questions": n, "base": base, "budgets": rows}}


# ------------------------------------------------------------------------------
# The script

def report_arguments(parser, batch: int = 8, windows: int = 64, seq: int | None = 256) -> None:
    parser.add_argument("--batch", type=common.within(1, 10 ** 5), default=batch,
                        help=f"sequences at a time [{batch}]")
    length = seq or "the model's length, at most 2048"
    parser.add_argument("--seq", type=common.within(2, 10 ** 6), default=seq,
                        help=f"tokens of each [{length}]")
    parser.add_argument("--windows", type=common.within(1, 10 ** 6), default=windows,
                        help=f"windows of --seq held-out tokens to report on [{windows}]")


def passage_arguments(parser, least: int = 0) -> None:
    none = "" if least else "; 0 for none"
    parser.add_argument("--passages", type=common.within(least, 10 ** 6), default=500,
                        help=f"held-out passages to say twice, for the recall{none} [500]")


def held_out_passages(args, held_out: np.ndarray, config, n: int = PASSAGE) -> Tensor | None:
    """--passages of n tokens (N, n), of fewer where the model has no positions for two; or None."""
    if not args.passages:
        return None
    n = min(n, config.max_position_embeddings // 2)
    with common.blame("--passages"):
        return spread_windows(held_out, args.passages, n)[:, 1:]


def curves_in(folder: Path, model: Model) -> dict:
    """What train.py and search.py left in a folder, as curves."""
    config = model.config
    trained, pca = (Projection.load(folder / "projections.safetensors", p) for p in ("", "pca_"))
    trained.check_fits(config)
    trained, pca = trained.to(model.device), pca.to(model.device)
    uniform = partial(uniform_ranks, config=config)
    curves = {"pca": (pca, uniform), "trained": (trained, uniform)}
    if (folder / "ranks_pca.json").exists():
        curves["pca_searched"] = (
            pca, lambda budget: read_plan(folder / "ranks_pca.json", config, budget)[1])
    if (folder / "ranks.json").exists():
        curves["searched"] = (
            trained, lambda budget: read_plan(folder / "ranks.json", config, budget)[1])
    return curves


def describe(ckpt: Path, model) -> str:
    c, millions = model.config, sum(p.numel() for p in model.parameters()) / 1e6
    return (f"{ckpt}: {millions:,.1f} M parameters, {c.num_hidden_layers} layers, "
            f"{c.num_attention_heads} query heads on {c.num_key_value_heads}, {c.head_dim} wide")


def check_same_run(folder: Path, args) -> None:
    """ValueError where train.json names another model, text or --seq."""
    if not (folder / "train.json").exists():
        return
    config = common.read_json(folder / "train.json").get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'train.json'}: no config of a training")
    for name, now in (("ckpt", str(args.ckpt)), ("data", str(args.data or "")), ("seq", args.seq)):
        if config[name] != now:
            raise ValueError(f"{folder}: was trained with --{name} {config[name]}, not {now}")


def main():
    parser = common.arguments(__doc__)
    data_arguments(parser)
    report_arguments(parser)
    passage_arguments(parser)
    parser.add_argument("--tasks", type=Path,
                        help="a .jsonl of multiple-choice questions to answer at every budget")
    args = parser.parse_args()
    device, dtype = common.prepare(args)
    common.keep_freed_memory()
    if args.tasks:
        with common.blame("--tasks"):
            read_questions(args.tasks)
    common.check_folder(args.out)
    with common.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    with common.blame("--out"):
        curves = curves_in(args.out, model)
        check_same_run(args.out, args)
        for _, plan in curves.values():
            plan(BUDGETS[-1])                       # fail now if a path ends too early
    print(describe(args.ckpt, model))
    _, held_out = text_for(args, model.config)
    passages = held_out_passages(args, held_out, model.config)

    tasks = partial(report_tasks, model, curves, args) if args.tasks else dict
    write_report(model, held_out, curves, args, args.out / "evaluation.json", {}, tasks,
                 passages)


if __name__ == "__main__":
    common.run_script(main)
