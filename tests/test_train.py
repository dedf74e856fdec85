"""Training: only the projections learn, and a stopped run goes on as if it had not been stopped."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CKPT, DEMO, ROOT, call, random_start, relative, script, shape, small
from safetensors.torch import load_file, save_file

from model import generate, load, logits, products_in_bfloat16
from projection import Projection, Rotation, plan_at, uniform_ranks
from search import Windows, find_order, find_start
from support import processes
from support.checkpoint import read_config
from support.data import windows
from support.files import fingerprint, open_safetensors, read_tensors, write_tensors
from support.plans import read_ranks
from support.training import TrainingState, named, peak_memory, read_state, settings_of
from train import Recipe, distil, draw_along, draw_independent, draw_levels, start_of, train


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ------------------------------------------------------------------------------
# The ranks of a step

def test_all_heads_of_a_sequence_have_one_level_from_2_to_7(model):
    d = model.config.head_dim
    levels = draw_levels(600, model.config, seeded()) * 8 // d      # (2, L, B, K)
    low, high = levels.amin((0, 1, 3)), levels.amax((0, 1, 3))
    assert torch.equal(low, high)
    drawn = low.bincount(minlength=9)
    assert drawn.tolist() == [0, 0, *[100] * 6, 0]                  # one of each 600th, in sixths


def test_independent_ranks_are_all_alike(model):
    d = model.config.head_dim
    levels = draw_independent(4096, model.config, seeded()) * 8 // d
    share = torch.bincount(levels.flatten(), minlength=9)[1:] / levels.numel()
    assert (share - 1 / 8).abs().max() < 0.01


def test_ranks_along_an_order_are_its_plans(model):
    L, K, d = shape(model)
    generator = seeded()
    order = torch.cat([torch.randperm(2 * L * K, generator=generator) for _ in range(7)])
    ranks = draw_along(512, model.config, generator, order)
    budgets = [1 - n / (16 * L * K) for n in range(len(order) + 1)]
    plans = torch.stack([plan_at(order, model.config, budget) for budget in budgets])
    by_sequence = ranks.permute(2, 0, 1, 3)[:, None]                # (B, 1, 2, L, K)
    found = (by_sequence == plans).all((2, 3, 4))                   # (B, plans)
    assert (found.sum(1) == 1).all()


def test_every_step_sees_all_budgets_from_15_to_90_percent(model):
    L, K, d = shape(model)
    order = torch.arange(2 * L * K).repeat(7)
    ranks = draw_along(5, model.config, seeded(), order)
    share = ranks.double().mean((0, 1, 3)).sort().values / d
    fifths = 0.15 + 0.15 * torch.arange(6)
    lowering = 1 / (16 * L * K)                                     # a plan is that much below
    assert (share > fifths[:-1] - lowering).all()
    assert (share < fifths[1:] + 1e-6).all()


def test_an_order_that_was_cut_short_is_enough(model):
    """Five lowerings end above 90%."""
    d = model.config.head_dim
    order = torch.arange(5)
    ranks = draw_along(512, model.config, seeded(), order)
    assert ranks.min() == d - d // 8


# ------------------------------------------------------------------------------
# Gradients

RECIPE = Recipe(steps=12, batch=8, seq=32, lr=0.1, floor=1e-3)


def distilled(model, tokens, rotation, ranks, recompute=False):
    """KL of the student at ranks, (B,), with a graph down to the rotation."""
    recipe = dataclasses.replace(RECIPE, recompute=recompute)
    loss, kl = distil(model, tokens, rotation.at(ranks), recipe)
    assert torch.equal(loss, kl)
    return loss


def test_only_the_projections_get_gradients(model, tokens):
    rotation = Rotation(random_start(model))
    ranks = draw_levels(len(tokens), model.config, seeded())
    distilled(model, tokens, rotation, ranks).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in rotation.parameters())


def test_recomputed_layers_give_the_same_gradients(model, tokens):
    start = random_start(model)
    ranks = draw_levels(len(tokens), model.config, seeded())
    gradients = []
    for recompute in (False, True):
        rotation = Rotation(start)
        distilled(model, tokens, rotation, ranks, recompute).sum().backward()
        gradients.append([p.grad for p in rotation.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("draw", ["levels", "along", "independent"])
def test_accumulated_batches_are_one_large_batch(model, tmp_path, monkeypatch, draw):
    """Three steps of two batches of 4 against 8 at once: the same sequences, in the same places,
    with the same ranks.

    From the second step on A is not zero, and an entry that one batch does not see moves what the
    other one does.
    """
    L, K, _ = shape(model)
    draw = {"levels": draw_levels, "independent": draw_independent,
            "along": partial(draw_along, order=torch.arange(2 * L * K).repeat(7))}[draw]
    model, start = model.double(), random_start(model, whole=2).to(None, torch.float64)
    tokens = np.random.default_rng(1).integers(3, 96, 4000)
    seen = []

    def noted(model, text, project, recipe, start):
        seen.append((text, start))
        return distil(model, text, project, recipe, start)

    monkeypatch.setattr("train.distil", noted)

    def end_of(batch, accumulate):
        rotation = Rotation(start)
        state = TrainingState(tmp_path / "state.safetensors", rotation, {}, {})
        recipe = dataclasses.replace(
            RECIPE, steps=3, batch=batch, accumulate=accumulate, positions=64)
        train(model, state, tokens, draw, recipe, lambda _: None)
        texts, starts = (torch.cat(part) for part in zip(*seen, strict=True))
        seen.clear()
        return list(rotation.parameters()), texts, starts

    (one, *of_one), (two, *of_two) = end_of(8, 1), end_of(4, 2)
    assert all(torch.equal(a, b) for a, b in zip(of_one, of_two, strict=True))
    texts, starts = of_one
    assert len({tuple(text) for text in texts.tolist()}) == 24
    assert starts.unique().numel() > 5
    for a, b in zip(one, two, strict=True):
        assert relative(b, a) < 1e-6
        assert a.isfinite().all() and a.any()


def test_text_can_be_generated_before_training(model, tokens):
    """In inference mode, whose tensors no gradient may meet; the table of RoPE serves both."""
    list(generate(model, tokens[0, :1].tolist(), 21))
    rotation = Rotation(random_start(model))
    ranks = draw_levels(3, model.config, seeded())
    distilled(model, tokens, rotation, ranks).sum().backward()
    assert rotation.A_k.grad.isfinite().all()


# ------------------------------------------------------------------------------
# What Adam must not move

@pytest.fixture
def rotation_after(model, tmp_path):
    """`rotation_after(draw)`: what 12 steps with ranks of `draw` make of a rotation."""
    tokens = np.random.default_rng(1).integers(3, 96, 4000)

    def run(draw):
        rotation = Rotation(random_start(model, whole=2))
        state = TrainingState(tmp_path / "state.safetensors", rotation, {}, {})
        done = []
        train(model, state, tokens, draw, RECIPE, done.append)
        assert done == list(range(1, 13))
        assert state.step == len(state.facts["loss"]) == 12
        return rotation

    return run


def at_level(level: int, B: int, config, _) -> torch.Tensor:
    plan = uniform_ranks(level / 8, config)
    return plan[:, :, None].expand(-1, -1, B, -1)


def test_with_one_rank_only_the_entries_across_it_move(rotation_after):
    for level in (1, 4, 7):
        rotation = rotation_after(partial(at_level, level))
        d = rotation.start.U_k.shape[-1]
        r = level * d // 8
        across = (rotation.rows < r) & (rotation.columns >= r)
        for A in (rotation.A_k, rotation.A_v):
            assert (A[..., ~across] == 0).all()
            assert (A[..., across] != 0).all()


def test_with_full_ranks_nothing_moves(rotation_after):
    rotation = rotation_after(partial(at_level, 8))
    assert not rotation.A_k.any()
    assert not rotation.A_v.any()
    assert torch.equal(rotation.mean_v, rotation.start.mean_v)


@pytest.mark.parametrize("side", [0, 1])
def test_one_side_may_be_full_for_a_step(rotation_after, side):
    """Which happens by chance where heads and sequences are few; the other side learns."""
    def draw(B, config, generator):
        ranks = at_level(4, B, config, generator).clone()
        ranks[side] = config.head_dim
        return ranks

    rotation = rotation_after(draw)
    still, moved = (rotation.A_k, rotation.A_v)[::1 - 2 * side]
    assert not still.any()
    assert moved.any()


# ------------------------------------------------------------------------------
# What a run leaves

def test_a_run_leaves_the_projections_that_others_rely_on(trained):
    L, K, d = 2, 2, 16
    file = trained / "out" / "projections.safetensors"
    tensors = load_file(file)
    shapes = {"U_k": (L, K, d, d), "U_v": (L, K, d, d), "mean_v": (L, K, d)}
    shapes |= {f"pca_{name}": size for name, size in shapes.items()} | {"mean_k": (L, K, d)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for name in ("U_k", "U_v", "pca_U_k", "pca_U_v"):
        U = tensors[name].double()
        assert (U.mT @ U - torch.eye(d)).abs().max() < 1e-5
    assert Projection.load(file).whole == 4


def test_a_run_leaves_a_report_at_seven_budgets(trained):
    report = json.loads((trained / "out" / "train.json").read_text())
    assert len(report["loss"]) == report["config"]["steps"] == 150
    assert (report["config"]["whole"], report["config"]["positions"]) == (4, 64)
    assert np.bincount(report["order"]).tolist() == [7] * 8         # down to an eighth
    budgets = [row["budget"] for row in report["budgets"]]
    assert budgets == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25]
    assert set(report["base"]) == {"perplexity", "accuracy"}
    for row in report["budgets"]:
        assert set(row) == {"budget", "pca", "trained", "pca_ordered", "trained_ordered"}
        measured = {"kl", "perplexity", "accuracy", "same", "kl_99.9", "by_position"}
        assert set(row["pca"]) == set(row["trained"]) == measured
    assert report["budgets"][0]["trained"]["kl"] < 1e-6
    assert report["budgets"][0]["pca"]["perplexity"] == report["base"]["perplexity"]


def test_a_run_leaves_the_ranks_along_its_order_for_its_projections(trained):
    config = read_config(CKPT / "config.json")
    found = read_ranks(trained / "out" / "ranks.json", config)
    report = json.loads((trained / "out" / "train.json").read_text())
    assert found.order.tolist() == report["order"]
    trained_ones = Projection.load(trained / "out" / "projections.safetensors")
    assert found.projections == trained_ones.hash()
    assert torch.equal(found.ranks, plan_at(found.order, config, 0.375))
    said = json.loads((trained / "out" / "ranks.json").read_text())
    assert said["budget"] == 0.375
    assert {said["kl"], *(kl for *_, kl in said["path"])} == {None}         # not measured


@pytest.mark.parametrize("options, units, amp", [
    ((), True, True),
    ((), False, False),
    (("--no-amp",), True, False),
    (("--amp",), False, True),
    (("--dtype", "float64"), True, False),
    (("--recipe", "paper"), True, False),
    (("--recipe", "paper", "--amp"), True, True),
])
def test_products_are_in_bfloat16_where_the_machine_has_units_for_them(
        trained, tmp_path, monkeypatch, capsys, options, units, amp):
    monkeypatch.setattr("support.cli.has_bfloat16_units", lambda: units)
    call("train", *small(trained), "--steps", 1, "--sweep-windows", 2, *options, "--out", tmp_path)
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["config"]["amp"] == amp
    assert ("Products in bfloat16" in capsys.readouterr().out) == (not options and units)


def test_in_bfloat16_factors_are_rounded_and_logits_are_not(model, tokens):
    """Nothing of it is left behind, and weights of other dtypes are as they were."""
    states = model.norm(model.hidden(tokens)).flatten(0, 1)
    expected = logits(states, model.lm_head.weight)
    with products_in_bfloat16(model.device):
        assert model.hidden(tokens).dtype == torch.float32
        rounded = logits(states, model.lm_head.weight)
    assert rounded.dtype == torch.float32
    assert relative(rounded, expected) < 1e-2
    assert torch.equal(logits(states, model.lm_head.weight), expected)
    with products_in_bfloat16(model.device, False):
        assert torch.equal(logits(states, model.lm_head.weight), expected)


def test_a_run_leaves_its_four_files_and_no_other(trained):
    names = sorted(path.name for path in (trained / "out").iterdir())
    assert names == ["projections.safetensors", "ranks.json", "train.json", "train.png"]
    assert (trained / "out" / "train.png").read_bytes()[:4] == b"\x89PNG"


def windows_of(trained, positions) -> Windows:
    """Those of a run's sweeps; its validation text, 8 windows, is no part of them."""
    training = np.load(trained / "tokens.npy")[:3600 - (8 * 32 + 1)]
    return Windows(training, 64, 8, 32, positions, 0)


