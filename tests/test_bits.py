"""bits.train: what bits cost, what learns, what a step takes, the files, the script."""
import dataclasses
import json
import os
import shutil

import pytest
import torch
from conftest import CKPT, DEMO, call, random_start, relative, script, shape, small
from safetensors.torch import load_file
from test_rounding import random_path, random_rounding

from bits import Bits, load_bits
from bits.rounding import BITS, ERROR, Rounding, bits_at, water_filling
from bits.train import TrainedRounding, block_costs, draw_bits, path_of, step_memory
from model import Model, generate, load
from projection import Projection
from search import Windows, mean_of_keys, what_matters
from support.checkpoint import read_config
from support.training import TrainingState
from train import Recipe, distil


@pytest.fixture
def known(model):
    """A model, the sweep's two matrices over a random text, and a rounding that learns."""
    varies, asked, _ = swept(model)
    return model, asked, TrainedRounding(random_start(model, whole=4), varies)


def swept(model, count: int = 8, T: int = 40):
    windows = Windows(torch.randint(3, 96, (900,)).numpy(), count, 4, T, 1, 0)
    return what_matters(model, windows, mean_of_keys(model, windows, 4), 4)


# ------------------------------------------------------------------------------
# The path

def test_a_path_always_takes_bits_where_they_are_cheapest(known):
    """Against a scan over all blocks."""
    model, asked, trained = known
    with torch.no_grad():
        costs = block_costs(trained(), asked)
    path = water_filling(costs)
    with torch.no_grad():
        assert torch.equal(path, path_of(trained(), asked))
    cost = costs.flatten()
    now = torch.full_like(cost, 8).long()
    for place, after in path.tolist():
        prices = []
        for c, b in zip(cost.tolist(), now.tolist(), strict=True):
            less = BITS[max(0, BITS.index(b) - 1)]
            prices.append(c * (ERROR[less] - ERROR[b]) / (b - less) if b else float("inf"))
        assert prices[place] == pytest.approx(min(prices), rel=1e-6)
        assert after == BITS[BITS.index(now[place].item()) - 1]
        now[place] = after
    assert (now == 0).all()


