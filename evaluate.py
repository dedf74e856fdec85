"""How far a compressed model is from the model, on text it never saw.

    KL          Σ p log(p / q), the model's next-token distribution p against the compressed one's
                q, in nats per token: 0 is the model itself. The mean over tokens, by position too,
                and the 99.9th percentile, which one token in a thousand exceeds
    perplexity  exp of the mean −log q(next token); accuracy: how often q's likeliest token is it
    same        how often q's likeliest token is p's
    recall      a passage is said twice: how much more often q's likeliest token is the next one in
                the second copy than in the first. The mean KL hides this: in most of a text little
                hangs on tokens far back, and to remember them is what a cache is for
    questions   multiple choice by log-likelihood, through the real cache: the measure of the paper
                (MatryoshkaKV, arXiv 2410.14731, section 4.1)

All but the questions are taken with keys and values projected (`project=`); the cache gives the
same logits. A curve of the report is a projection, and a function from a budget, the share of the
cache kept, to a plan, the ranks of all heads.

    python evaluate.py                                  # what train.py and search.py left in out/
    python evaluate.py --tasks demo/questions.jsonl

Reads projections.safetensors in the --out folder, and ranks.json and ranks_pca.json (train.py,
search.py) where they were found for these projections; writes evaluation.json and .png. A line of
--tasks is {"context": text, "choices": [texts], "label": number of the right one, from 0}.
"""
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cache import KVCache
from model import Model, load, log_probabilities, logits
from projection import BUDGETS, Projection, plan_at, uniform_ranks
from support import cli, files
from support.checkpoint import read_config
from support.data import even_windows, held_out_passages, text_for
from support.pictures import CURVES, draw_report, whole_recall
from support.plans import PROJECTIONS, order_in
from support.progress import Progress
from support.tokenizer import load_tokenizer, with_beginning

# ------------------------------------------------------------------------------
# On held-out text

@torch.no_grad()
def measure(model: Model, tokens: np.ndarray, hooks: dict, B: int, T: int, limit: int):
    """The model, and the model with each hook `project=`, over at most `limit` windows of T tokens.

    All at position 0. hooks: {name: hook}.
    Returns ({"perplexity", "accuracy"} of the base, {name: {"kl", "perplexity", "accuracy", "same",
    "kl_99.9", "by_position"}}), by_position {"64–256": KL, …} as far as windows go. ValueError
    where a cross-entropy is not a number, or beyond any sense.
    """
    text = even_windows(tokens, limit, T)
    base = torch.zeros(4, dtype=torch.float64)
    totals = {name: torch.zeros(4, dtype=torch.float64) for name in hooks}
    n = text[:, 1:].numel()
    kls = {name: torch.empty(n) for name in hooks}  # of every token
    done = passed = 0
    # Of the model and of each hook, every token goes through the layers and then has its logits.
    progress = Progress(2 * n * (1 + len(hooks)), "measuring")
    for block in text.to(model.device).split(B):
        x, y = block[:, :-1], block[:, 1:].flatten()
        states = []                                     # the model's own, and those with each hook
        for project in (None, *hooks.values()):
            states.append(model.norm(model.hidden(x, project)).flatten(0, 1))
            progress(passed := passed + len(y))
        teacher, *students = states
        for rows, log_p in log_probabilities(model, teacher):
            p, likeliest = log_p.exp(), log_p.argmax(-1)
            base += by_token(p, log_p, log_p, y[rows], likeliest).sum(1)    # its own KL is 0
            for name, student in zip(hooks, students, strict=True):
                log_q = logits(student[rows], model.lm_head.weight).log_softmax(-1)
                found = by_token(p, log_p, log_q, y[rows], likeliest)
                totals[name] += found.sum(1)
                kls[name][done:done + len(y)][rows] = found[0].float()
            progress(passed := passed + len(p) * len(states))
        done += len(y)
    _, perplexity, accuracy, _ = means(base, n)
    results = {}
    for name, total in totals.items():
        kl, ppl, right, same = means(total, n)
        worst = float(np.quantile(kls[name].numpy(), 0.999))
        results[name] = {"kl": kl, "perplexity": ppl, "accuracy": right}
        results[name] |= {"same": same, "kl_99.9": worst}
        results[name]["by_position"] = by_position(kls[name].view(-1, T).mean(0))
    return {"perplexity": perplexity, "accuracy": accuracy}, results


