"""Folding: U_r of the values goes into W_v and W_o; what is left of it is a bias.

Values have no RoPE between their weights and the cache, so U_r and U_rᵀ need not be products of
their own: they vanish into the weights before and after them. Of one head, for rows x W,

    W_v' = W_v U_r, b_v' = b_v U_r      make the coordinates v U_r that are cached
    W_o' = U_rᵀ W_o                     takes weighted sums of them, for each of G query heads
    bias = Σ_h μ (I − P) W_o[h]         what cut-off means add: attention weights sum to one

It is the paper's "new linear layer" (arXiv 2410.14731, Figure 2). generate.py drops the model's own
weights, so `cut` makes a smaller plan's from a larger one's. It can: a coordinate of v U does not
depend on the rank. The first rows of W_v' and columns of W_o' stay; each column dropped goes into
the bias, times its coordinate's mean, an entry of μ U.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from model import stored_for_rows


class Folded(NamedTuple):
    """A layer's weights for a plan. W_qkv' holds, as the blocks of keys lie, of each head the rows
    of its G queries and of its key; then the rows of the values, as their blocks lie."""
    W_qkv: Tensor                       # (H·d + K·d + Σ r, hidden)
    b_qkv: Tensor | None                # Qwen2 has one
    W_o: Tensor                                                     # (hidden, Σ r over query heads)
    bias: Tensor | None                 # (hidden): what cut-off means add; None where nothing is


class Layout(NamedTuple):
    """What a layer is folded for: ranks, U and means are those of its values, by head."""
    head_order: Tensor                  # (2, K): heads as their keys lie, and as their values lie
    ranks: Tensor                                                   # (K,) int64
    U: Tensor                                                       # (K, d, d)
    means: Tensor                                                   # (K, d)

    def is_full(self) -> bool:
        d = self.U.shape[-1]
        return bool((self.ranks == d).all())


class Head(NamedTuple):
    """The weights of one key-value head and its G query heads, as stored; n is d, or a rank."""
    W_qk: Tensor                        # ((G + 1)·d, hidden): rows of the queries, then of the key
    b_qk: Tensor | None
    W_v: Tensor                                                     # (n, hidden)
    b_v: Tensor | None
    W_o: Tensor                                                     # (hidden, G, n)


def fold(weights, layout: Layout) -> Folded:
    """The weights of a layer of the model (model.Attention) for its layout."""
    heads = heads_of(weights, *layout.means.shape)
    if not layout.is_full():
        return fold_heads(heads, layout, layout.U, layout.means)

    folded = side_by_side(heads, layout)
    W_o = stored_for_rows(weights.o_proj.weight)        # as it is: no second copy
    return folded._replace(W_o=W_o)


def heads_of(weights, K: int, d: int) -> list[Head]:
    """The weights of a layer, head by head."""
    q, k, v = weights.q_proj, weights.k_proj, weights.v_proj
    W_qk = chunks_of_both(q.weight, k.weight, K)
    W_v = v.weight.chunk(K)
    W_o = weights.o_proj.weight.unflatten(1, (K, -1, d))            # (hidden, K, G, d)

    b_qk = b_v = [None] * K
    if q.bias is not None:
        b_qk = chunks_of_both(q.bias, k.bias, K)
        b_v = v.bias.chunk(K)

    parts = zip(W_qk, b_qk, W_v, b_v, W_o.unbind(1), strict=True)
    return [Head(*of_head) for of_head in parts]


def chunks_of_both(q: Tensor, k: Tensor, K: int) -> list[Tensor]:
    """The rows of K heads: those that make its G queries, then those that make its key."""
    pairs = zip(q.chunk(K), k.chunk(K), strict=True)
    return [torch.cat(pair) for pair in pairs]


def fold_heads(
    heads: list[Head],
    layout: Layout,
    bases: Tensor | list[Tensor],
    means: Tensor | list[Tensor],
    bias: Tensor | None = None,
) -> Folded:
    """Fold the values of a layer's heads to their ranks, and lay all side by side.

    bases: of each head a matrix (n, n) of which U_r is the first columns, n the coordinates it has;
    means: what its cut-off coordinates stand for, (n). bias: what an earlier fold added.
    """
    folded = list(heads)
    for j, (W_qk, b_qk, *values) in enumerate(heads):
        device = W_qk.device
        rank = layout.ranks[j]
        U_r = bases[j][:, :rank].to(device)
        mean = means[j].to(device)
        *values, constant = fold_head(*values, U_r, mean)
        folded[j] = Head(W_qk, b_qk, *values)
        bias = constant if bias is None else bias + constant
    return side_by_side(folded, layout, bias)


def fold_head(
    W_v: Tensor,
    b_v: Tensor | None,
    W_o: Tensor,
    U_r: Tensor,
    mean: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Fold a head's value side into its weights, by the equations above (transposed: as stored).

    W_v (n, hidden), b_v (n) or None, W_o (hidden, G, n); U_r (n, r), mean (n), n as in Head. Gives
    W_v' (r, hidden), b_v' (r) or None, W_o' (hidden, G, r), and the bias (hidden), in U_r's dtype.
    """
    cut_off = mean - mean @ U_r @ U_r.T                             # μ (I − P)
    W_o_wide = W_o.to(U_r)
    bias = W_o_wide.sum(1) @ cut_off
    W_v_new = U_r.T @ W_v.to(U_r)
    W_o_new = W_o_wide @ U_r
    if b_v is not None:
        b_v_new = b_v.to(U_r) @ U_r
        b_v = b_v_new.to(b_v)
    return W_v_new.to(W_v), b_v, W_o_new.to(W_o), bias


