"""The scripts: a chain of them on a tiny model, each on the demo, and one line for wrong input."""
import importlib
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import CKPT, DEMO, GOLDEN, call, random_projection, relative, script, shape
from safetensors.torch import load_file, save_file

from cache import KVCache
from evaluate import measure, recall
from model import Model, generate, load
from projection import Projection, calibrate, plan_at
from search import Windows, find_order, find_start
from support.checkpoint import read_config
from support.data import even_windows, set_apart
from support.plans import PROJECTIONS, order_of, read_ranks
from train import draw_along, draw_independent, draw_levels

SCRIPTS = [
    "model", "projection", "search", "train", "cache", "kernel", "evaluate", "generate",
    "support.data", "bits.train"]


# ------------------------------------------------------------------------------
# The chain: train, search, train along the order, search again, evaluate; and the start alone

@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with first/, second/, start/, what the chain left, and the options of its links."""
    folder = tmp_path_factory.mktemp("chain")
    first, second, start = folder / "first", folder / "second", folder / "start"
    np.save(folder / "tokens.npy", np.random.default_rng(2).integers(3, 96, 2000))
    options = ["--ckpt", CKPT, "--data", folder / "tokens.npy", "--seq", 16, "--batch", 2]
    options += ["--windows", 2]
    call("train", *options, "--uniform", "--steps", 4, "--out", first)
    call("search", *options, "--proj", first / PROJECTIONS)
    along = ["--ranks", first / "ranks.json"]
    call("train", *options, "--steps", 4, *along, "--out", second)
    call("search", *options, "--proj", second / PROJECTIONS)
    call("search", *options, "--proj", second / PROJECTIONS, "--pca")
    call("evaluate", *options, "--out", second)
    call("train", *options, "--steps", 0, "--out", start)
    call("evaluate", *options, "--out", start)
    return folder, options


def read(path) -> dict:
    return json.loads(path.read_text())


def ranks_at(file, model, budget: float) -> torch.Tensor:
    """The plan of a file of search.py."""
    return plan_at(read_ranks(file, model.config).order, model.config, budget)


@pytest.mark.parametrize("budget", [0.875, 0.125])
def test_at_the_end_of_the_chain_the_cache_gives_the_projected_models_logits(chain, budget):
    folder, _ = chain
    model = load(CKPT)
    p = Projection.load(folder / "second" / PROJECTIONS)
    ranks = ranks_at(folder / "second" / "ranks.json", model, budget)
    assert budget - 1 / 64 < ranks.sum() / (ranks.numel() * 16) <= budget
    tokens = torch.randint(3, 96, (1, 24))
    cache = KVCache(p, ranks, batch=1, max_len=24)
    parts = tokens.split([15, 1, 1, 7], dim=1)
    logits = torch.cat([model(part, cache=cache) for part in parts], dim=1)
    assert relative(logits, model(tokens, project=p.at(ranks))) < 1e-4


def test_at_the_end_of_the_chain_decoding_follows_the_projected_model(chain):
    folder, _ = chain
    model = load(CKPT)
    p = Projection.load(folder / "second" / PROJECTIONS)
    ranks = ranks_at(folder / "second" / "ranks.json", model, 0.375)
    text = [1, 17, 60]
    for token in generate(model, text[:], 10, cache=KVCache(p, ranks, batch=1, max_len=20)):
        logits = model(torch.tensor([text]), project=p.at(ranks))
        assert logits[0, -1].argmax() == token
        text.append(token)
    assert len(text) > 3


def test_each_link_leaves_its_files_beside_those_it_worked_on(chain):
    """And nothing else, the states of trainings among it."""
    folder, _ = chain
    evaluated = {"evaluation.json", "evaluation.png"}
    start = {PROJECTIONS, "train.json", "train.png", "ranks.json"} | evaluated
    first = start - evaluated | {"ranks.png"}
    second = first | {"ranks_pca.json", "ranks_pca.png"} | evaluated
    for name, expected in (("first", first), ("second", second), ("start", start)):
        assert {file.name for file in (folder / name).iterdir()} == expected
    for name, prefix in (("ranks.json", ""), ("ranks_pca.json", "pca_")):
        p = Projection.load(folder / "second" / PROJECTIONS, prefix)
        assert read(folder / "second" / name)["projections"] == p.hash()


def test_a_search_sweeps_anew_also_for_what_was_trained_along_an_order(chain):
    """By the gradients of the trained projections; a KL is measured at each eighth alone."""
    folder, _ = chain
    model = load(CKPT)
    tokens = np.load(folder / "tokens.npy")[:1800]
    windows = Windows(tokens, 64, 2, 16, 64, 0)
    order = find_order(model, Projection.load(folder / "second" / PROJECTIONS), windows)
    searched = read(folder / "second" / "ranks.json")
    assert order_of(searched["path"], model.config).tolist() == order.tolist()
    assert order.tolist() != read(folder / "second" / "train.json")["order"]
    measured = [n for n, row in enumerate(searched["path"], 1) if row[3] is not None]
    assert measured == [8, 16, 24, 32, 40, 48, 56]
    assert searched["evaluations"] == 7


def test_a_search_says_that_it_replaces_the_order_of_a_training(chain, tmp_path, capsys):
    folder, options = chain
    shutil.copytree(folder / "second", tmp_path / "own")
    proj = tmp_path / "own" / PROJECTIONS
    given = [*options, "--sweep-windows", 2, "--proj", proj]
    for more, said in (((), True), (("--pca",), False), (("--out", tmp_path / "other"), False)):
        call("search", *given, *more)
        assert ("took the place of the order" in capsys.readouterr().err) == said


def test_no_steps_leave_the_start_and_the_order_of_the_sweeps(chain):
    folder, _ = chain
    model = load(CKPT)
    tokens, _ = set_apart(np.load(folder / "tokens.npy")[:1800], 8 * 16 + 1)
    windows = Windows(tokens, 64, 2, 16, 64, 0)
    expected = find_start(model, windows, whole=4)
    p = Projection.load(folder / "start" / PROJECTIONS)
    assert p.whole == 4
    for name, tensor in p.tensors().items():
        assert relative(tensor, expected.tensors()[name]) < 1e-6, name
    report, ranks = (read(folder / "start" / f"{name}.json") for name in ("train", "ranks"))
    assert report["loss"] == [] and report["step"] == 0
    assert report["order"] == find_order(model, expected, windows).tolist()
    assert report["order"] == order_of(ranks["path"], model.config).tolist()


@pytest.mark.parametrize("name", ["second", "start"])
def test_a_training_writes_its_order_as_a_file_of_ranks(chain, tmp_path, name):
    """With the plan at 37.5%, and no KL: none was measured."""
    folder, options = chain
    out = folder / name
    if name == "second":                            # whose file search.py wrote over
        out = tmp_path
        along = ["--ranks", folder / "first" / "ranks.json"]
        call("train", *options, "--steps", 1, *along, "--out", out)
    said, model = read(out / "ranks.json"), load(CKPT)
    order = read(out / "train.json")["order"]
    found = read_ranks(out / "ranks.json", model.config)
    assert found.order.tolist() == order
    assert torch.equal(found.ranks, plan_at(torch.tensor(order), model.config, 0.375))
    assert found.fits(Projection.load(out / PROJECTIONS))
    assert said["levels"] == 8 and said["budget"] == 0.375
    assert {said[key] for key in ("kl", "uniform_kl", "evaluations")} == {None}
    assert {row[3] for row in said["path"]} == {None}


def test_an_evaluation_behind_a_training_alone_shows_its_order(chain):
    """With the very numbers of the training's own report."""
    folder, _ = chain
    rows, reported = (read(folder / "start" / f"{name}.json")["budgets"]
                      for name in ("evaluation", "train"))
    for row, before in zip(rows, reported, strict=True):
        assert set(row) == {"budget", "pca", "trained", "searched"}
        del row["searched"]["recall"]
        assert row["searched"] == before["trained_ordered"]
    assert rows[-1]["searched"]["kl"] != reported[-1]["trained"]["kl"]


