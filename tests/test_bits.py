"""bits.py: the path against a scan, what learns, and the script on a tiny model."""
import json
import shutil
from functools import partial

import pytest
import torch
from conftest import CKPT, call, random_projection, relative, shape, small
from test_rounding import random_bits, random_path

from bits import (
    TrainedRounding,
    draw_bits,
    find_path,
    load_bits,
    total_share,
    water_filling,
    weight_alone,
    weight_around,
)
from generate import decode
from model import load
from order import output_weights, pairs_of_columns
from projection import Moments
from rounding import BITS, ERROR, bits_at


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
    path = water_filling(matters, block)
    cost = (matters[..., None] * block).flatten()
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
    """Around any plan exactly. Alone all others' 8 bits are in it: by a few hundredths too much."""
    model, moments, _ = known
    rounding, block, matters, kl_of_each = made_up_costs(known)
    measured = partial(kl_of_each, model)
    around = weight_around(measured, block, random_bits(model))
    assert relative(around, matters) < 1e-6
    alone = weight_alone(measured, block, model.config)
    assert relative(alone, matters) < 0.1
    dead = block.clone()
    dead[1, 0, 0] = 0                                               # nobody reads its values
    assert weight_alone(measured, dead, model.config).isfinite().all()
    assert weight_around(measured, dead, random_bits(model)).isfinite().all()
    monkeypatch.setattr("bits.kl_of_each", kl_of_each)
    path = find_path(model, rounding, moments, None, None)
    assert torch.equal(path, water_filling(alone, block))
    path = find_path(model, rounding, moments, None, None, path)
    assert torch.equal(path, water_filling((alone * matters).sqrt(), block))


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
    hidden = model.hidden(tokens, trained().at(bits))
    hidden.square().mean().backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    d = shape(model)[2]
    assert trained.rotation.A_k.shape[-1] == d * (d - 1) // 2


def test_plans_are_drawn_around_the_path(model):
    path = random_path(model)
    bits = draw_bits(64, model.config, torch.Generator().manual_seed(1), path)
    means = bits.double().mean((0, 1, 3, 4))
    assert means.min() < 1.3 and means.max() > 3.7
    assert (bits[:, :, 0] != bits[:, :, 1]).any()
    near = [bits_at(path, model.config, mean / 16) for mean in means.tolist()]
    assert (torch.stack(near, 2) - bits).abs().double().mean() < 2


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("bits")
    options = ["--steps", 12, "--windows", 4, "--passages", 4, "--out", out]
    call("bits", *small(trained), *options)
    return out


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
    tokens = torch.randint(3, 96, (2, 24))
    cache = bits.cache(0.125, batch=2, max_len=24)
    found = torch.cat([model(part, cache=cache) for part in tokens.split((10, 1, 13), 1)], 1)
    close = (found - model(tokens, project=bits.at(0.125))).abs().amax(-1) < 1e-3
    assert close.double().mean() > 0.8
    assert len(list(decode(model, bits.cache(0.0625, 1, 12), [1, 5, 9], 8))) <= 8


def test_total_counts_the_exact_tokens():
    assert total_share(2, 512) == pytest.approx((4 * 16 + 508 * 2) / (512 * 16))
    assert total_share(2, 3) == 1


@pytest.mark.parametrize(("spoil", "words"), [
    ({"head_dim": 5}, "head_dim 5"), ({"exact": 2}, "2 exact"), ({"path": [[1]]}, "not a path"),
    ({"path": None}, "not what")])
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
    line = refusal("bits", *small(trained), "--proj", tmp_path / "none", "--out", tmp_path)
    assert "--proj" in line