@pytest.mark.parametrize("options, whole, positions", [
    ((), 4, 64),
    (("--whole", 0, "--positions", 40), 0, 40),
])
def test_a_run_of_no_steps_leaves_the_start_and_the_order(
        trained, tmp_path, options, whole, positions):
    call("train", *small(trained), "--steps", 0, *options, "--out", tmp_path)
    model, windows = load(CKPT), windows_of(trained, positions)
    start = find_start(model, windows, whole)
    p = Projection.load(tmp_path / "projections.safetensors")
    assert p.whole == whole
    for name, tensor in start.tensors().items():
        assert relative(getattr(p, name), tensor) < 1e-6
    found = read_ranks(tmp_path / "ranks.json", model.config)
    assert found.fits(p)
    assert torch.equal(found.order, find_order(model, start, windows))
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["loss"] == []
    assert report["order"] == found.order.tolist()
    assert [report["config"][name] for name in ("steps", "whole", "positions")] == [
        0, whole, positions]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["projections.safetensors", "ranks.json", "train.json", "train.png"]


def test_a_run_may_begin_with_what_is_trained_and_its_order(trained, tmp_path):
    """Also with windows of another length, and for one rank everywhere without the order."""
    begin = ("--start", trained / "out" / "projections.safetensors", "--steps", 0, "--seq", 40)
    before = Projection.load(begin[1])
    for name, options in (("along", ()), ("uniform", ("--uniform",))):
        call("train", *small(trained), *begin, *options, "--out", tmp_path / name)
        p = Projection.load(tmp_path / name / "projections.safetensors")
        assert p.whole == before.whole
        for matrix, tensor in before.tensors().items():
            assert relative(getattr(p, matrix), tensor) < 1e-6
    config = load(CKPT).config
    along = read_ranks(tmp_path / "along" / "ranks.json", config)
    assert torch.equal(along.order, read_ranks(trained / "out" / "ranks.json", config).order)
    assert not (tmp_path / "uniform" / "ranks.json").exists()