def test_a_block_costs_what_is_asked_of_what_it_is_off(model):
    """Against a loop over columns, for matrices and spreads of any kind; a dead head costs 0."""
    L, K, d = shape(model)
    r = random_rounding(model)
    some = torch.randn(2, L, K, d, d, dtype=torch.float64)
    asked = some @ some.mT
    asked[1, 0, 0] = 0
    found = block_costs(r, asked)
    for side, U in enumerate((r.p.U_k, r.p.U_v)):
        columns = [U[0, 0, :, c].double() for c in range(d)]
        each = [u @ asked[side, 0, 0] @ u * r.spread[side, 0, 0, c].item() ** 2 / 2
                for c, u in enumerate(columns)]
        for block in range(8):
            expected = sum(each[block * d // 8:(block + 1) * d // 8]).item()
            assert found[side, 0, 0, block].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", [0, 1])
def test_the_cost_of_small_errors_is_the_kl_that_they_make(model, side):
    """Errors of a known variance along one column, of which nothing else knows, in float64."""
    model = model.double()
    L, K, d = shape(model)
    text = torch.randint(3, 96, (64, 41))
    windows = Windows(torch.randint(3, 96, (900,)).numpy(), 2, 2, 40, 1, 0)
    windows.text, windows.starts = text[:, :-1], torch.zeros(64, dtype=torch.long)
    windows.batch = 16
    _, asked, _ = what_matters(model, windows, torch.zeros(L, K, d), 4)
    u, size = torch.nn.functional.normalize(torch.randn(d, dtype=torch.float64), dim=0), 0.03

    def noisy(layer, k, v, turn):
        both = [turn(k), v]
        if layer == 0:
            error = size * torch.randn(*k.shape[:3], 1, dtype=torch.float64) * u
            error[:, 1:] = 0
            error[:, :, :4] = 0
            both[side] = both[side] + error
        return both

    with torch.no_grad():
        kl = [distil(model, text, noisy, Recipe(1, 64, 40, 0.1))[1].mean() for _ in range(20)]
    found = torch.stack(kl).mean().item() * 40 / 36                 # per token that has an error
    expected = (u @ asked[side, 0, 0] @ u).item() * size ** 2 / 2
    assert found == pytest.approx(expected, rel=0.25)


# ------------------------------------------------------------------------------
# What learns

def test_spreads_follow_the_rotation(known):
    """At the start and after a turn they are the deviations of the turned text."""
    _, _, trained = known
    with torch.no_grad():
        trained.rotation.A_k.normal_(std=0.3)
        r = trained()
        U, varies = r.p.U_k.double(), trained.varies[0].double()
        expected = (U.mT @ varies @ U).diagonal(dim1=-2, dim2=-1).sqrt()
        assert relative(r.spread[0], expected) < 1e-4


def test_everything_learns(known, tokens):
    model, _, trained = known
    path = random_path(model)
    bits = draw_bits(3, model.config, torch.Generator().manual_seed(0), path)
    tokens = tokens.repeat(1, 2)                                    # more than one group
    hidden = model.hidden(tokens, trained().at(bits))
    hidden.square().mean().backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    d = shape(model)[2]
    assert trained.rotation.A_k.shape[-1] == d * (d - 1) // 2


def test_plans_of_many_budgets_of_the_path_are_drawn(model):
    path = random_path(model)
    bits = draw_bits(64, model.config, torch.Generator().manual_seed(1), path)
    means = bits.double().mean((0, 1, 3, 4))
    assert 0.5 < means.min() < 1 and 4 < means.max() <= 4.5
    of_path = [bits_at(path, model.config, mean / 16) for mean in means.tolist()]
    assert torch.equal(torch.stack(of_path, 2), bits)


# ------------------------------------------------------------------------------
# What a step takes

def kept_for_backward(c, batch: int, seq: int, dtype) -> int:
    """Bytes that autograd keeps in a step, each storage once; not the model's nor the rounding's.

    The largest buffers are those of the layers, keys and values as stored and as they are.
    """
    model = Model(c).to(dtype).requires_grad_(False)
    L, K, d = shape(model)
    start = random_rounding(model).p.to("cpu", torch.float32)
    trained = TrainedRounding(start, torch.eye(d).expand(2, L, K, d, d))
    path = water_filling(torch.rand(2, L, K, 8, dtype=torch.float64))
    hook = trained.at(draw_bits(batch, c, torch.Generator().manual_seed(0), path))
    model.rope.rows(0, seq, dtype, model.device)
    apart = {x.untyped_storage().data_ptr()
             for x in (*model.parameters(), model.rope.cos, model.rope.sin)}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    text = torch.randint(c.vocab_size, (batch, seq + 1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss, _ = distil(model, text, hook, Recipe(1, batch, seq, 0.1))
    assert loss.requires_grad
    return sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seq", [256, 512])
def test_a_step_keeps_what_is_predicted(seq, dtype):
    """That is what all layers hold, more than a single one, and so nothing that is on the way."""
    demo = read_config(DEMO / "config.json")
    c, batch = dataclasses.replace(demo, num_hidden_layers=2, vocab_size=96), 2
    all_layers, one = (step_memory(c, batch, seq, dtype, recompute) for recompute in (False, True))
    L = c.num_hidden_layers
    predicted = sum(L / (L - 1) * (all_layers[name] - one[name])
                    for name in ("within layers", "rounding"))
    assert kept_for_backward(c, batch, seq, dtype) == pytest.approx(predicted, rel=0.15)


# ------------------------------------------------------------------------------
# The files

def saved(model, file, **said) -> Bits:
    """What a training would leave, of random numbers."""
    file.parent.mkdir(exist_ok=True)
    bits = Bits(random_rounding(model), random_path(model), model.config)
    bits.save(file, said)
    return bits


def test_bits_are_read_as_they_were_written(model, tmp_path):
    bits = saved(model, tmp_path / "bits.json", seq=60)
    again = load_bits(tmp_path / "bits.json")
    assert torch.equal(again.path, bits.path)
    assert again.rounding.hash() == bits.rounding.hash()
    assert torch.equal(again.plan(0.125), bits_at(bits.path, model.config, 0.125))


@pytest.mark.parametrize("of_other", ["bits.safetensors", "bits.json"])
def test_files_of_two_trainings_are_refused(model, tmp_path, of_other):
    """As where a training was killed between its two files, or one of them was copied alone."""
    for name in ("one", "other"):
        saved(model, tmp_path / name / "bits.json")
    shutil.copy(tmp_path / "other" / of_other, tmp_path / "one")
    with pytest.raises(ValueError, match="another training") as refused:
        load_bits(tmp_path / "one" / "bits.json")
    assert str(tmp_path / "one" / "bits.json") in str(refused.value)
    load_bits(tmp_path / "other" / "bits.json")


def test_no_tensor_of_another_training_goes_unnoticed(model, tmp_path):
    bits = saved(model, tmp_path / "bits.json")
    p, spread = bits.rounding.p, bits.rounding.spread
    others = [Rounding(p, spread * 1.001)]
    for name, tensor in p.tensors().items():
        other = Projection.of(p.tensors() | {name: tensor * 1.001}, whole=4)
        others.append(Rounding(other, spread))
    for other in others:
        other.save(tmp_path / "bits.safetensors")
        with pytest.raises(ValueError, match="another training"):
            load_bits(tmp_path / "bits.json")
    bits.rounding.save(tmp_path / "bits.safetensors")
    load_bits(tmp_path / "bits.json")


def test_a_file_that_does_not_say_for_which_tensors_is_read(model, tmp_path):
    """As those of before did not."""
    bits = saved(model, tmp_path / "bits.json")
    said = json.loads((tmp_path / "bits.json").read_text())
    del said["rounding"]
    (tmp_path / "bits.json").write_text(json.dumps(said))
    assert torch.equal(load_bits(tmp_path / "bits.json").path, bits.path)


@pytest.mark.parametrize(("spoil", "words"), [
    ({"head_dim": 5}, "head_dim 5"), ({"whole": 2}, "whole 2"), ({"newest": 0}, "newest 0"),
    ({"exact": 4}, "run bits.train again"),
    ({"path": [[1]]}, "not a path"), ({"path": None}, "not what"), ({"rounding": 7}, "another")])
def test_a_spoilt_file_is_named(model, tmp_path, spoil, words):
    saved(model, tmp_path / "bits.json", **spoil)
    with pytest.raises(ValueError, match=words) as refused:
        load_bits(tmp_path / "bits.json")
    assert "bits.json" in str(refused.value)


# ------------------------------------------------------------------------------
# The script

QUICK = "--seq", 60, "--steps", 12, "--windows", 4, "--passages", 4, "--sweep-windows", 8


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("bits")
    call("bits.train", *small(trained), *QUICK, "--out", out)
    return out


def test_a_resumed_run_ends_where_the_undisturbed_one_does(
        made, trained, tmp_path, monkeypatch, capsys, refusal):
    """Stopped by a Ctrl-C two steps after the state was saved, between its two new paths.

    It was started by absolute paths and is resumed by relative ones.
    """
    plain = TrainingState.save

    def save(state, every):
        if state.step == 5:
            plain(state, every)
            state.save_at = 0.0
        if state.step == 7:
            raise KeyboardInterrupt

    options = [*small(trained), *QUICK, "--out", tmp_path]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(TrainingState, "save", save)
        call("bits.train", *options)
    assert left.value.code == 130
    assert "--resume continues from step 5" in capsys.readouterr().err.splitlines()[-1]
    assert "--lr" in refusal("bits.train", *options, "--resume", "--lr", 0.5)
    monkeypatch.chdir(trained)
    options[options.index(trained / "tokens.npy")] = "tokens.npy"
    options[options.index(CKPT)] = os.path.relpath(CKPT)
    call("bits.train", *options, "--resume")
    assert not (tmp_path / "bits.state.safetensors").exists()
    assert "--resume" in refusal("bits.train", *options, "--resume")
    one, other = (load_file(out / "bits.safetensors") for out in (made, tmp_path))
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() < 1e-6, name
    one, other = (json.loads((out / "bits.json").read_text()) for out in (made, tmp_path))
    assert one["path"] == other["path"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_the_script_leaves_what_its_reader_reads(made):
    model = load(CKPT)
    said = json.loads((made / "bits.json").read_text())
    assert said["head_dim"] == model.config.head_dim and said["whole"] == 4
    assert len(said["loss"]) == 12
    kl = [row["kl"] for row in said["budgets"]]
    assert kl == sorted(kl) and kl[0] < 0.1 * kl[-1]
    assert (made / "bits.png").stat().st_size > 5000
    bits = load_bits(made / "bits.json")
    assert bits.plan(0.125).double().mean() <= 2
    tokens = torch.randint(3, 96, (2, 54))
    cache = bits.cache(0.125, batch=2, max_len=54)
    found = torch.cat([model(part, cache=cache) for part in tokens.split((40, 1, 13), 1)], 1)
    close = (found - model(tokens, project=bits.at(0.125))).abs().amax(-1) < 1e-3
    assert close.double().mean() > 0.8
    made_up = list(generate(model, [1, 5, 9], 8, cache=bits.cache(0.0625, 1, 12)))
    assert len(made_up) <= 8


def test_a_report_says_what_each_plan_takes(made):
    """The tokens that are exact come on top: 4 + 32 of a window of 60."""
    bits = load_bits(made / "bits.json")
    rows = json.loads((made / "bits.json").read_text())["budgets"]
    shares = [0.5, 0.375, 0.28125, 0.25, 0.1875, 0.15625, 0.125, 0.09375, 0.0625, 0.046875]
    assert len(rows) == len(shares)
    for row, share in zip(rows, shares, strict=True):
        assert row["budget"] == bits.plan(share).double().mean().item() / 16
        assert share - 0.005 < row["budget"] <= share
        assert row["in_all"] == pytest.approx(row["budget"] + 36 / 60)
        assert set(row) == {"budget", "in_all", "kl", "perplexity", "accuracy", "same", "kl_99.9",
                            "by_position", "recall"}


def test_a_training_goes_to_the_folder_of_the_projections_that_it_starts_from(
        trained, tmp_path, monkeypatch):
    """They are its start, and no file but its own is written there."""
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "made"
    shutil.copytree(trained / "out", folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.chdir(tmp_path / "elsewhere")
    quick = ["--seq", 60, "--steps", 1, "--lr", 0, "--windows", 1, "--passages", 0]
    proj = folder / "projections.safetensors"
    call("bits.train", *small(trained), *quick, "--proj", proj)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert after.keys() - before.keys() == {"bits.json", "bits.safetensors", "bits.png"}
    assert {name: after[name] for name in before} == before
    start, learnt = load_file(proj), load_file(folder / "bits.safetensors")
    assert (start["U_k"] - learnt["U_k"]).abs().max() < 1e-5
    assert torch.equal(start["mean_k"], learnt["mean_k"])
    model, bits = load(CKPT), load_bits(folder / "bits.json")
    tokens = torch.randint(3, 96, (2, 54))
    cache = bits.cache(0.4, batch=2, max_len=54)
    found = torch.cat([model(part, cache=cache) for part in tokens.split((40, 1, 13), 1)], 1)
    close = (found - model(tokens, project=bits.at(0.4))).abs().amax(-1) < 1e-3
    assert close.double().mean() > 0.8


def test_wrong_input_is_said_in_one_line(made, trained, tmp_path, refusal):
    line = refusal("generate", "--bits", tmp_path / "none.json")
    assert "--bits" in line and "none.json" in line
    line = refusal("generate", "--bits", made / "bits.json")        # the demo is another model
    assert "--bits" in line and "the model has" in line
    line = refusal("generate", "--budget", 0.05)
    assert "0.125" in line
    line = refusal("bits.train", *small(trained), "--out", tmp_path)
    assert "--seq 32" in line
    longer = *small(trained), "--seq", 60, "--out", tmp_path
    line = refusal("bits.train", *longer, "--proj", tmp_path / "none")
    assert "--proj" in line
    file = tmp_path / "bits.json"
    shutil.copy(made / "bits.json", file)
    saved(load(CKPT), tmp_path / "other" / "bits.json").rounding.save(
        file.with_suffix(".safetensors"))
    line = refusal("generate", "--bits", file)
    assert "--bits" in line and "bits.json" in line and "another training" in line


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(trained, tmp_path):
    """Its path too, for which every process has windows of its own."""
    options = ["--ckpt", CKPT, "--data", trained / "tokens.npy", "--dtype", "float64"]
    options += ["--seq", 60, "--steps", 4, "--windows", 4, "--passages", 0]
    one, two = tmp_path / "one", tmp_path / "two"
    call("bits.train", *options, "--batch", 8, "--out", one)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = script(*torchrun, "-m", "bits.train", *options, "--batch", 4, "--out", two)
    assert done.returncode == 0, done.stderr
    a, b = (json.loads((out / "bits.json").read_text()) for out in (one, two))
    assert a["path"] == b["path"]
    assert a["loss"][:2] == pytest.approx(b["loss"][:2], rel=1e-9)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)          # a code may have flipped