def test_an_order_for_another_model_is_refused(chain, tmp_path, refusal):
    folder, _ = chain
    for name in (PROJECTIONS, "train.json"):
        shutil.copy(folder / "second" / name, tmp_path)
    options = ["--ckpt", CKPT, "--proj", tmp_path / PROJECTIONS, "--budget", 0.5]
    call("cache", *options)
    said = read(tmp_path / "train.json") | {"order": [0, 8]}
    (tmp_path / "train.json").write_text(json.dumps(said))
    assert "order for another model" in refusal("cache", *options)


def test_a_training_along_an_order_reports_on_the_plans_of_the_order(chain):
    folder, _ = chain
    report = read(folder / "second" / "train.json")
    path = read(folder / "first" / "ranks.json")["path"]
    assert report["order"] == order_of(path, read_config(CKPT / "config.json")).tolist()
    for row in report["budgets"]:
        assert set(row) == {"budget", "pca", "trained", "pca_ordered", "trained_ordered"}
    assert "order" not in read(folder / "first" / "train.json")


def test_an_evaluation_shows_four_curves_where_both_searches_have_been(chain):
    folder, _ = chain
    evaluation = read(folder / "second" / "evaluation.json")
    for row in evaluation["budgets"]:
        assert set(row) == {"budget", "pca", "trained", "pca_searched", "searched"}
    assert (folder / "second" / "evaluation.png").read_bytes()[:4] == b"\x89PNG"


def test_an_evaluation_repeats_what_the_training_said(chain):
    folder, _ = chain
    evaluation, report = (read(folder / "second" / f"{name}.json")
                          for name in ("evaluation", "train"))
    del evaluation["base"]["recall"]                # which trainings do not measure
    assert evaluation["base"] == report["base"]
    for row, before in zip(evaluation["budgets"], report["budgets"], strict=True):
        for name in ("pca", "trained"):
            del row[name]["recall"]
            assert row[name] == before[name]


@pytest.mark.parametrize("curve, prefix, file", [
    ("searched", "", "ranks.json"), ("pca_searched", "pca_", "ranks_pca.json")])
def test_a_searched_curve_is_of_its_own_projections_and_plans(chain, curve, prefix, file):
    folder, _ = chain
    second, model = folder / "second", load(CKPT)
    p = Projection.load(second / PROJECTIONS, prefix)
    held_out = np.load(folder / "tokens.npy")[-200:]
    passages = even_windows(held_out, 500, 32)[:, 1:]     # twice 32: the model's positions
    for row in read(second / "evaluation.json")["budgets"]:
        ranks = ranks_at(second / file, model, row["budget"])
        _, results = measure(model, held_out, {"": p.at(ranks)}, B=2, T=16, limit=2)
        results[""]["recall"] = recall(model, passages, p.at(ranks))
        assert row[curve].pop("by_position") == results[""].pop("by_position")
        assert row[curve] == pytest.approx(results[""], abs=1e-6)


