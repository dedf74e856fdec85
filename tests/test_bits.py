"""bits.py: the path against a scan, what learns, and the script on a tiny model."""
import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CKPT, call, random_projection, relative, script, shape, small
from safetensors.torch import load_file
from test_rounding import random_bits, random_path, random_rounding

from bits import (
    Run,
    TrainedRounding,
    draw_bits,
    first_path,
    load_bits,
    parts_of_kl,
    path_around,
    scaled_errors,
    total_share,
)
from cache import KVCache
from distance import spread_windows
from generate import decode
from model import load
from order import output_weights, pairs_of_columns
from packed import PackedCache
from projection import Moments, Projection, uniform_ranks
from rounding import BITS, ERROR, bits_at, errors_at, grouped_attention, same_bits, water_filling


@pytest.fixture
def known(model):
    """A model, moments of a random text, and a rounding that learns."""
    moments = Moments(model.config)
    model.hidden(torch.randint(3, 96, (8, 40)), observe=moments)
    return model, moments, TrainedRounding(random_projection(model), moments)


def made_up_costs(known):
    """A rounding, its blocks' errors, what heads matter by decree, and the KL that follows."""
    model, moments, trained = known
    with torch.no_grad():
        rounding = trained()
    pairs = pairs_of_columns(moments, rounding.p, output_weights(model)).diagonal(dim1=-2, dim2=-1)
    block = pairs.unflatten(-1, (8, -1)).sum(-1)                    # (2, L, K, 8)
    matters = 0.1 + torch.rand(block.shape[:3], dtype=torch.float64)
    matters /= block.sum(-1)

    def kl_of_each(model, plans, *_):
        found = []
        for plan in plans:
            error = torch.tensor([ERROR[b] for b in plan.flatten().tolist()], dtype=torch.float64)
            found.append((matters[..., None] * block * error.view(block.shape)).sum())
        return torch.stack(found)

    return rounding, block, matters, kl_of_each


def test_a_path_always_takes_bits_where_they_are_cheapest(known):
    """Against a scan over all blocks, with weights made up."""
    _, block, matters, _ = made_up_costs(known)
    costs = matters[..., None] * block
    path = water_filling(costs)
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


def test_what_a_head_matters_is_found_where_it_is_known(known, monkeypatch):
    """All others' 8 bits are in it: by a few hundredths too much. A dead head costs nothing."""
    model, moments, _ = known
    rounding, block, matters, kl_of_each = made_up_costs(known)
    monkeypatch.setattr("bits.kl_of_each", kl_of_each)
    found, path = first_path(model, rounding, moments, None, None)
    assert relative(found, matters) < 0.1
    assert torch.equal(path, water_filling(found[..., None] * block))
    dead = block.clone()
    dead[1, 0, 0] = 0                                               # nobody reads its values
    monkeypatch.setattr("bits.block_errors", lambda *_: dead)
    found, path = first_path(model, rounding, moments, None, None)
    assert found.isfinite().all() and len(path) == 6 * block.numel()
    costs_nothing = (dead == 0).flatten().nonzero()[:, 0]
    first = path[:6 * 8, 0]                                         # all bits of its eight blocks
    assert set(first.tolist()) == set(costs_nothing.tolist())


def test_around_a_plan_both_measurements_count(known, monkeypatch):
    """The geometric mean is taken twice; and a block without a part is no disaster."""
    model, moments, _ = known
    rounding, block, matters, _ = made_up_costs(known)
    around = block * matters[..., None] * (0.5 + torch.rand(block.shape, dtype=torch.float64))

    def decreed(model, rounding, plan, *_):
        return around * errors_at(plan)

    monkeypatch.setattr("bits.parts_of_kl", decreed)
    start = water_filling(matters[..., None] * block)
    found = path_around(model, rounding, moments, None, None, matters, start)
    expected = (matters[..., None] * block) ** 0.25 * around ** 0.75
    assert torch.equal(found, water_filling(expected))
    around[0, 0, 0] = -around[0, 0, 0]                              # noise
    around[1, 0, 0] = 0
    found = path_around(model, rounding, moments, None, None, matters, start)
    assert len(found) == len(start)