def test_a_run_that_began_with_what_is_trained_resumes(trained, tmp_path, monkeypatch, refusal):
    """Whole tokens are the file's, not the default's."""
    call("train", *small(trained), "--steps", 0, "--whole", 2, "--out", tmp_path / "two")
    begin = tmp_path / "two" / "projections.safetensors"
    options = [*small(trained), "--start", begin, "--steps", 8]
    call("train", *options, "--out", tmp_path / "once")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop(patch, saved_at=3, stopped_at=4)
        call("train", *options, "--out", tmp_path / "twice", "--save-every", 0)
    shutil.rmtree(tmp_path / "two")                     # the state holds what it began with
    call("train", *options, "--out", tmp_path / "twice", "--resume")
    assert_same_end(tmp_path / "once", tmp_path / "twice")
    assert Projection.load(tmp_path / "twice" / "projections.safetensors").whole == 2


def test_what_a_run_cannot_begin_with_is_refused(trained, tmp_path, refusal):
    call("train", *small(trained), "--recipe", "paper", "--steps", 0, "--out", tmp_path)
    papers = tmp_path / "projections.safetensors"
    ours = trained / "out" / "projections.safetensors"
    out = ("--out", tmp_path / "out")
    for options, words in (
            (("--start", papers), f"--start: {papers}: is of --recipe paper, whose keys have no"),
            (("--start", ours, "--whole", 4), "--start: goes with neither --recipe paper nor --wh"),
            (("--start", ours, "--recipe", "paper"), "--start: goes with neither --recipe paper"),
            (("--start", ours, "--seq", 4), f"--start: {ours}: 4 whole tokens, which leave noth"),
            (("--start", tmp_path / "none"), "--start: ")):
        assert refusal("train", *small(trained), *options, *out).startswith(words)


