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


@pytest.mark.parametrize("start", [0, torch.tensor([41, 0, 7])], ids=["at zero", "anywhere"])
def test_the_loss_of_windows_is_the_students_distance_from_the_model(model, start):
    """Inputs are all tokens but the last, targets all but the first."""
    model = model.double()
    text, ranks = torch.randint(3, 96, (3, 22)), random_ranks(model, 3)
    p = random_projection(model, whole=2, mean=1.0).to(None, torch.float64)
    loss, kl = distil(model, text, p.at(ranks), Recipe(1, 3, 21, 0.1, ce=0.25), start)
    for b, position in enumerate(torch.as_tensor(start).expand(3).tolist()):
        log_p, log_q = (
            model.lm_head(model.norm(model.hidden(text[b:b + 1, :-1], project, start=position)))
            .log_softmax(-1) for project in (None, p.at(ranks[:, :, b])))
        expected = mean_kl(log_p, log_q)
        cross_entropy = F.nll_loss(log_q[0], text[b, 1:]).item()
        assert kl[b].item() == pytest.approx(expected, rel=1e-9)
        assert loss[b].item() == pytest.approx(0.75 * expected + 0.25 * cross_entropy, rel=1e-9)


def test_a_full_rank_student_has_no_loss(model, tokens):
    full = uniform_ranks(1.0, model.config)[:, :, None].expand(-1, -1, len(tokens), -1)
    project = Rotation(random_start(model)).at(full)
    _, kl = distil(model, tokens, project, Recipe(1, 3, 20, 0.1))
    assert kl.abs().max() < 1e-6


def test_the_teacher_is_the_same_and_the_student_another_wherever_windows_start(model):
    """Keys are projected where they lie, by one basis for all positions."""
    model = model.double()
    text = torch.randint(3, 96, (3, 22))
    p = random_projection(model).to(None, torch.float64)
    project, recipe = p.at(uniform_ranks(0.5, model.config)), Recipe(1, 3, 21, 0.1)
    losses = [distil(model, text, project, recipe, start)[0]
              for start in (0, 37, torch.tensor([37, 0, 37]))]
    at_zero, at_37, mixed = losses
    assert (at_zero - at_37).abs().min() > 1e-6
    assert relative(mixed, torch.stack((at_37[0], at_zero[1], at_37[2]))) < 1e-9