def test_parts_of_kl_are_its_slopes(known):
    """Against differences of the KL, each block's errors held fixed and scaled, in float64.

    Attention's backward pass keeps its denominators in float32 on a CPU.
    """
    model, moments, trained = known
    model = model.to(dtype=torch.float64)
    with torch.no_grad():
        rounding = trained(torch.float64)
    plan = random_bits(model)
    tokens = np.random.default_rng().integers(3, 96, 3 * 40 + 1)
    text = spread_windows(tokens, 3, 40)
    errors = {}

    def record(layer, k, v):
        *stored, attention = rounding.at(plan)(layer, k, v)
        for side, (x, hat) in enumerate(zip((k, v), stored, strict=True)):
            errors[side, layer] = (hat - x) @ rounding.U[side][layer]
        return *stored, attention

    def kl(scale):
        def scaled(layer, k, v):
            hats = []
            for side, x in enumerate((k, v)):
                factor = scale[side, layer].repeat_interleave(x.shape[-1] // 8, -1)[:, None]
                hats.append(x + (factor * errors[side, layer]) @ rounding.U[side][layer].mT)
            return *hats, partial(grouped_attention, newest=(k, v))

        return log_ratio(model, text, scaled)

    log_ratio(model, text, record)
    args = SimpleNamespace(batch=3, seq=40, amp=False, checkpoint=False, ce=0.0)
    parts = parts_of_kl(model, rounding, plan, tokens, args) / text[:, 1:].numel()
    assert parts.shape == plan.shape
    for place in torch.randperm(plan.numel())[:6].tolist():
        step = torch.zeros(plan.shape, dtype=torch.float64)
        step.view(-1)[place] = 1e-4
        slope = (kl(1 + step) - kl(1 - step)) / 2e-4
        assert parts.view(-1)[place].item() == pytest.approx(slope, rel=1e-3, abs=1e-7)
    same = scaled_errors(rounding, plan, torch.ones(plan.shape))
    x = torch.randn(2, 2, *shape(model)[1:], 9, dtype=torch.float64).transpose(-1, -2)
    for side in (0, 1):
        scaled, expected = same(0, *x)[side], rounding.at(plan)(0, *x)[side]
        assert relative(scaled, expected) < 1e-12


@torch.no_grad()
def log_ratio(model, text, project) -> float:
    """Σ p log(p / q) of a hook against the model, the mean over tokens."""
    p = model(text[:, :-1]).double().log_softmax(-1)
    q = model(text[:, :-1], project).double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_spreads_follow_the_rotation(known):
    """At the start and after a turn they are the standard deviations of the turned text."""
    _, moments, trained = known
    with torch.no_grad():
        trained.rotation.A_k.normal_(std=0.3)
        r = trained()
        cov, _ = moments.covariances()
        expected = (r.p.U_k.double().mT @ cov @ r.p.U_k.double()).diagonal(dim1=-2, dim2=-1).sqrt()
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


QUICK = "--seq", 60, "--steps", 12, "--windows", 4, "--passages", 4


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("bits")
    call("bits", *small(trained), *QUICK, "--out", out)
    return out


def test_a_resumed_run_ends_where_the_undisturbed_one_does(
        made, trained, tmp_path, monkeypatch, capsys, refusal):
    """Stopped by a Ctrl-C two steps after the state was saved, between its two new paths."""
    save = Run.save

    def save_and_stop(run):
        if run.said["step"] == 5:
            save(run)
            run.save_at = 0.0
        if run.said["step"] == 7:
            raise KeyboardInterrupt

    options = [*small(trained), *QUICK, "--out", tmp_path]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(Run, "save", save_and_stop)
        call("bits", *options)
    assert left.value.code == 130
    assert "--resume continues from step 5" in capsys.readouterr().err.splitlines()[-1]
    assert "--lr" in refusal("bits", *options, "--resume", "--lr", 0.5)
    call("bits", *options, "--resume")
    assert not (tmp_path / Run.STATE).exists()
    assert "--resume" in refusal("bits", *options, "--resume")
    one, other = (load_file(out / "bits.safetensors") for out in (made, tmp_path))
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() < 1e-6, name
    one, other = (json.loads((out / "bits.json").read_text()) for out in (made, tmp_path))
    assert one["path"] == other["path"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_the_script_leaves_what_its_reader_reads(made):
    model = load(CKPT)
    said = json.loads((made / "bits.json").read_text())
    assert said["head_dim"] == model.config.head_dim and said["exact"] == 4
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
    assert len(list(decode(model, bits.cache(0.0625, 1, 12), [1, 5, 9], 8))) <= 8


def test_the_total_is_what_a_cache_takes():
    """As large as the cache itself, whose newest tokens have 16 bits in a 16-bit model."""
    model = load(CKPT)
    r = random_rounding(model)
    cache = PackedCache(r, same_bits(2, model.config), 1, 512, torch.bfloat16)
    full = KVCache(Projection.identity(model.config), uniform_ranks(1.0, model.config), 1, 512,
                   torch.bfloat16)
    share = (cache.data.nbytes + cache.newest.nbytes) / full.data.nbytes
    assert total_share(2, 512) == pytest.approx(share)


@pytest.mark.parametrize(("spoil", "words"), [
    ({"head_dim": 5}, "head_dim 5"), ({"exact": 2}, "exact 2"), ({"newest": 0}, "newest 0"),
    ({"path": [[1]]}, "not a path"), ({"path": None}, "not what")])
def test_a_spoilt_file_is_named(made, tmp_path, spoil, words):
    said = json.loads((made / "bits.json").read_text()) | spoil
    shutil.copy(made / "bits.safetensors", tmp_path)
    (tmp_path / "bits.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=words):
        load_bits(tmp_path / "bits.json")


def test_wrong_input_is_said_in_one_line(made, trained, tmp_path, refusal):
    line = refusal("generate", "--bits", tmp_path / "none.json")
    assert "--bits" in line
    line = refusal("generate", "--bits", made / "bits.json", "--shrink-to", 0.5)
    assert "--bits" in line
    line = refusal("generate", "--budget", 0.05)
    assert "0.125" in line
    line = refusal("bits", *small(trained), "--out", tmp_path)
    assert "--seq 32" in line
    longer = *small(trained), "--seq", 60, "--out", tmp_path
    line = refusal("bits", *longer, "--proj", tmp_path / "none")
    assert "--proj" in line


def test_two_processes_are_one_with_twice_the_batch(trained, tmp_path):
    """Its path too, whose parts of the KL every process measures on windows of its own."""
    options = ["--ckpt", CKPT, "--data", trained / "tokens.npy", "--dtype", "float64"]
    options += ["--seq", 60, "--steps", 4, "--windows", 4, "--passages", 0]
    one, two = tmp_path / "one", tmp_path / "two"
    call("bits", *options, "--batch", 8, "--out", one)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "bits.py"]
    done = script(*torchrun, *options, "--batch", 4, "--out", two)
    assert done.returncode == 0, done.stderr
    a, b = (json.loads((out / "bits.json").read_text()) for out in (one, two))
    assert a["path"] == b["path"]
    assert a["loss"][:2] == pytest.approx(b["loss"][:2], rel=1e-9)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)          # a code may have flipped
