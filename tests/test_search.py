"""The search: Algorithm 1 decision by decision, a nested path, and the lazy search close behind."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import GOLDEN
from model import load
from projection import Projection, plan_on_path, read_ranks
from search import Cost, exact, lazy
from test_projection import random_projection, shape

ROOT = GOLDEN.parent.parent
CKPT = GOLDEN / "mistral_sharded_head_dim"


@pytest.fixture
def double(model):
    """In float64: near ties flip in float32."""
    p = random_projection(model)
    return model.double(), Projection(p.U_k.double(), p.U_v.double(), p.mean_v.double())


def brute_force(model, p, tokens, rounds):
    """Algorithm 1 from whole forward passes and PyTorch's own KL."""
    L, K, d = shape(model)
    ranks, log_p, path = torch.full((2, L, K), d), model(tokens).log_softmax(-1), []
    for _ in range(rounds):
        best = None
        for side in range(2):
            for layer in range(L):
                for head in range(K):
                    if ranks[side, layer, head] > d // 8:
                        ranks[side, layer, head] -= d // 8
                        log_q = model(tokens, project=p.at(ranks)).log_softmax(-1)
                        kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum").item() / tokens.numel()
                        ranks[side, layer, head] += d // 8
                        if best is None or kl < best[0]:
                            best = kl, (side, layer, head)
        ranks[best[1]] -= d // 8
        path.append(best)
    return path


@torch.no_grad()
def test_exact_is_algorithm_1_decision_by_decision(double):
    model, p = double
    tokens = torch.randint(3, 96, (2, 11))
    cost, rounds = Cost(model, p, tokens), 25
    for (kl, candidate), found in zip(brute_force(model, p, tokens, rounds), exact(cost)):
        assert found == candidate
        assert cost.kl == pytest.approx(kl, rel=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("search", [exact, lazy])
def test_the_path_is_nested_and_ends_at_an_eighth(double, search):
    model, p = double
    L, K, d = shape(model)
    cost, before = Cost(model, p, torch.randint(3, 96, (1, 9))), torch.full((2, L, K), d)
    for candidate in search(cost):
        assert (before - cost.ranks).sum() == d // 8 == before[candidate] - cost.ranks[candidate]
        before = cost.ranks
    assert (cost.ranks == d // 8).all()


@torch.no_grad()
def test_a_partial_pass_gives_the_whole_pass(double):
    """Only the layers from the lowered one up are run; the KL is that of the whole model."""
    model, p = double
    tokens = torch.randint(3, 96, (2, 9))
    cost, log_p = Cost(model, p, tokens), model(tokens).log_softmax(-1)
    for candidate in lazy(cost):
        log_q = model(tokens, project=p.at(cost.ranks)).log_softmax(-1)
        assert cost.kl == pytest.approx(F.kl_div(log_q, log_p, log_target=True, reduction="sum").item() / 18, rel=1e-9)
    assert cost.layer_passes < len(model.layers) * cost.passes


@torch.no_grad()
def test_lazy_takes_a_small_share_of_the_passes_and_is_nearly_as_good(double):
    model, p = double
    tokens, ends = torch.randint(3, 96, (4, 30)), []
    for search in (exact, lazy):
        cost = Cost(model, p, tokens)
        curve = [cost.kl for _ in search(cost)]
        ends.append((cost.passes, curve))
    (exact_passes, best), (lazy_passes, curve) = ends
    assert lazy_passes < exact_passes / 3                          # a model of 8 or 16 ranks; the gain grows with their number
    assert sum(curve) < 1.3 * sum(best)


def test_lazy_ends_where_lowering_reduces_the_kl():
    """Rounding makes increases negative in bfloat16."""
    class Noise:
        kl, step = 0.0, 1
        ranks = torch.full((2, 1, 2), 3)
        of = lambda self, c: -1e-5 * (1 + 0.05 * sum(c))
        candidates = lambda self: [tuple(c) for c in (self.ranks > 1).nonzero().tolist()]

        def lower(self, c):
            self.ranks[c] -= 1
    assert len(list(lazy(Noise()))) == 8


def test_the_budget_reached_is_the_largest_not_above_the_one_asked_for(model):
    L, K, d = shape(model)
    order, one = torch.arange(8), 1 / (2 * L * K * 8)
    for lowered, taken in ((0, 0), (0.5, 1), (1, 1), (3.2, 4), (8, 8)):
        budget = 1 - lowered * one
        share = plan_on_path(order, model.config, budget).sum().item() / (2 * L * K * d)
        assert share <= budget < share + one and share == 1 - taken * one
    with pytest.raises(ValueError, match="ends at"):
        plan_on_path(order, model.config, 1 - 9 * one)


def script(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_script_writes_a_plan_that_the_model_reads(tmp_path):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 96, 3000))
    model = load(CKPT)
    random_projection(model).save(tmp_path / "p.safetensors")
    arguments = ["search.py", "--ckpt", CKPT, "--data", tmp_path / "tokens.npy", "--proj", tmp_path / "p.safetensors", "--seq", 32,
                 "--out", tmp_path / "out", "--budget", 0.4]
    done = script(*arguments)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "out" / "ranks.json").read_text())
    L, K, d = shape(model)
    assert set(plan) == {"head_dim", "budget", "keys", "values", "kl", "uniform_kl", "evaluations", "path"}
    assert plan["head_dim"] == d and len(plan["path"]) == 2 * L * K * 7 and 0.4 - 1 / (2 * L * K * 8) < plan["budget"] <= 0.4
    ranks = read_ranks(tmp_path / "out" / "ranks.json", model.config)
    assert torch.equal(ranks, read_ranks(tmp_path / "out" / "ranks.json", model.config, 0.4))
    assert ranks.sum() == plan["budget"] * ranks.numel() * d
    assert (tmp_path / "out" / "ranks.png").read_bytes()[:4] == b"\x89PNG"


def test_wrong_input_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    from search import main
    np.save(tmp_path / "tokens.npy", np.full(3000, 5))
    random_projection(load(GOLDEN / "llama_mha")).save(tmp_path / "other.safetensors")
    random_projection(load(CKPT)).save(tmp_path / "p.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    good = ["--data", tmp_path / "tokens.npy", "--proj", tmp_path / "p.safetensors"]
    for arguments, culprits in (
            ([*good, "--proj", tmp_path / "none.safetensors"], ["--proj", "none.safetensors"]),
            ([*good, "--proj", tmp_path / "broken.safetensors"], ["--proj", "broken.safetensors"]),
            ([*good, "--proj", tmp_path / "other.safetensors"], ["--proj", "model has"]),
            ([*good, "--budget", 0.1], ["--budget", "0.1"]),
            ([*good, "--budget", "half"], ["--budget", "half"]),
            ([*good, "--out", tmp_path / "tokens.npy"], ["--out", "tokens.npy"]),
            ([*good, "--seq", 5000], ["--data", "too short"])):
        monkeypatch.setattr(sys, "argv", ["search.py", *map(str, ["--ckpt", CKPT, "--out", tmp_path / "out", *arguments])])
        with pytest.raises(SystemExit) as left:
            main()
        lines = capsys.readouterr().err.strip().splitlines()
        assert left.value.code == 2 and len(lines) == 1 and all(c in lines[0] for c in culprits), (arguments, lines)
