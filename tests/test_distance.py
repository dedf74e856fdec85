"""The distance from the model: the loss, what is measured, and recall, as their definitions are."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import mean_kl, random_projection, random_ranks, random_start, relative

from data import windows
from distance import Distill, logits, measure, recall, spread_windows
from projection import Rotation, uniform_ranks

# ------------------------------------------------------------------------------
# The loss

@pytest.mark.parametrize("c", [0.0, 0.75, 1.0])
def test_the_loss_and_its_gradient_are_those_of_the_definition(model, c, monkeypatch):
    monkeypatch.setattr("common.CHUNK", 7)      # several chunks, the last one not full
    model = model.double()
    teacher, student = torch.randn(2, 3, 11, 32, dtype=torch.float64)
    targets = torch.randint(0, 96, (3, 11))
    weights = torch.randn(3, dtype=torch.float64)

    student.requires_grad_()
    loss, kl = Distill.apply(student, teacher, model, targets, c)
    (loss * weights).sum().backward()

    other = student.detach().clone().requires_grad_()
    log_p, log_q = (model.lm_head(x).log_softmax(-1) for x in (teacher, other))
    by_token = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    expected_kl = by_token.mean(1)
    cross_entropy = F.cross_entropy(log_q.mT, targets, reduction="none").mean(1)
    expected = (1 - c) * expected_kl + c * cross_entropy
    (expected * weights).sum().backward()
    assert relative(kl, expected_kl) < 1e-12
    assert relative(loss, expected) < 1e-12
    assert relative(student.grad, other.grad) < 1e-12


def test_logits_of_a_bfloat16_model_keep_float32_digits():
    x, W = torch.randn(5, 64).bfloat16(), torch.randn(20000, 64).bfloat16()
    assert relative(logits(x, W), x.double() @ W.double().T) < 1e-6


def test_a_full_rank_student_has_no_loss(model, tokens):
    full = uniform_ranks(1.0, model.config)[:, :, None].expand(-1, -1, len(tokens), -1)
    teacher = model.norm(model.hidden(tokens))
    project = Rotation(random_start(model))().at(full)
    student = model.norm(model.hidden(tokens, project))
    _, kl = Distill.apply(student, teacher, model, tokens, 0.0)
    assert kl.abs().max() < 1e-6


# ------------------------------------------------------------------------------
# On held-out text

def test_the_report_is_that_of_whole_logits(model, monkeypatch):
    monkeypatch.setattr("common.CHUNK", 17)
    tokens = np.random.default_rng(0).integers(3, 96, 5 * 31 + 1)
    project = random_start(model).at(uniform_ranks(0.375, model.config))
    base, results = measure(model, tokens, {"x": project}, B=2, T=30, limit=5)
    block = windows(tokens, torch.arange(5) * 31, 30)
    x, y = block[:, :-1], block[:, 1:]
    log_p, log_q = (model.double()(x, project=f).log_softmax(-1) for f in (None, project))
    assert results["x"]["kl"] == pytest.approx(mean_kl(log_p, log_q), rel=1e-4)
    kls = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).flatten().sort().values
    assert len(kls) == 150                          # the 99.9th percentile lies near the last
    worst = kls[148] + (0.999 * 149 - 148) * (kls[149] - kls[148])
    assert results["x"]["kl_99.9"] == pytest.approx(worst.item(), rel=1e-3)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert results["x"]["same"] == pytest.approx(same.item())
    assert 0 < same < 1
    for log, got in ((log_p, base), (log_q, results["x"])):
        cross_entropy = F.nll_loss(log.flatten(0, 1), y.flatten())
        right = (log.argmax(-1) == y).double().mean()
        assert got["perplexity"] == pytest.approx(cross_entropy.exp().item(), rel=1e-4)
        assert got["accuracy"] == pytest.approx(right.item())


def test_windows_are_spread_over_all_of_the_held_out_text(model):
    seen = []
    tokens = np.arange(1000) % 90
    plain = model.hidden

    def hidden(x, *hooks):
        seen.extend(x[:, 0].tolist())
        return plain(x, *hooks)

    model.hidden = hidden
    measure(model, tokens, {}, B=3, T=9, limit=4)
    assert seen == [(249 * i) % 90 for i in range(4)]


@pytest.mark.parametrize("factor", [1e10, math.nan, math.inf])
def test_weights_that_make_no_sense_are_said_to_be_broken(model, factor):
    model.lm_head.weight.data = model.lm_head.weight * factor
    tokens = np.random.default_rng(0).integers(3, 96, 100)
    with pytest.raises(ValueError, match="weights"):
        measure(model, tokens, {}, B=2, T=9, limit=4)


def test_too_short_a_text_holds_no_window():
    assert spread_windows(np.arange(65), 500, 64).shape == (1, 65)
    with pytest.raises(ValueError, match="too short, 64 .* 64"):
        spread_windows(np.arange(64), 500, 64)


# ------------------------------------------------------------------------------
# Recall

VOCABULARY = 80


def reader(knows) -> SimpleNamespace:
    """A model in whose row its next tokens are right at the places that knows(passage's n) names.

    The hook of its `hidden` is such a function too. Elsewhere it says token 0, which no text holds.
    """
    def hidden(x, project=None):
        n = x.shape[1] // 2
        following = x.roll(-1, 1)
        places = torch.tensor([(project or knows)(n, t) for t in range(2 * n)])
        return F.one_hot(following * places, VOCABULARY).float()

    return SimpleNamespace(hidden=hidden, norm=lambda x: x, device=torch.device("cpu"),
                           lm_head=SimpleNamespace(weight=torch.eye(VOCABULARY)))


@pytest.mark.parametrize("knows, expected", [
    (lambda n, t: t >= n, 1.0),                             # what it read before, all of it
    (lambda n, t: t < n - 1, -1.0),                         # all but what it read before
    (lambda n, t: True, 0.0),                               # what it knows anyway is no memory
    (lambda n, t: t in (n - 1, 2 * n - 1), 0.0),            # where a copy ends nothing counts
    (lambda n, t: n <= t < n + 5, 5 / 19),
])
def test_recall_is_what_the_second_copy_gains(knows, expected, monkeypatch):
    monkeypatch.setattr("common.CHUNK", 7)
    passages = torch.stack([torch.randperm(VOCABULARY - 1)[:20] + 1 for _ in range(18)])
    model = reader(lambda n, t: t >= n)
    assert recall(model, passages, knows) == pytest.approx(expected)
    assert recall(model, passages) == pytest.approx(1.0)


def test_recall_is_that_of_whole_logits(model):
    passages = torch.randint(3, 12, (20, 30))
    project = random_projection(model).at(random_ranks(model))
    twice = torch.cat((passages, passages), 1)
    guesses = model(twice, project=project).argmax(-1)
    right = (guesses[:, :-1] == twice[:, 1:]).double()
    expected = right[:, 30:].mean() - right[:, :29].mean()
    assert recall(model, passages, project) == pytest.approx(expected.item(), abs=1e-6)
