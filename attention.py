"""Attention over the rows of the cache in plain PyTorch: everywhere but for a GPU's single tokens.

Heads of the same rank lie side by side, as one view (J·B, r, max_len), so that one product serves
them all; and one softmax serves all heads of a layer, whatever their ranks:

    scores = (q U_r)(k U_r)ᵀ / sqrt(d)      for each group of keys
    output = softmax(scores) (v U_r)        for each group of values

`attend_stored` reads the cache. `attend_first` is for its first tokens, which attend to nothing but
themselves: there PyTorch's own causal attention is the faster one, in one call for all heads.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from model import causal_attention

SCORES = 2 ** 24        # scores computed at a time for a long chunk: 64 MB in float32


class Group(NamedTuple):
    """J heads of a layer with the same rank, neighbours in the cache: their blocks as one view."""
    matrices: slice                     # of J · batch matrices, in the order of the blocks
    rows: Tensor                                                    # (J·batch, r, max_len)


def attend_first(
    groups: tuple,
    q: Tensor,
    k: Tensor,
    to_value_order: Tensor | None,
    window: int | None,
) -> Tensor:
    """Attention of the first T tokens, among themselves: (B, T, Σ r over query heads).

    q (K, B, G, T, d), k (K, B, T, d), in key order, zero beyond each rank. Values are read back
    from the cache, padded to d and brought into key order; outputs go back into value order.
    """
    K, B, _, T, d = q.shape
    _, values = groups
    v = k.new_zeros(K * B, T, d)
    for matrices, rows in values:
        r = rows.shape[1]
        v[matrices, :, :r] = rows[:, :, :T].mT
    if to_value_order is not None:
        v = moved(v, to_value_order.argsort(), B)
    q = q.flatten(0, 1)                                             # (K·B, G, T, d)
    k = k.flatten(0, 1)[:, None]                                    # (K·B, 1, T, d)
    a = causal_attention(q, k, v[:, None], window)
    if to_value_order is not None:
        a = moved(a, to_value_order, B)
    outputs = []
    for matrices, rows in values:
        r = rows.shape[1]
        part = a[matrices, :, :, :r]                                # (J·B, G, T, r)
        outputs.append(for_row(part.unflatten(0, (-1, B))))
    return join(outputs, 2)


def moved(x: Tensor, heads: Tensor, B: int) -> Tensor:
    """x (K·B, …) with its heads in another order."""
    x = x.unflatten(0, (-1, B))                                     # (K, B, …)
    x = x.index_select(0, heads)
    return x.flatten(0, 1)


def for_row(a: Tensor) -> Tensor:
    """Attention's (J, B, G, T, r) of J heads as W_o' takes it, (B, T, J·G·r)."""
    a = a.permute(1, 3, 0, 2, 4)                                    # (B, T, J, G, r)
    return a.flatten(2)


def attend_stored(
    groups: tuple,
    q: Tensor,
    begin: int,
    end: int,
    window: int | None,
    to_value_order: Tensor | None,
) -> Tensor:
    """Attention of the last T tokens, q (K, B, G, T, d), to tokens begin … end − 1 of a layer.

    Returns (B, T, Σ r over query heads). A long chunk goes in pieces.
    """
    if q.shape[3] == 1:
        return attend_rows(groups, q, begin, end, None, to_value_order)
    outputs = []
    for part, unseen in in_pieces(q, begin, end, window):
        outputs.append(attend_rows(groups, part, begin, end, unseen, to_value_order))
    return join(outputs, 1)


def in_pieces(q: Tensor, begin: int, end: int, window: int | None):
    """Queries (K, B, G, T, d) and the tokens they do not see, few enough at a time."""
    K, B, G, T, _ = q.shape
    unseen = unseen_tokens(begin, end, T, window, q.device)
    size = max(1, SCORES // (K * B * G * (end - begin)))
    return zip(q.split(size, dim=3), unseen.split(size), strict=True)


def unseen_tokens(begin: int, end: int, T: int, window: int | None, device) -> Tensor:
    """Which of tokens begin … end − 1 the last T of them do not see, (T, end − begin) bool.

    The future, and what the window leaves behind: without one nothing, as with one of `end` tokens.
    """
    token = torch.arange(begin, end, device=device)
    now = token[-T:, None]
    return (token > now) | (token <= now - (window or end))


def attend_rows(
    groups: tuple,
    q: Tensor,
    begin: int,
    end: int,
    unseen: Tensor | None,
    to_value_order: Tensor | None,
) -> Tensor:
    """Attention of these queries to rows begin … end − 1; their scores are in memory at once.

    The G queries that share a key-value head form one matrix: each stored number is read once and
    never repeated. One product for all heads of a rank, and one softmax for all heads.
    """
    keys, values = groups
    K, B, G, T, d = q.shape
    q = q.reshape(K * B, G * T, d)
    scores = q.new_empty(K * B, G * T, end - begin)
    scale = d ** -0.5
    for matrices, rows in keys:
        r = rows.shape[1]
        q_r = q[matrices, :, :r]
        k_r = rows[:, :, begin:end]                                 # (J·B, r, tokens)
        some = scores[matrices]
        torch.baddbmm(some, q_r, k_r, beta=0, alpha=scale, out=some)

    if unseen is not None:
        by_token = scores.unflatten(1, (G, T))
        by_token.masked_fill_(unseen, float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.softmax(-1, wide).to(q.dtype)
    if to_value_order is not None:
        weights = moved(weights, to_value_order, B)

    outputs = []
    for matrices, rows in values:
        v_r = rows[:, :, begin:end].mT                              # (J·B, tokens, r)
        a = torch.bmm(weights[matrices], v_r)                       # (J·B, G·T, r)
        outputs.append(for_row(a.view(-1, B, G, T, a.shape[2])))
    return join(outputs, 2)


def join(parts: list[Tensor], dim: int) -> Tensor:
    """torch.cat, but without its copy where there is only one part."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim)
