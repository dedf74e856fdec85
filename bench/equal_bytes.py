"""Ranks against rounding, at equal bytes: what a user with a real memory problem compares.

Cutting coordinates off is one way to make a cache smaller, storing each in fewer bits another, and
they combine. This script measures them with one yardstick, the bytes of a token as a share of a
16-bit cache, scales and zeros counted (16 bits each):

    ranks           the projections and plans in --out, coordinates in 16 bits
    intN            each token's keys and values of a head in N bits, between their least and their
                    largest: a scale and a zero for each token, head and side
    intN turned     the same behind one random rotation for all heads, which spreads outliers
    KIVI N          keys by channel over groups of 32 tokens, values by token; the newest group is
                    kept exactly (arXiv 2402.02750). Read in chunks of 32; the exact group, 32
                    tokens of 16 bits whatever the length, comes on top of the bytes shown
    ranks x int4    the coordinates that a plan keeps, in 4 bits with a scale and a zero
    bits            as bits.py trained them, if --out has bits.json; 4 exact tokens come on top

KL is the distance from the model on held-out text, in nats per token; top-1 the share of tokens
whose likeliest next token stays the same. Recall: held-out passages of 64 tokens, followed by
themselves; how much more often the next token is right in the second copy than in the first, as a
share of the model's own gain. Nothing here is trained or tuned; ranks come as train.py and
search.py left them.

    python bench/equal_bytes.py     # what train.py, search.py and bits.py left in out/
"""
import re
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
from bits import load_bits, show_bytes
from data import data_arguments, text_for
from distance import PASSAGE, gain_of_copy, log_probabilities, spread_windows
from evaluate import describe, report_arguments
from folding import chunks_of_both
from model import Model, load
from plans import read_plan
from projection import Projection, uniform_ranks

GROUP = 32              # tokens of a KIVI group
WHOLE = 16              # bits of a number that is not rounded


# ------------------------------------------------------------------------------
# Rounding

def rounded(x: Tensor, bits: int, dim: int, kept: Tensor | None = None) -> Tensor:
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


def by_token(layer: int, k: Tensor, v: Tensor, bits: int, turn: Tensor | None = None):
    """The hook `project=` of intN."""
    if turn is None:
        return rounded(k, bits, -1), rounded(v, bits, -1)
    return rounded(k @ turn, bits, -1) @ turn.T, rounded(v @ turn, bits, -1) @ turn.T


def by_rank_and_token(layer: int, k: Tensor, v: Tensor, p: Projection, ranks: Tensor, bits: int):
    """The hook of ranks x intN: (k U_r) rounded, U_rᵀ; what is cut off of v is its mean."""
    d = k.shape[-1]
    kept_k, kept_v = (torch.arange(d) < ranks[side, layer][:, None, None] for side in (0, 1))
    mean = p.mean_v[layer][:, None]
    coordinates = rounded(k @ p.U_k[layer] * kept_k, bits, -1, kept_k)
    k_hat = coordinates @ p.U_k[layer].mT
    coordinates = rounded(v @ p.U_v[layer] * kept_v, bits, -1, kept_v)
    cut_off = (mean @ p.U_v[layer]) * ~kept_v
    return k_hat, (coordinates + cut_off) @ p.U_v[layer].mT


def heads_then_values(parts: list[Tensor], K: int) -> Tensor:
    """Rows as KVCache.fold has them: of each head those of its queries and its key, then values."""
    q, k, v = parts
    return torch.cat((*chunks_of_both(q, k, K), v))


class Kivi:
    """What `model(tokens, cache=)` asks of a cache; attends to rounded groups and the newest one.

    To be called with chunks of GROUP tokens. Float32 throughout: its size is not what is measured.
    """

    def __init__(self, config, bits: int):
        self.bits = bits
        self.K = config.num_key_value_heads
        self.length = 0
        self.past = [None] * config.num_hidden_layers

    def begin(self, model: Model, B: int, T: int):
        if T > GROUP:
            raise ValueError(f"{T} tokens; KIVI is read in chunks of at most {GROUP}")
        return model.rope.rows(self.length, T, model.dtype, model.device)

    def advance(self, T: int) -> None:
        self.length += T

    def fold(self, i: int, weights):
        parts = weights.q_proj, weights.k_proj, weights.v_proj
        W = heads_then_values([part.weight for part in parts], self.K)
        b = None
        if parts[0].bias is not None:
            b = heads_then_values([part.bias for part in parts], self.K)
        return W, b, weights.o_proj.weight, None

    def attend(self, i: int, both: Tensor, v: Tensor, window=None) -> Tensor:
        q, k = both[:, :, :-1].flatten(1, 2), both[:, :, -1]
        B, K, T, d = k.shape
        v = v.view(B, T, K, d).transpose(1, 2)
        past = self.past[i] or (k[:, :, :0], v[:, :, :0])
        keys, values = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        n = keys.shape[2]
        mask = torch.ones(T, n, dtype=torch.bool).tril(n - T)
        a = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        new = rounded(k, self.bits, 2), rounded(v, self.bits, -1)       # channels, tokens
        self.past[i] = [torch.cat(pair, 2) for pair in zip(past, new, strict=True)]
        return a.transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------
# What is compared: name, share of a 16-bit cache, states of tokens (B, T)

def hooked(hook):
    return lambda model, x: model.hidden(x, hook)


def in_chunks(bits: int):
    def states(model: Model, x: Tensor) -> Tensor:
        cache = Kivi(model.config, bits)
        return torch.cat([model.hidden(part, cache=cache) for part in x.split(GROUP, 1)], 1)
    return states