def test_the_recipe_of_the_paper_starts_from_pca_with_neither_whole_tokens_nor_an_order(
        trained, tmp_path):
    call("train", *small(trained), "--recipe", "paper", "--steps", 0, "--out", tmp_path)
    file = tmp_path / "projections.safetensors"
    p, pca = Projection.load(file), Projection.load(file, "pca_")
    assert (p.whole, p.mean_k) == (0, None)
    for name, tensor in pca.tensors().items():
        assert relative(getattr(p, name), tensor) < 1e-6
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["projections.safetensors", "train.json", "train.png"]
    report = json.loads((tmp_path / "train.json").read_text())
    assert "order" not in report
    assert (report["config"]["whole"], report["config"]["positions"]) == (0, 1)


def test_training_beats_pca_at_every_budget(trained):
    """The order was found for the start of training; PCA gains by it where little is cut."""
    report = json.loads((trained / "out" / "train.json").read_text())
    for row in report["budgets"][1:]:
        kl = {name: measured["kl"] for name, measured in row.items() if name != "budget"}
        assert kl["trained_ordered"] < min(kl["pca_ordered"], kl["pca"])
        assert kl["trained"] < kl["pca"]
        assert kl["pca_ordered"] < kl["pca"] or row["budget"] < 0.5


# ------------------------------------------------------------------------------
# Stopped, killed, out of disk, out of numbers

def projections(out) -> dict:
    return load_file(out / "projections.safetensors")


def losses(out) -> list[float]:
    return json.loads((out / "train.json").read_text())["loss"]


def assert_same_end(out, other):
    a, b = projections(out), projections(other)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < 1e-6
    assert losses(out) == pytest.approx(losses(other), abs=1e-6)


def stop(monkeypatch, saved_at: int, stopped_at: int):
    """The next run saves its state after one step alone, and is interrupted after another."""
    plain = TrainingState.save

    def save(state, every):
        if state.step == saved_at:
            plain(state, every)
        if state.step == stopped_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", save)


SHORT = ["--steps", 30, "--sweep-windows", 8, "--windows", 2]


