"""The report of a folder, and questions through the cache."""
import importlib
import json
import math
import shutil
import sys

import pytest
import torch
from conftest import (
    DEMO,
    call,
    random_projection,
    random_ranks,
    small,
)

from cache import KVCache
from evaluate import answer, choice_scores, print_table, read_questions, whole_recall
from projection import Projection, uniform_ranks

# ------------------------------------------------------------------------------
# The report

def test_the_report_of_a_training_can_be_made_again(trained, tmp_path):
    out = shutil.copytree(trained / "out", tmp_path / "out")
    call("evaluate", *small(trained), "--windows", 32, "--passages", 0, "--out", out)
    before, again = (json.loads((out / f"{name}.json").read_text())
                     for name in ("train", "evaluation"))
    kept = ("budget", "pca", "trained")
    rows = [{name: row[name] for name in kept} for row in before["budgets"]]
    assert again == {"base": before["base"], "budgets": rows}
    assert (out / "evaluation.png").read_bytes()[:4] == b"\x89PNG"


def test_a_model_that_gains_nothing_has_no_recall_to_keep(capsys):
    assert whole_recall(0.25) == 400
    assert math.isnan(whole_recall(0.0))
    numbers = {"perplexity": 9.0, "accuracy": 0.5, "recall": -0.1}
    curve = numbers | {"kl": 0.0, "same": 1.0, "kl_99.9": 0.0}
    print_table(numbers, [{"budget": 0.5, "pca": curve, "trained": curve}])
    assert capsys.readouterr().out.split()[-2:] == ["nan", "nan"]


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
