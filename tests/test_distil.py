"""The loss of training: that of its definition, with the gradient of its definition."""
import pytest
import torch
import torch.nn.functional as F
from conftest import mean_kl, random_projection, random_ranks, random_start, relative

from projection import Rotation, uniform_ranks
from train import Distill, Recipe, distil


@pytest.mark.parametrize("c", [0.0, 0.75, 1.0])
def test_the_loss_and_its_gradient_are_those_of_the_definition(model, c, monkeypatch):
    monkeypatch.setattr("model.CHUNK", 7)      # several chunks, the last one not full
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


def test_the_loss_of_windows_is_the_students_distance_from_the_model(model):
    """Inputs are all tokens but the last, targets all but the first."""
    model = model.double()
    text = torch.randint(3, 96, (3, 22))
    project = random_projection(model).at(random_ranks(model, 3))
    loss, kl = distil(model, text, project, Recipe(1, 3, 21, 0.1, ce=0.25))
    log_p, log_q = (model(text[:, :-1], project=f).log_softmax(-1) for f in (None, project))
    for i in range(3):
        expected = mean_kl(log_p[i:i + 1], log_q[i:i + 1])
        cross_entropy = F.nll_loss(log_q[i], text[i, 1:]).item()
        assert kl[i].item() == pytest.approx(expected, rel=1e-9)
        assert loss[i].item() == pytest.approx(0.75 * expected + 0.25 * cross_entropy, rel=1e-9)


def test_a_full_rank_student_has_no_loss(model, tokens):
    full = uniform_ranks(1.0, model.config)[:, :, None].expand(-1, -1, len(tokens), -1)
    project = Rotation(random_start(model)).at(full)
    _, kl = distil(model, tokens, project, Recipe(1, 3, 20, 0.1))
    assert kl.abs().max() < 1e-6
