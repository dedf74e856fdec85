"""Projections: orthogonal, nested, harmless at full rank, and free on the value side."""
import pytest
import torch

from conftest import relative
from projection import (Moments, Projection, Rotation, check_ranks, fold_values, projector, read_ranks, uniform_ranks)


def shape(model):
    c = model.config
    return c.num_hidden_layers, c.num_key_value_heads, c.head_dim


def random_projection(model) -> Projection:
    L, K, d = shape(model)
    U_k, U_v = torch.linalg.qr(torch.randn(2, L, K, d, d)).Q
    return Projection(U_k, U_v, torch.randn(L, K, d))


def random_ranks(model, *batch) -> torch.Tensor:
    L, K, d = shape(model)
    return torch.randint(1, 9, (2, L, *batch, K)) * (d // 8)


def test_full_rank_is_the_base_model(model, tokens):
    full = uniform_ranks(1.0, model.config)
    assert torch.equal(model(tokens, project=random_projection(model).at(full)), model(tokens))


def test_a_head_at_full_rank_passes_through_untouched(model):
    """Also in bfloat16, where k U Uᵀ would be rounded, and beside heads that are projected."""
    L, K, d = shape(model)
    ranks = random_ranks(model)
    ranks[:, :, 1] = d
    ranks[:, :, 0] = d // 2
    k, v = torch.randn(2, 3, K, 7, d).bfloat16()
    k_hat, v_hat = random_projection(model).at(ranks)(1, k, v)
    assert torch.equal(k_hat[:, 1], k[:, 1]) and torch.equal(v_hat[:, 1], v[:, 1])
    assert not torch.equal(k_hat[:, 0], k[:, 0])


def test_columns_beyond_the_rank_have_no_influence(model, tokens):
    p, ranks = random_projection(model), random_ranks(model)
    beyond = torch.arange(p.U_k.shape[-1]) >= ranks[..., None]                           # (2, L, K, d)
    noise = lambda U, cut: torch.where(cut[..., None, :], torch.full_like(U, 7.0), U)
    q = Projection(noise(p.U_k, beyond[0] & (ranks[0] < p.U_k.shape[-1])[..., None]),
                   noise(p.U_v, beyond[1] & (ranks[1] < p.U_k.shape[-1])[..., None]), p.mean_v)
    assert torch.equal(model(tokens, project=p.at(ranks)), model(tokens, project=q.at(ranks)))


def test_a_key_mean_would_change_nothing(model, tokens):
    """softmax does not see a constant added to every key, so the projections keep no mean of the keys."""
    L, K, d = shape(model)
    constant = torch.randn(K, 1, d)
    shifted = model(tokens, project=lambda layer, k, v: (k + constant, v))
    assert relative(shifted, model(tokens)) < 1e-5


def test_every_sequence_may_have_ranks_of_its_own(model, tokens):
    p, ranks = random_projection(model), random_ranks(model, len(tokens))
    together = model(tokens, project=p.at(ranks))
    for b in range(len(tokens)):
        alone = model(tokens[b:b + 1], project=p.at(ranks[:, :, b]))
        assert relative(together[b:b + 1], alone) < 1e-5


def test_folding_values_into_the_weights_changes_nothing(model, tokens):
    """softmax(q kᵀ) v̂ W_o from the coordinates that a cache would hold, against the projection in the original space."""
    p, ranks = random_projection(model), random_ranks(model)
    ranks[0] = model.config.head_dim                                                     # keys as they are
    G = model.config.num_attention_heads // model.config.num_key_value_heads
    for i, layer in enumerate(model.layers):
        seen = {}
        model.hidden(tokens, observe=lambda j, q, k, v: seen.update({j: (q, k, v)}))
        q, k, v = seen[i]
        x = torch.randn(*tokens.shape, model.config.hidden_size)
        v = layer.self_attn.v_proj(x).view(*tokens.shape, -1, v.shape[-1]).transpose(1, 2)
        _, v_hat = p.at(ranks)(i, k, v)
        expected = layer.self_attn.o_proj(model.attend(q, k, v_hat).transpose(1, 2).flatten(2))

        W_v, W_o, bias = fold_values(layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight, p.U_v[i], p.mean_v[i],
                                     ranks[1, i])
        coordinates = (x @ W_v.T).split(ranks[1, i].tolist(), dim=-1)                    # K of (B, T, r)
        scores = q @ k.repeat_interleave(G, 1).transpose(2, 3) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
        sums = [weights[:, h] @ coordinates[h // G] for h in range(q.shape[1])]
        assert W_v.shape[0] == ranks[1, i].sum() and W_o.shape[1] == G * ranks[1, i].sum()
        assert relative(torch.cat(sums, -1) @ W_o.T + bias, expected) < 1e-5


def test_pca_keeps_the_most_variance_of_all_projections(model):
    L, K, d = shape(model)
    moments = Moments(model.config)
    sequences = [torch.randint(3, 96, (4, 25)) for _ in range(3)]
    kept = []
    for tokens in sequences:
        model.hidden(tokens, observe=moments)
        model.hidden(tokens, observe=lambda layer, q, k, v: kept.append((layer, q, k, v)))
    pca = moments.pca()
    for layer in range(L):
        v = torch.cat([v for i, _, _, v in kept if i == layer]).transpose(0, 1).flatten(1, 2).double()   # (K, n, d)
        q = torch.cat([q for i, q, _, _ in kept if i == layer]).double()
        centered = v - v.mean(1, keepdim=True)
        assert relative(moments.mean_v()[layer], v.mean(1)) < 1e-6
        singular = torch.linalg.svdvals(centered).square()
        coordinates = (centered @ pca.U_v[layer].double()).square().sum(1)
        assert relative(coordinates.cumsum(-1), singular.cumsum(-1)) < 1e-5
        G = q.shape[1] // K
        for j in range(K):
            rows = q[:, j * G:(j + 1) * G].flatten(0, 2)
            assert relative(moments.qq[layer, j], rows.T @ rows) < 1e-9


def test_the_aware_start_knows_the_readers(model, tokens):
    """Directions that no query looks in, and those that W_o does not take in, come last."""
    L, K, d = shape(model)
    moments = Moments(model.config)
    moments.n += 100
    axes = torch.arange(1, d + 1, dtype=torch.float64)
    moments.kk += 100 * torch.eye(d)                               # every direction of keys and values as strong
    moments.vv += 100 * torch.eye(d)
    moments.qq += 100 * torch.diag(axes)                           # queries look more along later axes
    start = moments.aware([torch.linalg.qr(torch.randn(K * moments.G * d, K * moments.G * d)).Q
                           * axes.flip(0).repeat(K * moments.G) for _ in range(L)])
    expected = torch.eye(d).expand(L, K, d, d)
    assert relative(start.U_k.abs(), expected.flip(-1)) < 1e-5     # the last axis first
    assert relative(start.U_v.abs(), expected) < 1e-5              # W_o reads the first axis most


def test_the_rotation_starts_as_the_identity_and_stays_orthogonal(model):
    start = random_projection(model)
    rotation = Rotation(start)
    assert relative(rotation().U_k, start.U_k) < 1e-6
    for parameter in rotation.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    d = start.U_k.shape[-1]
    for U in (rotation().U_k, rotation().U_v):
        assert (U.mT @ U - torch.eye(d)).abs().max() < 1e-5
    C, A = rotation.cayley(rotation.A_k.double())[0, 1], torch.zeros(d, d, dtype=torch.float64)
    A[rotation.rows, rotation.columns] = rotation.A_k[0, 1].double()
    A, eye = A - A.T, torch.eye(d, dtype=torch.float64)
    assert (C.T @ C - eye).abs().max() < 1e-12
    assert relative(C, torch.linalg.inv(eye - A / 2) @ (eye + A / 2)) < 1e-9


def test_turning_within_a_block_of_ranks_would_change_no_projector(model):
    """Why those entries are not parameters."""
    L, K, d = shape(model)
    if d // 8 < 2:
        pytest.skip("a block is a single column")
    U = random_projection(model).U_k[0]
    turn = torch.block_diag(*[torch.linalg.qr(torch.randn(d // 8, d // 8)).Q for _ in range(8)])
    for rank in range(d // 8, d, d // 8):
        ranks = torch.full((K,), rank)
        assert relative(projector(U @ turn, ranks), projector(U, ranks)) < 1e-5


def test_save_and_load_give_the_same(model, tmp_path):
    p = random_projection(model)
    p.pca = random_projection(model)
    p.save(tmp_path / "p.safetensors")
    q = Projection.load(tmp_path / "p.safetensors")
    for a, b in ((p, q), (p.pca, q.pca)):
        assert torch.equal(a.U_k, b.U_k) and torch.equal(a.U_v, b.U_v) and torch.equal(a.mean_v, b.mean_v)


def test_wrong_ranks_are_refused(model):
    L, K, d = shape(model)
    good = torch.full((2, L, K), d // 2)
    check_ranks(good, L, K, d)
    for wrong in (good[:1], good[:, :1], good.float(), good * 0, good * 3, good + 1 if d > 8 else good * 20, -good):
        with pytest.raises(ValueError, match="rank"):
            random_projection(model).at(wrong)


def test_uniform_ranks_are_rounded_down(model):
    d = model.config.head_dim
    for budget, eighths in ((1.0, 8), (0.99, 7), (0.875, 7), (0.3, 2), (0.25, 2), (0.125, 1)):
        assert (uniform_ranks(budget, model.config) == eighths * d // 8).all()


def test_a_plan_is_the_longest_prefix_of_the_path_within_the_budget(model, tmp_path):
    import json
    L, K, d = shape(model)
    path = [["keys", 0, 1, 0.1], ["values", 1, 0, 0.2], ["values", 1, 0, 0.3]]
    plan = {"head_dim": d, "budget": 1.0, "keys": [[d] * K] * L, "values": [[d] * K] * L, "path": path}
    (tmp_path / "ranks.json").write_text(json.dumps(plan))
    one = 1 / (2 * L * K * 8)
    for budget, entries in ((1.0, 0), (1 - 0.5 * one, 1), (1 - one, 1), (1 - 1.01 * one, 2), (1 - 3 * one, 3)):
        expected = torch.full((2, L, K), d)
        for side, layer, head, _ in path[:entries]:
            expected[int(side == "values"), layer, head] -= d // 8
        assert torch.equal(read_ranks(tmp_path / "ranks.json", model.config, budget), expected)
    assert (read_ranks(tmp_path / "ranks.json", model.config) == d).all()
    for broken in ({"head_dim": d + 8}, {"path": [["keys", 99, 0, 0]]}, {"path": 3}, {"keys": [[d]]}, {"keys": None},
                   {"path": [["keys", 0, 0, 0]] * 8}):
        (tmp_path / "ranks.json").write_text(json.dumps(plan | broken))
        with pytest.raises(ValueError, match="ranks.json"):
            read_ranks(tmp_path / "ranks.json", model.config, None if "keys" in broken else 0.5)
