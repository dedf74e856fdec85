"""Measures and recall, as their definitions are; a folder's report; questions through the cache."""
import importlib
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CKPT,
    DEMO,
    ROOT,
    call,
    mean_kl,
    random_projection,
    random_ranks,
    random_start,
    shape,
    small,
)

from cache import KVCache
from evaluate import (
    answer,
    by_position,
    check_same_run,
    choice_scores,
    curves_in,
    measure,
    print_table,
    read_questions,
    recall,
    report,
    tokens_of,
)
from projection import Projection, uniform_ranks
from support.data import windows
from support.files import fingerprint_of_model
from support.pictures import whole_recall
from support.plans import PROJECTIONS
from support.tokenizer import load_tokenizer

# ------------------------------------------------------------------------------
# On held-out text

def test_a_report_says_how_far_it_is_through_all_of_its_work(model, monkeypatch):
    """Layers, logits and recall, in steps that grow to the total."""
    steps = []

    class Recorder:
        def __init__(self, total, what):
            steps.append((what, total, []))

        def __call__(self, step, *_):
            steps[-1][2].append(step)

    monkeypatch.setattr("evaluate.Progress", Recorder)
    monkeypatch.setattr("model.CHUNK", 17)
    tokens = np.random.default_rng(0).integers(3, 96, 200)
    passages = torch.randint(3, 96, (20, 5))
    args = SimpleNamespace(batch=2, seq=30, windows=5)
    hook = random_start(model).at(uniform_ranks(0.5, model.config))
    report(model, tokens, {"trained": lambda budget: hook}, (1.0, 0.5), args, passages)
    assert [what for what, *_ in steps] == ["measuring", "passages said twice"]
    for _, total, done in steps:
        assert done == sorted(set(done)) and done[-1] == total and len(done) >= 4


def test_the_report_is_that_of_whole_logits(model, monkeypatch):
    monkeypatch.setattr("model.CHUNK", 17)
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


def test_by_position_a_kl_is_the_mean_over_the_windows_there(model, monkeypatch):
    monkeypatch.setattr("model.CHUNK", 100)
    tokens = np.random.default_rng(0).integers(3, 96, 3 * 260 + 1)
    project = random_projection(model).at(uniform_ranks(0.375, model.config))
    _, results = measure(model, tokens, {"x": project}, B=2, T=260, limit=3)
    x = windows(tokens, torch.arange(3) * 260, 260)[:, :-1]
    log_p, log_q = (model(x, project=f).log_softmax(-1)[:, 64:256] for f in (None, project))
    assert list(results["x"]["by_position"]) == ["64–256"]
    kl = results["x"]["by_position"]["64–256"]
    assert kl == pytest.approx(mean_kl(log_p, log_q), rel=1e-4)
    assert kl != pytest.approx(results["x"]["kl"], rel=1e-3)


def test_a_window_has_the_stretches_that_it_fills():
    means = {"64–256": 159.5, "256–1024": 639.5, "1024–2048": 1535.5, "2048–4096": 3071.5}
    for T, count in ((63, 0), (255, 0), (256, 1), (2047, 2), (5000, 4)):
        found = by_position(torch.arange(T).double())
        assert list(found.items()) == list(means.items())[:count]


def test_kl_by_position_is_printed_where_there_are_two_stretches(capsys):
    numbers = {"kl": 0.0, "perplexity": 9.0, "accuracy": 0.5, "same": 1.0, "kl_99.9": 0.0}
    for more in ({}, {"256–1024": 0.7654321}):
        curve = numbers | {"by_position": {"64–256": 0.1234567} | more}
        print_table(numbers, [{"budget": budget, "trained": curve} for budget in (1.0, 0.5)])
        said = [line.split() for line in capsys.readouterr().out.splitlines()]
        printed = [line for line in said if "0.12346" in line]
        assert len(printed) == len(more)
        if more:
            assert printed[0][0] == "50.0%"
            assert printed[0][-2:] == ["0.12346", "0.76543"]
            assert ["64–256", "256–1024"] in [line[-2:] for line in said]


@pytest.mark.parametrize("factor", [1e10, math.nan])
def test_weights_that_make_no_sense_are_said_to_be_broken(model, factor):
    model.lm_head.weight.data = model.lm_head.weight * factor
    tokens = np.random.default_rng(0).integers(3, 96, 100)
    with pytest.raises(ValueError, match="weights"):
        measure(model, tokens, {}, B=2, T=9, limit=4)


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
    monkeypatch.setattr("model.CHUNK", 7)
    passages = torch.stack([torch.randperm(VOCABULARY - 1)[:20] + 1 for _ in range(18)])
    model = reader(lambda n, t: t >= n)
    assert recall(model, passages, knows) == pytest.approx(expected)
    assert recall(model, passages) == pytest.approx(1.0)


