"""The search: Algorithm 1 decision by decision, and the sweeps against derivatives by hand."""
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from conftest import (
    CKPT,
    GOLDEN,
    call,
    mean_kl,
    random_projection,
    random_start,
    relative,
    shape,
)

from model import Model, load
from projection import Projection, plan_at, uniform_ranks
from search import (
    DRAWS,
    Cost,
    Leaves,
    Windows,
    cheapest_first,
    drawn_gradients,
    exact,
    find_order,
    find_start,
)
from support import processes
from support.data import random_windows
from support.plans import read_ranks


@pytest.fixture
def double(model):
    """A model and projections in float64: near ties flip in float32."""
    return model.double(), in_double(random_projection(model, whole=2, mean=1.0))


def in_double(p):
    """Float64, and as orthogonal."""
    p = p.to(None, torch.float64)
    p.U_k, p.U_v = (torch.linalg.qr(U).Q for U in (p.U_k, p.U_v))
    return p


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


@torch.no_grad()
def test_the_path_is_nested_and_ends_at_an_eighth(double):
    model, p = double
    L, K, d = shape(model)
    cost = Cost(model, p, torch.randint(3, 96, (1, 9)))
    before = torch.full((2, L, K), d)
    for candidate in exact(cost):
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
    for _ in exact(cost):
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
def test_states_are_float32_over_bfloat16_weights():
    """The same KLs as with those weights in float32, and so the same order."""
    golden = GOLDEN / "llama_bfloat16"
    low, exact = load(golden, dtype=torch.bfloat16), load(golden)
    p, tokens = random_projection(exact), torch.randint(3, 96, (2, 11))
    by_low, by_exact = (Cost(model, p, tokens) for model in (low, exact))
    for candidate in by_exact.candidates():
        kl = by_exact.if_lowered(candidate)
        assert by_low.if_lowered(candidate) == pytest.approx(kl, rel=1e-3)


# ------------------------------------------------------------------------------
# Windows anywhere

def test_the_states_are_the_same_wherever_a_window_starts(every_model):
    """Attention is relative. The keys lie elsewhere."""
    model, tokens = every_model.double(), torch.randint(3, 96, (3, 21))
    keys = {}

    def states(start):
        def observe(layer, q, k, v, turn):
            keys[layer] = turn(k)

        return model.hidden(tokens, observe=observe, start=start)

    at_zero = states(0)
    keys_at_zero = dict(keys)
    for start in (37, 5000, torch.tensor([0, 1, 43]), torch.tensor([700, 700, 9])):
        assert relative(states(start), at_zero) < 1e-9
        for b, position in enumerate(torch.as_tensor(start).expand(3).tolist()):
            for layer, there in keys_at_zero.items():
                moved = relative(keys[layer][b], there[b])
                assert moved > 0.1 if position else moved < 1e-12
    for b in range(3):                                  # each sequence at its own place
        states(torch.tensor([700, 43, 9]))
        together = [k[b] for k in keys.values()]
        states([700, 43, 9][b])
        for a, k in zip(together, keys.values(), strict=True):
            assert torch.equal(a, k[b])


def windows_of(count=6, batch=4, seq=12, positions=64, seed=0) -> Windows:
    text = np.random.default_rng(seed).integers(3, 96, 400)
    return Windows(text, count, batch, seq, positions, seed)


def test_the_windows_of_a_sweep_lie_anywhere():
    """As whole windows below `positions`, or at 0 where they do not fit; near 0 more often."""
    starts = windows_of(count=600, positions=15).starts             # the cubes of random numbers
    assert starts.bincount().cumsum(0).tolist() == pytest.approx(
        [600 * (n / 4) ** (1 / 3) for n in (1, 2, 3, 4)], abs=40)
    for positions in (1, 12):
        assert not windows_of(count=600, positions=positions).starts.any()


# ------------------------------------------------------------------------------
# The sweeps, against derivatives of PyTorch's own log-probabilities

