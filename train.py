"""Train the projections: distil the model into itself, its KV cache cut to random ranks.

MatryoshkaKV (arXiv 2410.14731), section 3. The teacher is the model. The student is the same
weights, with each token's key replaced by k̂ = k P and its value by v̂ = v P + μ (I − P), where
P = U_r U_rᵀ is made of the first r columns of an orthogonal U of its head. Only A in U = U₀ C(A)
and the means μ learn (projection.py):

    minimise   KL( p_teacher(· | text) ‖ p_student(· | text; ranks) )    over random text and ranks

The ranks are drawn anew for every sequence. So each leading group of columns must do as well as it
can without those that follow, like nested dolls, and one U serves every rank.

`--recipe paper` is the paper's as its authors' code has it: it starts from PCA, draws every rank
independently, and minimises the mean of 0.25 KL + 0.75 cross-entropy by Adam at 0.001.
It gains where little of the cache is left and loses to PCA elsewhere. The default differs in

  start      PCA plus what queries and W_o read (query_aware): better before any training.
  ranks      plans of any size along an order of lowerings (draw_along), as search.py makes them:
             one for the start (order.py), or --ranks FILE. --uniform: one level for all heads
             (draw_levels). The paper's average to about half.
  steps      200, where the paper's recipe has 400.
  objective  the mean of log(KL + 0.001) over sequences. KL at 25% is some fifty times that at
             87.5%: in a plain mean the small ranks drown the rest. In the logarithm a tenth less KL
             counts about the same at every budget. No cross-entropy: it pulls towards the text.
  rate       0.5 / d. Adam steps every angle alike; a column is turned by nearly d of them.

    python train.py                                             # the demo on Python's documentation
    python train.py --recipe paper --out out_paper              # the paper's recipe, to compare
    python train.py --uniform --out out_uniform                 # for the same rank everywhere
    torchrun --nproc_per_node=8 train.py --ckpt DIR --data FILE     # several GPUs (docs/seven_b.md)
"""
import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor

import common
from data import data_arguments, random_windows, set_apart, text_for
from distance import Distill, measure, wide
from evaluate import describe, report_arguments, write_report
from model import Model, load, read_config
from order import find_order, output_weights
from plans import read_plan
from projection import LEVELS, Projection, Rotation, calibrate, plan_at, shape_of, uniform_ranks

# ------------------------------------------------------------------------------
# The ranks of a step, (2, L, B, K), multiples of d/8, for keys and values separately. That they are
# new for every sequence is what nests the dolls.

