"""How far a compressed model is from the model, on text it never saw.

    KL          Σ p log(p / q), the model's next-token distribution p against the compressed one's
                q, in nats per token: 0 is the model itself. The mean over tokens, which is also
                what training minimises (Distill), and the 99.9th percentile, the worst of them
    perplexity  exp of the mean −log q(next token); accuracy: how often q's likeliest token is it
    same        how often q's likeliest token is p's
    recall      a passage is said twice: how much more often q's likeliest token is the next one in
                the second copy than in the first. The mean KL hides this: in most of a text little
                hangs on tokens far back, and to remember them is what a cache is for

All with keys and values projected (`project=`); the cache gives the same logits. evaluate.py and
train.py report it. Windows and passages are of held-out text.
"""
import math

import numpy as np
import torch
from torch import Tensor

import common
from data import windows
from model import Model

# ------------------------------------------------------------------------------
# Next-token distributions

def log_probabilities(model: Model, *states: Tensor):
    """log p of states (n, hidden) behind the model's last norm, of the same tokens, by chunks.

    Yields (slice of the tokens, log p of the first states, of the second, …), never all at once.
    """
    for start in range(0, len(states[0]), common.CHUNK):
        rows = slice(start, start + common.CHUNK)
        yield rows, *(logits(x[rows], model.lm_head.weight).log_softmax(-1) for x in states)


