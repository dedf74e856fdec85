"""Ranks against rounding, at equal bytes: what a user with a real memory problem compares.

Cutting coordinates off is one way to make a cache smaller, storing each in fewer bits another, and
they combine. This script measures them with one yardstick, the bytes of a token as a share of a
16-bit cache, scales and zeros counted (16 bits each):

    ranks           the projections and plans in --out, coordinates in 16 bits
    intN            each token's keys and values of a head in N bits, between their least and their
                    largest: a scale and a zero for each token, head and side
    intN turned     the same behind one random rotation for all heads, which spreads outliers
    KIVI N          keys by channel over groups of 32 tokens, values by token (arXiv 2402.02750)
    q8_0, q4_0      llama.cpp's: 32 neighbours of a token and head share a scale in 16 bits, no
                    zero; "turned" behind a Hadamard matrix of the head's width
    ranks x int4    the coordinates that a plan keeps, in 4 bits with a scale and a zero
    bits            as bits.train trained them, if --out has bits.json

KIVI and bits keep the newest group exactly: a token sees its own group, 1 to 32 tokens up to
itself, as it is. So that no method has that for itself, each is measured twice: with the newest
group exact, and stored like all others. Exact it comes on top of the bytes shown, 32 tokens of 16
bits whatever the length. The whole first tokens of bits and of ranks come on top too.

KL is the distance from the model on held-out text, in nats per token; top-1 the share of tokens
whose likeliest next token stays the same. Recall: held-out passages of 64 tokens, followed by
themselves; how much more often the next token is right in the second copy than in the first, as a
share of the model's own gain. Nothing is trained here: ranks come as train.py (or search.py) left
them, bits as bits.train did.

    python bench/equal_bytes.py     # what train.py and bits.train left in out/
"""
import re
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bits import load_bits
from bits.rounding import FULL, GROUP, NewestExact
from evaluate import describe, measure, recall
from model import load
from projection import Projection, plan_at, uniform_ranks
from support import cli
from support.data import held_out_passages, text_for
from support.files import write_json
from support.pictures import picture, show_bytes
from support.plans import PROJECTIONS, read_ranks

# ------------------------------------------------------------------------------
# Rounding

def rounded(x: Tensor, bits: int, dim: int = -1, kept: Tensor | None = None) -> Tensor:
    """x as 2^bits levels between its least and its largest along dim; scale and zero in 16 bits.

    kept: which numbers are stored; the others are zero, and stay so.
    """
    if kept is None:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    else:
        low = x.masked_fill(~kept, torch.inf).amin(dim, keepdim=True)
        high = x.masked_fill(~kept, -torch.inf).amax(dim, keepdim=True)
    step = ((high - low) / (2 ** bits - 1)).half().float().clamp(min=1e-8)
    low = low.half().float()
    level = ((x - low) / step).round().clamp(0, 2 ** bits - 1)
    y = low + level * step
    return y if kept is None else y * kept


def by_token(layer: int, k: Tensor, v: Tensor, turn, bits: int, Q: Tensor | None = None,
             stored=rounded):
    """The hook `project=` of intN, or of `stored`, behind a rotation Q, if there is one."""
    k = turn(k)
    if Q is None:
        return stored(k, bits), stored(v, bits)
    return stored(k @ Q, bits) @ Q.T, stored(v @ Q, bits) @ Q.T


def in_blocks(x: Tensor, bits: int) -> Tensor:
    """x as llama.cpp has it: 8 bits around 0, or 4 whose lowest level is what lies furthest out."""
    blocks = x.unflatten(-1, (-1, 32))
    furthest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = (furthest.abs() / 127 if bits == 8 else furthest / -8).half().float()
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    safe = torch.where(scale == 0, 1.0, scale)
    return ((blocks / safe).round().clamp(low, high) * scale).flatten(-2)