def draw_independent(B: int, config, generator: Generator) -> Tensor:
    """The paper's: each rank is any of the eight, whatever the others are."""
    L, K, d = shape_of(config)
    levels = torch.randint(1, LEVELS + 1, (2, L, B, K), generator=generator)
    return levels * (d // LEVELS)


def draw_levels(B: int, config, generator: Generator) -> Tensor:
    """One level for all heads of a sequence, 2 to 7 (25 to 87.5%)."""
    L, K, d = shape_of(config)
    levels = 2 + ((LEVELS - 2) * one_of_each(B, generator)).long()
    ranks = levels * (d // LEVELS)
    return ranks[:, None].expand(2, L, B, K)


def draw_along(B: int, config, generator: Generator, order) -> Tensor:
    """The plans of B budgets along the order, from 15% (or its end) to 90%."""
    L, K, _ = shape_of(config)
    end_of_order = 1 - len(order) / (2 * L * K * LEVELS)
    low, high = max(0.15, end_of_order), max(0.9, end_of_order)
    budgets = low + (high - low) * one_of_each(B, generator)
    plans = [plan_at(order, config, budget) for budget in budgets.tolist()]
    return torch.stack(plans, dim=2)


def one_of_each(B: int, generator: Generator) -> Tensor:
    """Random numbers (B,), one out of each B-th of 0 to 1: every batch sees the whole range."""
    part = torch.randperm(B, generator=generator)
    return (part + torch.rand(B, generator=generator)) / B


# ------------------------------------------------------------------------------
# Training

def train(run: "Run", model: Model, tokens, draw, hook, floor, after_step) -> None:
    """Rotate the projections so that the model with the small cache says what the model says.

    draw(B, config, generator) gives random plans; hook(rotation, plans) the student's `project=`,
    and which entries of A_k and A_v it sees, (2, …), or None for all. The objective is the mean of
    log(loss + floor) over sequences, or of the loss, where floor is None.
    """
    args, rotation = run.args, run.rotation
    parameters = list(rotation.parameters())
    # A token's share of the gradient may be below 6e-8, the smallest number of float16.
    scale = args.batch * args.seq if model.dtype == torch.float16 else 1
    progress = common.Progress(args.steps)
    mine = common.my_share(args.batch)
    B = common.WORLD * args.batch
    for step in range(run.said["step"], args.steps):
        # Everything random in a step follows from the seed and the step's number: a resumed
        # training draws what it would have, and N processes what one with N times the batch would.
        generator = Generator().manual_seed(args.seed * 1_000_003 + step)
        kl_of_step = torch.zeros(1, dtype=torch.float64)
        visible = None
        for _ in range(args.accumulate):
            block = random_windows(tokens, B, args.seq, generator, mine)
            plans = draw(B, model.config, generator)
            project, seen = hook(rotation, plans)
            visible = seen if visible is None else visible | seen
            loss, kl = distillation(model, block, project, args)                # per sequence
            objective = loss if floor is None else torch.log(loss + floor)
            if objective.requires_grad:                 # not where every head is full
                (scale * objective.mean()).backward()
            kl_of_step += scale * kl.mean().item()
        gradients = [kl_of_step, *(p.grad for p in parameters)]
        for gradient in gradients:
            common.sum_over_processes(gradient).div_(scale * args.accumulate * common.WORLD)
        if not all(gradient.isfinite().all() for gradient in gradients):
            common.fail(f"--lr {args.lr}: the loss of step {step + 1} or its gradient is not a "
                        "number. Start again with a smaller --lr or another --dtype")
        if visible is not None:                         # drop the others: visible_entries
            rotation.A_k.grad.mul_(visible[0])
            rotation.A_v.grad.mul_(visible[1])
        for group in run.optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=False)
        run.said["loss"].append(kl_of_step.item())
        run.said["step"] = step + 1
        progress(step + 1, f"KL {kl_of_step.item():.4f}", args.accumulate * B * args.seq)
        after_step(step + 1)


def distillation(model: Model, block: Tensor, project, args):
    """Of windows (B, T + 1), per sequence: (1 − ce) KL + ce · cross-entropy, and the KL."""
    block = block.to(model.device)
    x = block[:, :-1]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.amp):
        with torch.no_grad():                           # the teacher: the same weights, no hook
            teacher = model.hidden(x)
        student = model.hidden(x, project, recompute=args.checkpoint)
    student, teacher = model.norm(student), model.norm(teacher)
    return Distill.apply(student, teacher, model, block[:, 1:], args.ce)


def ranks_hook(rotation: Rotation, ranks: Tensor, batch: int):
    """`train`'s hook for ranks (2, L, WORLD · batch, K): the student uses its process's share."""
    mine = ranks[:, :, common.my_share(batch)]
    return rotation().at(mine), rotation.visible_entries(ranks)


def schedule(step: int, steps: int) -> float:
    """The learning rate's factor: a cosine to zero, times a warm-up over the first tenth."""
    warm_up = min(1.0, (step + 1) / (0.1 * steps))
    cosine = math.cos(math.pi * step / steps)
    return warm_up * 0.5 * (1 + cosine)


# ------------------------------------------------------------------------------
# A training's state