def logits(x: Tensor, W: Tensor) -> Tensor:
    """x Wᵀ of states (n, hidden) and W (vocab, hidden), in float32 or float64.

    In a bfloat16 result small KLs drown and likeliest tokens tie, so its weights are widened, 8,192
    rows of the vocabulary at a time.
    """
    x = x.to(wide(x.dtype))
    if x.dtype == W.dtype:
        return x @ W.T
    return torch.cat([x @ piece.to(x.dtype).T for piece in W.split(2 ** 13)], dim=-1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that probabilities are computed in: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


# ------------------------------------------------------------------------------
# On held-out text

def spread_windows(tokens: np.ndarray, count: int, T: int) -> Tensor:
    """Up to `count` windows of T + 1 tokens, spread evenly over all of them: (count, T + 1).

    ValueError where the tokens do not fill one.
    """
    if len(tokens) <= T:
        raise ValueError(f"too short, {len(tokens)} tokens for windows of {T}")
    count = min(count, (len(tokens) - 1) // T)
    stride = (len(tokens) - 1) // count
    return windows(tokens, torch.arange(count) * stride, T)


@torch.no_grad()
def measure(model: Model, tokens: np.ndarray, hooks: dict, B: int, T: int, limit: int):
    """The model, and the model with each hook `project=`, over at most `limit` windows of T tokens.

    Returns ({"perplexity", "accuracy"} of the base, {name: {"kl", "perplexity", "accuracy", "same",
    "kl_99.9"}}). ValueError where a cross-entropy is not a number, or beyond any sense.
    """
    text = spread_windows(tokens, limit, T)
    base = torch.zeros(4, dtype=torch.float64)
    totals = {name: torch.zeros(4, dtype=torch.float64) for name in hooks}
    kls = {name: [] for name in hooks}              # of every token: 4 bytes for each hook
    for block in text.to(model.device).split(B):
        x, y = block[:, :-1], block[:, 1:].flatten()
        teacher = model.norm(model.hidden(x)).flatten(0, 1)
        likeliest = torch.empty_like(y)
        for rows, log_p in log_probabilities(model, teacher):
            likeliest[rows] = log_p.argmax(-1)
            base += by_token(log_p, log_p, y[rows], likeliest[rows]).sum(1)
        for name, project in hooks.items():
            student = model.norm(model.hidden(x, project)).flatten(0, 1)
            for rows, log_p, log_q in log_probabilities(model, teacher, student):
                found = by_token(log_p, log_q, y[rows], likeliest[rows])
                totals[name] += found.sum(1)
                kls[name].append(found[0].float())
    n = text[:, 1:].numel()
    _, perplexity, accuracy, _ = means(base, n)
    results = {}
    for name, total in totals.items():
        kl, ppl, right, same = means(total, n)
        worst = float(np.quantile(torch.cat(kls[name]).numpy(), 0.999))
        results[name] = {"kl": kl, "perplexity": ppl, "accuracy": right}
        results[name] |= {"same": same, "kl_99.9": worst}
    return {"perplexity": perplexity, "accuracy": accuracy}, results


def by_token(log_p: Tensor, log_q: Tensor, y: Tensor, likeliest: Tensor) -> Tensor:
    """KL(p ‖ q), the cross-entropy of q, and whether its likeliest token is y, is p's: (4, n).

    Log-probabilities are (n, vocab); y, the next token, and p's likeliest are (n,).
    """
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    cross_entropy = -log_q.gather(1, y[:, None])[:, 0]
    guess = log_q.argmax(-1)
    found = kl, cross_entropy, guess == y, guess == likeliest
    return torch.stack([x.double() for x in found]).cpu()


def means(total: Tensor, n: int) -> tuple[float, float, float, float]:
    """KL, perplexity, accuracy, and share of p's guesses kept, from sums over n tokens."""
    kl, cross_entropy, accuracy, same = (total / n).tolist()
    if not cross_entropy < 700:                     # exp would overflow; NaN is not below either
        raise ValueError(f"a cross-entropy of {cross_entropy:.3g} nats per token: are the weights "
                         "whole?")
    return kl, math.exp(cross_entropy), accuracy, same


# ------------------------------------------------------------------------------
# What a cache is for

PASSAGE = 64            # tokens that are said twice


@torch.no_grad()
def recall(model: Model, passages: Tensor, project=None) -> float:
    """How much more often the next token is right in the second copy of passages (N, n).

    The accuracy over tokens 2 to n of the second copy, less that over the same tokens in the first.
    """
    n = passages.shape[1]
    right = torch.zeros(2)
    for part in passages.to(model.device).split(16):
        twice = part.repeat(1, 2)
        states = model.norm(model.hidden(twice, project)).flatten(0, 1)
        guesses = [log_q.argmax(-1) for _, log_q in log_probabilities(model, states)]
        hits = torch.cat(guesses).view_as(twice)[:, :-1] == twice[:, 1:]
        first, second = hits[:, :n - 1].sum(), hits[:, n:].sum()
        right += torch.stack((first, second)).cpu()
    first, second = (right / (len(passages) * (n - 1))).tolist()
    return second - first


# ------------------------------------------------------------------------------
# The loss of training


class Distill(torch.autograd.Function):
    """(1 − c) KL(p_teacher ‖ p_student) + c · cross-entropy, and the KL: means over T, (B,) each.

    The loss of training. Its gradient for the student's logits is q − ((1 − c) p + c · onehot),
    taken in the same pass, chunk by chunk, while the probabilities are at hand: no logits are kept
    for the backward pass. Student and teacher are normed states (B, T, hidden).
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, model: Model, targets: Tensor, c: float):
        B, T, _ = student.shape
        s, t = student.flatten(0, 1), teacher.flatten(0, 1)
        y = targets.flatten()[:, None]
        gradient = torch.empty_like(s)
        kl = s.new_zeros(B * T, dtype=wide(s.dtype))
        cross_entropy = torch.zeros_like(kl)
        for rows, log_q, log_p in log_probabilities(model, s, t):
            target = log_p.exp()                                    # what q should be
            kl[rows] = log_p.sub_(log_q).mul_(target).sum(-1)       # Σ p log(p / q)
            if c > 0:
                cross_entropy[rows] = -log_q.gather(1, y[rows])[:, 0]
                share = torch.full_like(target[:, :1], c)
                target.mul_(1 - c).scatter_add_(1, y[rows], share)
            by_logits = log_q.exp_().sub_(target)
            gradient[rows] = by_logits.to(s.dtype) @ model.lm_head.weight
        ctx.save_for_backward(gradient.view_as(student))
        kl = kl.view(B, T).mean(1)
        cross_entropy = cross_entropy.view(B, T).mean(1)
        ctx.mark_non_differentiable(kl)
        return (1 - c) * kl + c * cross_entropy, kl

    @staticmethod
    def backward(ctx, by_loss: Tensor, _):
        gradient, = ctx.saved_tensors
        by_token = by_loss[:, None, None] / gradient.shape[1]
        return gradient * by_token.to(gradient), None, None, None, None
