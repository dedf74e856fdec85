"""Orthogonal projections of keys and values (MatryoshkaKV, arXiv 2410.14731, section 3).

Each of L layers has K key-value heads; each head has two orthogonal d × d matrices, U_k for
keys and U_v for values, columns sorted by importance, and the mean μ of its values. At rank r only
the first r columns U_r count. With P = U_r U_rᵀ, and vectors as rows,

    k̂ = k P                     cached as k U_r, r numbers in place of d
    v̂ = v P + μ (I − P)         cached as v U_r; the rest of v is replaced by its mean

and q · k̂ = (q U_r) · (k U_r). One U serves every rank like nested dolls, Matryoshka: a smaller
rank uses a prefix of the same columns. Keys are projected after RoPE.

The matrices start as eigenvectors: in the paper of covariances over a calibration text, a PCA; by
default those of `find_start` (search.py). Training then rotates them (train.py). The Cayley map C
of a skew-symmetric A is orthogonal by construction, and the identity at A = 0:

    U = U₀ C(A),        C(A) = (I − A/2)⁻¹ (I + A/2)

Ranks are multiples of d/8: level l, 1 to 8, keeps l eighths of the columns. A plan is the ranks of
all heads: (2, L, K) integers, [0] of keys, [1] of values; their mean / d is its budget. An order
(search.py) lists heads, of keys or of values, that lose an eighth one after the other: a prefix of
it makes a plan.

Not in the paper, and absent where `whole` is 0 and `mean_k` None (README, "What differs", says what
each is worth):

    whole       the first w tokens of a sequence keep all d coordinates. Everybody attends to them,
                and their keys and values are unlike all others.
    mean_k      m, the mean of a head's keys before RoPE. RoPE turns it by the position n, R_n m,
                and PCA would spend columns on that curve. So k̂ = R_n m + (k − R_n m) P, with k
                after RoPE, as above.

Where mean_k is None keys need no mean: to cut it off takes one vector c from all keys, q · c from
all scores of a query, and softmax does not see it. Whole tokens are not cut and would keep that c,
so `whole` needs mean_k.

    python projection.py        # the variance that leading columns hold, on the demo model
"""
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from model import Model, load, products_in_bfloat16
from support import cli, files, processes
from support.data import random_windows, text_for
from support.progress import Progress

# Ranks are multiples of d / LEVELS, so a budget is at least 1 / LEVELS; it is also the step of
# Algorithm 1. Files of orders are for one LEVELS, and the blocks of bits/ are as wide.
LEVELS = 8
SIDES = ("keys", "values")
BUDGETS = [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25]       # those that reports are made at


# ------------------------------------------------------------------------------
# The projection itself