def hadamard(d: int) -> Tensor:
    """Sylvester's matrix over √d, of d a power of two."""
    H = torch.ones(1, 1)
    while len(H) < d:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H / d ** 0.5


def by_rank_and_token(layer: int, k: Tensor, v: Tensor, turn, p: Projection, ranks: Tensor,
                      bits: int):
    """The hook of ranks x intN: coordinates rounded; means come back, and first tokens stay whole.
    """
    d = k.shape[-1]
    kept_k, kept_v = (torch.arange(d) < ranks[side, layer][:, None, None] for side in (0, 1))
    m = torch.zeros_like(k) if p.mean_k is None else p.mean_k[layer][:, None].expand_as(k)
    coordinates = rounded(turn(k - m) @ p.U_k[layer] * kept_k, bits, -1, kept_k)
    k_hat = coordinates @ p.U_k[layer].mT + turn(m)
    mean = p.mean_v[layer][:, None]
    coordinates = rounded(v @ p.U_v[layer] * kept_v, bits, -1, kept_v)
    cut_off = (mean @ p.U_v[layer]) * ~kept_v
    v_hat = (coordinates + cut_off) @ p.U_v[layer].mT
    return p.with_whole(turn(k), k_hat), p.with_whole(v, v_hat)


def by_group(layer: int, k: Tensor, v: Tensor, turn, bits: int):
    """The hook of KIVI N: keys channel by channel within a group, values token by token."""
    keys = [rounded(group, bits, 2) for group in turn(k).split(GROUP, dim=2)]
    return torch.cat(keys, dim=2), rounded(v, bits, -1)


def twice(hook) -> dict:
    """A hook with the newest group exact, and with it stored like all others."""
    if isinstance(hook, NewestExact):
        return {"exact": hook, "stored": hook.stored}
    return {"exact": NewestExact(hook), "stored": hook}


# ------------------------------------------------------------------------------
# What is compared

def candidates(args, config) -> list:
    """(Name, share of a 16-bit cache, hook), the largest first."""
    d = config.head_dim
    scales = 2 * FULL                               # bits of a scale and a zero
    Q = torch.linalg.qr(torch.randn(d, d)).Q
    rows = []
    for bits in (8, 4, 3, 2):
        share = (bits + scales / d) / FULL
        rows.append((f"int{bits}", share, partial(by_token, bits=bits)))
        rows.append((f"int{bits} turned", share, partial(by_token, bits=bits, Q=Q)))
    for bits in (8, 4) if d % 32 == 0 else ():
        share = (bits + FULL / 32) / FULL
        rows.append((f"q{bits}_0", share, partial(by_token, bits=bits, stored=in_blocks)))
        if d & (d - 1) == 0:
            hook = partial(by_token, bits=bits, Q=hadamard(d), stored=in_blocks)
            rows.append((f"q{bits}_0 turned", share, hook))
    for bits in (4, 2):                             # half of the scales by channel, half by token
        share = (bits + scales * (1 / GROUP + 1 / d) / 2) / FULL
        rows.append((f"KIVI {bits}", share, partial(by_group, bits=bits)))

    with cli.blame("--out"):
        p = Projection.load(args.out / PROJECTIONS)
        p.check_fits(config)
        found = read_ranks(args.out / "ranks.json", config)
        if not found.fits(p):
            raise ValueError(f"{args.out / 'ranks.json'}: was searched for other projections")
        for budget in (0.75, 0.5, 0.375, 0.25, 0.1875):
            ranks = plan_at(found.order, config, budget)
            rows.append((f"ranks {budget:.1%}", budget, p.at(ranks)))
            hook = partial(by_rank_and_token, p=p, ranks=ranks, bits=4)
            share = (4 * budget + scales / d) / FULL
            rows.append((f"ranks {budget:.1%} x int4", share, hook))
        uniform = uniform_ranks(0.25, config)
        rows.append(("uniform ranks 25.0%", 0.25, p.at(uniform)))
    if (args.out / "bits.json").exists():
        with cli.blame("--out"):
            bits = load_bits(args.out / "bits.json")
            bits.rounding.p.check_fits(config)
        for budget in (0.28125, 0.25, 0.1875, 0.15625, 0.125, 0.09375, 0.0625, 0.046875):
            share = bits.plan(budget).double().mean().item() / FULL
            rows.append((f"bits {budget:.2%}", share, bits.at(budget)))
    return sorted(rows, key=lambda row: -row[1])


