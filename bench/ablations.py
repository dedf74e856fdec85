"""What each part of the method is worth, on the demo: KL to the base model on held-out text at uniform ranks.

    python tests/ablations.py start          # no training: channels, PCA, the query-aware start
    python tests/ablations.py sides          # keys alone compressed, values alone, with projections trained by train.py
    python tests/ablations.py fixed          # no Matryoshka: every sequence at one rank, 37.5%
    python tests/ablations.py free           # no orthogonality: U itself is learnt, without the Cayley map
    python tests/ablations.py default        # train.py's default, to compare with

Each takes --steps, --seed and the like as train.py does (`sides` reads --out), and prints a line for each row. They exist to
be compared with one another: same text, same steps.
"""
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from model import load  # noqa: E402
from projection import BUDGETS, STEPS, Projection, Rotation, uniform_ranks  # noqa: E402

NAMES = ("start", "sides", "fixed", "free", "default")


def channels(moments) -> Projection:
    """Whole coordinates, none mixed, in the order of key energy times query energy, and of value energy: U a permutation."""
    d = moments.v.shape[-1]
    energy = lambda total: total.diagonal(dim1=-2, dim2=-1)
    order = lambda e: torch.eye(d)[e.argsort(dim=-1, descending=True)].transpose(-1, -2).contiguous()
    return Projection(order(energy(moments.kk) * energy(moments.qq)), order(energy(moments.covariance("v"))), moments.mean_v())


class Free(Rotation):
    """U = U₀ + A with any A: U_r U_rᵀ is then no projection."""

    def __init__(self, start: Projection):
        super().__init__(start)
        self.A_k, self.A_v = (nn.Parameter(torch.zeros_like(U)) for U in (start.U_k, start.U_v))

    def forward(self, dtype=None) -> Projection:
        U_k, U_v = self.start.U_k.to(dtype) + self.A_k.to(dtype), self.start.U_v.to(dtype) + self.A_v.to(dtype)
        return Projection(U_k, U_v, self.mean_v.to(dtype), self.start.pca)

    def told_apart(self, ranks):
        return torch.ones(2, 1, dtype=torch.bool)


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(f"which one? {', '.join(NAMES)}", file=sys.stderr)
        raise SystemExit(2)
    name = sys.argv.pop(1)
    args = train.options()
    model = load(args.ckpt, dtype=torch.float32)
    tokens, held = train.text_for(args, model)
    config, rows = model.config, {}
    at = lambda p, ranks=uniform_ranks: [p.at(ranks(b, config)) for b in BUDGETS[1:]]

    with torch.no_grad():
        moments = train.calibrate(model, tokens, args.batch, args.seq, args.seed)
    aware = moments.aware([layer.self_attn.o_proj.weight for layer in model.layers])
    aware.pca = moments.pca()
    if name == "start":
        rows = {"channels": at(channels(moments)), "PCA": at(aware.pca), "query-aware start": at(aware)}
    elif name == "sides":
        p = Projection.load(args.out / "projections.safetensors")
        for side in range(2):
            def ranks(b, c):
                plan = uniform_ranks(1.0, c)
                plan[side] = uniform_ranks(b, c)[side]
                return plan
            rows[f"{('keys', 'values')[side]} alone"] = at(p, ranks)
    else:
        args.checkpoint, args.recipe, args.ranks, args.lr = False, "ours", None, args.lr or 0.5 / config.head_dim
        args.dtype, args.ce, args.train_tokens = "float32", 0.0, len(tokens)
        if name == "fixed":
            train.draw_ranks = lambda kind, B, c, *_: torch.full((2, config.num_hidden_layers, B, config.num_key_value_heads),
                                                                 3 * config.head_dim // STEPS)
        run = train.Run(args, aware)
        if name == "free":
            run.rotation = Free(aware)
            run.optimizer = torch.optim.Adam(run.rotation.parameters(), lr=args.lr)
        run.save_sometimes = run.keep_best = lambda *_: None
        train.train(model, tokens, tokens[:0], run)
        with torch.no_grad():
            rows = {name: at(run.rotation())}
    plans = {(row, b): project for row, hooks in rows.items() for b, project in zip(BUDGETS[1:], hooks)}
    _, results = train.evaluate(model, held, plans, args.batch, args.seq, args.runs)
    print("                    " + "".join(f"{b:>9.1%}" for b in BUDGETS[1:]))
    for row in rows:
        print(f"{row:20s}" + "".join(f"{results[row, b]['kl']:9.5f}" for b in BUDGETS[1:]))


if __name__ == "__main__":
    main()