def test_a_resumed_run_ends_where_the_undisturbed_one_does(
        trained, tmp_path, monkeypatch, capsys, refusal):
    """Stopped by a Ctrl-C two steps after the state was saved, then resumed from elsewhere."""
    call("train", *small(trained), *SHORT, "--out", tmp_path / "once")
    options = [*small(trained), *SHORT, "--out", tmp_path / "twice"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        stop(patch, saved_at=23, stopped_at=25)
        call("train", *options, "--save-every", 0)
    assert left.value.code == 130
    assert "--resume continues from step 23" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "twice" / "projections.safetensors").exists()
    assert "--lr" in refusal("train", *options, "--resume", "--lr", 0.5)
    monkeypatch.chdir(trained)
    options[options.index(trained / "tokens.npy")] = "tokens.npy"
    options[options.index(CKPT)] = os.path.relpath(CKPT)
    call("train", *options, "--resume")
    assert_same_end(tmp_path / "once", tmp_path / "twice")
    once, twice = (read_ranks(tmp_path / name / "ranks.json", read_config(CKPT / "config.json"))
                   for name in ("once", "twice"))
    assert torch.equal(once.order, twice.order)
    assert Projection.load(tmp_path / "twice" / "projections.safetensors").whole == 4


@pytest.mark.parametrize("seconds, pause", [(0.1, 30), (4, 196)])
def test_saving_takes_at_most_two_percent_of_the_time(state, monkeypatch, seconds, pause):
    """All processes wait for a save. Here one takes `seconds`."""
    clock = [1000.0]

    def write_tensors(*_):
        clock[0] += seconds

    monkeypatch.setattr("support.training.time.time", lambda: clock[0])
    monkeypatch.setattr("support.training.write_tensors", write_tensors)
    state.save_if_due(30.0, last=False)                             # the first step, at once
    assert state.save_at == pytest.approx(clock[0] + pause)
    clock[0] += pause - 1
    before = clock[0]
    state.save_if_due(30.0, last=False)
    assert clock[0] == before
    state.save_if_due(30.0, last=True)
    assert clock[0] == before + seconds


@pytest.mark.slow
def test_two_bytes_train_as_four_do(trained, tmp_path, monkeypatch):
    """States, products and gradients in two bytes; loss, rotation and Adam in four.

    From one start, since rounding changes which next tokens the sweeps draw.
    """
    ends, starts = {}, []

    def one_start(*arguments):
        if not starts:
            starts.append(start_of(*arguments))
        return dict(starts[0])

    monkeypatch.setattr("train.start_of", one_start)
    for name in ("float32", "float16", "bfloat16"):
        options = [*small(trained), "--steps", 60, "--dtype", name, "--lr", 0.05]
        call("train", *options, "--out", tmp_path / name)
        ends[name] = sum(losses(tmp_path / name)[-10:])
    assert ends["float16"] == pytest.approx(ends["float32"], rel=0.02)
    assert ends["bfloat16"] == pytest.approx(ends["float32"], rel=0.02)


