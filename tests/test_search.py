"""The search: Algorithm 1 decision by decision, a nested path, and the lazy search close behind."""
import json

import numpy as np
import pytest
import torch
from conftest import CKPT, GOLDEN, call, mean_kl, random_projection, shape

from model import load
from plans import read_plan
from projection import Projection
from search import Cost, exact, lazy


@pytest.fixture
def double(model):
    """A model and projections in float64: near ties flip in float32."""
    p = random_projection(model)
    return model.double(), Projection(p.U_k.double(), p.U_v.double(), p.mean_v.double())


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


@torch.no_grad()
@pytest.mark.parametrize("search", [exact, lazy])
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


@torch.no_grad()
def test_lazy_takes_a_small_share_of_the_passes_and_is_nearly_as_good(double):
    """On models of 8 or 16 ranks; the gain grows with their number."""
    model, p = double
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

    def __init__(self, costs: dict, noise: float):
        self.ranks = torch.full((2, 1, 2), 3)
        self.kl, self.eighth, self.noise, self.passes = 0.0, 1, noise, 0
        self.costs = costs

    def measure(self, ranks, first):
        self.passes += 1
        assert self.passes < 100
        return sum(self.costs[tuple(place)][3 - ranks[tuple(place)]]
                   for place in (ranks < 3).nonzero().tolist()), None


PLACES = [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]


def test_lazy_ends_where_lowering_reduces_the_kl():
    """Rounding makes increases negative in bfloat16."""
    costs = {place: [0, -1e-5 * (1 + 0.05 * sum(place)), -2e-5] for place in PLACES}
    for noise in (0.0, 1e-6):
        assert len(list(lazy(Made(costs, noise)))) == 8


def test_increases_below_the_noise_are_ordered_by_those_of_a_deeper_cut():
    """One eighth costs each rank as good as nothing: −1e-6 … 1e-6 is rounding's, in wrong order."""
    deep = dict(zip(PLACES, (4e-3, 1e-3, 3e-3, 2e-3), strict=True))
    shallow = dict(zip(PLACES, (-1e-6, 1e-6, 0, 5e-7), strict=True))
    costs = {place: [0, shallow[place], deep[place]] for place in PLACES}
    order = list(lazy(Made(costs, noise=1e-5)))
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
    in_double = Cost(model, p, tokens).noise
    single = Projection(*(x.float() for x in p.tensors().values()))
    in_single = Cost(model.float(), single, tokens).noise
    assert in_double < 1e-14
    assert 0 < in_single < 1e-6


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
        "head_dim", "budget", "keys", "values", "kl", "uniform_kl", "evaluations", "path"}
    assert plan["head_dim"] == d
    assert len(plan["path"]) == 2 * L * K * 7
    assert 0.4 - 1 / (2 * L * K * 8) < plan["budget"] <= 0.4
    assert (folder / "out" / "ranks.png").read_bytes()[:4] == b"\x89PNG"


def test_the_plan_spelled_out_is_the_prefix_of_the_path_for_the_budget(searched):
    folder, _ = searched
    file, model = folder / "out" / "ranks.json", load(CKPT)
    plan = json.loads(file.read_text())
    _, ranks = read_plan(file, model.config)
    _, prefix = read_plan(file, model.config, 0.4)
    assert torch.equal(ranks, prefix)
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