def test_a_search_for_pca_is_that_for_a_file_whose_projections_are_pca(chain, tmp_path):
    folder, options = chain
    pca = Projection.load(folder / "second" / PROJECTIONS, "pca_")
    pca.save(tmp_path / "pca.safetensors")
    call("search", *options, "--proj", tmp_path / "pca.safetensors", "--out", tmp_path)
    assert read(tmp_path / "ranks.json") == read(folder / "second" / "ranks_pca.json")
    assert read(tmp_path / "ranks.json") != read(folder / "second" / "ranks.json")


def test_the_papers_recipe_starts_at_pca_and_ours_does_not(chain, tmp_path):
    """A rate of zero leaves the start as it is."""
    _, options = chain
    equal = {}
    for recipe in ("paper", "ours"):
        out = tmp_path / recipe
        call("train", *options, "--steps", 1, "--lr", 0, "--recipe", recipe, "--out", out)
        tensors = load_file(out / PROJECTIONS)
        equal[recipe] = torch.allclose(tensors["U_k"], tensors["pca_U_k"], atol=1e-6)
        assert ("mean_k" in tensors) == (recipe == "ours")
        assert Projection.load(out / PROJECTIONS).whole == (4 if recipe == "ours" else 0)
        assert (out / "ranks.json").exists() == (recipe == "ours")
    assert equal == {"paper": True, "ours": False}


def test_what_a_training_is_told_of_whole_tokens_and_of_positions_is_what_it_says(chain, tmp_path):
    _, options = chain
    told = ["--whole", 2, "--positions", 40, "--sweep-windows", 3, "--uniform", "--steps", 1]
    call("train", *options, *told, "--out", tmp_path)
    config = read(tmp_path / "train.json")["config"]
    assert [config[key] for key in ("whole", "positions", "sweep_windows", "draw")] == [
        2, 40, 3, "levels"]
    assert Projection.load(tmp_path / PROJECTIONS).whole == 2
    assert not (tmp_path / "ranks.json").exists()   # --uniform has no order


def test_the_papers_recipe_runs_with_its_rate_and_its_cross_entropy(chain, tmp_path):
    _, options = chain
    call("train", *options, "--steps", 3, "--recipe", "paper", "--out", tmp_path)
    report = read(tmp_path / "train.json")
    assert report["config"]["lr"] == 0.001
    assert report["config"]["ce"] == 0.75
    tensors = load_file(tmp_path / PROJECTIONS)
    assert not torch.allclose(tensors["U_k"], tensors["pca_U_k"], atol=1e-6)


@pytest.mark.parametrize("recipe, draw, floor, steps", [
    ("paper", draw_independent, None, 400), ("uniform", draw_levels, 1e-3, 200),
    ("along an order", draw_along, 1e-3, 200)])
def test_a_recipe_draws_its_ranks_and_takes_the_logarithm_or_not(
        chain, tmp_path, monkeypatch, recipe, draw, floor, steps):
    _, options = chain
    taken = []

    def note(model, state, tokens, draw, recipe, after_step):
        taken.extend((draw, recipe.floor, recipe.steps))

    monkeypatch.setattr("train.train", note)
    monkeypatch.setattr("train.finish", lambda *_: None)
    named = {"paper": ["--recipe", "paper"], "uniform": ["--uniform"]}.get(recipe, [])
    call("train", *options, *named, "--out", tmp_path)
    assert getattr(taken[0], "func", taken[0]) is draw
    assert taken[1:] == [floor, steps]


def test_an_evaluation_is_of_the_text_and_model_that_were_trained_on(chain, tmp_path, refusal):
    """But its windows may be longer, or shorter."""
    folder, options = chain
    shutil.copy(folder / "tokens.npy", tmp_path / "other.npy")
    shutil.copytree(CKPT, tmp_path / "ckpt")
    out = shutil.copytree(folder / "second", tmp_path / "out")
    for name, other in (("--data", "other.npy"), ("--ckpt", "ckpt")):
        line = refusal("evaluate", *options, name, tmp_path / other, "--out", out)
        assert f"was trained with {name}" in line
    call("evaluate", *options, "--seq", 40, "--passages", 0, "--out", out)
    rows, before = (read(of / "evaluation.json")["budgets"] for of in (out, folder / "second"))
    assert rows[-1]["trained"]["kl"] != before[-1]["trained"]["kl"]


def test_after_a_new_training_what_was_searched_before_it_is_left_out(chain, tmp_path, capsys):
    folder, options = chain
    out = shutil.copytree(folder / "second", tmp_path / "out")
    call("train", *options, "--uniform", "--steps", 3, "--seed", 1, "--out", out)
    capsys.readouterr()
    call("evaluate", *options, "--passages", 2, "--out", out)
    said = capsys.readouterr().err
    for name in ("ranks.json", "ranks_pca.json"):
        assert f"{out / name}: was searched for other projections, and is not used" in said
    for row in read(out / "evaluation.json")["budgets"]:
        assert set(row) == {"budget", "pca", "trained"}


