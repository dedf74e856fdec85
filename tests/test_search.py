"""The search: Algorithm 1 decision by decision, a nested path, and what stands in its place."""
import json

import numpy as np
import pytest
import torch
from conftest import CKPT, GOLDEN, call, mean_kl, random_projection, shape

from model import load
from projection import Moments, Projection, output_weights, plan_at
from search import (
    Cost,
    along,
    cheapest_first,
    costs_of,
    errors,
    exact,
    find_order,
    kl_of_each,
    lazy,
    rounding_noise,
)
from support.plans import PROJECTIONS, read_ranks


def in_double(model):
    """A model and projections in float64: near ties flip in float32."""
    p = random_projection(model)
    return model.double(), p.to(None, torch.float64)


@pytest.fixture
def double(model):
    return in_double(model)


# ------------------------------------------------------------------------------
# Algorithm 1


def brute_force(model, p, tokens, rounds):
    """Algorithm 1 from whole passes and PyTorch's own KL; yields (KL, candidate) of each round."""
    L, K, d = shape(model)
    ranks = torch.full((2, L, K), d)
    log_p = model(tokens).log_softmax(-1)

    def kl_if_lowered(candidate):
        lowered = ranks.clone()
        lowered[candidate] -= d // 8
        return mean_kl(log_p, model(tokens, project=p.at(lowered)).log_softmax(-1))

    for _ in range(rounds):
        candidates = [tuple(place) for place in (ranks > d // 8).nonzero().tolist()]
        kl, best = min((kl_if_lowered(candidate), candidate) for candidate in candidates)
        ranks[best] -= d // 8
        yield kl, best


@torch.no_grad()
def test_exact_is_algorithm_1_decision_by_decision(double):
    model, p = double
    tokens = torch.randint(3, 96, (2, 11))
    cost = Cost(model, p, tokens)
    search = exact(cost)
    for kl, candidate in brute_force(model, p, tokens, rounds=25):
        assert next(search) == candidate
        assert cost.kl == pytest.approx(kl, rel=1e-9)


@pytest.mark.parametrize("search", [exact, lazy])
@torch.no_grad()
def test_the_path_is_nested_and_ends_at_an_eighth(double, search):
    model, p = double
    L, K, d = shape(model)
    cost = Cost(model, p, torch.randint(3, 96, (1, 9)))
    before = torch.full((2, L, K), d)
    for candidate in search(cost):
        lost = before - cost.ranks
        assert lost.sum() == lost[candidate] == d // 8
        before = cost.ranks
    assert (cost.ranks == d // 8).all()


@torch.no_grad()
def test_a_partial_pass_gives_the_whole_pass(double):
    """Only the layers from the lowered one up are run; the KL is that of the whole model."""
    model, p = double
    tokens = torch.randint(3, 96, (2, 9))
    cost = Cost(model, p, tokens)
    log_p = model(tokens).log_softmax(-1)
    for _ in lazy(cost):
        log_q = model(tokens, project=p.at(cost.ranks)).log_softmax(-1)
        assert cost.kl == pytest.approx(mean_kl(log_p, log_q), rel=1e-9)
    assert cost.layer_passes < len(model.layers) * cost.passes


@torch.no_grad()
def test_asking_what_a_lowering_costs_changes_nothing(double):
    model, p = double
    cost = Cost(model, p, torch.randint(3, 96, (1, 9)))
    before, kl = cost.ranks.clone(), cost.kl
    for candidate in cost.candidates():
        asked = cost.if_lowered(candidate)
        assert torch.equal(cost.ranks, before)
        assert cost.kl == kl
    cost.lower(candidate)
    assert cost.kl == asked


# ------------------------------------------------------------------------------
# Lazily

@pytest.mark.parametrize("kind", ["mistral_sharded_head_dim", "llama_mha"])
@torch.no_grad()
def test_lazy_takes_a_small_share_of_the_passes_and_is_nearly_as_good(kind):
    """On models of 8 and 16 ranks; the gain grows with their number."""
    model, p = in_double(load(GOLDEN / kind))
    tokens = torch.randint(3, 96, (4, 30))
    passes, curves = [], []
    for search in (exact, lazy):
        cost = Cost(model, p, tokens)
        curves.append([cost.kl for _ in search(cost)])
        passes.append(cost.passes)
    assert passes[1] < passes[0] / 3
    assert sum(curves[1]) < 1.3 * sum(curves[0])


class Made(Cost):
    """A cost that is made up: four ranks of three eighths, `costs` for one, two eighths less."""

    def __init__(self, costs: dict):
        self.ranks = torch.full((2, 1, 2), 3)
        self.kl, self.eighth, self.passes = 0.0, 1, 0
        self.costs = costs

    def measure(self, ranks, first):
        self.passes += 1
        assert self.passes < 100
        return sum(self.costs[tuple(place)][3 - ranks[tuple(place)]]
                   for place in (ranks < 3).nonzero().tolist()), None


PLACES = [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_lazy_ends_where_lowering_reduces_the_kl(monkeypatch, noise):
    """Rounding makes increases negative in bfloat16."""
    monkeypatch.setattr("search.rounding_noise", lambda cost: noise)
    costs = {place: [0, -1e-5 * (1 + 0.05 * sum(place)), -2e-5] for place in PLACES}
    assert len(list(lazy(Made(costs)))) == 8


def test_increases_below_the_noise_are_ordered_by_those_of_a_deeper_cut(monkeypatch):
    """One eighth costs each rank as good as nothing: −1e-6 … 1e-6 is rounding's, in wrong order."""
    monkeypatch.setattr("search.rounding_noise", lambda cost: 1e-5)
    deep = dict(zip(PLACES, (4e-3, 1e-3, 3e-3, 2e-3), strict=True))
    shallow = dict(zip(PLACES, (-1e-6, 1e-6, 0, 5e-7), strict=True))
    costs = {place: [0, shallow[place], deep[place]] for place in PLACES}
    order = list(lazy(Made(costs)))
    assert order[:4] == sorted(PLACES, key=deep.get)


@torch.no_grad()
def test_states_are_float32_over_bfloat16_weights():
    """The same KLs as with those weights in float32, and so the same order."""
    golden = GOLDEN / "llama_bfloat16"
    low, exact = load(golden, dtype=torch.bfloat16), load(golden)
    p, tokens = random_projection(exact), torch.randint(3, 96, (2, 11))
    by_low, by_exact = (Cost(model, p, tokens) for model in (low, exact))
    for candidate in by_exact.candidates():
        kl = by_exact.if_lowered(candidate)
        assert by_low.if_lowered(candidate) == pytest.approx(kl, rel=1e-3)


@torch.no_grad()
def test_the_noise_is_that_of_rounding(double):
    model, p = double
    tokens = torch.randint(3, 96, (2, 11))
    cost = Cost(model, p, tokens)
    kl, ranks, inputs = cost.kl, cost.ranks, list(cost.inputs)
    assert rounding_noise(cost) < 1e-14
    assert cost.kl == kl and cost.ranks is ranks                    # asking changes nothing
    assert all(a is b for a, b in zip(cost.inputs, inputs, strict=True))
    in_single = Cost(model.float(), p.to(None, torch.float32), tokens)
    assert 0 < rounding_noise(in_single) < 1e-6


# ------------------------------------------------------------------------------
# Along an order

@torch.no_grad()
def test_a_whole_order_is_followed_by_one_pass_for_each_lowering(double):
    model, p = double
    L, K, d = shape(model)
    tokens = torch.randint(3, 96, (2, 9))
    order = torch.cat([torch.randperm(2 * L * K) for _ in range(7)])
    cost = Cost(model, p, tokens)
    cost.passes = 0
    log_p = model(tokens).log_softmax(-1)
    for n, place in enumerate(along(cost, order), 1):
        assert np.ravel_multi_index(place, (2, L, K)) == order[n - 1]
        assert torch.equal(cost.ranks, plan_at(order, model.config, 1 - n / (2 * L * K * 8)))
        if n in (1, 20):
            log_q = model(tokens, project=p.at(cost.ranks)).log_softmax(-1)
            assert cost.kl == pytest.approx(mean_kl(log_p, log_q), rel=1e-9)
    assert cost.passes == n == len(order)
    assert (cost.ranks == d // 8).all()


@pytest.mark.parametrize("length", [0, 3, 55])
@torch.no_grad()
def test_an_order_that_was_cut_short_is_followed_and_then_searched_to_an_eighth(double, length):
    """From where it ends, as the lazy search would go on from there."""
    model, p = double
    L, K, d = shape(model)
    tokens = torch.randint(3, 96, (2, 9))
    order = torch.cat([torch.randperm(2 * L * K) for _ in range(7)])[:length]
    cost = Cost(model, p, tokens)
    path = list(along(cost, order))
    assert (cost.ranks == d // 8).all()
    assert len(path) == 2 * L * K * 7

    places = [np.ravel_multi_index(candidate, (2, L, K)) for candidate in path]
    assert places[:length] == order.tolist()
    other = Cost(model, p, tokens)
    for candidate in path[:length]:
        other.lower(candidate)
    assert path[length:] == list(lazy(other))


# ------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with what the script left for random projections, and its options."""
    folder = tmp_path_factory.mktemp("searched")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 96, 3000))
    random_projection(load(CKPT)).save(folder / "p.safetensors")
    options = ["--ckpt", CKPT, "--data", folder / "tokens.npy", "--seq", 32]
    options += ["--proj", folder / "p.safetensors", "--windows", 4]
    call("search", *options, "--budget", 0.4, "--out", folder / "out")
    return folder, options


def test_the_script_writes_the_plan_and_the_whole_path(searched):
    folder, _ = searched
    plan = json.loads((folder / "out" / "ranks.json").read_text())
    model = load(CKPT)
    L, K, d = shape(model)
    assert set(plan) == {
        "head_dim", "budget", "keys", "values", "kl", "uniform_kl", "evaluations", "path",
        "projections"}
    assert plan["head_dim"] == d
    assert plan["projections"] == Projection.load(folder / "p.safetensors").hash()
    assert len(plan["path"]) == 2 * L * K * 7
    assert 0.4 - 1 / (2 * L * K * 8) < plan["budget"] <= 0.4
    assert (folder / "out" / "ranks.png").read_bytes()[:4] == b"\x89PNG"


def test_the_plan_spelled_out_is_the_prefix_of_the_path_for_the_budget(searched):
    folder, _ = searched
    file, model = folder / "out" / "ranks.json", load(CKPT)
    plan = json.loads(file.read_text())
    found = read_ranks(file, model.config)
    ranks = found.ranks
    assert torch.equal(ranks, plan_at(found.order, model.config, 0.4))
    assert ranks.sum() == plan["budget"] * ranks.numel() * model.config.head_dim
    taken = ranks.numel() * 8 - int(ranks.sum()) * 8 // model.config.head_dim
    assert plan["kl"] == plan["path"][taken - 1][3]


def test_an_interrupted_search_leaves_the_path_so_far(searched, tmp_path, monkeypatch, capsys):
    """Stopped after ten lowerings: 1 − 10/64 of the cache."""
    _, options = searched

    def stopped(cost):
        steps = lazy(cost)
        for _ in range(10):
            yield next(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr("search.lazy", stopped)
    with pytest.raises(SystemExit) as left:
        call("search", *options, "--out", tmp_path)
    assert left.value.code == 130
    assert "down to 84.4%" in capsys.readouterr().err.splitlines()[-1]
    plan = json.loads((tmp_path / "ranks.json").read_text())
    assert len(plan["path"]) == 10
    assert plan["budget"] == 1 - 10 / 64


def test_the_script_goes_on_where_the_order_of_a_training_was_cut_short(searched, tmp_path):
    _, options = searched
    model = load(CKPT)
    p = random_projection(model)
    p.save(tmp_path / PROJECTIONS)
    (tmp_path / "train.json").write_text(json.dumps({"order": [6, 1, 1]}))
    call("search", *options, "--proj", tmp_path / PROJECTIONS)
    found = read_ranks(tmp_path / "ranks.json", model.config)
    assert found.order[:3].tolist() == [6, 1, 1]
    assert found.order.bincount().tolist() == [7] * 8
    assert found.fits(p)


# ------------------------------------------------------------------------------
# An order before any training: errors against pairs, steps against a scan

@torch.no_grad()
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


def start_of_a_search(model):
    """Random projections, moments of a text, and another text to measure on."""
    moments = Moments(model.config)
    model.hidden(torch.randint(3, 96, (8, 40)), observe=moments)
    return random_projection(model), moments, np.random.default_rng(0).integers(3, 96, 300)


@torch.no_grad()
def test_what_nobody_reads_is_lowered_first(model):
    """W_o takes in nothing of one key-value head: neither its keys nor its values count."""
    L, K, d = shape(model)
    W_o = model.layers[1].self_attn.o_proj
    nothing = W_o.weight.clone()
    nothing[:, :2 * d] = 0                                          # of the G = 2 query heads
    W_o.weight.data = nothing
    order = find_order(model, *start_of_a_search(model), batch=2, seq=40)
    assert order.bincount().tolist() == [7] * (2 * L * K)
    unread = [np.ravel_multi_index((side, 1, 0), (2, L, K)) for side in (0, 1)]
    assert sorted(order[:14].tolist()) == [unread[0]] * 7 + [unread[1]] * 7


@torch.no_grad()
def test_first_eighths_go_in_the_order_of_what_they_cost(model, monkeypatch):
    """By 4LK KLs, of each rank alone at two levels, and the errors between them."""
    seen = []

    def noted(*arguments):
        seen.append(kl_of_each(*arguments))
        return seen[0]

    monkeypatch.setattr("search.kl_of_each", noted)
    p, moments, tokens = start_of_a_search(model)
    order = find_order(model, p, moments, tokens, batch=2, seq=40).tolist()
    L, K, d = shape(model)
    kl, = seen
    assert len(kl) == 4 * L * K
    error = errors(moments, p, output_weights(model)).flatten(0, 2)
    costs = costs_of(error, kl.view(-1, 2))
    firsts = sorted(range(2 * L * K), key=order.index)
    assert firsts == costs[:, 7].argsort().tolist()
    assert (kl[::2] > kl[1::2]).all()                               # of level 2, of level 6
