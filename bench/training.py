"""How fast training is, and what share of this machine it uses.

A step's operations in matrix products are 6 N per token, N the weights in them: 2 N for the
teacher, 2 N for the student, 2 N for the student's gradient (by its states alone: no weight has
one). Their rate is set against the rate that products of the same shapes reach on their own. The
rest of a step (softmax of two vocabularies, norms, the rotations) counts as lost time.

    python bench/training.py                    # 20 steps of train.py's default, nothing is kept
    python bench/training.py --amp              # the same with products in bfloat16
"""
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import (
    recipe_of,
    seconds_of,
    spread,
    sweep_start,
    synchronize,
    training_arguments,
    unsaved_state,
)
from model import Model, load
from projection import Rotation
from support import cli
from support.checkpoint import read_config
from support.data import text_for
from support.training import peak_memory, prepare_training
from train import draw_levels, train

WARM_UP = 2             # steps that are not counted: memory is still being fetched


def matrices(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p for p in module.parameters() if p.ndim == 2]


@torch.no_grad()
def product_rate(model: Model, rows: int, dtype: torch.dtype) -> float:
    """Operations per second of this model's products alone, `rows` tokens at a time."""
    operations, seconds = 0, 0.0
    for W in [*matrices(model.layers[0]), model.lm_head.weight]:
        W = W.to(dtype)
        x = W.new_empty(rows, W.shape[1]).normal_()
        product = partial(F.linear, x, W)
        product()
        times = [seconds_of(product) for _ in range(5)]
        seconds += statistics.median(times)
        operations += 2 * rows * W.numel()
    return operations / seconds


def seconds_per_step(args, model: Model, tokens) -> list[float]:
    """Train as train.py does, without what it saves and reports."""
    state = unsaved_state(Rotation(sweep_start(args, model, tokens)))
    recipe = recipe_of(args, model.config, amp=args.amp, recompute=args.checkpoint)
    ends = []

    def after_step(step: int) -> None:
        synchronize()
        ends.append(time.perf_counter())

    train(model, state, tokens, draw_levels, recipe, after_step)
    counted = ends[WARM_UP - 1:]            # from the end of the warm-up on
    return [end - start for start, end in pairwise(counted)]


def options():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    parser.add_argument("--batch", type=cli.within(1, 10 ** 5), default=8,
                        help="sequences of a step [8]")
    parser.add_argument("--seq", type=cli.within(2, 10 ** 6), default=256,
                        help="tokens of each [256]")
    training_arguments(parser, steps=20)
    parser.add_argument("--amp", action="store_true", help="as for train.py")
    args = parser.parse_args()
    args.checkpoint = None                  # decided by the memory there is, as in train.py
    if args.steps <= WARM_UP:
        cli.fail(f"--steps {args.steps}: the first {WARM_UP} warm up; take more")
    return args


def main():
    args = options()
    with cli.blame("--ckpt"):
        config = read_config(args.ckpt / "config.json")
    with tempfile.TemporaryDirectory() as folder:
        args.out = Path(folder)             # for the ids of a .txt or .jsonl
        need = partial(peak_memory, config, args.batch, args.seq)
        device, dtype = prepare_training(args, config, need)
        with cli.blame("--ckpt"):
            model = load(args.ckpt, device, dtype)
        tokens, _ = text_for(args, config)
        seconds = seconds_per_step(args, model, tokens)

    made = args.batch * args.seq
    speeds = [made / s for s in seconds]
    product_dtype = torch.bfloat16 if args.amp else dtype
    rate = product_rate(model, min(made, 2048), product_dtype)
    weights = [*matrices(model.layers), model.lm_head.weight]
    operations = 6 * sum(W.numel() for W in weights)
    shares = [operations * speed / rate for speed in speeds]
    name = str(product_dtype).removeprefix("torch.")
    print(f"\n{len(seconds)} steps of {made:,} tokens: {spread(speeds, ',.0f')} tokens/s")
    print(f"Matrix products alone reach {rate / 1e9:,.0f} GFLOP/s in {name} here; "
          f"{operations / 1e6:,.1f} MFLOP per token are {spread(shares, '.0%')} of that")


if __name__ == "__main__":
    cli.run_script(main)
