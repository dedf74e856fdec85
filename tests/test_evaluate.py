"""The distance from the model, and questions through the cache: as their definitions have them."""
import importlib
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DEMO,
    call,
    mean_kl,
    random_projection,
    random_ranks,
    random_start,
    relative,
    small,
)

from cache import KVCache
from data import windows
from evaluate import Distill, answer, choice_scores, logits, measure, read_questions
from projection import Projection, Rotation, uniform_ranks

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
# The report

def test_the_report_is_that_of_whole_logits(model, monkeypatch):
    monkeypatch.setattr("common.CHUNK", 17)
    tokens = np.random.default_rng(0).integers(3, 96, 5 * 31 + 1)
    project = random_start(model).at(uniform_ranks(0.375, model.config))
    base, results = measure(model, tokens, {"x": project}, B=2, T=30, limit=5)
    block = windows(tokens, torch.arange(5) * 31, 30)
    x, y = block[:, :-1], block[:, 1:]
    log_p, log_q = (model.double()(x, project=f).log_softmax(-1) for f in (None, project))
    assert results["x"]["kl"] == pytest.approx(mean_kl(log_p, log_q), rel=1e-4)
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


def test_the_report_of_a_training_can_be_made_again(trained, tmp_path):
    out = shutil.copytree(trained / "out", tmp_path / "out")
    call("evaluate", *small(trained), "--windows", 32, "--out", out)
    before, again = (json.loads((out / f"{name}.json").read_text())
                     for name in ("train", "evaluation"))
    kept = ("budget", "pca", "trained")
    rows = [{name: row[name] for name in kept} for row in before["budgets"]]
    assert again == {"base": before["base"], "budgets": rows}
    assert (out / "evaluation.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------
# Multiple choice

def question(context: str, *choices: str, label: int) -> dict:
    return {"context": context, "choices": list(choices), "label": label}


TIE = question("same", " twice", " twice", label=0)
QUESTIONS = [
    question("The json module", " parses text.", " is", " draws on the screen, slowly", label=0),
    question("", "import", "x", label=1),                           # no context
    question("json.", "d", "e", "f", "g", label=2),                 # one token each
    TIE,                                                            # the first of equals counts
    question("Return the val", "ue", "ley of the kings", "id", label=0),    # tokens merge across
    question("A longer context of several words, that all share. ", "Yes", "No", label=1),
    question("Q: ", "unusual", "value", label=0),                   # the space goes to the choices
]


def by_whole_sequences(model, tokenizer, question, project):
    """log p(choice | context) from a pass over context and choice, for each choice."""
    scores = []
    context = [tokenizer.bos_id()] + tokenizer.encode(question["context"].rstrip())
    for choice in question["choices"]:
        whole = [tokenizer.bos_id()] + tokenizer.encode(question["context"] + choice)
        log_p = model(torch.tensor([whole]), project=project).log_softmax(-1)[0]
        first = min(len(context), len(whole) - 1)
        scores.append(sum(log_p[t - 1, whole[t]].item() for t in range(first, len(whole))))
    return torch.tensor(scores)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["full", "uniform", "ragged"])
def test_scores_are_those_of_whole_sequences(demo, plan):
    model, tokenizer = demo
    p, ranks = random_projection(model), random_ranks(model)
    if plan != "ragged":
        ranks = uniform_ranks({"uniform": 0.5, "full": 1.0}[plan], model.config)
    cache = KVCache(p, ranks, 1, 40)
    for question in QUESTIONS:
        scores = choice_scores(model, tokenizer, question, cache)
        expected = by_whole_sequences(model, tokenizer, question, p.at(ranks))
        assert (scores - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


@torch.no_grad()
def test_the_largest_score_answers_and_the_first_of_equals(demo):
    model, tokenizer = demo
    right = [0, 0]
    for question in QUESTIONS:
        scores = by_whole_sequences(model, tokenizer, question, None)
        lengths = torch.tensor([len(choice) for choice in question["choices"]])
        for i, x in enumerate((scores, scores / lengths)):
            right[i] += max(range(len(x)), key=x.__getitem__) == question["label"]
    unturned = Projection.identity(model.config), uniform_ranks(1.0, model.config)
    got = answer(model, tokenizer, QUESTIONS, *unturned)
    assert got == pytest.approx(
        {"accuracy": right[0] / 7, "accuracy_by_character": right[1] / 7})
    assert answer(model, tokenizer, [TIE], *unturned)["accuracy"] == 1


def test_empty_lines_between_questions_are_skipped(tmp_path):
    path, good = tmp_path / "q.jsonl", json.dumps(QUESTIONS[0])
    path.write_text(good + "\n\n" + good + "\n")
    assert read_questions(path) == [QUESTIONS[0]] * 2
    path.write_text("\n")
    with pytest.raises(ValueError, match="no question"):
        read_questions(path)


@pytest.mark.parametrize("bad", [
    "no",
    "[]",
    "3",
    '{"context": "a", "choices": ["b", "c"]}',
    '{"context": "a", "choices": ["b"], "label": 0}',
    '{"context": "a", "choices": 3, "label": 0}',
    '{"context": "a", "choices": "bc", "label": 0}',
    '{"context": "a", "choices": ["b", "c"], "label": 2}',
    '{"context": "a", "choices": ["b", "c"], "label": -1}',
    '{"context": "a", "choices": ["b", "c"], "label": true}',
    '{"context": "a", "choices": ["b", "c"], "label": "0"}',
    '{"context": "a", "choices": ["b", ""], "label": 0}',
    '{"context": "a", "choices": ["b", 3], "label": 0}',
    '{"context": 1, "choices": ["b", "c"], "label": 0}',
])
def test_a_malformed_question_is_named_by_its_line(tmp_path, bad):
    path, good = tmp_path / "q.jsonl", json.dumps(QUESTIONS[0])
    path.write_text(good + "\n\n" + bad + "\n")
    with pytest.raises(ValueError, match="line 3"):
        read_questions(path)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the names are those of Python 3.11")
def test_the_questions_of_the_demo_are_true():
    questions = read_questions(DEMO / "questions.jsonl")
    assert len(questions) > 100
    for question in questions:
        module = importlib.import_module(question["context"].removesuffix("."))
        exists = [hasattr(module, name) for name in question["choices"]]
        assert exists == [n == question["label"] for n in range(4)], question
