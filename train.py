"""Train the projections: distil the model into itself, its KV cache cut to random ranks.

MatryoshkaKV (arXiv 2410.14731), section 3. The teacher is the model. The student is the same
weights, with each token's key replaced by k̂ = k P and its value by v̂ = v P + μ (I − P), where
P = U_r U_rᵀ is made of the first r columns of an orthogonal U of its head. Only A in U = U₀ C(A)
and the values' means μ learn (projection.py):

    minimise   KL( p_teacher(· | text) ‖ p_student(· | text; ranks) )    over random text and ranks

The ranks are drawn anew for every sequence. So each leading group of columns must do as well as it
can without those that follow, like nested dolls, and one U serves every rank.

    python train.py --recipe paper --out out_paper                  # the paper's recipe

is the paper's as its authors' code has it: U₀ is the PCA, every rank is drawn independently
(draw_independent), and the mean of 0.25 KL + 0.75 cross-entropy is minimised by Adam at 0.001. It
gains where little of the cache is left, and loses to PCA elsewhere. The default differs in

    tokens      the first 4 stay whole, and keys have a turned mean (projection.py)
    start       what varies plus what the model's answer hangs on: `find_start`, search.py
    windows     lie anywhere, near 0 more often, not all at 0: `random_starts`, support/data.py
    ranks       plans of 15 to 90% along an order of lowerings: `draw_along`. The order is found
                for the start (`find_order`, search.py), or that of --ranks FILE. --uniform: one
                level for all heads, `draw_levels`
    objective   the mean of log(KL + 0.001) over sequences, no cross-entropy: `Recipe.floor`
    rate        0.5 / d: Adam steps every angle alike; a column is turned by nearly d of them
    steps       200, where the paper's recipe has 400

    python train.py                                                 # on Python's documentation
    python train.py --uniform --out out_uniform                     # for the same rank everywhere
    python train.py --start out/projections.safetensors --data FILE --out out_file  # on other text
    torchrun --nproc_per_node=8 train.py --ckpt DIR --data FILE     # several GPUs: docs/seven_b.md
"""
import argparse
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor

from evaluate import describe, hooks_of, measure, report
from model import Model, load, log_probabilities, products_in_bfloat16, wide
from projection import (
    BUDGETS,
    LEVELS,
    Projection,
    Rotation,
    calibrate,
    check_levels,
    plan_at,
    shape_of,
    uniform_ranks,
)
from search import Windows, find_order, find_start, positions_of, ranks_file, rows_of
from support import cli, files, processes
from support.checkpoint import read_config
from support.data import random_starts, random_windows, set_apart, text_for
from support.pictures import draw_report
from support.plans import PROJECTIONS, order_beside, read_ranks
from support.progress import Progress
from support.training import (
    Forecast,
    TrainingState,
    peak_memory,
    prepare_training,
    read_state,
    reporting,
    settings_of,
    state_file,
)

# ------------------------------------------------------------------------------
# The loss of a step

@dataclass
class Recipe:
    """How to train: what `train` is told beside the model, the text and the draw."""
    steps: int
    batch: int                      # sequences of a process at a time, each with its own ranks
    seq: int                        # tokens of each
    lr: float                       # Adam's, at its peak
    ce: float = 0.0                 # share of the next-token cross-entropy in the loss
    # None: the objective is the mean of the loss, as in the paper. A number: the mean of
    # log(loss + floor). KL at 25% is some fifty times that at 87.5%, and in a plain mean the small
    # ranks drown the rest; in the logarithm a tenth less KL counts about the same at every budget.
    floor: float | None = None
    positions: int = 1              # windows lie anywhere below; 1: all at 0, as in the paper
    accumulate: int = 1             # batches of a step
    amp: bool = False               # products in bfloat16 over float32 weights
    recompute: bool = False         # layers again in the backward pass
    seed: int = 0


def distil(model: Model, text: Tensor, project, recipe: Recipe, start=0) -> tuple[Tensor, Tensor]:
    """Of windows (B, T + 1), per sequence: (1 − ce) KL + ce · cross-entropy, and the KL; (B,).

    start: the positions of their first tokens.
    """
    text = text.to(model.device)
    x = text[:, :-1]
    with products_in_bfloat16(model.device, recipe.amp):
        with torch.no_grad():                           # the teacher: the same weights, no hook
            teacher = model.norm(model.hidden(x, start=start))
        student = model.norm(model.hidden(x, project, start=start, recompute=recipe.recompute))
        return Distill.apply(student, teacher, model, text[:, 1:], recipe.ce)