@pytest.fixture
def next_tokens(monkeypatch):
    """What is drawn where the sweeps draw next tokens: (windows, T, DRAWS) random ones."""
    y = torch.randint(3, 96, (6, 12, DRAWS))
    rows = []

    def multinomial(p, draws, replacement, generator):
        assert (draws, replacement) == (DRAWS, True)
        assert (p.sum(-1) - 1).abs().max() < 1e-5
        if not rows:                                                # another sweep begins
            rows.extend(y.flatten(0, 1))
        taken, rows[:] = rows[:len(p)], rows[len(p):]
        return torch.stack(taken)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    return y


def log_p_of(model, windows, y, project):
    """Σ_t log p(y_t) of every window and draw, (windows, DRAWS)."""
    states = model.hidden(windows.text, project, start=windows.starts)
    log_p = model.lm_head(model.norm(states)).log_softmax(-1)
    return log_p.gather(-1, y).sum(1)


def costs_by_hand(model, p, windows, y):
    """½ mean (Σ_t g_t·δ_t)² / T of every head at every level, (2, L, K, 8); the last is level 0.

    Σ_t g_t·δ_t is the derivative of Σ_t log p(y_t) by ε, at 0, where δ is added ε times.
    """
    L, K, d = shape(model)
    N, T = windows.text.shape
    epsilon = torch.zeros(2, L, K, 8, N, dtype=torch.float64, requires_grad=True)

    def along(side, layer, x, mean, U):
        """x plus all δ = −(x − mean)(I − P) of its heads, ε times each."""
        total = x
        for j, level in itertools.product(range(K), range(8)):
            P = U[layer, j, :, :level * d // 8] @ U[layer, j, :, :level * d // 8].T
            delta = -(x[:, j] - mean[:, j]).detach() @ (torch.eye(d).double() - P)
            delta[:, :p.whole] = 0
            shift = torch.zeros_like(x)
            shift[:, j] = delta
            total = total + epsilon[side, layer, j, 7 - level][:, None, None, None] * shift
        return total

    def project(layer, k, v, turn):
        m = torch.zeros(L, K, d).double() if p.mean_k is None else p.mean_k
        R_m = turn(m[layer][:, None].expand(k.shape))
        mu = p.mean_v[layer][:, None].expand(v.shape)
        return along(0, layer, turn(k), R_m, p.U_k), along(1, layer, v, mu, p.U_v)

    costs = 0
    for of_draw in log_p_of(model, windows, y, project).T:
        by_window, = torch.autograd.grad(of_draw.sum(), epsilon, retain_graph=True)
        costs = costs + 0.5 * by_window.square().mean(-1) / T / DRAWS
    return costs


@pytest.mark.parametrize("kind", [{"whole": 3, "mean": 2.0}, {}], ids=["turned", "plain"])
def test_the_order_is_that_of_the_second_order_cost_of_every_rank(
        model, next_tokens, monkeypatch, kind):
    model = model.double()
    windows = windows_of(positions=64 if kind else 1)
    p = in_double(random_projection(model, **kind))
    asked = []

    def noted(steps):
        asked.append(steps)
        return cheapest_first(steps)

    monkeypatch.setattr("search.cheapest_first", noted)
    order = find_order(model, p, windows)
    costs = costs_by_hand(model, p, windows, next_tokens).flatten(0, 2)
    assert relative(asked[0].cumsum(-1), costs[:, :-1]) < 1e-9

    ahead = costs.diff(dim=-1, prepend=torch.zeros(len(costs), 1))[:, :-1].numpy()
    ahead = [np.maximum.accumulate(row).tolist() for row in ahead]  # a cheap one behind a dear one
    by_hand = []
    while any(ahead):
        place = min((i for i, row in enumerate(ahead) if row), key=lambda i: ahead[i][0])
        ahead[place].pop(0)
        by_hand.append(place)
    assert order.tolist() == by_hand


def test_projections_in_float32_serve_a_model_in_float64(model):
    """As files hold them: `--dtype float64`."""
    p, model = random_projection(model, whole=2, mean=1.0), model.double()
    exact = find_order(model, p.to(None, torch.float64), windows_of())
    assert torch.equal(find_order(model, p, windows_of()), exact)


@pytest.mark.parametrize("whole", [0, 3])
def test_the_start_is_what_varies_and_what_the_answer_hangs_on(model, next_tokens, whole):
    """Eigenvectors of cov(x) / tr + E[gᵀg] / tr; of keys the second moments about R m."""
    model = model.double()
    L, K, d = shape(model)
    windows = windows_of()
    p = find_start(model, windows, whole)

    kept, zeros, before_rope = {}, [], {}

    def project(layer, k, v, turn):
        before_rope[layer], kept[layer] = k.detach(), (k.detach(), v.detach(), turn)
        zeros.extend(torch.zeros_like(x, requires_grad=True) for x in (k, v))
        return turn(k) + zeros[-2], v + zeros[-1]

    of_draws = log_p_of(model, windows, next_tokens, project).sum(0)
    gradients = [torch.autograd.grad(one, zeros, retain_graph=True) for one in of_draws]
    for layer, (k, v, turn) in kept.items():
        m = k[:, :, whole:].mean((0, 2))
        assert relative(p.mean_k[layer], m) < 1e-6
        assert relative(p.mean_v[layer], v[:, :, whole:].mean((0, 2))) < 1e-6
        for side, (x, U) in enumerate(((turn(k - m[:, None]), p.U_k), (v, p.U_v))):
            for j in range(K):
                rows = x[:, j, whole:].reshape(-1, d).numpy()
                g = torch.cat([of[2 * layer + side][:, j, whole:] for of in gradients])
                g = g.reshape(-1, d).numpy()
                varies = np.cov(rows.T, bias=True) if side else rows.T @ rows / len(rows)
                both = varies / varies.trace() + g.T @ g / (g * g).sum()
                _, vectors = np.linalg.eigh(both)
                same = U[layer, j].double().numpy().T @ vectors[:, ::-1]
                assert np.abs(np.abs(same) - np.eye(d)).max() < 1e-4
    assert p.whole == whole


def test_what_the_sweeps_add_zeros_to_is_the_model(model, tokens):
    L, K, d = shape(model)
    leaves = Leaves(torch.randn(L, K, d), torch.randn(L, K, d), 2)
    assert torch.equal(model(tokens, project=leaves), model(tokens))


def test_recomputed_layers_give_the_same_start_and_order(model, monkeypatch):
    """`--checkpoint`; layers are run once more for every draw, and no state is kept within one."""
    layers, plain = [], Model.layer

    def counted(self, i, *arguments):
        layers.append(i)
        return plain(self, i, *arguments)

    monkeypatch.setattr(Model, "layer", counted)
    found = []
    for recompute in (False, True):
        windows = windows_of()
        windows.recompute = recompute
        layers.clear()
        start = find_start(model, windows, 2)
        found.append((find_order(model, start, windows), start.tensors(), len(layers)))
    (order, tensors, once), (same_order, same, again) = found
    assert torch.equal(order, same_order)
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)
    L, batches = len(model.layers), 2
    assert (once, again - once) == (3 * batches * L, 2 * batches * DRAWS * L)


