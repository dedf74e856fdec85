"""Orthogonal projections of keys and values: where the KV cache becomes smaller.

Every layer and every key-value head has two orthogonal d × d matrices, U_k for keys and U_v for values, columns sorted by
importance, and the mean μ of its values. At rank r only the first r columns U_r count; with P = U_r U_rᵀ

    k̂ = k P                     cached as k U_r, r numbers in place of d; q · k̂ = (q U_r) · (k U_r)
    v̂ = v P + μ (I − P)         cached as v U_r; the rest of v is replaced by its mean

This is MatryoshkaKV (arXiv 2410.14731), section 3; "the paper" below.

Keys are projected after RoPE and need no mean: it would add one and the same number, q · μ(I − P), to all scores of a query,
which softmax does not see.
The matrices start as eigenvectors over a calibration text and are then rotated by training, U = U₀ C(A), where the Cayley
map of a skew-symmetric A is orthogonal by construction and the identity at A = 0:

    C(A) = (I − A/2)⁻¹ (I + A/2)

One U serves every rank like nested dolls, since a smaller rank uses a prefix of the same columns. Ranks are multiples of d/8.
A plan of ranks is an integer tensor (2, L, K): [0] for keys, [1] for values.

    python projection.py         # calibrates the demo: what its leading columns hold, and folding checked on one layer
"""
import json
import math
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

STEPS = 8                                             # ranks are multiples of d / STEPS
SIDES = ("keys", "values")
BUDGETS = [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25]  # those that reports are made at


# ---------------------------------------------------------------------------------------------------------------------
# Calibration: second moments over a text, and the two projections computed from them, `pca` and `aware`

