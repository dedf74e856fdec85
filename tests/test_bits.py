"""bits.train: what bits cost, what learns, what a step takes, the files, the script."""
import dataclasses
import json
import math
import os
import shutil

import pytest
import torch
from conftest import (
    CKPT,
    DEMO,
    call,
    mean_kl,
    random_projection,
    random_start,
    relative,
    script,
    shape,
    small,
)
from safetensors.torch import load_file
from test_cache import with_large_biases
from test_rounding import random_path, random_rounding

from bits import Bits, load_bits
from bits.costs import (
    FACTORS,
    block_costs,
    deviations,
    find_path,
    first_steps,
    shrink_and_noise,
    what_is_asked,
)
from bits.rounding import BITS, NORMAL, Rounding, bits_at, on_grid, same_bits, water_filling
from bits.train import TrainedRounding, draw_bits, step_memory
from model import Model, generate, load
from projection import Projection
from search import DRAWS, Windows, find_start, sweep
from support.checkpoint import read_config
from support.training import TrainingState
from train import Recipe, distil


def random_windows(count: int = 8, T: int = 40) -> Windows:
    return Windows(torch.randint(3, 96, (900,)).numpy(), count, 4, T, 1, 0)


@pytest.fixture
def known(model):
    """A model, windows, what they ask, and a rounding that learns."""
    windows, start = random_windows(), random_start(model, whole=4)
    asked = what_is_asked(model, windows, start)
    steps = first_steps(model, windows, start, asked)
    return model, windows, asked, TrainedRounding(start, asked.varies, steps)


# ------------------------------------------------------------------------------
# The path

def test_a_path_always_takes_bits_where_they_are_cheapest(known):
    """Against a scan over all blocks; a step that is cheaper than the one before it goes with it.
    """
    model, windows, asked, trained = known
    with torch.no_grad():
        rounding = trained()
    shrink, noise = shrink_and_noise(model, windows, rounding.p, rounding.steps[None], "")
    costs = block_costs(asked, shrink[0], noise[0])
    path = water_filling(costs)
    assert torch.equal(path, find_path(model, windows, rounding, asked))
    costs, now, worst = costs.flatten(0, -2), [6] * costs[..., 0].numel(), {}
    for place, after in path.tolist():
        prices = {}
        for block, b in enumerate(now):
            if b:
                step = (costs[block, b - 1] - costs[block, b]) / (BITS[b] - BITS[b - 1])
                prices[block] = max(step.item(), worst.get(block, -math.inf))
        assert prices[place] <= min(prices.values()) * (1 + 1e-9) + 1e-30
        worst[place] = prices[place]
        now[place] -= 1
        assert after == BITS[now[place]]
    assert not any(now)


