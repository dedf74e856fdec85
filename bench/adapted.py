"""KL of start and order against PCA, for any model of transformers: Gemma-3-270m is one.

PCA has uniform ranks: as the paper has it, and with the same first tokens whole. Eigenvectors of
the second moments are its keys' then, as no mean is put back.

    python bench/gemma3.py ../gemma3
    python bench/adapted.py --ckpt ../gemma3 --positions 1
"""
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from adapters.transformers_cache import load
from evaluate import describe, measure
from projection import Moments, Projection, leading, plan_at, uniform_ranks
from search import Windows, find_order, find_start, positions_of
from support import cli
from support.data import text_for

BUDGETS = (0.75, 0.5, 0.375, 0.25)


@torch.no_grad()
def moments_of(model, windows: Windows, whole: int) -> Moments:
    """Of keys, turned, and values, the first `whole` tokens left out."""
    moments = Moments(model.config, model.device)

    def observe(layer, _, k, v, turn):
        moments.add(0, layer, turn(k)[:, :, whole:])
        moments.add(1, layer, v[:, :, whole:])

    for batch in windows:
        windows.states(model, batch, observe=observe)
    return moments


def main():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.report_arguments(parser, batch=4, windows=8)
    cli.sweep_arguments(parser)
    cli.amp_argument(parser)
    parser.add_argument("--whole", type=cli.within(0, 64), default=4, help="[4]")
    args = parser.parse_args()
    args.out = Path("out")
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    cli.choose_amp(args, device, dtype)
    model = load(args.ckpt, device, dtype)
    config = model.config
    print(describe(args.ckpt, model))
    tokens, held_out = text_for(args, config)
    windows = Windows(tokens, args.sweep_windows, args.batch, args.seq,
                      positions_of(args, config), args.seed, args.amp)
    pca = moments_of(model, windows, 0).pca()
    moments = moments_of(model, windows, args.whole)
    varies = torch.stack((moments.second()[0], moments.covariance()[1]))
    U_k, U_v = leading(varies)
    nothing = torch.zeros_like(pca.mean_v)
    pca_whole = Projection(U_k, U_v, moments.mean()[1].float(), nothing, args.whole)
    start = find_start(model, windows, args.whole)
    order = find_order(model, start, windows)
    uniform = partial(uniform_ranks, config=config)
    curves = {"PCA": (pca, uniform), "PCA, whole": (pca_whole, uniform), "start": (start, uniform),
              "start, order": (start, partial(plan_at, order, config))}
    hooks = {(name, b): p.to(device).at(plan(b)) for name, (p, plan) in curves.items()
             for b in BUDGETS}
    _, found = measure(model, held_out, hooks, args.batch, args.seq, args.windows)
    print(f"\n{args.windows} windows of {args.seq}; in brackets the share of PCA with whole tokens")
    print("              " + "".join(f"{b:>16.1%}" for b in BUDGETS))
    for name in curves:
        kls = [found[name, b]["kl"] for b in BUDGETS]
        of = [found["PCA, whole", b]["kl"] for b in BUDGETS]
        cells = (f"{f'{x:.4f} ({x / y:.3f})':>16s}" for x, y in zip(kls, of, strict=True))
        print(f"{name:14s}" + "".join(cells))


if __name__ == "__main__":
    cli.run_script(main)
