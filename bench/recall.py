"""Recall by distance: what is left of the model's gain when a passage is said again, by its length.

A token of the second copy is found as many tokens back as the passage is long, so longer passages
ask the cache for what lies further back. Of the lengths that are tried without --length those whose
twice exceeds the model's positions are left out. Rows are the curves of evaluate.py at one budget,
and bits where bits.train left some.

    python bench/recall.py                          # what train.py and search.py left in out/
    python bench/recall.py --budget 0.5
    python bench/recall.py --ckpt DIR --length 1024 4096 --passages 16  # far back in a long text
"""
import sys
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bits import load_bits
from evaluate import curves_in, describe, hooks_of, recall
from model import Model, load
from support import cli
from support.data import held_out_passages, text_for
from support.pictures import CURVES, whole_recall

LENGTHS = (32, 64, 128, 240)
AT_A_TIME = 2 ** 13         # tokens of a pass, or two copies of one passage


def recall_in_parts(model: Model, passages: Tensor, beginning, project=None) -> float:
    """evaluate.recall of passages (N, n), few at a time where they are long."""
    n = passages.shape[1]
    parts = passages.split(max(1, AT_A_TIME // (2 * n)))
    of_parts = [recall(model, part, project, beginning=beginning) * len(part) for part in parts]
    return sum(of_parts) / len(passages)


def lengths_for(args, config) -> list[int]:
    """Those of --length, or LENGTHS; twice each is to be within the model's positions."""
    most = config.max_position_embeddings
    for n in args.length or ():
        if 2 * n > most:
            cli.fail(f"--length {n}: said twice it takes {2 * n} positions, and the model has "
                     f"{most}")
    return args.length or [n for n in LENGTHS if 2 * n <= most]


def main():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.out_argument(parser)
    cli.passage_arguments(parser, least=1)
    parser.add_argument("--budget", type=cli.within(0.125, 1.0), default=0.25,
                        help="share of the cache that is kept [0.25]")
    parser.add_argument("--length", type=cli.within(2, 10 ** 6), nargs="+",
                        help=f"tokens of a passage, one or several {list(LENGTHS)}")
    args = parser.parse_args()
    args.seq = 1
    device, dtype = cli.prepare(args)
    cli.keep_freed_memory()
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    config = model.config
    lengths = lengths_for(args, config)
    with cli.blame("--out"):
        curves = hooks_of(curves_in(args.out, model))
        hooks = {CURVES[name][1]: hook(args.budget) for name, hook in curves.items()}
        if (args.out / "bits.json").exists():
            bits = load_bits(args.out / "bits.json")
            hooks |= {f"bits, {share:.2%}": bits.at(share) for share in (0.125, 0.0625)}
    print(describe(args.ckpt, model))
    _, held_out = text_for(args, config)
    passages = [held_out_passages(args, held_out, config, n) for n in lengths]

    print(f"\n  {'tokens of a passage':32s}" + "".join(f"{n:>8d}" for n in lengths))
    beginning = getattr(held_out, "beginning", None)        # of --begin
    own = [recall_in_parts(model, p, beginning) for p in passages]
    shown = "".join(f"{gain:8.1%}" for gain in own)
    print(f"  {'gain of the model itself':32s}{shown}", flush=True)
    for name, hook in hooks.items():
        left = [recall_in_parts(model, p, beginning, hook) * whole_recall(gain)
                for p, gain in zip(passages, own, strict=True)]
        print(f"  {name:32s}" + "".join(f"{share:7.1f}%" for share in left), flush=True)


if __name__ == "__main__":
    cli.run_script(main)
