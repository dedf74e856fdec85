"""Multiple choice: the scores through the cache are those of whole sequences, and a bad line is named."""
import json
import sys

import pytest
import torch

from cache import KVCache
from model import load, load_tokenizer
from projection import uniform_ranks
from test_projection import random_projection, random_ranks
from test_train import ROOT
from train import answer, choice_scores, read_questions

QUESTIONS = [
    {"context": "The json module", "choices": [" parses text.", " is", " draws a window on the screen, slowly"], "label": 0},
    {"context": "", "choices": ["import", "x"], "label": 1},                                       # no context
    {"context": "json.", "choices": ["d", "e", "f", "g"], "label": 2},                             # one token each
    {"context": "same", "choices": [" twice", " twice"], "label": 0},                              # a tie: the first
    {"context": "Return the val", "choices": ["ue", "ley of the kings", "id"], "label": 0},        # tokens merge across the border
    {"context": "A longer context, of several words, that all choices share. ", "choices": ["Yes", "No"], "label": 1},
    {"context": "Q: ", "choices": ["unusual", "value"], "label": 0},                               # the space goes to the choices
]


@pytest.fixture(scope="module")
def demo():
    return load(ROOT / "demo"), load_tokenizer(ROOT / "demo")


def by_whole_sequences(model, tokenizer, question, project):
    scores = []
    for choice in question["choices"]:
        context = [tokenizer.bos_id()] + tokenizer.encode(question["context"].rstrip())
        whole = [tokenizer.bos_id()] + tokenizer.encode(question["context"] + choice)
        log_p = model(torch.tensor([whole]), project=project).log_softmax(-1)[0]
        first = min(len(context), len(whole) - 1)
        scores.append(sum(log_p[t - 1, whole[t]].item() for t in range(first, len(whole))))
    return torch.tensor(scores)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["full", "uniform", "ragged"])
def test_scores_are_those_of_whole_sequences(demo, plan):
    model, tokenizer = demo
    p = random_projection(model)
    ranks = random_ranks(model) if plan == "ragged" else uniform_ranks(0.5 if plan == "uniform" else 1.0, model.config)
    cache = KVCache(p, ranks, 1, 40)
    for question in QUESTIONS:
        scores = choice_scores(model, tokenizer, question, cache)
        expected = by_whole_sequences(model, tokenizer, question, p.at(ranks))
        assert (scores - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


@torch.no_grad()
def test_the_largest_score_answers_and_the_first_of_equals(demo):
    model, tokenizer = demo
    full, right = uniform_ranks(1.0, model.config), [0, 0]
    for question in QUESTIONS:
        scores = by_whole_sequences(model, tokenizer, question, None)
        lengths = torch.tensor([len(c) for c in question["choices"]])
        for i, x in enumerate((scores, scores / lengths)):
            right[i] += max(range(len(x)), key=lambda n: x[n]) == question["label"]
    got = answer(model, tokenizer, QUESTIONS, None, full)
    assert got == pytest.approx({"accuracy": right[0] / 7, "accuracy_by_character": right[1] / 7})
    assert answer(model, tokenizer, QUESTIONS[3:4], None, full)["accuracy"] == 1


def test_a_malformed_line_is_named(tmp_path):
    path, good = tmp_path / "q.jsonl", json.dumps(QUESTIONS[0])
    path.write_text(good + "\n\n" + good + "\n")
    assert len(read_questions(path)) == 2
    for bad in ("no", "[]", '{"context": "a", "choices": ["b", "c"]}', '{"context": "a", "choices": ["b"], "label": 0}',
                '{"context": "a", "choices": ["b", "c"], "label": 2}', '{"context": "a", "choices": ["b", ""], "label": 0}',
                '{"context": "a", "choices": ["b", 3], "label": 0}', '{"context": 1, "choices": ["b", "c"], "label": 0}',
                '{"context": "a", "choices": ["b", "c"], "label": true}'):
        path.write_text(good + "\n\n" + bad + "\n")
        with pytest.raises(ValueError, match="line 3"):
            read_questions(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no question"):
        read_questions(path)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="names come and go with Python's versions; these are of 3.11")
def test_the_questions_of_the_demo_are_true():
    import importlib
    questions = read_questions(ROOT / "demo" / "questions.jsonl")
    assert len(questions) > 100
    for q in questions:
        module = importlib.import_module(q["context"].removesuffix("."))
        assert [hasattr(module, name) for name in q["choices"]] == [n == q["label"] for n in range(4)], q
