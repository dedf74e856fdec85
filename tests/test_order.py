"""The order of lowerings found without a search: errors against pairs, steps against a scan."""
import torch
from conftest import random_projection, shape

from order import cheapest_first, costs_of, errors
from projection import Moments


def test_errors_are_what_readers_miss_of_the_columns_cut_off(model):
    """Against all pairs of a query and a key, and of a value and a row of W_o, one by one."""
    L, K, d = shape(model)
    moments, p = Moments(model.config), random_projection(model)
    G = moments.G
    for layer in range(L):
        q, k, v = (torch.randn(1, heads, 20, d) for heads in (K * G, K, K))
        moments(layer, q, k, v)
    W_o = [torch.randn(30, K * G * d) for _ in range(L)]
    error = errors(moments, p, W_o)
    cached = (k - k.mean(2, keepdim=True), v - v.mean(2, keepdim=True))
    read = (q[0].view(K, -1, d), W_o[-1].view(30, K, G, d).transpose(0, 1).reshape(K, -1, d))
    for side, U in enumerate((p.U_k, p.U_v)):
        x, y = cached[side][0] @ U[-1], read[side] @ U[-1]          # (K, 20, d), (K, …, d)
        for level in range(9):
            r = level * d // 8
            missed = x[..., r:] @ y[..., r:].mT
            expected = missed.square().sum((-1, -2)).double() / 20
            assert torch.allclose(error[side, -1, :, level], expected, rtol=1e-4, atol=1e-6)


def test_costs_are_a_power_of_the_errors_through_two_levels():
    error = torch.rand(5, 9, dtype=torch.float64).cumsum(1).flip(1)
    error[:, 8] = 0
    weight, power = torch.rand(2, 5, 1, dtype=torch.float64)
    expected = weight * error ** (0.7 + power)
    costs = costs_of(error, expected[:, (2, 6)])
    assert torch.allclose(costs, expected)
    assert (costs[:, 8] == 0).all()


def test_costs_are_numbers_where_nothing_is_lost():
    error = torch.zeros(3, 9, dtype=torch.float64)
    assert costs_of(error, torch.zeros(3, 2, dtype=torch.float64)).isfinite().all()


def test_the_cheapest_next_step_is_taken_first():
    """Against a scan of what each place's next step costs; a cheap one waits behind a dear one."""
    steps = torch.rand(6, 7, dtype=torch.float64)
    steps[:4] = steps[:4].sort(-1).values
    taken = [0] * 6
    keys = steps.cummax(-1).values
    for place in cheapest_first(steps).tolist():
        waiting = [keys[i, n] for i, n in enumerate(taken) if n < 7]
        assert keys[place, taken[place]] == min(waiting)
        taken[place] += 1
    assert taken == [7] * 6