class Distill(torch.autograd.Function):
    """(1 − c) KL(p ‖ q) + c · cross-entropy, and the KL: means over T, (B,) each.

    p is the teacher's and q the student's distribution of the next token; both come as normed
    states (B, T, hidden). The gradient at a token's logits, (q − ((1 − c) p + c · onehot)) / T, is
    taken in the same pass, chunk by chunk, while the probabilities are at hand: no logits are kept
    for the backward pass, which divides by T.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, model: Model, targets: Tensor, c: float):
        B, T, _ = student.shape
        s, t = student.flatten(0, 1), teacher.flatten(0, 1)
        y = targets.flatten()[:, None]
        gradient = torch.empty_like(s)
        kl = s.new_zeros(B * T, dtype=wide(s.dtype))
        cross_entropy = torch.zeros_like(kl)
        for rows, log_q, log_p in log_probabilities(model, s, t):
            target = log_p.exp()                                    # what q should be
            kl[rows] = log_p.sub_(log_q).mul_(target).sum(-1)       # Σ p log(p / q)
            if c > 0:
                cross_entropy[rows] = -log_q.gather(1, y[rows])[:, 0]
                share = torch.full_like(target[:, :1], c)
                target.mul_(1 - c).scatter_add_(1, y[rows], share)
            by_logits = log_q.exp_().sub_(target)
            gradient[rows] = by_logits.to(s.dtype) @ model.lm_head.weight
        ctx.save_for_backward(gradient.view_as(student))
        kl = kl.view(B, T).mean(1)
        cross_entropy = cross_entropy.view(B, T).mean(1)
        ctx.mark_non_differentiable(kl)
        return (1 - c) * kl + c * cross_entropy, kl

    @staticmethod
    def backward(ctx, by_loss: Tensor, _):
        gradient, = ctx.saved_tensors
        by_token = by_loss[:, None, None] / gradient.shape[1]
        return gradient * by_token.to(gradient), None, None, None, None


# ------------------------------------------------------------------------------
# Training

def draw_independent(B: int, config, generator: Generator) -> Tensor:
    """The paper's ranks of a step, (2, L, B, K): each any of d/8, …, d, whatever the others are.

    That they are new for every sequence is what nests the dolls.
    """
    L, K, d = shape_of(config)
    levels = torch.randint(1, LEVELS + 1, (2, L, B, K), generator=generator)
    return levels * (d // LEVELS)


def train(model: Model, state: TrainingState, tokens, draw, recipe: Recipe, after_step) -> None:
    """Rotate the projections so that the model with the small cache says what the model says.

    draw(N, config, generator) gives random plans, ranks (2, L, N, K), for the N sequences of a step
    in all processes. state.module.at(plans, those of the step) gives the student's hook `project=`
    (Rotation). Calls after_step(number) after each step. state.facts["loss"] gets the KLs.
    """
    parameters = list(state.module.parameters())
    B = processes.WORLD * recipe.batch                  # sequences of a batch, in all processes
    mine = processes.my_share(recipe.batch)
    # A token's share of the gradient may be below 6e-8, the smallest number of float16.
    scale = recipe.batch * recipe.seq if model.dtype == torch.float16 else 1
    progress = Progress(recipe.steps, before=state.step)
    for step in range(state.step, recipe.steps):
        # Everything random in a step follows from the seed and the step's number: a resumed
        # training draws what it would have, and N processes what one with N times the batch would.
        generator = Generator().manual_seed(recipe.seed * 1_000_003 + step)
        kl_of_step = torch.zeros(1, dtype=torch.float64)
        texts = [random_windows(tokens, B, recipe.seq, generator, mine)
                 for _ in range(recipe.accumulate)]
        of_step = draw(recipe.accumulate * B, model.config, generator)
        starts = random_starts(recipe.accumulate * B, recipe.seq, recipe.positions, generator)
        for text, plans, start in zip(texts, of_step.split(B, dim=2), starts.split(B), strict=True):
            student = state.module.at(plans[:, :, mine], of_step)
            loss, kl = distil(model, text, student, recipe, start[mine])
            objective = loss if recipe.floor is None else torch.log(loss + recipe.floor)
            if objective.requires_grad:                 # not where every head is full
                (scale * objective.mean()).backward()
            kl_of_step += scale * kl.mean().item()
        gradients = [kl_of_step, *(p.grad for p in parameters)]     # zeros where nothing was seen
        for gradient in gradients:
            processes.sum_over(gradient).div_(scale * recipe.accumulate * processes.WORLD)
        if not all(gradient.isfinite().all() for gradient in gradients):
            cli.fail(f"--lr {recipe.lr}: the loss of step {step + 1} or its gradient is not a "
                     "number. Start again with a smaller --lr or another --dtype")
        for group in state.optimizer.param_groups:
            group["lr"] = recipe.lr * schedule(step, recipe.steps)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=False)
        state.facts["loss"].append(kl_of_step.item())
        state.facts["step"] = step + 1
        progress(step + 1, f"KL {kl_of_step.item():.4f}", recipe.accumulate * B * recipe.seq)
        after_step(step + 1)


def schedule(step: int, steps: int) -> float:
    """The learning rate's factor: a cosine to zero, times a warm-up over the first tenth."""
    warm_up = min(1.0, (step + 1) / (0.1 * steps))
    cosine = math.cos(math.pi * step / steps)
    return warm_up * 0.5 * (1 + cosine)