class Run:
    """The rotation and its start, plain PCA, the order, Adam's moments, the KL of every step."""

    # What must be as it was for a resumed training to end where the undisturbed one would have.
    SETTINGS = (
        "recipe", "uniform", "ce", "steps", "batch", "seq", "lr",
        "accumulate", "seed", "dtype", "amp", "train_tokens", "processes")
    FILES = ("ckpt", "data", "ranks")
    START, STATE = "train.start.safetensors", "train.state.safetensors"

    def __init__(self, args, start: Projection, pca: Projection, order):
        args.processes = common.WORLD
        self.args = args
        self.start, self.pca, self.order = start, pca, order
        self.start_file = args.out / self.START
        self.file = args.out / self.STATE
        self.rotation = Rotation(start)
        for parameter in self.rotation.parameters():    # a step where all are full has no gradient
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.Adam(self.rotation.parameters())
        config = {name: getattr(args, name) for name in self.SETTINGS}
        config |= {name: str(getattr(args, name) or "") for name in self.FILES}
        self.said = {"step": 0, "loss": [], "checks": [], "config": config}
        self.saved_step, self.save_at = 0, 0.0          # when to save: the first step at once

    def projection(self) -> Projection:
        """What has been learnt so far, orthogonal within float32's rounding."""
        with torch.no_grad():
            return self.rotation(torch.float64).to(None, torch.float32)

    def save(self) -> None:
        """The state; at first what never changes too. A state of another start is removed."""
        began = time.time()
        if not self.saved_step:
            self.file.unlink(missing_ok=True)
            tensors = self.start.tensors("start.") | self.pca.tensors("pca.")
            if self.order is not None:
                tensors["order"] = self.order
            with common.blame("--out"):
                common.write_tensors(self.start_file, tensors)
        common.save_state(self.file, self.rotation, self.optimizer, {}, self.said)
        self.saved_step = self.said["step"]
        if self.args.save_every:                        # all processes wait: at most 2% of the time
            seconds = time.time() - began
            self.save_at = time.time() + max(self.args.save_every, 49 * seconds)

    @staticmethod
    def resume(args, model: Model, *_) -> "Run":
        """The training that `save` wrote. ValueError if there is none, or one of other settings."""
        file = args.out / Run.STATE
        tensors, said = common.load_state(file)
        fixed = common.read_tensors(args.out / Run.START)
        start = Projection.of(fixed, "start.").to(model.device)
        pca = Projection.of(fixed, "pca.")
        run = Run(args, start, pca, fixed.get("order"))
        common.check_same(file, said["config"], run.said["config"])
        common.restore_state(run.rotation, run.optimizer, tensors)
        run.said, run.saved_step = said, said["step"]
        return run


# ------------------------------------------------------------------------------
# The script

VALID = 8       # windows of validation text, the end of the training text


def options() -> argparse.Namespace:
    """The command line, checked as far as it can be before any file is opened."""
    parser = common.arguments(__doc__, several=True)
    data_arguments(parser)
    report_arguments(parser, windows=32)
    add = parser.add_argument
    count = common.within(1, 10 ** 7)
    positive = common.within(0.0, 1e6)
    add("--recipe", choices=("ours", "paper"), default="ours", help="[ours]")
    add("--ranks", type=Path, help="train along the order in this file of search.py")
    add("--uniform", action="store_true", help="train for the same rank everywhere")
    add("--steps", type=count, help="[200; paper: 400]")
    add("--accumulate", type=count, default=1, help="batches per step [1]")
    add("--lr", type=positive, help="Adam's peak rate [0.5 / head_dim; paper: 0.001]")
    add("--ce", type=common.within(0.0, 1.0), help="share of cross-entropy [0; paper: 0.75]")
    add("--amp", action="store_true", help="matrix products in bfloat16 over float32 weights")
    add("--checkpoint", action=argparse.BooleanOptionalAction,
        help="recompute layers in the backward pass: less memory, more time [if need be]")
    add("--check-every", type=count, default=100, help="steps between validations [100]")
    add("--save-every", type=positive, default=30.0, help="least seconds between saves [30]")
    add("--resume", action="store_true", help="continue the training that stopped in --out")
    args = parser.parse_args()
    paper = args.recipe == "paper"
    args.uniform |= paper
    args.steps = args.steps or (400 if paper else 200)
    if args.ranks and args.uniform:
        common.fail("--ranks: goes with neither --uniform nor --recipe paper, which draw their "
                    "ranks along no order")
    if args.ce is None:
        args.ce = 0.75 if paper else 0.0
    return args