# ------------------------------------------------------------------------------
# The report

CURVES = {      # names without their numbers: label, colour, marker
    "ranks": ("ranks, along their order", "C2", "^"),
    "int": ("int8 to int2, a scale per token and head", "C7", "s"),
    "KIVI": ("KIVI, 4 and 2 bits", "C5", "P"),
    "q_ turned": ("llama.cpp's q8_0 and q4_0, turned", "C9", "X"),
    "ranks x int": ("those ranks in int4", "C8", "v"),
    "bits": ("bits", "C4", "D"),
}


def draw(rows: list[dict], path: Path) -> None:
    """KL and recall against bytes: lines with the newest group exact, dots with it stored."""
    with picture(path, columns=2, width=11, height=5) as (distance, memory):
        for curve, (label, color, marker) in CURVES.items():
            mine = [row for row in rows if re.sub(r"[\d.%]+", "", row["name"]).split() ==
                    curve.split()]
            x = [100 * row["bytes"] for row in mine]
            for found, style in (
                ("exact", {"label": label, "marker": marker}),
                ("stored", {"linestyle": ":", "marker": marker, "markersize": 3}),
            ):
                style["color"] = color
                distance.plot(x, [row[found]["kl"] for row in mine], **style)
                memory.plot(x, [100 * row[found]["recall"] for row in mine], **style)
        distance.set(yscale="log", ylabel="KL to the base model, nats per token")
        memory.set(ylim=(0, 105), ylabel="recall, % of the model's own")
        handles, labels = memory.get_legend_handles_labels()
        memory.figure.legend(handles, labels, loc="outside lower center", ncols=3,
                             title="lines: the newest group exact; dots: stored")
        for axis in (distance, memory):
            show_bytes(axis)


@torch.no_grad()
def main():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.out_argument(parser)
    cli.report_arguments(parser)
    cli.passage_arguments(parser, least=1)
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    if device.type != "cpu" or dtype != torch.float32:
        cli.fail("bench/equal_bytes.py: rounds in float32 on a CPU")
    cli.keep_freed_memory()
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    rows = candidates(args, model.config)
    print(describe(args.ckpt, model))
    _, held_out = text_for(args, model.config)
    passages = held_out_passages(args, held_out, model.config)
    own = recall(model, passages)
    print(f"\nThe model itself gains {own:.3f} in the second copy of {len(passages)} passages\n")
    columns = f"{'KL':>8s}   {'top-1':>6s}   {'recall':>6s}"
    print(" " * 34 + f"| {'the newest group exact':26s} | stored like all others")
    print(f"  {'bytes':>6s}   {'':24s} | {columns} | {columns}")
    found = []
    for name, share, hook in rows:
        hooks = twice(hook)
        _, results = measure(model, held_out, hooks, args.batch, args.seq, args.windows)
        shown = ""
        for newest, result in results.items():
            result["recall"] = recall(model, passages, hooks[newest]) / own
            shown += f" | {result['kl']:8.5f}   {result['same']:6.1%}   {result['recall']:6.1%}"
        print(f"  {share:6.1%}   {name:24s}{shown}", flush=True)
        found.append({"name": name, "bytes": share} | results)
    with cli.blame("--out"):
        write_json(args.out / "equal_bytes.json", {"rows": found}, indent=1)
        draw(found, args.out / "equal_bytes.png")
    print(f"Saved {args.out / 'equal_bytes.json'} and .png")


if __name__ == "__main__":
    cli.run_script(main)