def test_probabilities_that_are_not_numbers_are_said_to_be(model):
    states = torch.randn(5, 32)
    states[3, 1] = torch.nan
    with pytest.raises(ValueError, match="not numbers"):
        drawn_gradients(model, states, None)


def test_the_gradient_of_a_drawn_token_is_that_of_its_log_probability(model, monkeypatch):
    """(onehot(y) − p) W, also where logits come in chunks; other draws are other tokens."""
    monkeypatch.setattr("model.CHUNK", 7)                           # the last one is not full
    model, plain, drawn = model.double(), torch.multinomial, []

    def multinomial(*arguments, **named):
        drawn.append(plain(*arguments, **named))
        return drawn[-1]

    monkeypatch.setattr(torch, "multinomial", multinomial)
    states = torch.randn(24, 32, dtype=torch.float64, requires_grad=True)
    found = drawn_gradients(model, states, torch.Generator().manual_seed(0))
    y = torch.cat(drawn)
    assert y.shape == (24, DRAWS)
    assert (y[:, 0] != y[:, 1]).any()
    log_p = model.lm_head(states).log_softmax(-1)
    for draw in range(DRAWS):
        of_draw = log_p.gather(1, y[:, draw:draw + 1]).sum()
        expected, = torch.autograd.grad(of_draw, states, retain_graph=True)
        assert relative(found[draw], expected) < 1e-12