class Projection:
    """U_k, U_v (L, K, d, d), orthogonal, columns by importance; mean_v (L, K, d); float32.

    mean_k (L, K, d), of keys before RoPE, or None; whole: how many first tokens keep all.
    positions: the windows they were made on lay below this one; 0 if not known.
    """
    positions = 0

    def __init__(self, U_k: Tensor, U_v: Tensor, mean_v: Tensor, mean_k: Tensor | None = None,
                 whole: int = 0):
        square = *mean_v.shape, *mean_v.shape[-1:]
        if mean_v.ndim != 3 or U_k.shape != square or U_v.shape != square:
            raise ValueError(f"projections of shapes U_k {list(U_k.shape)}, U_v {list(U_v.shape)}, "
                             f"mean_v {list(mean_v.shape)}; expected (L, K, d, d) twice, (L, K, d)")
        if mean_k is not None and mean_k.shape != mean_v.shape:
            raise ValueError(f"mean_k of shape {list(mean_k.shape)}, and mean_v of another, "
                             f"{list(mean_v.shape)}")
        if whole < 0 or (whole and mean_k is None):
            raise ValueError(f"whole {whole}: needs a mean_k; without one whole is 0")
        self.U_k, self.U_v = U_k, U_v
        self.mean_v, self.mean_k, self.whole = mean_v, mean_k, whole

    def at(self, ranks: Tensor):
        """The hook `project=` that simulates a plan: (layer, k, v, turn) -> (k̂, v̂).

        ranks is (2, L, K), or (2, L, B, K) where every sequence of the batch has a plan of its own
        (training). ValueError for a rank that is not one of d/8, 2d/8, …, d.
        """
        L, K, d = self.mean_v.shape
        check_ranks(ranks, L, K, d)

        def project(layer: int, k: Tensor, v: Tensor, turn):
            if layer >= L or (k.shape[1], k.shape[3]) != (K, d):
                raise ValueError(f"projections of the shape (L, K, d) = {(L, K, d)}, but layer "
                                 f"{layer} of the model has keys {list(k.shape)}")
            r_k, r_v = ranks[:, layer]                              # (K,) or (B, K)
            turned = turn(k)
            if (r_k < d).any():
                P = projector(self.U_k[layer], r_k).to(k)
                if self.mean_k is None:
                    k_hat = turned @ P
                else:           # subtracted before it is turned, as the cache stores it
                    m = self.mean_k[layer][:, None].to(k)           # (K, 1, d)
                    k_hat = turn(k - m) @ P + turn(m.expand(k.shape[1:]))
                    is_full = (r_k == d)[..., None, None].to(k.device)
                    k_hat = torch.where(is_full, turned, k_hat)
                turned = self.with_whole(turned, k_hat)
            if (r_v < d).any():
                P = projector(self.U_v[layer], r_v)
                mean = self.mean_v[layer][:, None]                  # (K, 1, d)
                cut_off = mean - mean @ P                           # μ (I − P)
                v = self.with_whole(v, v @ P.to(v) + cut_off.to(v))
            return turned, v

        return project

    def with_whole(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """x̂ (B, K, T, d), but of the first tokens x."""
        w = self.whole
        return torch.cat((x[:, :, :w], x_hat[:, :, w:]), dim=2) if w else x_hat

    @staticmethod
    def identity(config) -> "Projection":
        """U = I and zero means: for a cache at full ranks, which is the model's own."""
        L, K, d = shape_of(config)
        U = torch.eye(d).repeat(L, K, 1, 1)
        return Projection(U, U.clone(), torch.zeros(L, K, d))

    def check_fits(self, config) -> None:
        """ValueError unless these are projections of a model with this config."""
        if (mine := tuple(self.mean_v.shape)) != (model := shape_of(config)):
            raise ValueError(f"projections of the shape {mine}, but the model has {model}")

    def to(self, device, dtype=None) -> "Projection":
        moved = Projection.of({name: x.to(device, dtype) for name, x in self.tensors().items()},
                              whole=self.whole)
        moved.positions = self.positions
        return moved

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """All of them, by the names that files use."""
        found = {name: getattr(self, name) for name in ("U_k", "U_v", "mean_v", "mean_k")}
        return {prefix + name: x for name, x in found.items() if x is not None}

    @staticmethod
    def of(tensors: dict, prefix: str = "", whole: int = 0) -> "Projection":
        """What `tensors` gave. Raises KeyError for one that is missing."""
        found = (tensors[prefix + name] for name in ("U_k", "U_v", "mean_v"))
        return Projection(*found, tensors.get(f"{prefix}mean_k"), whole)

    def hash(self) -> str:
        """What a file of ranks says it was made for: the sha256 of U_k, U_v, mean_k and whole."""
        if self.mean_k is None:
            return files.hash_of(self.U_k, self.U_v)
        return files.hash_of(self.U_k, self.U_v, self.mean_k, text=str(self.whole))

    def save(self, path: str | Path, pca=None, beside=None) -> None:
        """Write a safetensors file; plain PCA of the same text stands in it as pca_U_k, …

        beside: other tensors, by name.
        """
        beside = (beside or {}) | (pca.tensors("pca_") if pca else {})
        said = {"whole": str(self.whole), "positions": str(self.positions)}
        files.write_tensors(path, self.tensors() | beside, said)

    @staticmethod
    def load(path: str | Path, prefix: str = "") -> "Projection":
        """Read what `save` wrote; prefix "pca_" for the PCA in it. ValueError names the file."""
        with files.open_safetensors(path) as file:
            said = file.metadata() or {}
        whole, positions = "0" if prefix else said.get("whole", "0"), said.get("positions", "0")
        tensors = files.read_tensors(path)
        try:
            if not prefix and "mean_k" in tensors and "whole" not in said:
                raise ValueError("its metadata does not say whole, the number of first tokens; did "
                                 "another program save it?")
            for name, number in (("whole", whole), ("positions", positions)):
                if not number.isdecimal() or len(number) > 9:
                    raise ValueError(f"its metadata says {name} {number!r}, not a number of tokens")
            p = Projection.of(tensors, prefix, int(whole)).to(None, torch.float32)
            p.positions = int(positions)
        except KeyError as missing:
            raise ValueError(f"{path}: no tensor {missing}; are these projections?") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for name, x in p.tensors().items():
            if not x.isfinite().all():
                raise ValueError(f"{path}: {name} holds a number that is not finite")
        for name, U in (("U_k", p.U_k), ("U_v", p.U_v)):
            if not torch.allclose(U.mT @ U, identity_like(U), atol=0.01):
                raise ValueError(f"{path}: {name} is not orthogonal")
        return p


def shape_of(config) -> tuple[int, int, int]:
    """(L, K, d)"""
    return config.num_hidden_layers, config.num_key_value_heads, config.head_dim


def projector(U: Tensor, ranks: Tensor) -> Tensor:
    """P = U_r U_rᵀ of U (K, d, d) at ranks (..., K): (..., K, d, d).

    At rank d it is exactly the identity, so that a full head passes untouched, also in bfloat16.
    """
    d = U.shape[-1]
    r = ranks.to(U.device)[..., None]                               # (..., K, 1)
    kept = torch.arange(d, device=U.device) < r                     # (..., K, d)
    U_r = U * kept[..., None, :]
    P = U_r @ U_r.mT
    full = r[..., None] == d
    return torch.where(full, identity_like(U), P)


def identity_like(U: Tensor) -> Tensor:
    d = U.shape[-1]
    return torch.eye(d, dtype=U.dtype, device=U.device)


# ------------------------------------------------------------------------------
# Calibration: moments over a text, and the PCA computed from them

class Moments:
    """Sums over a calibration text, [0] of keys, [1] of values, per layer and KV head, float64.

    The model's hook `observe=`. One pass; no key is kept.
    """

    def __init__(self, config, device="cpu"):
        L, K, d = shape_of(config)
        sums = {"dtype": torch.float64, "device": device}
        self.tokens = torch.zeros(2, L, 1, 1, **sums)
        self.total = torch.zeros(2, L, K, d, **sums)                # Σ x
        self.squares = torch.zeros(2, L, K, d, d, **sums)           # Σ xᵀx

    def __call__(self, layer: int, _, k: Tensor, v: Tensor, turn) -> None:
        """Add the keys, turned by RoPE here, and the values (B, K, T, d) of one layer."""
        self.add(0, layer, turn(k))
        self.add(1, layer, v)

    def add(self, side: int, layer: int, x: Tensor) -> None:
        x = x.double()
        self.tokens[side, layer] += x[:, 0, :, 0].numel()
        self.total[side, layer] += x.sum((0, 2))
        self.squares[side, layer] += (x.mT @ x).sum(0)

    def sum_over_processes(self) -> "Moments":
        for total in (self.tokens, self.total, self.squares):
            processes.sum_over(total)
        return self

    def mean(self) -> Tensor:
        """E[x] (2, L, K, d)"""
        return self.total / self.tokens

    def second(self) -> Tensor:
        """E[xᵀx] (2, L, K, d, d)"""
        return self.squares / self.tokens[..., None]

    def covariance(self) -> Tensor:
        """E[xᵀx] − E[x]ᵀE[x] (2, L, K, d, d)"""
        mean = self.mean()[..., None]                               # (2, L, K, d, 1)
        return self.second() - mean * mean.mT

    def pca(self) -> Projection:
        """Plain PCA: eigenvectors of the covariances of keys and of values, largest first."""
        U_k, U_v = leading(self.covariance())
        return Projection(U_k, U_v, self.mean()[1].float())


def leading(symmetric: Tensor) -> Tensor:
    """Eigenvectors as columns, the largest eigenvalue's first: (..., d, d), float32."""
    if not symmetric.isfinite().all():
        raise ValueError("keys, values or weights are not finite: is the checkpoint whole?")
    vectors = torch.linalg.eigh(symmetric).eigenvectors.flip(-1)
    return vectors.float().contiguous()


@torch.no_grad()
def calibrate(model: Model, tokens, B: int, T: int, seed: int, amp: bool = False,
              batches: int = 16) -> Moments:
    """Moments of keys and values over random windows of the training text, each at position 0.

    amp: the model's products in bfloat16 over float32 weights.
    """
    moments = Moments(model.config, model.device)
    generator = torch.Generator().manual_seed(seed)
    mine = processes.my_share(B)
    progress = Progress(batches, "calibrating")
    for number in range(1, batches + 1):
        block = random_windows(tokens, processes.WORLD * B, T, generator, mine)
        with products_in_bfloat16(model.device, amp):
            model.hidden(block[:, :-1].to(model.device), observe=moments)
        progress(number, "", processes.WORLD * B * T)
    return moments.sum_over_processes()


# ------------------------------------------------------------------------------
# The rotation that training learns

class Rotation(nn.Module):
    """U = U₀ C(A) for every head: `rotation()` is the Projection at the current parameters.

    The parameters are entries of A above the diagonal, zero at the start, and the value means.
    Entries between columns of one eighth are left out: every rank keeps or drops an eighth whole,
    so turning within it changes no projection, and near A = 0 its gradient is rounding noise, which
    Adam would blow up. `within_blocks`: with those entries (bits/).
    """

    def __init__(self, start: Projection, within_blocks: bool = False):
        super().__init__()
        L, K, d = start.mean_v.shape
        self.start = start
        self.eighth = d // LEVELS
        rows, columns = torch.triu_indices(d, d, 1)
        matters = (rows // self.eighth != columns // self.eighth) | within_blocks
        self.rows = rows[matters].to(start.U_k.device)
        self.columns = columns[matters].to(start.U_k.device)
        zeros = start.U_k.new_zeros(L, K, len(self.rows))
        self.A_k = nn.Parameter(zeros)
        self.A_v = nn.Parameter(zeros.clone())
        self.mean_v = nn.Parameter(start.mean_v.clone())

    def forward(self, dtype: torch.dtype | None = None) -> Projection:
        """In `dtype`: float64 before saving, so that the Cayley map adds no error of its own."""
        return self.rotated(self.A_k, self.A_v, dtype)

    def at(self, ranks: Tensor, of_step: Tensor | None = None):
        """The hook of sequences with ranks (2, L, B, K): `Projection.at`, with gradients.

        Entries between columns that every sequence of a step keeps or cuts together get no
        gradient: near A = 0 it would be rounding noise. of_step: the ranks of all sequences of the
        step, (2, L, all, K), where `ranks` are a part of them.
        """
        entries = []
        visible = self.visible_entries(ranks if of_step is None else of_step)
        for A, seen in zip((self.A_k, self.A_v), visible, strict=True):
            entries.append(torch.where(seen, A, A.detach()))
        return self.rotated(*entries).at(ranks)

    def rotated(self, A_k: Tensor, A_v: Tensor, dtype: torch.dtype | None = None) -> Projection:
        start = self.start.to(None, dtype)
        U_k = start.U_k @ self.cayley(A_k.to(dtype))
        U_v = start.U_v @ self.cayley(A_v.to(dtype))
        return Projection(U_k, U_v, self.mean_v.to(dtype), start.mean_k, start.whole)

    def cayley(self, entries: Tensor) -> Tensor:
        """C(A) (L, K, d, d). I − A/2 is never singular: A has imaginary eigenvalues."""
        d = self.start.U_k.shape[-1]
        half = entries.new_zeros(*entries.shape[:2], d, d)
        half[..., self.rows, self.columns] = entries / 2
        half = half - half.transpose(-1, -2)
        eye = identity_like(half)
        return 2 * torch.linalg.inv(eye - half) - eye           # (I − A/2)⁻¹ (2 I − (I − A/2))

    def visible_entries(self, ranks: Tensor) -> Tensor:
        """Which of a head's n entries, of A_k and A_v, a step with ranks (2, L, B, K) can see.

        (2, L, K, n). An entry mixes two columns, of eighths a < b. It is seen if some sequence
        keeps the one and cuts the other off, at a level a < level ≤ b (counting eighths from 0).
        """
        levels = (ranks // self.eighth).transpose(2, 3)             # (2, L, K, B)
        drawn = levels.new_zeros(*levels.shape[:3], LEVELS + 1)
        drawn.scatter_(-1, levels, 1)
        up_to = drawn.cumsum(-1).to(self.rows.device)               # how many levels ≤ l were drawn
        a, b = self.rows // self.eighth, self.columns // self.eighth
        return up_to[..., b] > up_to[..., a]


# ------------------------------------------------------------------------------
# Plans of ranks

def check_levels(d: int) -> None:
    """ValueError where head_dim d does not divide into the levels that a rank may have."""
    if d % LEVELS:
        raise ValueError(f"head_dim {d} does not divide into {LEVELS} levels of rank: only the "
                         "full cache is possible")


def check_ranks(ranks: Tensor, L: int, K: int, d: int) -> None:
    """ValueError unless ranks is (2, L, K) or (2, L, B, K), integers, each one of d/8, …, d.

    Where d is no multiple of 8 there is d alone: the full cache.
    """
    outer, inner = ranks.shape[:2], ranks.shape[-1:]
    if ranks.ndim not in (3, 4) or outer + inner != (2, L, K) or ranks.is_floating_point():
        raise ValueError(f"ranks of shape {list(ranks.shape)}, {ranks.dtype}; expected integers of "
                         f"shape {[2, L, K]}")
    if (ranks == d).all():
        return
    check_levels(d)
    eighth = d // LEVELS
    for rank in ranks.unique().tolist():
        if rank % eighth or not eighth <= rank <= d:
            raise ValueError(f"rank {rank} is not one of {eighth}, {2 * eighth}, …, {d}")


def uniform_ranks(budget: float, config) -> Tensor:
    """Rank budget · d everywhere, (2, L, K), rounded down to a multiple of d/8, at least d/8."""
    L, K, d = shape_of(config)
    level = max(1, int(budget * LEVELS + 1e-9))                     # 0.75 may come as 0.7499…
    return torch.full((2, L, K), level * d // LEVELS)


def plan_at(order: Tensor, config, budget: float) -> Tensor:
    """The largest plan (2, L, K) within the budget: a prefix of the order (n,) of lowerings.

    Each entry is the place in the flattened (2, L, K) of a rank that loses an eighth. ValueError if
    the order ends above the budget.
    """
    L, K, d = shape_of(config)
    count = 2 * L * K
    taken = math.ceil((1 - budget) * count * LEVELS - 1e-6)
    if taken > len(order):
        end = 1 - len(order) / (count * LEVELS)
        raise ValueError(f"an order that ends at {end:.1%}, above the budget of {budget:.1%}")
    lowered = order[:taken].bincount(minlength=count)
    return (d - d // LEVELS * lowered).view(2, L, K)


# ------------------------------------------------------------------------------
# The script

def show_variance(side: str, U: Tensor, covariance: Tensor) -> None:
    """What share of the variance the leading columns of PCA hold, per layer."""
    L, _, _, d = U.shape
    ranks = range(d // LEVELS, d + 1, d // LEVELS)
    print(f"\n  {side:10s}" + "".join(f"r = {r:<6d}" for r in ranks))
    for layer in range(L):
        basis = U[layer].double()
        variance = (basis * (covariance[layer] @ basis)).sum(1)     # (K, d): of each column
        share = (variance.cumsum(-1).T / variance.sum(-1)).mean(1)
        print(f"  layer {layer:2d} " + "".join(f"{share[r - 1]:8.1%}  " for r in ranks))


@torch.no_grad()
def main():
    parser = cli.arguments(__doc__)
    cli.data_arguments(parser)
    cli.out_argument(parser)
    args = parser.parse_args()
    args.seq = 256
    device, dtype = cli.prepare(args)
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    tokens, _ = text_for(args, model.config)
    moments = calibrate(model, tokens, 8, args.seq, args.seed)
    pca = moments.pca()
    cov_k, cov_v = moments.covariance()
    print("\nShare of the variance that the first r columns of plain PCA hold, mean over heads:")
    show_variance("keys", pca.U_k, cov_k)
    show_variance("values", pca.U_v, cov_v)


if __name__ == "__main__":
    cli.run_script(main)