PLACES = (64, 256, 1024, 2048, 4096)


def by_position(kl: Tensor) -> dict[str, float]:
    """The mean of kl (T,), by position, over each stretch that windows fill, from 64 on."""
    stretches = zip(PLACES, PLACES[1:], strict=False)
    return {f"{a}–{b}": kl[a:b].mean().item() for a, b in stretches if b <= len(kl)}


def by_token(p: Tensor, log_p: Tensor, log_q: Tensor, y: Tensor, likeliest: Tensor) -> Tensor:
    """(4, n) float64 on the CPU: KL(p ‖ q), the cross-entropy of q, and 1 where q's likeliest token
    is y, is p's.

    Probabilities and their logarithms are (n, vocab); y, the next token, and p's likeliest (n,).
    """
    kl = torch.linalg.vecdot(p, log_p - log_q)
    cross_entropy = -log_q.gather(1, y[:, None])[:, 0]
    guess = log_q.argmax(-1)
    found = kl, cross_entropy, guess == y, guess == likeliest
    return torch.stack([x.double() for x in found]).cpu()


def means(total: Tensor, n: int) -> tuple[float, float, float, float]:
    """KL, perplexity, accuracy, and share of p's guesses kept, from sums over n tokens.

    ValueError where the cross-entropy is not a number, or beyond any sense.
    """
    kl, cross_entropy, accuracy, same = (total / n).tolist()
    if not cross_entropy < 700:                     # exp would overflow; NaN is not below either
        raise ValueError(f"a cross-entropy of {cross_entropy:.3g} nats per token: are the weights "
                         "whole?")
    return kl, math.exp(cross_entropy), accuracy, same


@torch.no_grad()
def recall(model: Model, passages: Tensor, project=None, after=lambda passages: None,
           beginning: int | None = None) -> float:
    """How much more often the next token is right in the second copy of passages (N, n).

    The accuracy over tokens 2 to n of the second copy, less that over the same tokens in the first.
    Calls after(number of passages) for every few. beginning: a token before the first copy.
    """
    n = passages.shape[1]
    right = torch.zeros(2)
    for part in passages.to(model.device).split(16):
        twice = part.repeat(1, 2)
        if beginning is not None:
            twice = F.pad(twice, (1, 0), value=beginning)
        states = model.norm(model.hidden(twice, project)).flatten(0, 1)
        guesses = [log_q.argmax(-1) for _, log_q in log_probabilities(model, states)]
        hits = torch.cat(guesses).view_as(twice)[:, :-1] == twice[:, 1:]
        first, second = hits[:, -2 * n + 1:-n].sum(), hits[:, -n + 1:].sum()
        right += torch.stack((first, second)).cpu()
        after(len(part))
    first, second = (right / (len(passages) * (n - 1))).tolist()
    return second - first


# ------------------------------------------------------------------------------
# The report: curves, each a hook `project=` for every budget