class Moments:
    """Sums over a calibration text, per layer and KV head, in float64: Σ kkᵀ, Σ vvᵀ, Σ k, Σ v, and Σ qqᵀ over the query
    heads of the group. Passed to the model as `observe=`: one streaming pass, and no key is ever kept."""

    def __init__(self, config, device="cpu"):
        L, K, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.n, self.G = torch.zeros(L), config.num_attention_heads // K
        self.k, self.v = torch.zeros(2, L, K, d, dtype=torch.float64, device=device)
        self.kk, self.vv, self.qq = torch.zeros(3, L, K, d, d, dtype=torch.float64, device=device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Add the queries (B, H, T, d), keys and values (B, K, T, d) of one layer."""
        q = q.unflatten(1, (-1, self.G)).flatten(2, 3)                                  # (B, K, G·T, d)
        q, k, v = q.double(), k.double(), v.double()
        self.n[layer] += k.shape[0] * k.shape[2]
        self.k[layer] += k.sum((0, 2))
        self.v[layer] += v.sum((0, 2))
        for total, x in ((self.kk, k), (self.vv, v), (self.qq, q)):
            total[layer] += (x.transpose(2, 3) @ x).sum(0)                              # (K, d, d)

    def pca(self) -> "Projection":
        """Plain PCA: eigenvectors of the covariances of keys and of values, largest first."""
        return Projection(leading(self.covariance("k")), leading(self.covariance("v")), self.mean_v())

    def aware(self, W_o: list[Tensor]) -> "Projection":
        """PCA that also asks who reads. A direction counts if keys vary along it or queries look along it, and for values
        if they vary along it or the output matrix W_o (hidden, H·d) of the layer takes it in; both with equal weight.

        Keys: eigenvectors of cov(k) / tr cov(k) + E[qqᵀ] / tr E[qqᵀ]; values: of cov(v) / tr cov(v) + M / tr M with
        M = Σ W_o[h]ᵀ W_o[h] over the query heads h of the group. A heuristic; `python train.py --lr 0 --steps 1` compares it with PCA.
        """
        d = self.v.shape[-1]
        heads = (W.to(self.vv).unflatten(1, (-1, self.G, d)) for W in W_o)               # (hidden, K, G, d), layer by layer
        read = torch.stack([torch.einsum("xkgd,xkge->kde", W, W) for W in heads])
        return Projection(leading(unit_trace(self.covariance("k")) + unit_trace(self.qq)),
                          leading(unit_trace(self.covariance("v")) + unit_trace(read)), self.mean_v())

    def mean_v(self) -> Tensor:
        return (self.v / self.n.to(self.v)[:, None, None]).float()

    def covariance(self, x: str) -> Tensor:
        """E[xxᵀ] − E[x]E[x]ᵀ for x in "k", "v": (L, K, d, d) float64."""
        n = self.n.to(self.v)[:, None, None]
        mean = getattr(self, x) / n
        return getattr(self, x + x) / n[..., None] - mean[..., :, None] * mean[..., None, :]


def leading(symmetric: Tensor) -> Tensor:
    """Eigenvectors as columns, the largest eigenvalue's first: (..., d, d) float64 -> float32."""
    return torch.linalg.eigh(symmetric).eigenvectors.flip(-1).float().contiguous()


def unit_trace(matrix: Tensor) -> Tensor:
    return matrix / matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


# ---------------------------------------------------------------------------------------------------------------------
# The projection itself

class Projection:
    """U_k, U_v (L, K, d, d) orthogonal, columns by importance, and mean_v (L, K, d); float32.

    `pca` is kept beside projections that are more than that: plain PCA of the same calibration text, the baseline of
    every report. Otherwise it is None.
    """

    def __init__(self, U_k: Tensor, U_v: Tensor, mean_v: Tensor, pca: "Projection | None" = None):
        if U_k.ndim != 4 or U_k.shape[2] != U_k.shape[3] or U_v.shape != U_k.shape or mean_v.shape != U_k.shape[:3]:
            raise ValueError(f"projections of shapes U_k {list(U_k.shape)}, U_v {list(U_v.shape)}, mean_v "
                             f"{list(mean_v.shape)}; expected (L, K, d, d) twice and (L, K, d)")
        self.U_k, self.U_v, self.mean_v, self.pca = U_k, U_v, mean_v, pca

    def at(self, ranks: Tensor):
        """The hook `project=` of the model at a plan of ranks: (layer, k, v) -> (k̂, v̂), of the same shapes.

        ranks is (2, L, K), or (2, L, B, K) where every sequence of the batch has ranks of its own (training). Raises
        ValueError for a rank that is not one of d/8, 2d/8, …, d.
        """
        L, K, d = self.mean_v.shape
        check_ranks(ranks, L, K, d)

        def project(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if layer >= L or k.shape[1] != K or k.shape[3] != d:
                raise ValueError(f"projections of the shape (L, K, d) = {(L, K, d)}, but layer {layer} of the model has "
                                 f"keys of shape {list(k.shape)}, (B, K, T, d)")
            if (ranks[0, layer] < d).any():
                k = k @ projector(self.U_k[layer], ranks[0, layer]).to(k)
            if (ranks[1, layer] < d).any():
                P = projector(self.U_v[layer], ranks[1, layer])
                mean = self.mean_v[layer][:, None]                                      # (K, 1, d)
                v = v @ P.to(v) + (mean - mean @ P).to(v)
            return k, v

        return project

    @staticmethod
    def identity(config) -> "Projection":
        """U = I, no mean."""
        L, K, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        return Projection(*torch.eye(d).repeat(2, L, K, 1, 1), torch.zeros(L, K, d))

    def check_fits(self, config) -> None:
        """ValueError unless these are projections of a model with this config."""
        expected = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        if tuple(self.mean_v.shape) != expected:
            raise ValueError(f"projections of the shape (L, K, d) = {tuple(self.mean_v.shape)}, but the model has {expected}")

    def to(self, device, dtype: torch.dtype | None = None) -> "Projection":
        return Projection(self.U_k.to(device, dtype), self.U_v.to(device, dtype), self.mean_v.to(device, dtype),
                          self.pca and self.pca.to(device))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; what was there before survives a failure."""
        tensors = {"U_k": self.U_k, "U_v": self.U_v, "mean_v": self.mean_v}
        if self.pca is not None:
            tensors |= {"pca_U_k": self.pca.U_k, "pca_U_v": self.pca.U_v, "pca_mean_v": self.pca.mean_v}
        write_tensors(path, {name: t.float() for name, t in tensors.items()})

    @staticmethod
    def load(path: str | Path) -> "Projection":
        """Read what `save` wrote. Raises ValueError naming the file and what is wrong with it."""
        with open_safetensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        try:
            trio = lambda prefix: [tensors[prefix + name] for name in ("U_k", "U_v", "mean_v")]
            return Projection(*trio(""), Projection(*trio("pca_")) if "pca_U_k" in tensors else None)
        except KeyError as missing:
            raise ValueError(f"{path}: no tensor {missing.args[0]}; is it a file of projections?") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def projector(U: Tensor, ranks: Tensor) -> Tensor:
    """P = U_r U_rᵀ for U (K, d, d) and ranks (..., K): (..., K, d, d). At rank d exactly the identity, so that a head
    at full rank passes through untouched, also in bfloat16."""
    d = U.shape[-1]
    ranks = ranks.to(U.device)[..., None]
    kept = torch.arange(d, device=U.device) < ranks                                     # (..., K, d)
    P = (U * kept[..., None, :]) @ U.transpose(-1, -2)
    return torch.where((ranks == d)[..., None], torch.eye(d, dtype=U.dtype, device=U.device), P)


def fold_values(W_v: Tensor, W_o: Tensor, U: Tensor, mean: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fold the value side of a layer into its weights: the paper's "new linear layer" (Figure 2), free at run time.

    W_v (K·d, hidden) and W_o (hidden, H·d) as in the checkpoint, U (K, d, d), mean (K, d), ranks (K,). Returns
    W_v' (Σ r, hidden), which makes the cached coordinates v U_r, head after head; W_o' (hidden, Σ r of every query
    head), which takes weighted sums of them; and the bias (hidden), what the means that were cut off add to every token.
    """
    K, d = mean.shape
    G = W_o.shape[1] // (K * d)
    down, up, bias = [], [], 0
    for j, r in enumerate(ranks.tolist()):
        U_r = U[j, :, :r] if r < d else torch.eye(d, dtype=U.dtype, device=U.device)    # a full head stays as it is
        lost = mean[j] - mean[j] @ U_r @ U_r.T                                          # μ (I − P)
        down.append(U_r.T @ W_v[j * d:(j + 1) * d].to(U))
        for h in range(j * G, (j + 1) * G):
            W = W_o[:, h * d:(h + 1) * d].to(U)
            up.append(W @ U_r)
            bias = bias + W @ lost
    return torch.cat(down).to(W_v), torch.cat(up, dim=1).to(W_o), bias.to(W_o)


# ---------------------------------------------------------------------------------------------------------------------
# The rotation that training learns

class Rotation(nn.Module):
    """U = U₀ C(A) for every head, with A = 0 at the start: `rotation()` is the Projection at the current parameters.

    The parameters are the entries of A above the diagonal, less those between two columns of one block of d/8: every
    allowed rank keeps or drops such a block whole, so turning within it changes no projection: near A = 0 the gradient is
    rounding noise, and Adam would blow it up. The value means train too; key means can have no effect.
    """

    def __init__(self, start: Projection):
        super().__init__()
        L, K, d = start.mean_v.shape
        self.start = start
        rows, columns = torch.triu_indices(d, d, 1)
        apart = rows // (d // STEPS) != columns // (d // STEPS)
        self.rows, self.columns = (x[apart].to(start.U_k.device) for x in (rows, columns))
        self.A_k = nn.Parameter(start.U_k.new_zeros(L, K, len(self.rows)))
        self.A_v = nn.Parameter(torch.zeros_like(self.A_k))
        self.mean_v = nn.Parameter(start.mean_v.clone())

    def forward(self, dtype: torch.dtype | None = None) -> Projection:
        """The projection, computed in `dtype`: float64 before saving, so that U is orthogonal to the last digit."""
        U_k, U_v = self.start.U_k.to(dtype), self.start.U_v.to(dtype)
        return Projection(U_k @ self.cayley(self.A_k.to(dtype)), U_v @ self.cayley(self.A_v.to(dtype)), self.mean_v.to(dtype),
                          self.start.pca)

    def told_apart(self, ranks: Tensor) -> Tensor:
        """Which entries of A_k and A_v the ranks (2, L, B, K) of a step can see, those between a column that some sequence
        keeps and one that it cuts: (2, L, K, n). The gradient of the others is rounding noise while A is near zero, and
        Adam would blow it up."""
        r = ranks.to(self.rows.device)[..., None]
        return ((self.rows < r) & (self.columns >= r)).any(2)

    def cayley(self, entries: Tensor) -> Tensor:
        """C(A) = (I − A/2)⁻¹ (I + A/2), (L, K, d, d). I − A/2 is never singular: A has imaginary eigenvalues."""
        d = self.start.U_k.shape[-1]
        half = entries.new_zeros(*entries.shape[:2], d, d)
        half[..., self.rows, self.columns] = entries / 2
        half = half - half.transpose(-1, -2)
        eye = torch.eye(d, dtype=half.dtype, device=half.device)
        return torch.linalg.solve(eye - half, eye + half)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks

def check_ranks(ranks: Tensor, L: int, K: int, d: int) -> None:
    """ValueError unless ranks is (2, L, K) or (2, L, B, K), integers, every one a multiple of d/8 from d/8 to d."""
    if d % STEPS:
        raise ValueError(f"head_dim {d} does not divide into {STEPS} steps")
    if ranks.ndim not in (3, 4) or ranks.shape[:2] != (2, L) or ranks.shape[-1] != K or ranks.is_floating_point():
        raise ValueError(f"ranks of shape {list(ranks.shape)}, {ranks.dtype}; expected integers of shape {[2, L, K]}")
    wrong = (ranks < d // STEPS) | (ranks > d) | (ranks % (d // STEPS) != 0)
    if wrong.any():
        raise ValueError(f"rank {ranks[wrong][0].item()} is not one of {d // STEPS}, {2 * d // STEPS}, …, {d}")


def uniform_ranks(budget: float, config) -> Tensor:
    """The same rank everywhere: budget · d rounded down to a multiple of d/8, at least d/8; (2, L, K)."""
    level = max(1, int(budget * STEPS + 1e-9))                                          # 0.1 · 3 is not quite 0.3
    return torch.full((2, config.num_hidden_layers, config.num_key_value_heads), level * (config.head_dim // STEPS))


def path_order(path: list, config) -> Tensor:
    """A path of lowerings, entries [side, layer, head, KL after it] that each take d/8 off one rank, as those ranks' places
    in the flattened (2, L, K), in their order: (n,). Raises ValueError for what is not such a path."""
    L, K = config.num_hidden_layers, config.num_key_value_heads
    try:
        places = [(SIDES.index(side) * L + range(L).index(layer)) * K + range(K).index(head) for side, layer, head, _ in path]
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a path of ranks for this model ({error})") from None
    order = torch.tensor(places, dtype=torch.long)
    if (order.bincount(minlength=1) >= STEPS).any():
        raise ValueError("a path that takes a rank below an eighth of head_dim")
    return order


def plan_on_path(order: Tensor, config, budget: float) -> Tensor:
    """The largest plan (2, L, K) within the budget on a path of lowerings: a prefix of them. Raises ValueError if the path
    ends before."""
    L, K, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    taken = math.ceil((1 - budget) * 2 * L * K * STEPS - 1e-6)
    if taken > len(order):
        raise ValueError(f"a path that ends at {1 - len(order) / (2 * L * K * STEPS):.1%} of the cache, above the budget of {budget:.1%}")
    return (d - d // STEPS * order[:taken].bincount(minlength=2 * L * K)).view(2, L, K)


def read_plan(path: str | Path, config) -> dict:
    """What a file of the search holds, its "path" as `path_order`. Raises ValueError naming the file."""
    plan = read_json(path)
    try:
        if plan["head_dim"] != config.head_dim:
            raise ValueError(f"a plan for head_dim {plan['head_dim']}, but the model has {config.head_dim}")
        return plan | {"path": path_order(plan["path"], config)}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a plan of ranks for this model ({error})") from None


def read_ranks(path: str | Path, config, budget: float | None = None) -> Tensor:
    """The plan (2, L, K) that a file of the search holds: the largest one on its path that is within `budget`, or
    without `budget` the one that the file was written for. Raises ValueError naming the file."""
    plan = read_plan(path, config)
    try:
        ranks = torch.tensor([plan["keys"], plan["values"]]) if budget is None else plan_on_path(plan["path"], config, budget)
        check_ranks(ranks, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a plan of ranks for this model ({error})") from None
    return ranks


# ---------------------------------------------------------------------------------------------------------------------
# Files. Reading gives a ValueError that names the file; writing goes to a temporary name first and is then renamed,
# so that a failure never costs what was there.

def open_safetensors(path: str | Path):
    """safetensors.safe_open for PyTorch; its tensors on a CPU are views of the memory-mapped file."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file, or a truncated one ({error})") from None


def read_json(path: str | Path) -> dict:
    """The object in a JSON file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def write_file(path: str | Path, data: bytes) -> None:
    """Write PATH.part, flush it to disk, rename it."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:   # a full disk: leave it no fuller
        part.unlink(missing_ok=True)
        raise


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    write_file(path, serialize({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, metadata))


# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def main():
    from model import arguments, blame, load, prepare
    from train import calibrate, load_data
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help=".txt, .jsonl, .bin or .npy [Python's own documentation]")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the token ids of a text [out]")
    args = parser.parse_args()
    device, dtype = prepare(args)
    with blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    with blame("--data"):
        tokens, _ = load_data(args.data, args.ckpt, model.config.vocab_size, args.out)
    print("Calibrating on training text ...", file=sys.stderr)
    moments = calibrate(model, tokens, B=8, T=256, seed=args.seed)
    L, K, d = moments.v.shape
    print(f"{args.ckpt}: {L} layers, {K} key-value heads, head_dim {d}; {int(moments.n[0]):,} tokens\n")

    print("Share of the variance that the leading r columns of plain PCA hold, mean over heads:\n")
    print("  layer   side  " + "".join(f"r = {r:<6d}" for r in range(d // STEPS, d + 1, d // STEPS)))
    pca = moments.pca()
    for layer in range(L):
        for side, U, x in (("keys", pca.U_k, "k"), ("values", pca.U_v, "v")):
            U = U[layer].double()
            energy = (U * (moments.covariance(x)[layer] @ U)).sum(1)                    # (K, d): variance of each column
            share = (energy.cumsum(-1) / energy.sum(-1, keepdim=True)).mean(0)[d // STEPS - 1::d // STEPS]
            print(f"  {layer:5d}  {side:6s}" + "".join(f"{100 * x:8.1f}% " for x in share.tolist()))

    ranks, p = uniform_ranks(0.5, model.config)[1, 0], pca.to(device)
    layer = model.layers[0].self_attn
    W_v, W_o, bias = fold_values(layer.v_proj.weight, layer.o_proj.weight, p.U_v[0], p.mean_v[0], ranks)
    x = torch.randn(1, model.config.hidden_size, device=device, dtype=dtype)             # a token that attends to itself
    v = (x @ layer.v_proj.weight.T).view(1, K, 1, d)
    _, v_hat = p.at(uniform_ranks(0.5, model.config))(0, v, v)
    unfolded = layer.o_proj(v_hat.repeat_interleave(moments.G, 1).flatten(1))
    folded = (x @ W_v.T).view(1, K, d // 2).repeat_interleave(moments.G, 1).flatten(1) @ W_o.T + bias
    print(f"\nFolded at rank {d // 2}, layer 0: W_v {list(layer.v_proj.weight.shape)} -> {list(W_v.shape)}, W_o "
          f"{list(layer.o_proj.weight.shape)} -> {list(W_o.shape)}, and a bias for the mean that is cut off; relative error "
          f"{((folded - unfolded).abs().max() / unfolded.abs().max()).item():.1e}")


if __name__ == "__main__":
    main()