def test_a_training_along_a_path_that_was_cut_short_knows_no_smaller_plan(chain, tmp_path, refusal):
    """As an interrupted search leaves it, if it came as far as a training needs."""
    folder, options = chain
    whole = read(folder / "first" / "ranks.json")
    reached = next(n for n in range(1, 57) if 1 - n / 64 <= 0.25)
    cut = whole["path"][:reached]
    (tmp_path / "cut.json").write_text(json.dumps(whole | {"path": cut}))
    call("train", *options, "--steps", 2, "--ranks", tmp_path / "cut.json", "--out", tmp_path)
    path = read(tmp_path / "ranks.json")["path"]
    assert [row[:3] for row in path] == [row[:3] for row in cut]
    plan = ["--ckpt", CKPT, "--proj", tmp_path / PROJECTIONS]
    call("cache", *plan, "--budget", 0.25)
    assert "ends at 25.0%" in refusal("cache", *plan, "--budget", 0.125)
    call("search", *options, "--proj", tmp_path / PROJECTIONS)      # goes to an eighth
    call("cache", *plan, "--budget", 0.125)
    assert (ranks_at(tmp_path / "ranks.json", load(CKPT), 0.125) == 2).all()


# ------------------------------------------------------------------------------
# Each on the demo

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of some thousand tokens, for the demo's tokenizer."""
    from pydoc_data.topics import topics
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics)[:12]))
    return path


def test_every_script_explains_itself(capsys):
    for name in SCRIPTS:
        with pytest.raises(SystemExit) as left:
            call(name, "--help")
        said = capsys.readouterr().out
        assert left.value.code == 0
        assert importlib.import_module(name).__doc__.splitlines()[0] in said
        for option in ("--ckpt", "--device", "--dtype", "--seed"):
            assert option in said, name


def test_model_speaks_without_a_cache(capsys):
    call("model", "--prompt", "Return the ", "--tokens", 4)
    said = capsys.readouterr()
    assert said.out.startswith("Return the ")
    assert said.err.startswith("4 tokens at ")


def test_cache_shows_the_layout_and_the_bytes(tmp_path, demo, capsys):
    model, _ = demo
    random_projection(model).save(tmp_path / "p.safetensors")
    options = ["--proj", tmp_path / "p.safetensors", "--budget", 0.5, "--tokens", 100]
    call("cache", *options)
    said = capsys.readouterr().out
    c = model.config
    full = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 100 * 4
    assert f"{full // 2:,} bytes" in said
    assert f"{full:,}\n" in said
    assert "####····" in said


def test_data_says_what_it_found(text, tmp_path, demo, capsys):
    _, tokenizer = demo
    call("support.data", "--data", text, "--out", tmp_path)
    said = capsys.readouterr().out
    count = len(tokenizer.encode(text.read_text())) + 1
    held_out = count // 10
    assert f"{count - held_out:,} tokens" in said
    assert f"{held_out:,} held out" in said
    assert tokenizer.decode(tokenizer.encode(text.read_text())[:5]) in said
    assert (tmp_path / "topics.txt.bin").stat().st_size == 2 * count