def report(model: Model, held_out: np.ndarray, curves: dict, budgets, args, passages=None):
    """Measure `curves`, {name: function from a budget to a hook}, and print tables.

    args: --batch, --seq, --windows. passages (N, n): what recall is measured on, if at all. Returns
    what the base model has, and a row for every budget.
    """
    hooks = {(name, b): hook(b) for name, hook in curves.items() for b in budgets if b < 1}
    with cli.blame("--ckpt"):
        base, results = measure(model, held_out, hooks, args.batch, args.seq, args.windows)
    # At full ranks a curve is the model itself.
    full = {"kl": 0.0} | base | {"same": 1.0, "kl_99.9": 0.0}
    full["by_position"] = by_position(torch.zeros(args.seq))
    if passages is not None:
        progress, done = Progress(len(passages) * (1 + len(hooks)), "passages said twice"), 0

        def after(some: int) -> None:
            nonlocal done
            progress(done := done + some)

        beginning = getattr(held_out, "beginning", None)            # of --begin
        base["recall"] = full["recall"] = recall(model, passages, None, after, beginning)
        for key, hook in hooks.items():
            results[key]["recall"] = recall(model, passages, hook, after, beginning)
    rows = [{"budget": budget} | {name: results.get((name, budget), full) for name in curves}
            for budget in budgets]
    print_table(base, rows)
    return base, rows


def hooks_of(curves: dict) -> dict:
    """Of curves that are a projection and its plan for a budget, what `report` takes."""
    return {name: lambda budget, p=p, plan=plan: p.at(plan(budget))
            for name, (p, plan) in curves.items()}


def print_table(base: dict, rows: list[dict]) -> None:
    """KL, perplexity, accuracy; then what is kept of the model's choices; then KL by position."""
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
    print_positions(rows)
    own_plan = {"pca_ordered", "trained_ordered", "pca_searched", "searched"}
    print("\n* with its own rank for every head\n" if own_plan & rows[0].keys() else "")


def print_columns(rows: list[dict], columns: list) -> None:
    """Of every column, (title, key, format, factor), what each curve has at each budget."""
    names = [name for name in rows[0] if name != "budget"]
    headings = "".join(f"{CURVES[name][0]:>11s}" for name in names)
    print("\n   cache" + "".join(f" | {title:^{len(headings)}s}" for title, *_ in columns))
    print("        " + f" | {headings}" * len(columns))
    for row in rows:
        line = f"  {row['budget']:6.1%}"
        for _, key, form, scale in columns:
            numbers = (round(scale * row[name][key], int(form[1])) for name in names)
            line += " | " + "".join(f"{x + 0.0:11{form}}" for x in numbers)     # −0 + 0 is 0
        print(line)


def print_positions(rows: list[dict]) -> None:
    """KL by position in the window, where windows are long enough to say more than the mean."""
    names = [name for name in rows[0] if name != "budget"]
    places = list(rows[0][names[0]]["by_position"])
    if len(places) < 2:
        return
    print("\n   cache   KL at positions  " + "".join(f"{place:>12s}" for place in places))
    for row in rows:
        for name in names if row["budget"] < 1 else ():
            kls = "".join(f"{kl:12.5f}" for kl in row[name]["by_position"].values())
            print(f"  {row['budget']:6.1%}   {CURVES[name][0]:18s}{kls}")


# ------------------------------------------------------------------------------
# Multiple choice

def read_questions(path: Path) -> list[dict]:
    """Those of a .jsonl. ValueError names the file, and a bad line."""
    questions = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
            context, choices, label = (question[key] for key in ("context", "choices", "label"))
            ok = isinstance(choices, list) and len(choices) > 1 and all(choices)
            ok = ok and all(isinstance(text, str) for text in (context, *choices))
            ok = ok and type(label) is int and 0 <= label < len(choices)
        except (ValueError, KeyError, TypeError, RecursionError):
            ok = False
        if not ok:
            raise ValueError(f'{path}: line {number} is not {{"context": text, "choices": [two '
                             'texts or more], "label": number of the right one, from 0}')
        questions.append(question)
    if not questions:
        raise ValueError(f"{path}: holds no question")
    return questions


