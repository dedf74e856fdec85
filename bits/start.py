"""Where bits begin: a start that asks who reads, and what each head costs alone.

What the first chapter's sweeps do better, second moments do here: E[xᵀx] of what is cached, and
E[yᵀy] of who reads it, queries for keys and rows of W_o for values.
"""
import torch
from torch import Tensor

from evaluate import measure
from model import Model
from projection import Moments, Projection, leading
from search import unit_trace
from support import processes
from support.data import random_windows


class Read(Moments):
    """Moments, and Σ qᵀq over a group's query heads, after RoPE: `qq` (L, K, d, d) float64."""

    def __init__(self, config, device="cpu"):
        super().__init__(config, device)
        self.G = config.num_attention_heads // config.num_key_value_heads
        self.qq = torch.zeros_like(self.squares[0])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, turn) -> None:
        super().__call__(layer, q, k, v, turn)
        q = q.unflatten(1, (-1, self.G)).flatten(2, 3).double()     # (B, K, G·T, d)
        self.qq[layer] += (q.mT @ q).sum(0)


@torch.no_grad()
def calibrate(model: Model, tokens, B: int, T: int, seed: int, batches: int = 16) -> Read:
    """The moments of random windows of the training text, each at position 0."""
    moments = Read(model.config, model.device)
    generator = torch.Generator().manual_seed(seed)
    mine = processes.my_share(B)
    for _ in range(batches):
        block = random_windows(tokens, processes.WORLD * B, T, generator, mine)
        model.hidden(block[:, :-1].to(model.device), observe=moments)
    processes.sum_over(moments.qq)
    return moments.sum_over_processes()


def query_aware(moments: Read, W_o: list[Tensor]) -> Projection:
    """The start; W_o (hidden, H·d) of every layer, as stored.

    A direction counts if keys or values vary along it, or if somebody looks along it: queries at
    keys, W_o at values. The two are added with equal weight: the eigenvectors of

        keys      cov(k) / tr cov(k) + E[qᵀq] / tr E[qᵀq]
        values    cov(v) / tr cov(v) + M / tr M,     M as in `readers`
    """
    read = torch.stack((moments.qq, readers(moments, W_o)))
    U_k, U_v = leading(unit_trace(moments.covariance()) + unit_trace(read))
    return Projection(U_k, U_v, moments.mean()[1].float())


def readers(moments: Read, W_o: list[Tensor]) -> Tensor:
    """M = Σ W_o[h]ᵀ W_o[h] over the query heads h of a group: (L, K, d, d)."""
    _, _, K, d = moments.total.shape
    M = torch.empty_like(moments.qq)
    for i, W in enumerate(W_o):
        W = W.to(M).view(-1, K, moments.G, d)                       # (hidden, K, G, d)
        M[i] = torch.einsum("xkgd,xkge->kde", W, W)
    return M


def output_weights(model: Model) -> list[Tensor]:
    """W_o (hidden, H·d) of every layer, as stored."""
    return [layer.self_attn.o_proj.weight for layer in model.layers]


def pairs_of_columns(moments: Read, p: Projection, W_o: list[Tensor]) -> Tensor:
    """E[xᵢxⱼ] E[yᵢyⱼ] for columns i and j: (2, L, K, d, d) float64.

    Up to a factor for each head, since y is summed: c, or a weight, takes it up.
    """
    cached = moments.covariance()                                   # (2, L, K, d, d)
    read = torch.stack((moments.qq, readers(moments, W_o)))
    U = torch.stack((p.U_k, p.U_v)).double()
    x = U.mT @ cached @ U
    y = U.mT @ read @ U
    return x * y


def alone(full: Tensor, values) -> list[Tensor]:
    """Plans like `full` but for one place, which has one of `values`: place by place."""
    plans = []
    for place in range(full.numel()):
        for value in values:
            plan = full.clone()
            plan.view(-1)[place] = value
            plans.append(plan)
    return plans


def kl_of_each(model: Model, hooks, tokens, batch: int, seq: int) -> Tensor:
    """The KL of each hook `project=` over four windows of training text: (n,) float64."""
    _, results = measure(model, tokens, dict(enumerate(hooks)), batch, seq, limit=4)
    kl = torch.tensor([result["kl"] for result in results.values()], dtype=torch.float64)
    return processes.sum_over(kl)                       # so that all have the same order