@torch.no_grad()
def test_drawn_gradients_are_zero_in_the_mean_and_vary_as_fisher_information(model, monkeypatch):
    """E[gᵀg] = Wᵀ (diag p − pᵀp) W, within what 4,000 draws can say."""
    draws = 4000
    monkeypatch.setattr("search.DRAWS", draws)
    model = model.double()
    states = torch.randn(3, 32, dtype=torch.float64)
    W = model.lm_head.weight
    g = drawn_gradients(model, states, torch.Generator().manual_seed(0)).transpose(0, 1)
    for state, of_draws in zip(states, g, strict=True):
        p = (W @ state).softmax(-1)
        fisher = W.T @ (p.diag() - p[:, None] * p) @ W
        errors = of_draws.mean(0) / (fisher.diag() / draws).sqrt()
        assert errors.abs().max() < 5
        assert relative(of_draws.T @ of_draws / draws, fisher) < 0.15


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


# ------------------------------------------------------------------------------
# What the sweeps take, and what they are worth

def test_the_passes_of_the_sweeps_do_not_grow_with_the_heads(model, monkeypatch):
    """A pass for every batch, three times, and a backward pass for every batch and draw, twice."""
    counted = {"hidden": 0, "grad": 0}

    def counting(name, plain):
        def counted_call(*arguments, **named):
            counted[name] += 1
            return plain(*arguments, **named)

        return counted_call

    monkeypatch.setattr(Model, "hidden", counting("hidden", Model.hidden))
    monkeypatch.setattr(torch.autograd, "grad", counting("grad", torch.autograd.grad))
    for L, K in ((1, 1), (3, 4)):
        counted.update(hidden=0, grad=0)
        config = dataclasses.replace(model.config, num_hidden_layers=L, num_key_value_heads=K)
        larger = Model(config).requires_grad_(False)
        order = find_order(larger, find_start(larger, windows_of(), 2), windows_of())
        assert len(order) == 2 * L * K * 7
        assert counted == {"hidden": 3 * 2, "grad": 2 * 2 * DRAWS}


class Waits(Exception):
    """A process, which has its own part of a sum, for those of the others."""


def in_processes(monkeypatch, world, run):
    """What run() gives in each of several processes, whose sums are over all.

    One after the other, again and again: as far as sums are known, and then for one more.
    """
    totals = []
    while True:
        parts, results = [], []
        for rank in range(world):
            try:
                results.append(in_process(monkeypatch, rank, world, run, iter(totals)))
            except Waits as waits:
                parts += waits.args
        if results:
            assert len(results) == world
            return results
        totals.append(sum(parts))


def in_process(monkeypatch, rank, world, run, totals):
    def sum_over(part):
        total = next(totals, None)
        if total is None:
            raise Waits(part.clone())
        return part.copy_(total)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "WORLD", world)
        patch.setattr(processes, "RANK", rank)
        patch.setattr(processes, "sum_over", sum_over)
        return run()