@pytest.mark.parametrize("beginning", [None, 1])
def test_recall_is_that_of_whole_logits(model, beginning):
    passages = torch.randint(3, 12, (20, 30))
    project = random_projection(model).at(random_ranks(model))
    begun = [] if beginning is None else [torch.full((20, 1), beginning)]
    text = torch.cat((*begun, passages, passages), 1)
    guesses = model(text, project=project).argmax(-1)
    right = (guesses[:, :-1] == text[:, 1:]).double()[:, len(begun):]
    expected = right[:, 30:].mean() - right[:, :29].mean()
    found = recall(model, passages, project, beginning=beginning)
    assert found == pytest.approx(expected.item(), abs=1e-6)


# ------------------------------------------------------------------------------
# The report of a folder

def test_the_report_of_a_training_can_be_made_again(trained, tmp_path):
    out = shutil.copytree(trained / "out", tmp_path / "out")
    call("evaluate", *small(trained), "--windows", 32, "--passages", 0, "--out", out)
    before, again = (json.loads((out / f"{name}.json").read_text())
                     for name in ("train", "evaluation"))
    kept = {"budget": "budget", "pca": "pca", "trained": "trained", "trained_ordered": "searched"}
    rows = [{name: row[old] for old, name in kept.items()} for row in before["budgets"]]
    assert again == {"base": before["base"], "budgets": rows}
    assert (out / "evaluation.png").read_bytes()[:4] == b"\x89PNG"


def test_a_report_may_be_on_windows_of_another_length(trained, tmp_path):
    out = shutil.copytree(trained / "out", tmp_path / "out")
    call("evaluate", *small(trained), "--seq", 256, "--windows", 1, "--passages", 0, "--out", out)
    said = json.loads((out / "evaluation.json").read_text())
    for row in said["budgets"]:
        assert list(row["trained"]["by_position"]) == ["64–256"]


VALUES_FIRST = 9 / 16       # budget where an order that lowers all values first has done so


def write_ranks(file, model, projection=None, rounds=7) -> None:
    """A file of search.py that lowers values first, for these projections, or says not for which.

    Its own plan is the full one. rounds: eighths that each rank loses, of the values and of the
    keys.
    """
    L, K, d = shape(model)
    path = [[side, layer, head, 0.1] for side in ("values", "keys") for _ in range(rounds)
            for layer in range(L) for head in range(K)]
    full = [[d] * K] * L
    said = {"head_dim": d, "keys": full, "values": full, "path": path}
    if projection is not None:
        said["projections"] = projection.hash()
    file.write_text(json.dumps(said))


@pytest.fixture
def folder(model, tmp_path):
    """A folder with projections and a PCA; its path, and the two."""
    trained, pca = random_projection(model), random_projection(model)
    trained.save(tmp_path / PROJECTIONS, pca)
    return tmp_path, trained, pca


def test_plans_of_a_search_are_those_of_the_projections_that_it_was_for(folder, model, capsys):
    path, trained, pca = folder
    write_ranks(path / "ranks.json", model, trained)
    write_ranks(path / "ranks_pca.json", model, pca)
    curves = curves_in(path, model)
    assert list(curves) == ["pca", "trained", "pca_searched", "searched"]
    for name, own in (("searched", trained), ("pca_searched", pca)):
        projection, plan = curves[name]
        keys, values = plan(VALUES_FIRST)
        assert projection.hash() == own.hash()
        assert (keys == 16).all()
        assert (values == 2).all()
    assert capsys.readouterr().err == ""


def test_plans_of_a_search_for_other_projections_are_not_used_and_a_line_says_so(
        folder, model, capsys):
    """Of an earlier training; or of the PCA, under the other name."""
    path, trained, _ = folder
    for name, other in (("ranks.json", random_projection(model)), ("ranks_pca.json", trained)):
        write_ranks(path / name, model, other)
        assert list(curves_in(path, model)) == ["pca", "trained"]
        line, = capsys.readouterr().err.splitlines()
        assert str(path / name) in line
        assert "other projections" in line
        assert "not used" in line
        (path / name).unlink()


def test_plans_that_name_no_projections_are_used_and_a_line_says_so(folder, model, capsys):
    """Those of files that were written before searches said it."""
    path, *_ = folder
    write_ranks(path / "ranks.json", model)
    assert list(curves_in(path, model)) == ["pca", "trained", "searched"]
    line, = capsys.readouterr().err.splitlines()
    assert str(path / "ranks.json") in line
    assert "does not say for which projections" in line


def test_a_path_that_ends_above_the_smallest_budget_is_named(folder, model):
    path, trained, _ = folder
    write_ranks(path / "ranks.json", model, trained, rounds=2)
    with pytest.raises(ValueError, match="ranks.json: .* ends at 75.0%"):
        curves_in(path, model)


def test_a_folder_without_a_pca_has_no_curve_of_one(folder, model):
    path, trained, _ = folder
    trained.save(path / PROJECTIONS)
    assert list(curves_in(path, model)) == ["trained"]


