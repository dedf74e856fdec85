"""Rounding: the grid, the hook, the gradient, and plans of bits."""
import math

import pytest
import torch
from conftest import random_projection, relative, shape

from bits.rounding import (
    BITS,
    GROUP,
    NORMAL,
    NewestExact,
    Rounding,
    bits_at,
    check_bits,
    grid,
    path_of_rows,
    path_to_rows,
    same_bits,
    to_code,
)
from model import rotate
from projection import Projection


def random_rounding(model, dtype=torch.float32, whole: int = 4) -> Rounding:
    L, K, d = shape(model)
    tensors = random_projection(model, whole, mean=1.0).to(None, dtype).tensors()
    for name in ("U_k", "U_v"):
        tensors[name] = torch.linalg.qr(tensors[name]).Q            # orthogonal in that dtype
    steps = (0.2 + torch.rand(2, L, K, d, 7)) * torch.tensor(NORMAL)
    return Rounding(Projection.of(tensors, whole=whole), steps.to(dtype))


def turn_of(model, T: int, dtype=torch.float32):
    """RoPE of T tokens, as hooks are given it."""
    cos_sin = model.rope.rows(3, T, dtype, model.device)
    return lambda k: rotate(k, *cos_sin)


def random_bits(model, *batch) -> torch.Tensor:
    L, K, _ = shape(model)
    return torch.tensor(BITS)[torch.randint(0, len(BITS), (2, L, *batch, K, 8))]


def random_path(model) -> torch.Tensor:
    """All lowerings of all blocks, in a random order."""
    blocks = same_bits(8, model.config).numel()
    place = torch.arange(blocks).repeat(6)[torch.randperm(6 * blocks)]
    seen, rows = {}, []
    for block in place.tolist():
        seen[block] = seen.get(block, 6) - 1
        rows.append((block, BITS[seen[block]]))
    return torch.tensor(rows)