def side_by_side(heads: list[Head], layout: Layout, bias=None) -> Folded:
    """A layer's heads as one matrix before the cache and one behind it."""
    by_key, by_value = layout.head_order.tolist()
    W_qkv, b_qkv, W_o = [], [], []
    for j in by_key:
        W_qkv.append(heads[j].W_qk)
        b_qkv.append(heads[j].b_qk)
    for j in by_value:
        W_qkv.append(heads[j].W_v)
        b_qkv.append(heads[j].b_v)
        W_o.append(heads[j].W_o.flatten(1))

    W_qkv = stored_for_rows(torch.cat(W_qkv))
    b_qkv = None if b_qkv[0] is None else torch.cat(b_qkv)
    W_o = stored_for_rows(torch.cat(W_o, dim=1))
    if bias is not None:
        bias = bias.to(W_o)
    return Folded(W_qkv, b_qkv, W_o, bias)


# ------------------------------------------------------------------------------
# From a plan to a smaller one

def cut(folded: Folded, before: Layout, after: Layout) -> Folded:
    """The folded weights of a layer for a smaller plan, from those of a larger one."""
    heads = heads_of_folded(folded, before)
    if after.is_full():
        return side_by_side(heads, after)._replace(W_o=folded.W_o)      # no second copy
    if before.is_full():
        return fold_heads(heads, after, after.U, after.means, folded.bias)

    # Turned already: a coordinate is itself.
    turned = (after.means[:, None] @ after.U)[:, 0]                 # (K, d): μ U
    ranks = before.ranks.tolist()
    means, bases = [], []
    for mean, rank in zip(turned, ranks, strict=True):
        means.append(mean[:rank])
        bases.append(torch.eye(rank, device=mean.device))
    return fold_heads(heads, after, bases, means, folded.bias)


def heads_of_folded(folded: Folded, layout: Layout) -> list[Head]:
    """The heads that lie side by side, by their numbers 0 … K − 1."""
    by_key, by_value = layout.head_order.tolist()
    K, d = layout.means.shape
    widths = layout.ranks[by_value].tolist()
    G = folded.W_o.shape[1] // sum(widths)

    sizes = [(G + 1) * d] * K + widths
    W = folded.W_qkv.split(sizes)
    b = [None] * len(sizes)
    if folded.b_qkv is not None:
        b = folded.b_qkv.split(sizes)
    columns = [G * r for r in widths]
    W_o = folded.W_o.split(columns, dim=1)

    heads = []
    for j in range(K):
        key, value = by_key.index(j), by_value.index(j)
        queries_and_key = W[key], b[key]
        values = W[K + value], b[K + value]
        of_queries = W_o[value].unflatten(1, (G, -1))               # (hidden, G, r)
        heads.append(Head(*queries_and_key, *values, of_queries))
    return heads