@pytest.fixture
def same_run(tmp_path):
    """`same_run(trained with, asked for)`: of --ckpt and --data; CKPT and None."""
    def check(before=None, now=None):
        said = {"ckpt": str(CKPT), "data": "", "seq": 32} | (before or {})
        (tmp_path / "train.json").write_text(json.dumps({"config": said}))
        asked = {"ckpt": CKPT, "data": None, "seq": 64, "begin": False} | (now or {})
        check_same_run(tmp_path, SimpleNamespace(**asked))

    return check


def test_a_run_is_the_same_from_wherever_its_paths_are_given(same_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative_ckpt = os.path.relpath(CKPT)
    data = tmp_path / "text.txt"
    same_run()
    same_run(now={"ckpt": Path(relative_ckpt)})
    same_run(before={"ckpt": relative_ckpt})
    same_run(before={"data": str(data)}, now={"data": Path("text.txt")})
    same_run(before={"data": "text.txt"}, now={"data": data})


@pytest.mark.parametrize("before, now, option", [
    ({}, {"ckpt": DEMO}, "--ckpt"),
    ({}, {"data": Path("text.txt")}, "--data"),
    ({"data": "/text.txt"}, {}, "--data"),
    ({"begin": True}, {}, "--begin"),
    ({"data": "/text.txt"}, {"data": Path("/other.txt")}, "--data"),
])
def test_a_report_on_another_model_or_text_is_refused(same_run, before, now, option):
    with pytest.raises(ValueError, match=f"was trained with {option}"):
        same_run(before, now)


def test_a_report_on_other_contents_of_the_same_paths_is_refused(same_run):
    same_run(before={"ckpt_hash": fingerprint_of_model(CKPT)})
    with pytest.raises(ValueError, match="--ckpt holds something else"):
        same_run(before={"ckpt_hash": fingerprint_of_model(DEMO)})


@pytest.mark.parametrize("name", [None, 3])
def test_a_train_json_that_names_no_folder_is_refused(same_run, name):
    with pytest.raises(ValueError, match="names no --ckpt"):
        same_run(before={"ckpt": name})


def test_projections_without_a_training_are_of_any_run(tmp_path):
    check_same_run(tmp_path, SimpleNamespace(ckpt=DEMO, data=None, seq=7))


def test_a_model_that_gains_nothing_has_no_recall_to_keep(capsys):
    assert whole_recall(0.25) == 400
    assert math.isnan(whole_recall(0.0))
    numbers = {"perplexity": 9.0, "accuracy": 0.5, "recall": -0.1}
    curve = numbers | {"kl": 0.0, "same": 1.0, "kl_99.9": 0.0, "by_position": {}}
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
@pytest.mark.parametrize("plan, whole", [("full", 0), ("uniform", 0), ("ragged", 0), ("ragged", 4)])
def test_scores_are_those_of_whole_sequences(demo, plan, whole):
    """Also where the prefix that choices share is shorter than what stays whole."""
    model, tokenizer = demo
    p, ranks = random_projection(model, whole, 1.0 if whole else 0.0), random_ranks(model)
    if plan != "ragged":
        ranks = uniform_ranks({"uniform": 0.5, "full": 1.0}[plan], model.config)
    cache = KVCache(p, ranks, 1, 40)
    for question in QUESTIONS:
        scores = choice_scores(model, *tokens_of(tokenizer, question), cache)
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
    tokens = [tokens_of(tokenizer, question) for question in QUESTIONS]
    got = answer(model, QUESTIONS, tokens, *unturned)
    assert got == pytest.approx(
        {"accuracy": right[0] / 7, "accuracy_by_character": right[1] / 7})
    assert answer(model, [TIE], [tokens_of(tokenizer, TIE)], *unturned)["accuracy"] == 1


def test_a_question_that_nothing_goes_before_is_refused():
    """A first token has no probability where no beginning of sequence stands before it."""
    tokenizer = load_tokenizer(ROOT / "tests" / "tokenizers" / "qwen2")
    with pytest.raises(ValueError, match="nothing goes before 'ab'"):
        tokens_of(tokenizer, question("", "ab", "cd", label=0))
    wholes, shared, begin = tokens_of(tokenizer, question("x ", "ab", "cd", label=0))
    assert shared == begin == 1
    assert {whole[0] for whole in wholes} == set(tokenizer.encode("x"))


def test_questions_are_read_before_anything_is_computed(folder, refusal, monkeypatch):
    monkeypatch.setattr("evaluate.load", None)
    path, *_ = folder
    file = path / "q.jsonl"
    file.write_text(json.dumps(QUESTIONS[0]))
    line = refusal("evaluate", "--ckpt", CKPT, "--tasks", file, "--out", path)
    assert line.startswith("--tasks: ")
    assert "tokenizer.model" in line


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
    '{"context": "a", "choices": ["b", "c"]}',
    '{"context": "a", "choices": ["b"], "label": 0}',
    '{"context": "a", "choices": "bc", "label": 0}',
    '{"context": "a", "choices": ["b", "c"], "label": 2}',
    '{"context": "a", "choices": ["b", "c"], "label": -1}',
    '{"context": "a", "choices": ["b", "c"], "label": true}',
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