def begin(args, model: Model, tokens, order) -> Run:
    """A new training: its start is an eigenbasis over a calibration text."""
    moments = calibrate(model, tokens, args.batch, args.seq, args.seed)
    start = pca = moments.pca()                         # pca waits on the CPU for the report
    if args.recipe == "ours":
        start = moments.query_aware(output_weights(model))
    start = start.to(model.device, wide(model.dtype))
    if order is None and not args.uniform:
        order = find_order(model, start, moments, tokens, args)
    return Run(args, start, pca.to("cpu"), order)


def check(run: Run, model: Model, valid, plan) -> None:
    """Print the KL on validation text: set apart from training, and not the held-out text."""
    p = run.projection()
    hooks = {budget: p.at(plan(budget)) for budget in (0.75, 0.5, 0.25)}
    with common.blame("--ckpt"):
        _, results = measure(model, valid, hooks, run.args.batch, run.args.seq, VALID)
    checked = {"step": run.said["step"]}
    for budget, result in results.items():
        checked[f"{budget:.0%}"] = round(result["kl"], 5)
    run.said["checks"].append(checked)
    print(f"\nKL on validation text: {checked}", file=sys.stderr)


def finish(run: Run, model: Model, held_out, plan) -> None:
    """Save the projections, report on them, and write train.json and train.png."""
    out, trained = run.args.out, run.projection()
    pca = run.pca.to(model.device)
    with common.blame("--out"):
        trained.save(out / "projections.safetensors", pca)
    uniform = partial(uniform_ranks, config=model.config)
    curves = {"pca": (pca, uniform), "trained": (trained, uniform)}
    if run.order is not None:
        curves |= {"pca_ordered": (pca, plan), "trained_ordered": (trained, plan)}
        run.said["order"] = run.order.tolist()
    write_report(model, held_out, curves, run.args, out / "train.json", run.said)
    run.file.unlink(missing_ok=True)            # the training is over
    run.start_file.unlink(missing_ok=True)


def main():
    args = options()
    with common.blame("--ckpt"):
        config = read_config(args.ckpt / "config.json")
    device, dtype = common.prepare_training(args, config, LEVELS)
    if args.lr is None:
        args.lr = 0.001 if args.recipe == "paper" else 0.5 / config.head_dim
    order = None
    if args.ranks and not args.resume:
        with common.blame("--ranks"):
            order, _ = read_plan(args.ranks, config, budget=0.25)     # as far as reports go
    with common.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    print(describe(args.ckpt, model))
    if args.seq < config.max_position_embeddings:
        print(f"For texts of up to {args.seq} tokens; for longer ones train with a longer --seq")
    tokens, held_out = text_for(args, config)
    args.train_tokens = len(tokens)
    tokens, valid = set_apart(tokens, VALID * args.seq + 1)
    start = Run.resume if args.resume else begin
    with common.blame("--resume" if args.resume else "--ckpt"):
        run = start(args, model, tokens, order)
    draw, plan, floor = draw_levels, partial(uniform_ranks, config=config), 1e-3
    if args.recipe == "paper":
        draw, floor = draw_independent, None
    elif run.order is not None:
        draw = partial(draw_along, order=run.order)
        plan = partial(plan_at, run.order, config)

    def after_step(step: int) -> None:
        if common.RANK:
            return
        forecast()
        last = step == args.steps
        if len(valid) and (last or step % args.check_every == 0):
            check(run, model, valid, plan)
        if last or time.time() >= run.save_at:
            run.save()                          # between steps: never half of one

    forecast = common.Forecast(args, device, args.steps - run.said["step"])
    hook = partial(ranks_hook, batch=args.batch)
    try:
        train(run, model, tokens, draw, hook, floor, after_step)
    except KeyboardInterrupt:
        where = f"the same command with --resume continues from step {run.saved_step}"
        common.fail(f"Stopped; {where if run.saved_step else 'nothing was saved yet'}", code=130)
    if common.RANK == 0:
        finish(run, model, held_out, plan)
    common.leave_processes()


if __name__ == "__main__":
    common.run_script(main)