def candidates(args, config) -> list:
    d = config.head_dim
    scales = 2 * WHOLE                              # bits of a scale and a zero
    turn = torch.linalg.qr(torch.randn(d, d)).Q
    rows = []
    for bits in (8, 4, 3, 2):
        share = (bits + scales / d) / WHOLE
        rows.append((f"int{bits}", share, hooked(partial(by_token, bits=bits))))
        hook = partial(by_token, bits=bits, turn=turn)
        rows.append((f"int{bits} turned", share, hooked(hook)))
    for bits in (4, 2):                             # half of the scales by channel, half by token
        share = (bits + scales * (1 / GROUP + 1 / d) / 2) / WHOLE
        rows.append((f"KIVI {bits}", share, in_chunks(bits)))

    with common.blame("--out"):
        p = Projection.load(args.out / "projections.safetensors")
        p.check_fits(config)
        for budget in (0.75, 0.5, 0.375, 0.25, 0.1875):
            _, ranks = read_plan(args.out / "ranks.json", config, budget)
            rows.append((f"ranks {budget:.1%}", budget, hooked(p.at(ranks))))
            hook = partial(by_rank_and_token, p=p, ranks=ranks, bits=4)
            share = (4 * budget + scales / d) / WHOLE
            rows.append((f"ranks {budget:.1%} x int4", share, hooked(hook)))
        uniform = uniform_ranks(0.25, config)
        rows.append(("uniform ranks 25.0%", 0.25, hooked(p.at(uniform))))
    if (args.out / "bits.json").exists():
        with common.blame("--out"):
            bits = load_bits(args.out / "bits.json")
        for budget in (0.25, 0.1875, 0.15625, 0.125, 0.09375, 0.0625, 0.046875):
            share = bits.plan(budget).double().mean().item() / WHOLE
            rows.append((f"bits {budget:.2%}", share, hooked(bits.at(budget))))
    return sorted(rows, key=lambda row: -row[1])


# ------------------------------------------------------------------------------
# The yardsticks

def distances(model: Model, tokens: Tensor, states) -> tuple[float, float]:
    """KL to the model in nats per token, and the share of tokens with the same likeliest next."""
    kl = same = 0.0
    for x in tokens[:, :-1].split(8):
        pair = model.norm(model.hidden(x)).flatten(0, 1), model.norm(states(model, x)).flatten(0, 1)
        for _, log_p, log_q in log_probabilities(model, *pair):
            kl += (log_p.exp() * (log_p - log_q)).sum().item()
            same += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
    return kl / tokens[:, 1:].numel(), same / tokens[:, 1:].numel()


CURVES = {      # names without their numbers: label, colour, marker
    "ranks": ("ranks: trained along their order", "C2", "^"),
    "int": ("int8 to int2, a scale per token and head", "C7", "s"),
    "KIVI": ("KIVI, 4 and 2 bits", "C5", "P"),
    "ranks x int": ("those ranks in int4", "C8", "v"),
    "bits": ("bits: trained for them", "C4", "D"),
}


def draw(rows: list[dict], path: Path) -> None:
    """KL and recall against bytes."""
    with common.picture(path, columns=2, width=11, height=4.5) as (distance, memory):
        for curve, (label, color, marker) in CURVES.items():
            mine = [row for row in rows if re.sub(r"[\d.%]+", "", row["name"]).split() ==
                    curve.split()]
            x = [100 * row["bytes"] for row in mine]
            style = {"label": label, "color": color, "marker": marker}
            distance.plot(x, [row["kl"] for row in mine], **style)
            memory.plot(x, [100 * row["recall"] for row in mine], **style)
        distance.set(yscale="log", ylabel="KL to the base model, nats per token")
        memory.set(ylim=(0, 105), ylabel="recall, % of the model's own")
        distance.legend(title="lower is better")
        for axis in (distance, memory):
            show_bytes(axis)


@torch.no_grad()
def main():
    parser = common.arguments(__doc__)
    data_arguments(parser)
    report_arguments(parser)
    parser.add_argument("--passages", type=common.within(1, 10 ** 6), default=500,
                        help=f"of {PASSAGE} held-out tokens, for the recall [500]")
    args = parser.parse_args()
    device, dtype = common.prepare(args)
    if device.type != "cpu" or dtype != torch.float32:
        common.fail("bench/equal_bytes.py: rounds in float32 on a CPU")
    common.keep_freed_memory()
    with common.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    rows = candidates(args, model.config)
    print(describe(args.ckpt, model))
    _, held_out = text_for(args, model.config)
    tokens = spread_windows(held_out, args.windows, args.seq)
    passages = spread_windows(held_out, args.passages, PASSAGE)[:, 1:]
    own = gain_of_copy(model, passages, model.hidden)
    print(f"\nThe model itself gains {own:.3f} in the second copy of {len(passages)} passages\n")
    print(f"  {'bytes':>6s}   {'':22s} {'KL':>8s}   {'top-1':>6s}   {'recall':>6s}")
    found = []
    for name, share, states in rows:
        kl, same = distances(model, tokens, states)
        kept = gain_of_copy(model, passages, partial(states, model)) / own
        print(f"  {share:6.1%}   {name:22s} {kl:8.4f}   {same:6.1%}   {kept:6.1%}", flush=True)
        found.append({"name": name, "bytes": share, "kl": kl, "same": same, "recall": kept})
    with common.blame("--out"):
        common.write_json(args.out / "equal_bytes.json", {"rows": found}, indent=1)
        draw(found, args.out / "equal_bytes.png")
    print(f"Saved {args.out / 'equal_bytes.json'} and .png")


if __name__ == "__main__":
    common.run_script(main)