@torch.no_grad()
def choice_scores(model: Model, wholes: list[list[int]], shared: int, begin: int, cache: KVCache):
    """log p(choice | context) of every choice, summed over its tokens: (choices,).

    wholes: the ids of context + choice of each choice. Their first `shared` tokens, which are the
    same, go through once; before each choice the cache is cut back to them. Tokens from `begin` on
    are the choice's, at least one.
    """
    cache.length = 0
    prefix = torch.tensor([wholes[0][:shared]], device=model.device)
    first = model.hidden(prefix, cache=cache)[:, -1:]
    scores = []
    for whole in wholes:
        cache.length = shared
        states, end = first, whole[shared:]
        if len(end) > 1:
            passed = torch.tensor([end[:-1]], device=model.device)
            states = torch.cat((first, model.hidden(passed, cache=cache)), dim=1)
        log_p = logits(model.norm(states[0]), model.lm_head.weight).log_softmax(-1)
        skip = min(begin, len(whole) - 1) - shared                  # what is before is context
        scores.append(log_p[torch.arange(skip, len(end)), end[skip:]].sum())
    return torch.stack(scores).cpu()


def tokens_of(tokenizer, question: dict) -> tuple[list[list[int]], int, int]:
    """What `choice_scores` takes: ids of context + choice, how many all share, where choices begin.

    A choice begins behind as many tokens as the context has without the white space at its end.
    ValueError where nothing goes before a choice.
    """
    def ids(text: str) -> list[int]:
        return with_beginning(tokenizer, tokenizer.encode(text))

    begin = len(ids(question["context"].rstrip()))
    wholes = [ids(question["context"] + choice) for choice in question["choices"]]
    shared = 0
    most = min(begin, *(len(whole) - 1 for whole in wholes))        # each has one more to score
    while shared < most and len({whole[shared] for whole in wholes}) == 1:
        shared += 1
    if not shared:
        raise ValueError("the tokenizer has no beginning of sequence, and nothing goes before "
                         f"{question['choices'][0]!r}")
    return wholes, shared, begin


def answer(model: Model, questions: list[dict], tokens: list, projection: Projection, ranks):
    """Two shares of questions whose right choice scores highest: by sum, by sum per character.

    tokens: `tokens_of` every question. Of equal choices the first is taken.
    """
    room = max(len(whole) for wholes, _, _ in tokens for whole in wholes)
    cache = KVCache(projection, ranks, 1, room, model.dtype, model.device)
    right = torch.zeros(2)
    for q, of_question in zip(questions, tokens, strict=True):
        scores = choice_scores(model, *of_question, cache)
        by_character = scores / torch.tensor([len(choice) for choice in q["choices"]])
        right += torch.tensor([x.argmax() == q["label"] for x in (scores, by_character)])
    accuracy, accuracy_by_character = (right / len(questions)).tolist()
    return {"accuracy": accuracy, "accuracy_by_character": accuracy_by_character}


def report_tasks(model: Model, curves: dict, file: Path, questions: list, tokens: list) -> dict:
    """Multiple choice at every budget, through the real cache."""
    print(f"{file}: {len(questions)} questions, accuracy by summed log-likelihood (and by "
          "log-likelihood per character), %\n")
    unturned = Projection.identity(model.config)
    base = answer(model, questions, tokens, unturned, uniform_ranks(1.0, model.config))
    print("   cache  " + "".join(f"{name:>17s}" for name in ("base", *curves)))
    rows = []
    for budget in BUDGETS:
        row = {name: answer(model, questions, tokens, projection, plan(budget))
               for name, (projection, plan) in curves.items()}
        rows.append({"budget": budget} | row)
        shown = [f"{100 * r['accuracy']:6.2f} ({100 * r['accuracy_by_character']:5.2f})"
                 for r in (base, *row.values())]
        print(f"  {budget:6.1%}  " + "".join(f"{text:>17s}" for text in shown), flush=True)
    return {"file": str(file), "questions": len(questions), "base": base, "budgets": rows}


# ------------------------------------------------------------------------------
# The script