def test_an_interrupt_before_the_first_save_says_so(trained, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        stop(monkeypatch, saved_at=0, stopped_at=2)
        call("train", *small(trained), "--steps", 9, "--save-every", 0, "--out", tmp_path)
    assert left.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("Stopped")
    assert "--resume" not in last


def write_path(file, rounds: int):
    """A plan's file whose path lowers every head of CKPT once a round."""
    full = [[16, 16]] * 2
    heads = [[side, layer, head, 0.1]
             for side in ("keys", "values") for layer in range(2) for head in range(2)]
    plan = {"head_dim": 16, "budget": 1.0, "keys": full, "values": full, "path": heads * rounds}
    file.write_text(json.dumps(plan))


def test_a_run_along_an_order_resumes_without_the_file(trained, tmp_path, monkeypatch):
    """The order stands in the state: the file may be another search's by then."""
    file = tmp_path / "ranks.json"
    options = [*small(trained), *SHORT, "--steps", 8, "--ranks", file]
    write_path(file, rounds=7)
    call("train", *options, "--out", tmp_path / "once")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop(patch, saved_at=3, stopped_at=4)
        call("train", *options, "--out", tmp_path / "twice", "--save-every", 0)
    file.unlink()
    call("train", *options, "--out", tmp_path / "twice", "--resume")
    assert_same_end(tmp_path / "once", tmp_path / "twice")


def test_an_order_that_ends_above_the_smallest_budget_is_refused_before_any_step(
        trained, tmp_path, refusal):
    """The report at 25% would fail, when all the work is done."""
    write_path(tmp_path / "ranks.json", rounds=3)
    options = [*small(trained), "--steps", 2, "--ranks", tmp_path / "ranks.json"]
    line = refusal("train", *options, "--out", tmp_path / "out")
    assert "--ranks" in line
    assert "ends at 62.5%" in line


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on_and_its_files_load(trained, tmp_path):
    """KILLS=20 in the environment kills that often; half of them once steps are being made."""
    options = [*small(trained), "--steps", 150, "--out", tmp_path, "--save-every", 0]
    state = tmp_path / "train.state.safetensors"
    moment = np.random.default_rng()
    for kill in range(int(os.environ.get("KILLS", 2))):
        command = [sys.executable, "train.py", "--no-amp", *map(str, options)]
        command += ["--resume"] * state.exists()
        run = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if kill % 2:
            while run.poll() is None and not state.exists():
                time.sleep(0.02)
        time.sleep(moment.uniform(0, 3))
        run.kill()
        run.wait()
        for file in tmp_path.glob("*.safetensors"):
            load_file(file)
        for file in tmp_path.glob("*.json"):
            json.loads(file.read_text())
    call("train", *options, *["--resume"] * state.exists())
    assert_same_end(tmp_path, trained / "out")


def test_a_full_disk_costs_nothing_that_was_saved(trained, tmp_path, monkeypatch, capsys):
    """The disk is full from the third save of the state on."""
    (tmp_path / "projections.safetensors").write_bytes(b"of an earlier run")
    writes, plain = [], os.fsync

    def full(file):
        writes.append(file)
        if len(writes) > 2:
            raise OSError(28, "No space left on device")
        plain(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as left:
        call("train", *small(trained), "--steps", 20, "--save-every", 0, "--out", tmp_path)
    last = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2
    assert "--out" in last
    assert "No space" in last
    assert (tmp_path / "projections.safetensors").read_bytes() == b"of an earlier run"
    state = load_file(tmp_path / "train.state.safetensors")
    assert state["adam.A_k.step"] == 2
    assert not list(tmp_path.glob("*.part"))


def test_a_loss_that_is_not_a_number_stops_the_run_and_costs_nothing(
        trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "projections.safetensors").write_bytes(b"of an earlier run")

    def not_a_number(student, *_):
        return student.sum((1, 2)) * torch.nan, student.sum((1, 2))

    monkeypatch.setattr("train.Distill.apply", not_a_number)
    with pytest.raises(SystemExit) as left:
        call("train", *small(trained), "--out", tmp_path)
    assert left.value.code == 2
    assert "not a number" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "projections.safetensors").read_bytes() == b"of an earlier run"


# ------------------------------------------------------------------------------
# The state and its settings

SETTINGS = {"lr": 0.1, "amp": False, "draw": "along", "ckpt": "/x", "data": "",
            "train_tokens": 4000, "processes": 1}


@pytest.fixture
def state(model, tmp_path):
    """A training that has begun, and its file, which is not yet there."""
    start = random_start(model)
    tensors = start.tensors("start.") | {"order": torch.arange(5)}
    return TrainingState(tmp_path / "train.state.safetensors", Rotation(start), SETTINGS, tensors)


def test_a_state_is_read_as_it_was_saved(state):
    rotation = state.module
    for parameter in rotation.parameters():
        parameter.grad.normal_()
    state.optimizer.step()
    state.facts |= {"step": 7, "loss": [0.5, 0.25]}
    state.save()
    saved = read_state(state.file, SETTINGS)
    again = Rotation(Projection.of(saved.tensors, "start."))
    other = TrainingState(state.file, again, SETTINGS, saved.tensors, saved)
    assert other.facts == state.facts
    assert other.step == other.saved_step == 7
    assert saved.tensors["order"].tolist() == list(range(5))
    for trained in (rotation, again):                               # Adam's moments: one step more
        for parameter in trained.parameters():
            parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    other.optimizer.step()
    for a, b in zip(rotation.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_other_settings_is_refused_in_words_that_a_user_knows(state):
    state.save()
    for name, value, words in (
            ("train_tokens", 3000,
             "4000 tokens of training text (--data), not 3000 tokens of training text (--data)"),
            ("processes", 2, "1 processes (torchrun), not 2 processes (torchrun)"),
            ("amp", True, "no --amp, not --amp"),
            ("draw", "levels", "an order of ranks, not --uniform"),
            ("draw", "independent", "an order of ranks, not --recipe paper"),
            ("lr", 0.5, "--lr 0.1, not --lr 0.5"),
            ("ckpt", "/y", "--ckpt /x, not --ckpt /y")):
        with pytest.raises(ValueError) as refused:
            read_state(state.file, SETTINGS | {name: value})
        assert str(refused.value) == f"{state.file}: was made with {words}"


def test_every_option_that_a_state_names_exists(capsys):
    from train import OPTIONS, PATHS
    with pytest.raises(SystemExit):
        call("train", "--help")
    options = capsys.readouterr().out.replace(",", " ").split()
    for name in (*OPTIONS, *PATHS):
        for value in ("x", True):
            assert named(name, value).split()[0] in options


def test_a_folder_is_the_same_by_any_path_to_it(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    shutil.copytree(CKPT, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "here")
    settings = []
    for folder in (tmp_path, Path(".."), Path("../here/..")):
        args = SimpleNamespace(lr=0.1, ckpt=folder / "model", data=folder / "x.npy", ranks=None)
        of_run = settings_of(args, ("lr",), ("ckpt", "data", "ranks"), np.arange(4000),
                             np.arange(400))
        settings.append({name: value for name, value in of_run.items() if "_hash" not in name})
        assert set(of_run) - set(settings[-1]) == {"ckpt_hash", "data_hash"}
    assert settings[0] == settings[1] == settings[2] == {
        "lr": 0.1, "ckpt": str(tmp_path / "model"), "data": str(tmp_path / "x.npy"), "ranks": "",
        "train_tokens": 4000, "processes": 1}


def test_a_fingerprint_tells_contents_apart(tmp_path):
    """Sizes, dtypes, and changes in any piece that it looks at; a second's work for any size."""
    file, ids = tmp_path / "a", np.arange(3 * 2 ** 20, dtype=np.uint16)
    ids.tofile(file)
    before = fingerprint(file, ids)
    assert fingerprint(file, ids) == before
    for place in (0, len(ids) // 2, len(ids) - 1):
        other = ids.copy()
        other[place] ^= 1
        assert fingerprint(file, other) != before
        other.tofile(file)
        assert fingerprint(file, ids) != before
        ids.tofile(file)
    assert fingerprint(file, ids[:-1]) != before != fingerprint(file, ids.astype(np.int16))
    file.write_bytes(b"")
    assert fingerprint(file) != fingerprint(file, file)


def test_other_weights_or_ids_under_the_same_path_do_not_resume(
        trained, tmp_path, monkeypatch, refusal):
    ckpt, text = shutil.copytree(CKPT, tmp_path / "ckpt"), tmp_path / "ids.npy"
    np.save(text, np.random.default_rng(0).integers(3, 96, 4000))
    options = ["--ckpt", ckpt, "--data", text, *small(trained)[4:], "--steps", 6,
               "--out", tmp_path / "out"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop(patch, saved_at=2, stopped_at=3)
        call("train", *options, "--save-every", 0)
    ids = np.load(text)
    np.save(text, ids[::-1])
    assert "--resume" in (line := refusal("train", *options, "--resume")) and "--data" in line
    np.save(text, ids)
    shard = min(ckpt.glob("model-*.safetensors"))
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[-1] += 1
    save_file(tensors, shard)
    assert "other contents of --ckpt" in refusal("train", *options, "--resume")


def test_a_folder_in_which_another_run_writes_is_refused_while_it_lives(trained, tmp_path, refusal):
    holds = ("import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
             "from support.files import hold_folder; hold_folder(Path(sys.argv[2]));"
             "print(flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", holds, ROOT, tmp_path], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    options = [*small(trained), "--steps", 0, "--out", tmp_path]
    assert "--out" in (line := refusal("train", *options)) and "another run" in line
    other.kill()
    other.wait()
    call("train", *options)
    assert (tmp_path / "train.json").exists()


def test_a_file_that_is_no_state_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="none.safetensors: no such file"):
        read_state(tmp_path / "none.safetensors", {})
    random_start(model).save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="p.safetensors: not the state"):
        read_state(tmp_path / "p.safetensors", {})


def without_a_moment(tensors: dict, said: str) -> None:
    tensors.pop(next(name for name in tensors if name.startswith("adam.")))


def other_numbers(tensors: dict, said: str) -> None:
    next(iter(tensors.values())).view(-1)[0] += 1


def other_facts(tensors: dict, said: str) -> str:
    return said.replace('"step": 0', '"step": 3')


@pytest.mark.parametrize("spoil", [without_a_moment, other_numbers, other_facts])
def test_a_state_that_is_not_as_it_was_written_is_refused(state, spoil):
    state.optimizer.step()
    state.save()
    read_state(state.file, SETTINGS)
    tensors = read_tensors(state.file)
    with open_safetensors(state.file) as opened:
        metadata = opened.metadata()
    metadata["said"] = spoil(tensors, metadata["said"]) or metadata["said"]
    write_tensors(state.file, tensors, metadata)
    with pytest.raises(ValueError, match="not the state of a training as it was written"):
        read_state(state.file, SETTINGS)


def test_a_run_that_is_resumed_with_other_settings_names_the_option(
        trained, tmp_path, monkeypatch, refusal):
    options = [*small(trained), "--steps", 6, "--out", tmp_path]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop(patch, saved_at=2, stopped_at=3)
        call("train", *options, "--save-every", 0)
    for other, words in (
            (("--whole", 2), "--whole 4, not --whole 2"),
            (("--positions", 40), "--positions 64, not --positions 40"),
            (("--sweep-windows", 9), "--sweep-windows 64, not --sweep-windows 9"),
            (("--uniform",), "an order of ranks, not --uniform")):
        line = refusal("train", *options, "--resume", *other)
        assert line.startswith("--resume: ")
        assert line.endswith(f"was made with {words}")


def test_options_that_do_not_go_together_are_refused_in_one_line(trained, tmp_path, refusal):
    for wrong, line in (
            (("--recipe", "paper", "--whole", 4),
             "--recipe paper: has neither --whole nor --positions"),
            (("--recipe", "paper", "--positions", 64),
             "--recipe paper: has neither --whole nor --positions"),
            (("--recipe", "paper", "--uniform"),
             "--uniform: goes not with --recipe paper, whose ranks are independent"),
            (("--whole", 32), "--whole 32: leaves nothing of windows of --seq 32"),
            (("--whole", 5, "--seq", 4), "--whole 5: leaves nothing of windows of --seq 4"),
            (("--positions", 65), "--positions 65: the model was made for 64"),
            (("--positions", 0), "argument --positions: 0 is not between 1 and 100000000")):
        assert refusal("train", *small(trained), *wrong, "--out", tmp_path) == line
    assert not any(tmp_path.iterdir())


def test_a_resumed_run_on_another_text_names_the_text(trained, tmp_path, monkeypatch, refusal):
    """The file has grown since: the path alone would not tell."""
    file, ids = tmp_path / "tokens.npy", np.load(trained / "tokens.npy")
    np.save(file, ids)
    options = [*small(tmp_path), "--steps", 6, "--uniform", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop(patch, saved_at=2, stopped_at=3)
        call("train", *options, "--save-every", 0)
    np.save(file, np.concatenate((ids, ids)))
    line = refusal("train", *options, "--resume")
    assert line.startswith("--resume: ")
    assert "3600 tokens of training text (--data), not 7200 tokens of training text" in line


# ------------------------------------------------------------------------------
# Processes and memory

@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["paper", "ours"])
def test_two_processes_are_one_with_twice_the_batch(trained, tmp_path, recipe):
    """As one batch; or as two of a step, where sweeps, too, have batches as large as theirs."""
    options = ["--ckpt", CKPT, "--data", trained / "tokens.npy", "--seq", 32]
    options += ["--steps", 10, "--dtype", "float64", "--recipe", recipe]
    one, two = tmp_path / "one", tmp_path / "two"
    twice = ["--batch", 8] if recipe == "paper" else ["--batch", 4, "--accumulate", 2]
    call("train", *options, *twice, "--out", one)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    done = script(*torchrun, *options, "--batch", 4, "--out", two)
    assert done.returncode == 0, done.stderr
    a, b = projections(one), projections(two)
    for name in ("U_k", "U_v") + ("pca_U_k",) * (recipe == "paper"):
        for r in range(2, 16, 2):
            P, Q = (x[name][..., :r].double() @ x[name][..., :r].double().mT for x in (a, b))
            assert (P - Q).abs().max() < 1e-8
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)


def test_processes_see_the_sequences_of_one_with_a_larger_batch(monkeypatch):
    """What torchrun's processes draw, end to end, is what a single process draws."""
    tokens = torch.arange(50).numpy()
    starts = torch.arange(8)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(processes, "RANK", rank)
        shares.append(windows(tokens, starts[processes.my_share(4)], 5))
    assert torch.equal(torch.cat(shares), windows(tokens, starts, 5))


def test_memory_grows_with_what_is_kept():
    config = read_config(DEMO / "config.json")

    def need(batch, dtype, recompute):
        return sum(peak_memory(config, batch, 256, dtype, recompute).values())

    recomputed = need(8, torch.float32, True)
    kept = need(8, torch.float32, False)
    assert recomputed < kept < need(16, torch.float32, False)
    assert need(8, torch.bfloat16, False) < kept


@pytest.mark.parametrize("steps", [0, 2])
def test_a_stopped_training_is_not_thrown_away(
        trained, tmp_path, monkeypatch, refusal, capsys, steps):
    """Neither by one that was not told to resume it; and after a stop in the report it is there.

    Also where it began with files that it has written over since.
    """
    begin = tmp_path / "projections.safetensors"
    for name in (begin.name, "ranks.json"):
        shutil.copy(trained / "out" / name, tmp_path)
    options = [*small(trained), "--start", begin, "--ranks", tmp_path / "ranks.json",
               "--steps", steps, "--lr", 0.05, "--out", tmp_path]

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr("train.report", stopped)
        call("train", *options)
    assert left.value.code == 130
    assert "--resume makes the report" in capsys.readouterr().err.splitlines()[-1]
    learnt = projections(tmp_path)["U_k"]
    assert torch.equal(learnt, projections(trained / "out")["U_k"]) == (steps == 0)
    assert "--resume goes on with it" in refusal("train", *options, "--lr", 0.1)
    call("train", *options, "--resume")
    assert torch.equal(projections(tmp_path)["U_k"], learnt)
    assert (tmp_path / "train.json").exists()
    call("train", *options)