# ------------------------------------------------------------------------------
# Not in the paper: draws of exactly the plans that are used later; every step sees all budgets.
# What they gain: docs/results.md.

def draw_levels(B: int, config, generator: Generator) -> Tensor:
    """One level for all heads of a sequence, 25 to 87.5%."""
    L, K, d = shape_of(config)
    least = LEVELS // 4
    levels = least + ((LEVELS - least) * one_of_each(B, generator)).long()
    ranks = levels * (d // LEVELS)
    return ranks[:, None].expand(2, L, B, K)


def draw_along(B: int, config, generator: Generator, order) -> Tensor:
    """The plans of B budgets along the order, from 15 to 90%, or where it ends before."""
    L, K, _ = shape_of(config)
    end_of_order = 1 - len(order) / (2 * L * K * LEVELS)
    low, high = max(0.15, end_of_order), max(0.9, end_of_order)
    budgets = low + (high - low) * one_of_each(B, generator)
    plans = [plan_at(order, config, budget) for budget in budgets.tolist()]
    return torch.stack(plans, dim=2)


def one_of_each(B: int, generator: Generator) -> Tensor:
    """Random numbers (B,), one out of each B-th of 0 to 1: every step sees the whole range."""
    part = torch.randperm(B, generator=generator)
    return (part + torch.rand(B, generator=generator)) / B


# ------------------------------------------------------------------------------
# The script

VALID = 8       # windows of validation text, the end of the training text
OPTIONS = ("recipe", "draw", "ce", "steps", "batch", "seq", "lr", "accumulate", "seed", "dtype",
           "amp", "whole", "positions", "sweep_windows", "begin")  # --resume names one that differs
PATHS = ("ckpt", "data", "ranks", "start")


def options(doc: str) -> argparse.Namespace:
    """The command line, checked as far as it can be before any file is opened."""
    parser = cli.arguments(doc, several=True)
    cli.data_arguments(parser)
    cli.out_argument(parser)
    cli.report_arguments(parser, windows=32)
    add = parser.add_argument
    count = cli.within(1, 10 ** 7)
    positive = cli.within(0.0, 1e6)
    add("--recipe", choices=("ours", "paper"), default="ours",
        help="the paper's, or ours, which differs as listed above [ours]")
    add("--ranks", type=Path, help="train along the order in this file of search.py")
    add("--start", type=Path, help="begin with these projections of recipe ours: U, means and "
        "whole tokens, and the order beside them. Without one a sweep finds it")
    add("--uniform", action="store_true", help="train for the same rank everywhere")
    add("--steps", type=cli.within(0, 10 ** 7),
        help="0: the start and the order alone [200; paper: 400]")
    add("--whole", type=cli.within(0, 10 ** 6),
        help="first tokens that keep all coordinates [4, or those of --start; paper: 0]")
    cli.sweep_arguments(parser)
    add("--accumulate", type=count, default=1, help="batches per step [1]")
    add("--lr", type=positive, help="Adam's peak rate [0.5 / head_dim; paper: 0.001]")
    add("--ce", type=cli.within(0.0, 1.0), help="share of cross-entropy [0; paper: 0.75]")
    cli.amp_argument(parser)
    add("--checkpoint", action=argparse.BooleanOptionalAction,
        help="recompute layers in the backward pass: less memory, more time [if need be]")
    add("--check-every", type=count, default=100, help="steps between validations [100]")
    add("--save-every", type=positive, default=30.0, help="least seconds between saves [30]")
    add("--resume", action="store_true", help="continue the training that stopped in --out")
    args = parser.parse_args()
    paper = args.recipe == "paper"
    args.draw = "independent" if paper else "levels" if args.uniform else "along"
    if args.steps is None:
        args.steps = 400 if paper else 200
    if paper and (args.whole or args.positions):
        cli.fail("--recipe paper: has neither --whole nor --positions")
    if args.start and (paper or args.whole is not None):
        cli.fail("--start: goes with neither --recipe paper nor --whole, which the file says")
    if args.whole is None and not args.start:
        args.whole = 0 if paper else 4
    if args.whole is not None and args.whole >= args.seq:
        cli.fail(f"--whole {args.whole}: leaves nothing of windows of --seq {args.seq}")
    if args.ranks and args.draw != "along":
        cli.fail("--ranks: goes with neither --uniform nor --recipe paper, which draw their "
                 "ranks along no order")
    if paper and args.uniform:
        cli.fail("--uniform: goes not with --recipe paper, whose ranks are independent")
    if args.ce is None:
        args.ce = 0.75 if paper else 0.0
    if paper and args.amp is None:
        args.amp = False
    return args


def recipe_of(args) -> Recipe:
    return Recipe(
        args.steps, args.batch, args.seq, args.lr, args.ce,
        floor=None if args.recipe == "paper" else 1e-3, positions=args.positions,
        accumulate=args.accumulate, amp=args.amp, recompute=args.checkpoint, seed=args.seed)


def given(args, config) -> tuple[Projection | None, Tensor | None]:
    """The start and the order that files give: --start and what is beside it, --ranks."""
    start = order = None
    if args.start:
        with cli.blame("--start"):
            start = Projection.load(args.start)
            start.check_fits(config)
            if start.mean_k is None:
                raise ValueError(f"{args.start}: is of --recipe paper, whose keys have no mean")
            if start.whole >= args.seq:
                raise ValueError(f"{args.start}: {start.whole} whole tokens, which leave nothing "
                                 f"of windows of --seq {args.seq}")
            if args.draw == "along" and not args.ranks:
                file, order = order_beside(args.start, start, config)
                print(f"The order: {'none beside --start' if order is None else file}")
    if args.ranks:
        with cli.blame("--ranks"):
            order = read_ranks(args.ranks, config).order
    if order is not None:
        with cli.blame("--ranks" if args.ranks else "--start"):
            plan_at(order, config, BUDGETS[-1])         # it must go as far as reports do
    return start, order


def start_of(args, model: Model, tokens, start, order) -> dict[str, Tensor]:
    """What a training begins with, for its state: its start, plain PCA, and the order, if any."""
    pca = calibrate(model, tokens, args.batch, args.seq, args.seed, args.amp).pca()
    if args.recipe == "paper":
        start = pca
    else:
        windows = Windows(tokens, args.sweep_windows, args.batch, args.seq, args.positions,
                          args.seed, args.amp, args.checkpoint)
        if start is None:
            start = find_start(model, windows, args.whole)
        start = start.to(model.device)
        if order is None and args.draw == "along":
            order = find_order(model, start, windows)
    start = start.to(model.device, wide(model.dtype))
    tensors = start.tensors("start.") | pca.to("cpu").tensors("pca.")
    tensors["whole"] = torch.tensor(start.whole)
    return tensors if order is None else tensors | {"order": order}


def check(state: TrainingState, model: Model, valid, hooks: dict, recipe: Recipe) -> None:
    """Print the KL on validation text: set apart from training, and not the held-out text."""
    with cli.blame("--ckpt"):
        _, results = measure(model, valid, hooks, recipe.batch, recipe.seq, VALID)
    checked = {"step": state.step} | {name: round(r["kl"], 5) for name, r in results.items()}
    state.facts.setdefault("checks", []).append(checked)
    print(f"\nKL on validation text: {checked}", file=sys.stderr)


def learnt(state: TrainingState) -> Projection:
    """What has been learnt so far, orthogonal within float32's rounding."""
    with torch.no_grad():
        return state.module(torch.float64).to(None, torch.float32)


def finish(state: TrainingState, model: Model, held_out, plan, args) -> None:
    """Save the projections, report on them, and write train.json and train.png."""
    trained = learnt(state)
    trained.positions = max(args.positions, args.seq)
    pca = Projection.of(state.tensors, "pca.").to(model.device)
    with cli.blame("--out"):
        trained.save(args.out / PROJECTIONS, pca)
        if "order" in state.tensors:
            path = rows_of(state.tensors["order"], model.config)
            budget = max(0.375, 1 - len(path) / (2 * trained.mean_v[..., 0].numel() * LEVELS))
            files.write_json(args.out / "ranks.json",
                             ranks_file(path, trained, model.config, budget))
    uniform = partial(uniform_ranks, config=model.config)
    curves = {"pca": (pca, uniform), "trained": (trained, uniform)}
    facts = state.facts
    if "order" in state.tensors:
        curves |= {"pca_ordered": (pca, plan), "trained_ordered": (trained, plan)}
        facts = facts | {"order": state.tensors["order"].tolist()}
    with reporting(state):
        base, rows = report(model, held_out, hooks_of(curves), BUDGETS, args)
    file = args.out / "train.json"
    with cli.blame("--out"):
        files.write_json(file, facts | {"projections": trained.hash(), "base": base,
                                        "budgets": rows}, indent=1)
        draw_report(base, rows, file.with_suffix(".png"))
    state.remove()
    print(f"Saved {args.out / PROJECTIONS}, {file} and {file.with_suffix('.png')}")


def main(doc=__doc__, read_config=read_config, load=load):
    """adapters/ has a `load` of its own, and what goes with it."""
    args = options(doc)
    with cli.blame("--ckpt"):
        config = read_config(args.ckpt / "config.json")
        check_levels(config.head_dim)
    positions = positions_of(args, config)
    args.positions = 1 if args.recipe == "paper" else positions
    need = partial(peak_memory, config, args.batch, args.seq)
    device, dtype = prepare_training(args, config, need)
    file = state_file(args, "train")
    if args.lr is None:
        args.lr = 0.001 if args.recipe == "paper" else 0.5 / config.head_dim
    start, order = (None, None) if args.resume else given(args, config)
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    print(describe(args.ckpt, model))
    tokens, held_out = text_for(args, config)
    settings = settings_of(args, OPTIONS, PATHS, tokens, held_out)
    tokens, valid = set_apart(tokens, VALID * args.seq + 1)
    saved = None
    if args.resume:
        with cli.blame("--resume"):
            saved = read_state(file, settings)
    with cli.blame("--ckpt"):
        tensors = saved.tensors if saved else start_of(args, model, tokens, start, order)
    with cli.blame("--resume"):
        start = Projection.of(tensors, "start.", int(tensors["whole"])).to(device)
        rotation = Rotation(start)
        state = TrainingState(file, rotation, settings, tensors, saved)

    plan = partial(uniform_ranks, config=config)        # of `check`, and of an order's curves
    draw = {"independent": draw_independent, "levels": draw_levels}.get(args.draw)
    if args.draw == "along":
        draw = partial(draw_along, order=tensors["order"])
        plan = partial(plan_at, tensors["order"], config)

    recipe = recipe_of(args)
    hooks = 6 * (4 if args.draw == "along" else 2)      # of the report: six budgets of each curve
    forecast = Forecast(args, device, args.steps - state.step, hooks)

    def after_step(step: int) -> None:
        if processes.RANK:
            return
        forecast()
        if len(valid) and (step == args.steps or step % args.check_every == 0):
            p = learnt(state)
            hooks = {f"{budget:.0%}": p.at(plan(budget)) for budget in (0.75, 0.5, 0.25)}
            check(state, model, valid, hooks, recipe)
        state.save_if_due(args.save_every, last=step == args.steps)     # never half of a step

    try:
        train(model, state, tokens, draw, recipe, after_step)
    except KeyboardInterrupt:
        state.stopped()
    if processes.RANK == 0:
        finish(state, model, held_out, plan, args)
    processes.leave()


if __name__ == "__main__":
    cli.run_script(main)