def curves_in(folder: Path, model: Model) -> dict:
    """What train.py and search.py left in a folder, as curves: (projection, plan for a budget)."""
    config, file = model.config, folder / PROJECTIONS
    curves, searched = {}, {}
    with files.open_safetensors(file) as tensors:
        has_pca = "pca_U_k" in tensors.keys()
    for name, prefix in (("pca", "pca_"), ("trained", ""))[not has_pca:]:
        projection = Projection.load(file, prefix)
        projection.check_fits(config)
        on_device = projection.to(model.device)
        curves[name] = on_device, partial(uniform_ranks, config=config)
        ranks = folder / ("ranks_pca.json" if prefix else "ranks.json")
        order = order_in(ranks, projection, config)
        if order is not None:
            try:
                plan_at(order, config, BUDGETS[-1])         # fail now if a path ends too early
            except ValueError as error:
                raise ValueError(f"{ranks}: {error}") from None
            name = "pca_searched" if prefix else "searched"
            searched[name] = on_device, partial(plan_at, order, config)
    return curves | searched


def describe(ckpt: Path, model: Model) -> str:
    c, millions = model.config, sum(p.numel() for p in model.parameters()) / 1e6
    return (f"{ckpt}: {millions:,.1f} M parameters, {c.num_hidden_layers} layers, "
            f"{c.num_attention_heads} query heads on {c.num_key_value_heads}, {c.head_dim} wide")


def check_same_run(folder: Path, args) -> dict:
    """The config in train.json. ValueError where it names another --ckpt or --data, or none."""
    if not (folder / "train.json").exists():
        return {}
    config = files.read_json(folder / "train.json").get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'train.json'}: no config of a training")
    for name in ("ckpt", "data"):
        before, now = config.get(name), getattr(args, name) or ""
        if not isinstance(before, str):
            raise ValueError(f"{folder / 'train.json'}: names no --{name}")
        if before and now:                              # wherever the script was called from
            before, now = Path(before).resolve(), now.resolve()
        if before != now:
            raise ValueError(f"{folder}: was trained with --{name} {before or 'none'}, not "
                             f"{now or 'none'}")
    if config.get("begin", args.begin) != args.begin:
        raise ValueError(f"{folder}: was trained {'without' if args.begin else 'with'} --begin")
    check_contents(config, "ckpt", files.fingerprint_of_model(args.ckpt))
    return config


def check_contents(config: dict, name: str, now: str) -> None:
    """ValueError where the training whose config that is saw other contents of --name."""
    if config.get(f"{name}_hash") not in (None, now):
        raise ValueError(f"--{name} holds something else than when these were trained")


def main():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.out_argument(parser)
    cli.report_arguments(parser)
    cli.passage_arguments(parser)
    parser.add_argument("--tasks", type=Path,
                        help="a .jsonl of multiple-choice questions to answer at every budget")
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    questions, tokens = [], []
    if args.tasks:                                      # all checked before anything runs
        with cli.blame("--ckpt"):
            config = read_config(args.ckpt / "config.json")
        with cli.blame("--tasks"):
            questions = read_questions(args.tasks)
            tokenizer = load_tokenizer(args.ckpt, config.vocab_size)
            tokens = [tokens_of(tokenizer, question) for question in questions]
    files.check_folder(args.out)
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    with cli.blame("--out"):
        curves = curves_in(args.out, model)
        trained = check_same_run(args.out, args)
    print(describe(args.ckpt, model))
    training_text, held_out = text_for(args, model.config)
    if args.data:                                       # Python's own differs between its versions
        with cli.blame("--out"):
            check_contents(trained, "data", files.fingerprint(training_text, held_out))
    passages = held_out_passages(args, held_out, model.config)

    base, rows = report(model, held_out, hooks_of(curves), BUDGETS, args, passages)
    said = {"base": base, "budgets": rows}
    file = args.out / "evaluation.json"
    with cli.blame("--out"):
        files.write_json(file, said, indent=1)          # whatever becomes of the questions
        draw_report(base, rows, file.with_suffix(".png"))
    if questions:
        said["tasks"] = report_tasks(model, curves, args.tasks, questions, tokens)
        with cli.blame("--out"):
            files.write_json(file, said, indent=1)
    print(f"Saved {file} and {file.with_suffix('.png')}")


if __name__ == "__main__":
    cli.run_script(main)