def test_projection_shows_what_leading_columns_hold(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("projection.calibrate", partial(calibrate, batches=1))
    call("projection", "--data", text, "--out", tmp_path)
    said = capsys.readouterr().out
    rows = [line.split()[2:] for line in said.splitlines() if line.startswith("  layer")]
    assert len(rows) == 2 * read_config(DEMO / "config.json").num_hidden_layers
    for row in rows:
        shares = [float(share.removesuffix("%")) for share in row]
        assert shares == sorted(shares)
        assert shares[-1] == 100.0


def test_generate_takes_the_projections_beside_its_ranks(tmp_path, demo, monkeypatch, capsys):
    """Not those in out/."""
    model, tokenizer = demo
    L, K, d = shape(model)
    for name in ("out", "out_x"):
        (tmp_path / name).mkdir()
        p = random_projection(model)
        p.save(tmp_path / name / PROJECTIONS)
    path = [[side, i, j, 0.1] for side in ("keys", "values") for i in range(L) for j in range(K)]
    plan = {"head_dim": d, "keys": [[d] * K] * L, "values": [[d] * K] * L, "path": path * 7}
    (tmp_path / "out_x" / "ranks.json").write_text(json.dumps(plan | {"projections": p.hash()}))
    monkeypatch.chdir(tmp_path)
    prompt = ["--prompt", "The json module", "--tokens", 5]
    call("generate", "--ranks", "out_x/ranks.json", "--budget", 0.5, *prompt)
    said = capsys.readouterr()
    assert "along the order in out_x/ranks.json" in said.err
    ids = [tokenizer.bos_id(), *tokenizer.encode("The json module")]
    cache = KVCache(p, ranks_at(tmp_path / "out_x" / "ranks.json", model, 0.5), 1, 40)
    assert said.out == tokenizer.decode(ids + list(generate(model, ids, 5, cache=cache))) + "\n"


@pytest.mark.slow
def test_generate_takes_the_order_that_a_training_of_no_steps_leaves(text, tmp_path, demo, capsys):
    """Its first tokens whole, beside the cache."""
    model, tokenizer = demo
    options = ["--data", text, "--seq", 16, "--batch", 1, "--sweep-windows", 1, "--windows", 1]
    call("train", *options, "--steps", 0, "--out", tmp_path)
    capsys.readouterr()
    prompt = ["--prompt", "The json module", "--tokens", 5]
    call("generate", "--proj", tmp_path / PROJECTIONS, "--budget", 0.25, *prompt)
    said = capsys.readouterr()
    assert f"along the order in {tmp_path / 'ranks.json'}" in said.err
    L, K, d = shape(model)
    outputs = model.config.num_attention_heads * model.config.hidden_size
    assert f"{4 * 4 * L * (2 * K * d + outputs):,} bytes for 4 whole first tokens" in said.err
    p = Projection.load(tmp_path / PROJECTIONS)
    ranks = ranks_at(tmp_path / "ranks.json", model, 0.25)
    assert len(ranks.unique()) > 2
    ids = [tokenizer.bos_id(), *tokenizer.encode("The json module")]
    cache = KVCache(p, ranks, 1, 40)
    assert said.out == tokenizer.decode(ids + list(generate(model, ids, 5, cache=cache))) + "\n"


def test_evaluate_answers_questions(text, tmp_path, demo):
    model, _ = demo
    pca = random_projection(model)
    random_projection(model).save(tmp_path / PROJECTIONS, pca)
    questions = (DEMO / "questions.jsonl").read_text().splitlines()[:2]
    (tmp_path / "q.jsonl").write_text("\n".join(questions))
    options = ["--data", text, "--seq", 16, "--windows", 1, "--passages", 0]
    call("evaluate", *options, "--tasks", tmp_path / "q.jsonl", "--out", tmp_path)
    tasks = read(tmp_path / "evaluation.json")["tasks"]
    assert tasks["questions"] == 2
    assert set(tasks["base"]) == {"accuracy", "accuracy_by_character"}
    assert len(tasks["budgets"]) == 7
    for row in tasks["budgets"]:
        assert set(row) == {"budget", "pca", "trained"}
    full = tasks["budgets"][0]
    assert full["pca"] == full["trained"] == tasks["base"]


def test_a_script_in_a_process_of_its_own_leaves_with_one_line_and_code_2():
    done = script("generate.py", "--tokens", "many")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--tokens" in done.stderr
    assert done.stdout == ""


def test_the_first_chapter_does_without_the_second():
    """Only generate.py --bits imports it."""
    names = "model", "projection", "search", "train", "cache", "evaluate", "generate"
    asked = "[name for name in sys.modules if name.split('.')[0] == 'bits']"
    done = script("-c", f"import sys, {', '.join(names)}; print({asked})")
    assert done.stdout == "[]\n", done.stderr


# ------------------------------------------------------------------------------
# Wrong input: exit code 2 and one line that names the culprit

@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder of files that are wrong, each in one way, and of some that are not."""
    folder = tmp_path_factory.mktemp("wrong")
    np.save(folder / "tokens.npy", np.random.default_rng(1).integers(3, 96, 5000))
    np.save(folder / "beyond.npy", np.full(5000, 96))
    np.save(folder / "negative.npy", np.full(5000, -1))
    np.save(folder / "floats.npy", np.zeros(5000))
    np.save(folder / "square.npy", np.zeros((50, 50), dtype=int))
    np.save(folder / "short.npy", np.full(30, 5))
    np.save(folder / "few.npy", np.full(200, 5))
    whole = (folder / "tokens.npy").read_bytes()
    for length in (4, 9, 50, 127, 1000):
        (folder / f"cut{length}.npy").write_bytes(whole[:length])
    (folder / "fake.npy").write_bytes(b"not an array")
    (folder / "odd.bin").write_bytes(b"abc")
    (folder / "empty.bin").write_bytes(b"")
    (folder / "file").write_text("")
    (folder / "text.txt").write_text("words " * 900)
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 900)
    (folder / "image.png").write_bytes(b"x")
    (folder / "lines.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (folder / "questions.jsonl").write_text('{"context": "a"}\n')

    write_projections(folder)
    write_plans(folder)
    write_checkpoints(folder)
    return folder


def write_projections(folder):
    p = random_projection(load(CKPT))
    p.save(folder / "p.safetensors")
    for name in ("done", "noted"):
        (folder / name).mkdir()
        p.save(folder / name / PROJECTIONS, p)
    (folder / "noted" / "train.json").write_text('{"config": null}')
    random_projection(load(GOLDEN / "llama_mha")).save(folder / "other.safetensors")
    p = random_projection(load(CKPT), whole=4, mean=1.0)
    p.save(folder / "mean.safetensors")
    tensors, m = load_file(folder / "mean.safetensors"), p.mean_k
    for name, changed, whole in (
        ("whole_text", tensors, "four"),
        ("whole_minus", tensors, "-4"),
        ("whole_alone", {name: x for name, x in tensors.items() if name != "mean_k"}, "4"),
        ("mean_shape", tensors | {"mean_k": m[..., :3].contiguous()}, "4"),
        ("mean_nan", tensors | {"mean_k": m.masked_fill(m == m.max(), torch.nan)}, "4"),
    ):
        save_file(changed, folder / f"{name}.safetensors", {"whole": whole})
    (folder / "broken.safetensors").write_bytes(b"nothing")
    save_file({"x": torch.zeros(3)}, folder / "unlike.safetensors")


def write_plans(folder):
    plan = {"head_dim": 16, "budget": 1.0, "keys": [[16] * 2] * 2, "values": [[16] * 2] * 2}
    plan["path"] = [["keys", 0, 0, 0.1]] * 3
    broken = {
        "short": {},
        "head_dim": {"head_dim": 8},
        "places": {"path": [["keys", 7, 0, 0.1]]},
        "text": {"path": "none"},
        "ragged": {"keys": [[16], [16, 16]]},
        "others": {"projections": "0" * 64},
    }
    for name, change in broken.items():
        (folder / f"{name}.json").write_text(json.dumps(plan | change))


def write_checkpoints(folder):
    """Copies of CKPT: no tokenizer, an empty one, one with a larger vocabulary, other configs."""
    def copy(name, **settings):
        made = shutil.copytree(CKPT, folder / name)
        config = read(made / "config.json") | settings
        (made / "config.json").write_text(json.dumps(config))
        return made

    (copy("empty_tokenizer") / "tokenizer.model").write_bytes(b"")
    shutil.copy(DEMO / "tokenizer.model", copy("large_tokenizer") / "tokenizer.model")
    copy("number", model_type=7)
    copy("gemma", model_type="gemma2")
    copy("nameless", model_type=None, architectures=3)
    copy("endless", eos_token_id=None)
    copy("ends", eos_token_id=[2, 3])
    copy("twelve", head_dim=12)
    (copy("list") / "config.json").write_text("[]")
    for name, files in (("numbers", 7), ("indexless", None), ("lost", "lost.safetensors")):
        index = copy(name) / "model.safetensors.index.json"
        weight_map = dict.fromkeys(read(index)["weight_map"], files)
        index.write_text(json.dumps({"weight_map": weight_map}))


BASE = {        # options that are right; those of a case come behind them
    "train": ["--ckpt", CKPT, "--data", "tokens.npy", "--out", "out", "--seq", 32],
    "search": ["--ckpt", CKPT, "--data", "tokens.npy", "--out", "out", "--proj", "p.safetensors"],
    "evaluate": ["--ckpt", CKPT, "--data", "tokens.npy", "--out", "done", "--seq", 32],
    "bits.train": ["--ckpt", CKPT, "--data", "tokens.npy", "--out", "out", "--seq", 60],
    "support.data": ["--ckpt", CKPT, "--data", "tokens.npy", "--out", "out"],
    "projection": ["--ckpt", CKPT, "--data", "tokens.npy", "--out", "out"],
    "cache": ["--ckpt", CKPT],
    "model": [],
    "generate": [],
}

CASES = [       # the script and its options; the words that the line must hold
    # The checkpoint
    ("train --ckpt nowhere", "--ckpt nowhere"),
    ("train --ckpt file", "--ckpt file"),
    ("train --ckpt list", "--ckpt config.json JSON"),
    ("train --ckpt number", "--ckpt config.json 7"),
    ("train --ckpt nameless", "--ckpt config.json"),
    ("train --ckpt gemma", "--ckpt config.json gemma2"),
    ("train --ckpt twelve", "--ckpt head_dim 12"),
    ("bits.train --ckpt twelve", "--ckpt head_dim 12"),
    ("train --ckpt numbers", "--ckpt index.json weight_map"),
    ("train --ckpt indexless", "--ckpt index.json weight_map"),
    ("train --ckpt lost", "--ckpt lost.safetensors"),
    # The tokenizer
    ("train --data text.txt", "--data tokenizer.model"),
    ("train --data text.txt --ckpt empty_tokenizer", "--data tokenizer.model SentencePiece"),
    ("train --data text.txt --ckpt large_tokenizer", "--data tokenizer vocabulary"),
    ("support.data --data text.txt --ckpt empty_tokenizer", "--data tokenizer.model SentencePiece"),
    ("model --ckpt empty_tokenizer", "--ckpt tokenizer.model SentencePiece"),
    ("generate --ckpt empty_tokenizer", "--ckpt tokenizer.model SentencePiece"),
    ("model --ckpt large_tokenizer", "vocabulary"),
    ("generate --ckpt large_tokenizer", "vocabulary"),
    # The text
    ("train --data none.txt", "--data none.txt"),
    ("train --data latin.txt --ckpt large_tokenizer", "--data latin.txt UTF-8"),
    ("train --data lines.jsonl --ckpt large_tokenizer", "--data lines.jsonl line 2"),
    ("train --data beyond.npy", "--data beyond.npy 96 vocabulary"),
    ("train --data negative.npy", "--data negative.npy -1 vocabulary"),
    ("train --data floats.npy", "--data floats.npy shape"),
    ("train --data square.npy", "--data square.npy shape"),
    ("train --data short.npy", "--data short.npy too short"),
    ("train --data fake.npy", "--data fake.npy"),
    ("train --data cut4.npy", "--data cut4.npy"),
    ("train --data cut9.npy", "--data cut9.npy"),
    ("train --data cut50.npy", "--data cut50.npy"),
    ("train --data cut127.npy", "--data cut127.npy"),
    ("train --data cut1000.npy", "--data cut1000.npy"),
    ("train --data odd.bin", "--data odd.bin"),
    ("train --data empty.bin", "--data empty.bin too short"),
    ("train --data image.png", "--data image.png"),
    ("train --data done", "--data done"),
    ("evaluate --data short.npy", "--data short.npy too short"),
    ("evaluate --data few.npy --seq 16", "--passages too short 20 32"),
    ("bits.train --data short.npy", "--data short.npy too short"),
    ("search --seq 5000", "--data tokens.npy too short"),
    ("projection --data short.npy", "--data short.npy too short"),
    ("support.data --data cut50.npy", "--data cut50.npy"),
    # Numbers and names
    ("train --steps -3", "--steps -3"),
    ("train --steps many", "--steps many"),
    ("train --batch 0", "--batch 0"),
    ("train --lr nan", "--lr nan"),
    ("train --ce 1.5", "--ce 1.5"),
    ("train --device tpu9", "--device tpu9"),
    ("train --device cuda:7", "--device cuda:7"),
    ("train --device meta", "--device meta"),
    ("train --dtype int3", "--dtype int3"),
    ("train --amp --dtype bfloat16", "--amp bfloat16"),
    ("train --seq 64 --batch 100000", "--batch --seq GB"),
    ("train --whole 32", "--whole 32 --seq 32"),
    ("train --whole 40", "--whole 40 --seq 32"),
    ("train --seq 4", "--whole 4 --seq 4"),
    ("train --whole -1", "--whole -1"),
    ("train --positions 65", "--positions 65 64"),
    ("train --positions 0", "--positions 0"),
    ("train --sweep-windows 0", "--sweep-windows 0"),
    ("train --recipe paper --whole 4", "--recipe paper --whole"),
    ("train --recipe paper --positions 32", "--recipe paper --positions"),
    ("train --recipe paper --uniform", "--uniform --recipe paper"),
    ("search --positions 0", "--positions 0"),
    ("search --proj mean.safetensors --positions 65", "--positions 65 64"),
    ("search --positions 32", "--positions p.safetensors mean_k"),
    ("search --proj mean.safetensors --seq 2", "--seq 2 --proj"),
    ("search --lazy", "--lazy"),
    ("train --wrong", "--wrong"),
    ("search --budget 0.1", "--budget 0.1"),
    ("search --budget half", "--budget half"),
    ("evaluate --windows 0", "--windows 0"),
    ("evaluate --passages -1", "--passages -1"),
    ("model --tokens 0", "--tokens 0"),
    ("generate --temperature -1", "--temperature -1"),
    ("generate --tokens 1 --shrink-to 0.5", "--tokens 1 --shrink-to"),
    ("generate --budget 0.1", "--budget 0.1"),
    ("cache --budget 1.01", "--budget 1.01"),
    # The folder for what is written
    ("train --out file", "--out file"),
    ("train --out file/below", "--out file"),
    ("search --out tokens.npy", "--out tokens.npy"),
    ("support.data --out file", "--out file"),
    ("train --resume", "--resume no such file"),
    ("evaluate --out empty", "--out projections.safetensors"),
    ("evaluate --out noted", "--out noted"),
    # Projections and plans
    ("search --proj none.safetensors", "--proj none.safetensors"),
    ("search --proj broken.safetensors", "--proj broken.safetensors"),
    ("search --proj unlike.safetensors", "--proj unlike.safetensors U_k"),
    ("search --proj other.safetensors", "--proj model has"),
    ("search --proj p.safetensors --pca", "--proj p.safetensors pca_U_k"),
    ("search --proj whole_text.safetensors", "--proj whole_text.safetensors whole 'four' number"),
    ("search --proj whole_minus.safetensors", "--proj whole_minus.safetensors whole '-4' number"),
    ("search --proj whole_alone.safetensors", "--proj whole_alone.safetensors whole 4 mean_k"),
    ("search --proj mean_shape.safetensors", "--proj mean_shape.safetensors mean_k shape"),
    ("search --proj mean_nan.safetensors", "--proj mean_nan.safetensors mean_k finite"),
    ("cache --budget 0.5 --proj none.safetensors", "--proj none.safetensors"),
    ("cache --budget 0.5 --proj other.safetensors", "--proj model has"),
    ("generate --budget 0.5 --proj none.safetensors", "--proj none.safetensors"),
    ("cache --budget 0.5", "--proj out/projections.safetensors"),
    ("cache --ranks short.json", "--proj projections.safetensors"),
    ("cache --proj p.safetensors --ranks others.json", "--ranks others.json other p.safetensors"),
    ("cache --proj p.safetensors --ranks none.json", "--ranks none.json"),
    ("cache --proj p.safetensors --ranks file", "--ranks file JSON"),
    ("cache --proj p.safetensors --ranks head_dim.json", "--ranks head_dim.json model has 16"),
    ("cache --proj p.safetensors --ranks places.json", "--ranks places.json"),
    ("cache --proj p.safetensors --ranks text.json", "--ranks text.json"),
    ("cache --proj p.safetensors --ranks ragged.json", "--ranks ragged.json"),
    ("cache --proj p.safetensors --ranks short.json --budget 0.5", "--ranks short.json ends at"),
    ("train --ranks none.json", "--ranks none.json"),
    ("train --ranks file", "--ranks file JSON"),
    ("train --ranks short.json --recipe paper", "--ranks paper"),
    ("train --ranks short.json --uniform", "--ranks --uniform"),
    # Chat
    ("generate --chat", "--chat demo chat_template.jinja tokenizer_config.json"),
    # Questions
    ("evaluate --tasks none.jsonl", "--tasks none.jsonl"),
    ("evaluate --tasks questions.jsonl", "--tasks questions.jsonl line 1"),
    ("evaluate --tasks empty.bin", "--tasks empty.bin no question"),
    ("evaluate --tasks latin.txt", "--tasks latin.txt UTF-8"),
]


@pytest.mark.parametrize("command, words", CASES, ids=[command for command, _ in CASES])
def test_wrong_input_is_named_in_one_line(wrong, monkeypatch, refusal, command, words):
    monkeypatch.chdir(wrong)
    name, *options = command.split()
    line = refusal(name, *BASE[name], *options)
    for word in words.split():
        assert word in line


def test_every_script_names_a_checkpoint_that_it_cannot_take(wrong, monkeypatch, refusal):
    monkeypatch.chdir(wrong)
    for name in SCRIPTS:
        if name != "kernel":                                        # which takes none
            line = refusal(name, *BASE[name], "--ckpt", "number")
            assert all(word in line for word in ("--ckpt", "config.json", "7")), name


def test_no_end_of_sequence_and_several_are_no_mistakes(wrong, monkeypatch):
    monkeypatch.chdir(wrong)
    for ckpt in ("endless", "ends"):
        call("cache", "--ckpt", ckpt)


def test_only_training_runs_in_several_processes(monkeypatch, refusal):
    monkeypatch.setattr("support.processes.WORLD", 2)
    for name in ("model", "support.data", "cache", "evaluate", "search", "generate"):
        assert "torchrun" in refusal(name)


# ------------------------------------------------------------------------------
# Weights that make no sense

BROKEN = [
    ("lm_head.weight", 1e10),
    ("lm_head.weight", np.nan),
    ("model.embed_tokens.weight", np.nan),
    ("model.layers.1.self_attn.o_proj.weight", np.nan),
    ("model.layers.0.self_attn.k_proj.weight", np.nan),
]


@pytest.fixture
def broken(tmp_path):
    """`broken(tensor, factor)`: a copy of CKPT with one tensor scaled."""
    def copy(tensor, factor):
        ckpt = shutil.copytree(CKPT, tmp_path / "ckpt")
        file = ckpt / read(ckpt / "model.safetensors.index.json")["weight_map"][tensor]
        tensors = load_file(file)
        tensors[tensor] *= factor
        save_file(tensors, file)
        return ckpt

    return copy


def last_line_of_error(capsys, name: str, *arguments) -> str:
    """That with which a script leaves, code 2, behind the lines of its progress."""
    with pytest.raises(SystemExit) as left:
        call(name, *arguments)
    assert left.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("tensor, factor", BROKEN[::3])
def test_an_evaluation_names_weights_that_make_no_sense(
        wrong, broken, monkeypatch, capsys, tensor, factor):
    monkeypatch.chdir(wrong)
    ckpt = broken(tensor, factor)
    line = last_line_of_error(capsys, "evaluate", *BASE["evaluate"], "--ckpt", ckpt)
    assert "--ckpt" in line
    assert "weights" in line


@pytest.mark.parametrize("tensor, factor", BROKEN)
def test_a_training_ends_with_a_line_about_weights_that_make_no_sense(
        wrong, broken, tmp_path, monkeypatch, capsys, tensor, factor):
    """Or about its loss, behind the lines of its progress; what was there stays."""
    monkeypatch.chdir(wrong)
    out = shutil.copytree("done", tmp_path / "out")
    before = (out / PROJECTIONS).read_bytes()
    options = ["--ckpt", broken(tensor, factor), "--batch", 2, "--steps", 2, "--out", out]
    last = last_line_of_error(capsys, "train", *BASE["train"], *options)
    assert "weights" in last or "not a number" in last
    assert (out / PROJECTIONS).read_bytes() == before


def test_a_search_over_weights_that_make_no_sense_costs_nothing(
        wrong, broken, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(wrong)
    out = tmp_path / "out"
    out.mkdir()
    (out / "ranks.json").write_text("of an earlier search")
    ckpt = broken("model.layers.1.self_attn.o_proj.weight", np.nan)
    options = ["--ckpt", ckpt, "--seq", 16, "--batch", 2, "--out", out]
    assert "--ckpt" in refusal("search", *BASE["search"], *options)
    assert (out / "ranks.json").read_text() == "of an earlier search"


def test_a_head_dim_that_is_no_multiple_of_8_has_the_full_cache_alone(tmp_path, refusal, capsys):
    """OpenLLaMA-3B has 100."""
    said = json.loads((DEMO / "config.json").read_text())
    said |= {"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 20,
             "num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(said))
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    model = Model(read_config(tmp_path / "config.json"))
    save_file({name if name.startswith("lm_head") else f"model.{name}": p.clone()
               for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
    call("model", "--ckpt", tmp_path, "--tokens", 5)
    expected = capsys.readouterr().out
    call("generate", "--ckpt", tmp_path, "--tokens", 5)
    assert capsys.readouterr().out == expected
    call("cache", "--ckpt", tmp_path)
    assert "100.0%" in capsys.readouterr().out
    Projection.identity(model.config).save(tmp_path / "projections.safetensors")
    p = tmp_path / "projections.safetensors"
    for command in (("generate", "--proj", p, "--budget", 0.5), ("search", "--proj", p),
                    ("cache", "--proj", p, "--budget", 0.5), ("train", "--out", tmp_path),
                    ("bits.train", "--proj", p)):
        line = refusal(*command, "--ckpt", tmp_path)
        assert line.startswith("--ckpt: ") and "head_dim 20" in line