@torch.no_grad()
def test_several_processes_find_what_one_finds(model, monkeypatch):
    """Three, for two batches: one has nothing to do. What is drawn follows from the window."""
    model, tokens_run = model.double(), []
    p = in_double(random_projection(model, whole=2, mean=1.0))

    def gradients(model, states, generator):
        tokens_run.append(len(states))
        return drawn_gradients(model, states, generator)

    monkeypatch.setattr("search.drawn_gradients", gradients)

    def run(batch=4):
        tokens_run.clear()
        windows = windows_of(batch=batch)
        return find_start(model, windows, 2), find_order(model, p, windows), sum(tokens_run)

    start, order, all_tokens = run()
    found = in_processes(monkeypatch, 3, run)
    assert [tokens for *_, tokens in found] == [all_tokens * 4 // 6, all_tokens * 2 // 6, 0]
    for other, same_order, _ in (*found, run(batch=1)):
        assert torch.equal(same_order, order)
        for name, tensor in start.tensors().items():
            assert relative(other.tensors()[name].abs(), tensor.abs()) < 1e-4


@pytest.fixture
def unequal(model):
    """A model whose W_o takes in nothing of layer 1's first key-value head."""
    d = model.config.head_dim
    W_o = model.layers[1].self_attn.o_proj
    W_o.weight.data = W_o.weight.clone()
    W_o.weight.data[:, :2 * d] = 0                                  # of the G = 2 query heads
    return model


@torch.no_grad()
def test_what_nobody_reads_is_lowered_first(unequal):
    """Neither the keys nor the values of that head count."""
    L, K, d = shape(unequal)
    p = random_projection(unequal, whole=2, mean=1.0)
    order = find_order(unequal, p, windows_of())
    assert order.bincount().tolist() == [7] * (2 * L * K)
    unread = [np.ravel_multi_index((side, 1, 0), (2, L, K)) for side in (0, 1)]
    assert sorted(order[:14].tolist()) == [unread[0]] * 7 + [unread[1]] * 7


@torch.no_grad()
def test_along_the_order_a_model_of_unequal_heads_loses_less_than_at_uniform_ranks(unequal):
    p = random_start(unequal, whole=2)
    order = find_order(unequal, p, windows_of(count=32, batch=8, seq=21, positions=1))
    tokens = torch.randint(3, 96, (16, 21))
    log_p = unequal(tokens).log_softmax(-1)

    def kl(ranks):
        return mean_kl(log_p, unequal(tokens, project=p.at(ranks)).log_softmax(-1))

    for budget in (0.75, 0.5, 0.375):
        by_order = kl(plan_at(order, unequal.config, budget))
        assert by_order < 0.9 * kl(uniform_ranks(budget, unequal.config))


# ------------------------------------------------------------------------------
# The script

@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A folder with what the script left for random projections, and its options."""
    folder = tmp_path_factory.mktemp("searched")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 96, 3000))
    model = load(CKPT)
    p, pca = random_projection(model, whole=2, mean=1.0), random_projection(model)
    p.save(folder / "p.safetensors", pca)
    options = ["--ckpt", CKPT, "--data", folder / "tokens.npy", "--seq", 32]
    options += ["--proj", folder / "p.safetensors", "--windows", 4, "--sweep-windows", 8]
    call("search", *options, "--budget", 0.4, "--out", folder / "out")
    return folder, options


def test_the_script_writes_the_plan_and_the_whole_path(searched):
    folder, _ = searched
    plan = json.loads((folder / "out" / "ranks.json").read_text())
    model = load(CKPT)
    L, K, d = shape(model)
    assert set(plan) == {
        "head_dim", "levels", "budget", "keys", "values", "kl", "uniform_kl", "evaluations", "path",
        "projections"}
    assert (plan["head_dim"], plan["levels"]) == (d, 8)
    assert plan["projections"] == Projection.load(folder / "p.safetensors").hash()
    assert len(plan["path"]) == 2 * L * K * 7
    assert 0.4 - 1 / (2 * L * K * 8) < plan["budget"] <= 0.4
    assert (folder / "out" / "ranks.png").read_bytes()[:4] == b"\x89PNG"


@torch.no_grad()
def test_the_plan_spelled_out_is_the_prefix_of_the_path_for_the_budget(searched):
    """And its KL is that of whole passes; along the path one is measured at every eighth."""
    folder, _ = searched
    file, model = folder / "out" / "ranks.json", load(CKPT)
    p = Projection.load(folder / "p.safetensors")
    plan = json.loads(file.read_text())
    found = read_ranks(file, model.config)
    ranks = found.ranks
    assert torch.equal(ranks, plan_at(found.order, model.config, 0.4))
    assert ranks.sum() == plan["budget"] * ranks.numel() * model.config.head_dim

    training = np.load(folder / "tokens.npy")[:2700]
    text = random_windows(training, 4, 32, torch.Generator().manual_seed(0))[:, :-1]
    log_p = model(text).log_softmax(-1)

    def kl(ranks):
        return mean_kl(log_p, model(text, project=p.at(ranks)).log_softmax(-1))

    assert plan["kl"] == pytest.approx(kl(ranks), rel=1e-4)
    assert plan["uniform_kl"] == pytest.approx(kl(uniform_ranks(0.4, model.config)), rel=1e-4)
    measured = {n: row[3] for n, row in enumerate(plan["path"], 1) if row[3] is not None}
    assert sorted(measured) == [8, 16, 24, 32, 40, 48, 56]
    for taken, found_kl in measured.items():
        plan_there = plan_at(found.order, model.config, 1 - taken / 64)
        assert found_kl == pytest.approx(kl(plan_there), rel=1e-4)


def test_the_order_of_the_script_is_that_of_the_sweep_over_the_training_text(searched):
    folder, options = searched
    model = load(CKPT)
    p = Projection.load(folder / "p.safetensors")
    training = np.load(folder / "tokens.npy")[:2700]
    found = read_ranks(folder / "out" / "ranks.json", model.config).order
    order = find_order(model, p, Windows(training, 8, 4, 32, 64, 0))
    assert torch.equal(found, order)
    elsewhere = find_order(model, p, Windows(training, 8, 4, 32, 1, 0))
    assert not torch.equal(found, elsewhere)
    call("search", *options, "--positions", 1, "--out", folder / "at_zero")
    found = read_ranks(folder / "at_zero" / "ranks.json", model.config).order
    assert torch.equal(found, elsewhere)


def test_plain_pca_has_a_search_of_its_own(searched, tmp_path):
    folder, options = searched
    call("search", *options, "--pca", "--out", tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ranks_pca.json", "ranks_pca.png"]
    model = load(CKPT)
    pca = Projection.load(folder / "p.safetensors", "pca_")
    found = read_ranks(tmp_path / "ranks_pca.json", model.config)
    assert found.projections == pca.hash() != Projection.load(folder / "p.safetensors").hash()
    training = np.load(folder / "tokens.npy")[:2700]                # calibrated at position 0
    assert torch.equal(found.order, find_order(model, pca, Windows(training, 8, 4, 32, 1, 0)))


def test_algorithm_1_has_the_kl_of_every_round_and_an_interrupt_leaves_the_path_so_far(
        searched, tmp_path, monkeypatch, capsys):
    """Stopped after ten lowerings: 1 − 10/64 of the cache."""
    _, options = searched

    def stopped(cost):
        yield from itertools.islice(exact(cost), 10)
        raise KeyboardInterrupt

    monkeypatch.setattr("search.exact", stopped)
    with pytest.raises(SystemExit) as left:
        call("search", *options, "--exact", "--out", tmp_path)
    assert left.value.code == 130
    assert "down to 84.4%" in capsys.readouterr().err.splitlines()[-1]
    plan = json.loads((tmp_path / "ranks.json").read_text())
    assert len(plan["path"]) == 10
    assert plan["budget"] == 1 - 10 / 64
    kls = [kl for *_, kl in plan["path"]]
    assert plan["kl"] == kls[-1] > kls[0]
    assert 8 * 10 <= plan["evaluations"] <= 9 * 10                  # the best one runs once more
    whole = (tmp_path / "ranks.json").read_bytes()                  # as good as: none is cut short
    with pytest.raises(SystemExit):
        call("search", *options, "--exact", "--out", tmp_path)
    assert "ranks_stopped.json holds the path" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "ranks.json").read_bytes() == whole


def test_positions_that_the_model_was_not_made_for_are_refused(searched, tmp_path, refusal):
    _, options = searched
    line = refusal("search", *options, "--positions", 65, "--out", tmp_path)
    assert line == "--positions 65: the model was made for 64"
    line = refusal("search", *options, "--seq", 65, "--out", tmp_path)
    assert line == "--seq 65: the model was made for 64"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_batches_and_each_knows_how_many(tokens, monkeypatch, world):
    windows = Windows(tokens.flatten().numpy(), 7, 2, 5, 1, 0)
    monkeypatch.setattr(processes, "WORLD", world)
    taken = []
    for rank in range(world):
        monkeypatch.setattr(processes, "RANK", rank)
        assert len(list(windows)) == len(windows)
        taken += [window for batch in windows for window in batch.tolist()]
    assert sorted(taken) == list(range(7))