def test_a_sweep_sums_what_it_is_said_to(known):
    """Against what `sweep` yields, column by column."""
    model, windows, asked, trained = known
    p = trained.rotation.start
    L, K, d = shape(model)
    rows = {}
    for draw, *place, g, x in sweep(model, windows, p.mean_k, p.mean_v, p.whole, ""):
        rows.setdefault(tuple(place), []).append((draw, g.double(), x.double()))
    n = windows.text.numel() * DRAWS
    for side, U in enumerate((p.U_k, p.U_v)):
        for c in (0, d // 8, d - 1):
            u = U[-1, -1, :, c].double()
            g = torch.cat([g[:, -1] @ u for _, g, _ in rows[side, L - 1]])      # (draws · N, T)
            x = torch.cat([x[:, -1] @ u for _, _, x in rows[side, L - 1]])
            assert asked.gradient[side, -1, -1, c].item() == pytest.approx(
                g.square().sum().item() / n, rel=1e-4)
            assert asked.cut[side, -1, -1, c].item() == pytest.approx(
                (g * x).sum(1).square().sum().item() / n, rel=1e-4)
        block = U[-1, -1, :, :d // 8].double()
        sums = [((g[:, -1] @ block) * (x[:, -1] @ block)).sum((1, 2))
                for _, g, x in rows[side, L - 1]]
        assert asked.cut_of_block[side, -1, -1, 0].item() == pytest.approx(
            torch.cat(sums).square().sum().item() / n, rel=1e-4)
        seen = torch.cat([x[:, -1].flatten(0, 1) for draw, _, x in rows[side, L - 1] if draw == 0])
        assert relative(asked.varies[side, -1, -1], seen.mT @ seen / len(seen)) < 1e-6


def test_rounding_shrinks_and_adds_noise(known):
    """ρ and E[n²] of x̂ = (1 − ρ) x + n, as a regression over all tokens has them."""
    model, windows, _, trained = known
    with torch.no_grad():
        rounding = trained()
    p, seen = rounding.p, []

    def observe(layer, q, k, v, turn):
        if layer == 0:
            seen.append([turn(k - p.mean_k[0][:, None]), v - p.mean_v[0][:, None]])

    for batch in windows:
        windows.states(model, batch, observe=observe)
    shrink, noise = shrink_and_noise(model, windows, p, rounding.steps[None], "")
    assert (shrink[..., 0] == 1).all() and (noise[..., 0] == 0).all()   # 0 bits
    for side, U in enumerate((p.U_k, p.U_v)):
        x = torch.cat([of_batch[side][:, 0, 4:].flatten(0, 1) for of_batch in seen]) @ U[0, 0]
        for which, b in enumerate(BITS[1:], 1):
            step, top = rounding.steps[side, 0, 0, :, which], torch.tensor((2 ** b - 1) / 2)
            x_hat = on_grid(x, step, top)
            rho = 1 - (x * x_hat).sum(0) / x.square().sum(0)
            n = (x_hat - (1 - rho) * x).square().mean(0)
            assert relative(shrink[0, side, 0, 0, :, which], rho) < 2e-2
            assert relative(noise[0, side, 0, 0, :, which], n) < 2e-2


def test_a_block_costs_what_its_columns_do(known):
    """With one ρ for all columns it is that of cutting them together, and their noise."""
    model, _, asked, _ = known
    L, K, d = shape(model)
    noise = torch.rand(2, L, K, d, 7, dtype=torch.float64)
    shrink = torch.rand(7, dtype=torch.float64).expand(2, L, K, d, 7)
    found = block_costs(asked, shrink, noise)
    eighth = slice(d // 8, 2 * (d // 8))
    for b in range(7):
        of_noise = (asked.gradient[1, 0, 0, eighth] * noise[1, 0, 0, eighth, b]).sum()
        together = asked.cut_of_block[1, 0, 0, 1] * shrink[0, 0, 0, 0, b] ** 2
        assert found[1, 0, 0, 1, b].item() == pytest.approx((of_noise + together).item() / 2)


def test_the_step_that_costs_least_is_taken(known):
    model, windows, asked, trained = known
    p = trained.rotation.start
    steps = first_steps(model, windows, p, asked)
    factors = steps / deviations(p, asked.varies)[..., None] / torch.tensor(NORMAL)
    assert (factors[..., None] - torch.tensor(FACTORS)).abs().amin(-1).max() < 1e-4

    def cost(steps):
        shrink, noise = (x[0] for x in shrink_and_noise(model, windows, p, steps[None], ""))
        return asked.gradient[..., None] * noise + asked.cut[..., None] * shrink ** 2

    least = cost(steps)
    for other in (steps / factors, steps / factors * 2):
        assert (least <= cost(other) * 1.02 + 1e-30).all()             # a code may have flipped


@pytest.mark.parametrize("kind", ["noise", "shrinking"])
@pytest.mark.parametrize("side", [0, 1])
def test_the_cost_of_small_errors_is_the_kl_that_they_make(model, side, kind):
    """Along one column of one head: noise of a known variance, or a little less of x; float64.

    640 windows: the two sides then differ by 5% (one deviation over seeds), with 64 by 16.
    """
    windows = random_windows(640)
    windows.batch = 16
    text = torch.cat((windows.text, windows.text[:, :1]), dim=1)
    p = random_start(model.float(), whole=4).to(None, torch.float64)
    model = model.double()
    asked = what_is_asked(model, windows, p)
    u, size = (p.U_k, p.U_v)[side][0, 0, :, 0], 0.03

    def changed(layer, k, v, turn):
        both = [turn(k), v]
        if layer == 0:
            means = [turn(p.mean_k[0][:, None].expand(k.shape[1:])), p.mean_v[0][:, None]]
            x = ((both[side] - means[side]) @ u)[..., None]
            error = size * torch.randn_like(x) if kind == "noise" else -size * x
            error = error * u
            error[:, 1:] = 0
            error[:, :, :4] = 0
            both[side] = both[side] + error
        return both

    with torch.no_grad():
        kl = [distil(model, text, changed, Recipe(1, 64, 40, 0.1))[1].mean()
              for _ in range(2 if kind == "noise" else 1)]
    per_token = (asked.gradient if kind == "noise" else asked.cut)[side, 0, 0, 0].item()
    found = torch.stack(kl).mean().item()
    assert found == pytest.approx(per_token * size ** 2 / 2, rel=0.25)


# ------------------------------------------------------------------------------
# What learns

def test_steps_follow_the_rotation(known):
    """At the start they are those found; after a turn they go with the turned text's deviations."""
    _, _, asked, trained = known
    with torch.no_grad():
        before = trained()
        trained.rotation.A_k.normal_(std=0.3)
        r = trained()
    of_each = []
    for rounding in (before, r):
        U, varies = rounding.p.U_k.double(), asked.varies[0]
        deviation = (U.mT @ varies @ U).diagonal(dim1=-2, dim2=-1).sqrt()
        of_each.append(rounding.steps[0] / deviation[..., None])
    assert relative(*of_each) < 1e-4


def test_everything_learns(known, tokens):
    model, _, _, trained = known
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
    steps = torch.ones(2, L, K, d, 7)
    trained = TrainedRounding(start, torch.eye(d).expand(2, L, K, d, d), steps)
    path = water_filling(torch.rand(2, L, K, 8, 7, dtype=torch.float64).sort(descending=True)[0])
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
    p, steps = bits.rounding.p, bits.rounding.steps
    others = [Rounding(p, steps * 1.001)]
    for name, tensor in p.tensors().items():
        other = Projection.of(p.tensors() | {name: tensor * 1.001}, whole=4)
        others.append(Rounding(other, steps))
    for other in others:
        other.save(tmp_path / "bits.safetensors")
        with pytest.raises(ValueError, match="another training"):
            load_bits(tmp_path / "bits.json")
    bits.rounding.save(tmp_path / "bits.safetensors")
    load_bits(tmp_path / "bits.json")


def test_a_file_that_does_not_say_for_which_tensors_is_refused(model, tmp_path):
    saved(model, tmp_path / "bits.json")
    said = json.loads((tmp_path / "bits.json").read_text())
    del said["rounding"]
    (tmp_path / "bits.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="rounding"):
        load_bits(tmp_path / "bits.json")


@pytest.mark.parametrize(("spoil", "words"), [
    ({"head_dim": 5}, "head_dim 5"), ({"whole": 2}, "whole 2"), ({"newest": 0}, "newest 0"),
    ({"exact": 4}, "run bits.train again"),
    ({"path": [[1]]}, "not a path"), ({"path": None}, "not what"), ({"rounding": 7}, "another"),
    ({"path": [["keys", 0, 0, 0, 6.0]]}, "not a path"),
    ({"path": [["keys", 0, False, 0, 6]]}, "not a path")])
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
    """The tokens that are held as they are come on top: 4 + 64 of a window of 60."""
    bits = load_bits(made / "bits.json")
    rows = json.loads((made / "bits.json").read_text())["budgets"]
    shares = [0.5, 0.375, 0.28125, 0.25, 0.1875, 0.15625, 0.125, 0.09375, 0.0625, 0.046875]
    assert len(rows) == len(shares)
    for row, share in zip(rows, shares, strict=True):
        assert row["budget"] == bits.plan(share).double().mean().item() / 16
        assert share - 0.005 < row["budget"] <= share
        assert row["in_all"] == pytest.approx(row["budget"] + 68 / 60)
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


def test_projections_without_a_mean_of_the_keys_get_one_and_no_step_need_be_taken(
        trained, tmp_path):
    """As those of --recipe paper; their U stays as it is."""
    model = load(CKPT)
    random_projection(model).save(tmp_path / "projections.safetensors")
    call("bits.train", *small(trained), "--seq", 60, "--steps", 0, "--windows", 2, "--passages", 0,
         "--sweep-windows", 8, "--proj", tmp_path / "projections.safetensors")
    start, made = Projection.load(tmp_path / "projections.safetensors"), load_bits(
        tmp_path / "bits.json").rounding.p
    assert made.whole == 4 and made.mean_k.abs().max() > 0
    assert (start.U_k - made.U_k).abs().max() < 1e-5
    assert made.positions == min(8192, model.config.max_position_embeddings)
    said = json.loads((tmp_path / "bits.json").read_text())
    assert said["loss"] == [] and len(said["budgets"]) == 10


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
    random_projection(load(CKPT), 60, mean=0.1).save(tmp_path / "whole.safetensors")
    line = refusal("bits.train", *longer, "--proj", tmp_path / "whole.safetensors")
    assert "--seq 60" in line and "whole" in line
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


# ------------------------------------------------------------------------------
# Keys with a large mean

def test_biases_of_600_cost_nothing_at_3_bits_once_they_are_the_mean():
    """Not even far behind the positions that bits were made at. With another mean they cost a lot.
    """
    held_out, kls = torch.randint(3, 96, (16, 40)), {}
    tokens = torch.randint(3, 96, (900,)).numpy()
    for size in (0, 600):
        model, mean_k = with_large_biases(size)
        bits = same_bits(3, model.config)
        windows = Windows(tokens, 16, 8, 40, 1, 0)
        p = find_start(model, windows, 4)
        for factor in (1, 0):
            p.mean_k = factor * mean_k
            asked = what_is_asked(model, windows, p)
            stored = Rounding(p, first_steps(model, windows, p, asked)).at(bits).stored
            for start in (0, 200):
                log_p, log_q = (
                    model.lm_head(model.norm(model.hidden(held_out, project, start=start)))
                    for project in (None, stored))
                kl = mean_kl(log_p.log_softmax(-1), log_q.log_softmax(-1))
                kls.setdefault((size, factor), []).append(kl)
    usual, large, without = (torch.tensor(kls[key]) for key in ((0, 1), (600, 1), (600, 0)))
    assert (large < 1.6 * usual).all()              # bases and steps are of other random numbers
    assert (without > 2 * usual).all()


def test_a_rate_that_ruins_the_steps_is_named_in_one_line(trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        call("bits.train", *small(trained), "--seq", 40, "--sweep-windows", 1, "--windows", 1,
             "--passages", 0, "--steps", 5, "--lr", 3000, "--out", tmp_path)
    assert left.value.code == 2
    assert "--lr 3000" in (line := capsys.readouterr().err.splitlines()[-1])
    assert line.endswith("smaller one")