def test_steps_are_the_best_for_a_normal_distribution():
    """Against a sum over a fine grid: no step is better; and errors are those of Max's table."""
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-x ** 2 / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])

    def error(bits: int, step: float) -> float:
        top = torch.tensor((2 ** bits - 1) / 2, dtype=torch.float64)
        x_hat = (to_code(x, step, top) - top) * step
        return ((x - x_hat).square() * density).sum().item()

    errors = (0.3634, 0.1188, 0.03744, 0.01154, 0.001040, 0.0000877)
    for bits, step, expected in zip(BITS[1:], NORMAL[1:], errors, strict=True):
        least = error(bits, step)
        assert least == pytest.approx(expected, rel=0.001), bits
        for factor in (0.9, 0.97, 1.03, 1.1):
            assert least <= error(bits, step * factor) * 1.001, (bits, factor)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_hook_rounds_number_by_number(model, batch):
    """Against a loop over coordinates in plain Python; keys lose their mean before RoPE."""
    L, K, d = shape(model)
    r, bits = random_rounding(model, torch.float64), random_bits(model, *batch)
    k, v = torch.randn(2, 2, K, 6, d, dtype=torch.float64)
    turn = turn_of(model, 6, torch.float64)
    (k_hat, _), (v_hat, _) = r.at(bits)(L - 1, k, v, turn)
    turned_mean = turn(r.p.mean_k[L - 1][:, None].expand(K, 6, d))
    for side, (U, mean, x, found) in enumerate((
            (r.p.U_k, turned_mean, turn(k), k_hat),
            (r.p.U_v, r.p.mean_v[L - 1][:, None].expand(K, 6, d), v, v_hat))):
        b, h, t = 1, K - 1, 5
        of_head = bits[side, L - 1][(b,) * len(batch)][h]
        y = (x[b, h, t] - mean[h, t]) @ U[L - 1, h]
        expected = mean[h, t].clone()
        for j in range(d):
            n = int(of_head[j // (d // 8)])
            step = r.steps[side, L - 1, h, j, BITS.index(n)].item()
            top = (2 ** n - 1) / 2
            code = min(max(round(y[j].item() / step + top), 0), 2 ** n - 1)
            expected += (code - top) * step * U[L - 1, h, :, j]
        assert torch.allclose(found[b, h, t], expected, atol=1e-6)


@pytest.mark.parametrize("whole", [0, 4])
def test_the_first_tokens_and_the_newest_are_as_they_are(model, whole):
    L, K, d = shape(model)
    k, v = torch.randn(2, 2, K, 9, d)
    turn = turn_of(model, 9)
    pairs = random_rounding(model, whole=whole).at(same_bits(0, model.config))(0, k, v, turn)
    for (stored, as_is), x in zip(pairs, (turn(k), v), strict=True):
        assert torch.equal(stored[:, :, :whole], x[:, :, :whole])
        assert not torch.equal(stored[:, :, whole], x[:, :, whole])
        assert torch.equal(as_is, x)


def test_nothing_is_left_of_zero_bits_but_the_mean(model):
    _, K, d = shape(model)
    r = random_rounding(model)
    x, turn = torch.randn(2, K, 9, d), turn_of(model, 9)
    (k_hat, _), (v_hat, _) = r.at(same_bits(0, model.config))(0, x, x, turn)
    m, mean = (mean[0][:, None].expand_as(x) for mean in (r.p.mean_k, r.p.mean_v))
    assert torch.allclose(k_hat[:, :, 4:], turn(m)[:, :, 4:], atol=1e-6)
    assert torch.allclose(v_hat[:, :, 4:], mean[:, :, 4:])


def test_the_gradient_goes_straight_through_and_stops_at_the_clamp():
    x = torch.tensor([[-9.0, -0.4, 0.3, 9.0]], requires_grad=True)
    step, top = grid(torch.full((1, 8), 2), torch.tensor(NORMAL).expand(1, 8, 7))
    to_code(x, step[0, 0, :4], top[0, 0, :4]).sum().backward()
    expected = [0, 1 / NORMAL[2], 1 / NORMAL[2], 0]
    assert x.grad[0].tolist() == pytest.approx(expected)


def test_at_zero_bits_nothing_but_the_mean_has_a_gradient(model):
    _, K, d = shape(model)
    r = random_rounding(model)
    r.U[0].requires_grad_()
    r.steps.requires_grad_()
    r.p.mean_k.requires_grad_()
    x = 0.1 * torch.randn(2, K, 9, d)
    (k_hat, _), _ = r.at(same_bits(0, model.config))(0, x, x, turn_of(model, 9))
    k_hat[:, :, 4:].square().sum().backward()
    assert r.U[0].grad.abs().max() < 1e-4
    assert r.steps.grad is None or r.steps.grad.abs().max() == 0
    assert r.p.mean_k.grad[0].abs().min() > 0


@pytest.mark.parametrize("budget", [0.5, 0.31, 0.01])
def test_a_plan_is_the_largest_prefix_of_its_path_within_the_budget(model, budget):
    path = random_path(model)
    plan = bits_at(path, model.config, budget)
    steps = torch.full((plan.numel(),), 8)
    most = budget * 16 * plan.numel()
    for place, after in path.tolist():
        if steps.sum() <= most:
            break
        steps[place] = after
    assert torch.equal(plan.flatten(), steps)
    check_bits(plan, random_projection(model))


def test_a_path_that_ends_too_early_is_refused(model):
    with pytest.raises(ValueError, match="ends at"):
        bits_at(random_path(model)[:5], model.config, 0.125)


def test_a_path_is_read_as_it_was_written(model):
    path = random_path(model)
    assert torch.equal(path_of_rows(path_to_rows(path, model.config), model.config), path)


def test_rows_that_are_no_path_are_refused(model):
    assert path_of_rows([["keys", 0, 0, 0, 6]], model.config).tolist() == [[0, 6]]
    for rows in (
        [],
        5,
        [[1, 2]],
        [["keys", 0, 0, 0, 4]],                                     # 6 comes first,
        [["values", 0, 0, 0, 6], ["values", 0, 0, 0, 6]],           # and once
        [["keys", 0, 0, 9, 6]],
        [["keys", 0, -1, 0, 6]],
        [["keys", 0, 0, 0.5, 6]],
        [["keys", 99, 0, 0, 6]],
        [["both", 0, 0, 0, 6]],
    ):
        with pytest.raises(ValueError, match="not a path of bits"):
            path_of_rows(rows, model.config)


def test_bits_of_another_shape_or_number_are_refused(model):
    r = random_rounding(model)
    with pytest.raises(ValueError, match="5 bits"):
        r.at(same_bits(5, model.config))
    with pytest.raises(ValueError, match="bits of shape"):
        r.at(same_bits(4, model.config)[..., :4])


def test_a_rounding_is_read_as_it_was_written(model, tmp_path):
    r = random_rounding(model)
    r.p.positions = 77
    r.save(tmp_path / "bits.safetensors")
    again = Rounding.load(tmp_path / "bits.safetensors")
    assert all(torch.equal(x, again.p.tensors()[name]) for name, x in r.p.tensors().items())
    assert torch.equal(again.steps, r.steps) and again.hash() == r.hash()
    assert (again.p.whole, again.p.positions) == (4, 77)


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_steps_are_positive_numbers(model, step):
    r = random_rounding(model)
    r.steps[1, 0, 0, 0, 3] = step
    with pytest.raises(ValueError, match="steps"):
        Rounding(r.p, r.steps)


def test_a_rounding_needs_a_mean_of_the_keys(model, tmp_path):
    p = random_projection(model)
    with pytest.raises(ValueError, match="mean_k"):
        Rounding(p, torch.ones(2, *p.mean_v.shape, 7))
    p.save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="p.safetensors: no tensor 'steps'"):
        Rounding.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize("window", [None, 7, 40])
def test_attention_sees_its_own_group_as_it_is_and_the_others_as_stored(window):
    """Against one query at a time, over groups that the tokens do not fill."""
    T = 2 * GROUP + 9
    q = torch.randn(2, 4, T, 8, dtype=torch.float64)
    k_hat, v_hat, k, v = torch.randn(4, 2, 2, T, 8, dtype=torch.float64)
    found = NewestExact.attention(q, (k_hat, k), (v_hat, v), window)
    for t in (0, 5, GROUP - 1, GROUP, GROUP + 20, T - 1):
        seen = range(max(0, t + 1 - (window or T)), t + 1)
        keys, values = (torch.stack([(x if s // GROUP == t // GROUP else x_hat)[:, :, s]
                                     for s in seen], 2) for x, x_hat in ((k, k_hat), (v, v_hat)))
        keys, values = (x.repeat_interleave(2, 1) for x in (keys, values))
        weights = (keys @ q[:, :, t, :, None] / 8 ** 0.5).softmax(2)
        assert relative(found[:, :, t], (weights * values).sum(2)) < 1e-6
