"""Projections: orthogonal, nested, harmless at full rank, and free on the value side."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import random_projection, random_ranks, relative, shape

from cache import fold_head
from model import causal_attention
from projection import (
    Moments,
    Projection,
    Rotation,
    check_ranks,
    plan_at,
    projector,
    query_aware,
    uniform_ranks,
)

# ------------------------------------------------------------------------------
# The projection

def test_full_rank_is_the_base_model(model, tokens):
    full = uniform_ranks(1.0, model.config)
    projected = model(tokens, project=random_projection(model).at(full))
    assert torch.equal(projected, model(tokens))


def test_a_head_at_full_rank_passes_through_untouched(model):
    """Also in bfloat16, where k U Uᵀ would be rounded, and beside heads that are projected."""
    L, K, d = shape(model)
    ranks = random_ranks(model)
    ranks[:, :, 1] = d
    ranks[:, :, 0] = d // 2
    k, v = torch.randn(2, 3, K, 7, d).bfloat16()
    k_hat, v_hat = random_projection(model).at(ranks)(1, k, v)
    assert torch.equal(k_hat[:, 1], k[:, 1])
    assert torch.equal(v_hat[:, 1], v[:, 1])
    assert not torch.equal(k_hat[:, 0], k[:, 0])


def test_columns_beyond_the_rank_have_no_influence(model, tokens):
    p, ranks = random_projection(model), random_ranks(model)
    d = model.config.head_dim

    def with_noise(U, ranks):
        beyond = torch.arange(d) >= ranks[..., None]                # (L, K, d)
        beyond &= (ranks < d)[..., None]
        return torch.where(beyond[..., None, :], torch.full_like(U, 7.0), U)

    noisy = Projection(with_noise(p.U_k, ranks[0]), with_noise(p.U_v, ranks[1]), p.mean_v)
    assert not torch.equal(noisy.U_k, p.U_k)
    assert torch.equal(model(tokens, project=p.at(ranks)), model(tokens, project=noisy.at(ranks)))


def test_a_key_mean_would_change_nothing(model, tokens):
    """softmax does not see a constant added to every key, so no mean of the keys is kept."""
    _, K, d = shape(model)
    constant = torch.randn(K, 1, d)
    shifted = model(tokens, project=lambda layer, k, v: (k + constant, v))
    assert relative(shifted, model(tokens)) < 1e-5


def test_what_a_value_loses_is_replaced_by_the_mean(model):
    """v̂ = v P + μ (I − P): a value that is the mean stays as it is, whatever the rank."""
    _, K, d = shape(model)
    p, ranks = random_projection(model), random_ranks(model)
    v = p.mean_v[1][:, None].expand(1, K, 4, d)
    _, v_hat = p.at(ranks)(1, v, v)
    assert relative(v_hat, v) < 1e-5


def test_every_sequence_may_have_ranks_of_its_own(model, tokens):
    p, ranks = random_projection(model), random_ranks(model, len(tokens))
    together = model(tokens, project=p.at(ranks))
    for b in range(len(tokens)):
        alone = model(tokens[b:b + 1], project=p.at(ranks[:, :, b]))
        assert relative(together[b:b + 1], alone) < 1e-5


def test_save_and_load_give_the_same(model, tmp_path):
    path = tmp_path / "p.safetensors"
    p, pca = random_projection(model), random_projection(model)
    p.save(path, pca=pca)
    for saved, prefix in ((p, ""), (pca, "pca_")):
        loaded = Projection.load(path, prefix)
        for name, tensor in saved.tensors().items():
            assert torch.equal(tensor, getattr(loaded, name))


def test_a_file_without_pca_says_so(model, tmp_path):
    random_projection(model).save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="p.safetensors: no tensor .?pca_U_k"):
        Projection.load(tmp_path / "p.safetensors", "pca_")


def test_tensors_that_do_not_fit_each_other_are_refused(model):
    p = random_projection(model)
    for U_k, U_v, mean_v in (
            (p.U_k[:1], p.U_v, p.mean_v),
            (p.U_k, p.U_v, p.mean_v[..., :-1]),
            (p.U_k[..., :-1], p.U_v[..., :-1], p.mean_v),
            (p.U_k[0], p.U_v[0], p.mean_v[0]),
            (p.U_k, p.U_v, torch.tensor(0.0)),
            (torch.tensor(1.0), p.U_v, p.mean_v)):
        with pytest.raises(ValueError, match="shapes"):
            Projection(U_k, U_v, mean_v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_projections_of_another_dtype_are_read_as_float32(model, tmp_path, dtype):
    """In a file that another script wrote; half of one dtype would fail in the midst of a pass."""
    p = random_projection(model)
    p.mean_v = p.mean_v.to(dtype)
    p.save(tmp_path / "p.safetensors")
    loaded = Projection.load(tmp_path / "p.safetensors")
    assert {x.dtype for x in loaded.tensors().values()} == {torch.float32}
    assert torch.equal(loaded.mean_v, p.mean_v.float())


def test_the_hash_tells_both_matrices_and_nothing_else(model, tmp_path):
    """To the last digit; a file and another dtype are no change."""
    p = random_projection(model)
    assert Projection(p.U_k, p.U_v, p.mean_v + 1).hash() == p.hash()
    assert p.to("cpu", torch.float64).hash() == p.hash()
    p.save(tmp_path / "p.safetensors")
    assert Projection.load(tmp_path / "p.safetensors").hash() == p.hash()
    hashes = {p.hash(), Projection(p.U_v, p.U_k, p.mean_v).hash()}
    for name, place in itertools.product(("U_k", "U_v"), (0, -1)):
        tensors = {key: x.clone() for key, x in p.tensors().items()}
        number = tensors[name][place, place, place, place]
        number.copy_(number.nextafter(torch.tensor(2.0)))           # by its last digit
        hashes.add(Projection.of(tensors).hash())
    assert len(hashes) == 6


# ------------------------------------------------------------------------------
# Folding

def test_folding_values_into_the_weights_changes_nothing(every_model, tokens):
    """softmax(q kᵀ) v̂ W_o from the coordinates that a cache would hold, against v̂ itself."""
    model = every_model
    p, ranks = random_projection(model), random_ranks(model)
    ranks[0] = model.config.head_dim                                # keys as they are
    G = model.config.num_attention_heads // model.config.num_key_value_heads
    seen = {}
    model.hidden(tokens, observe=lambda i, q, k, v: seen.update({i: (q, k)}))
    for i, (q, k) in seen.items():
        weights = model.layers[i].self_attn
        x = torch.randn(*tokens.shape, model.config.hidden_size)
        v = model.split_heads(weights.v_proj(x))
        _, v_hat = p.at(ranks)(i, k, v)
        expected = weights.o_proj(causal_attention(q, k, v_hat, None).transpose(1, 2).flatten(2))

        attention = causal_weights(q, k.repeat_interleave(G, 1))
        K, d = k.shape[1], k.shape[3]
        W_v, W_o = weights.v_proj.weight.split(d), weights.o_proj.weight.unflatten(1, (K, G, d))
        b_v = [None] * K if weights.v_proj.bias is None else weights.v_proj.bias.split(d)
        total = 0
        for j, r in enumerate(ranks[1, i].tolist()):
            U_r = p.U_v[i, j, :, :r]
            W, b, W_out, bias = fold_head(W_v[j], b_v[j], W_o[:, j], U_r, p.mean_v[i, j])
            assert (W.shape[0], W_out.shape[1:]) == (r, (G, r))
            coordinates = F.linear(x, W, b)                         # (B, T, r)
            for g in range(G):
                total = total + attention[:, j * G + g] @ coordinates @ W_out[:, g].T
            total = total + bias
        assert relative(total, expected) < 1e-5


def causal_weights(q, k):
    """softmax(q kᵀ / sqrt(d)) over the tokens up to each one, (B, H, T, T)."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    future = torch.ones_like(scores).triu(1).bool()
    return scores.masked_fill(future, -torch.inf).softmax(-1)


# ------------------------------------------------------------------------------
# Calibration

def observed(model, sequences):
    """All queries (L, H, n, d), keys and values (L, K, n, d) of some batches, float64."""
    kept = []
    for tokens in sequences:
        model.hidden(tokens, observe=lambda i, *qkv: kept.append((i, qkv)))
    layers = []
    for layer in range(model.config.num_hidden_layers):
        batches = [qkv for i, qkv in kept if i == layer]
        parts = zip(*batches, strict=True)
        layers.append([torch.cat(part).transpose(0, 1).flatten(1, 2).double() for part in parts])
    return [torch.stack(part) for part in zip(*layers, strict=True)]


def test_pca_keeps_the_most_variance_of_all_projections(model):
    sequences = [torch.randint(3, 96, (4, 25)) for _ in range(3)]
    moments = Moments(model.config)
    for tokens in sequences:
        model.hidden(tokens, observe=moments)
    pca = moments.pca()
    _, k, v = observed(model, sequences)
    assert relative(moments.mean_v(), v.mean(2)) < 1e-6
    for U, x in ((pca.U_k, k), (pca.U_v, v)):
        centered = x - x.mean(2, keepdim=True)
        most = torch.linalg.svdvals(centered).square()
        kept = (centered @ U.double()).square().sum(2)
        assert relative(kept.cumsum(-1), most.cumsum(-1)) < 1e-5


def test_calibration_sums_the_queries_of_a_group(model):
    L, K, d = shape(model)
    sequences = [torch.randint(3, 96, (4, 25)) for _ in range(2)]
    moments = Moments(model.config)
    for tokens in sequences:
        model.hidden(tokens, observe=moments)
    q, _, _ = observed(model, sequences)
    rows = q.view(L, K, -1, d)
    assert relative(moments.qq, rows.mT @ rows) < 1e-9


def test_the_query_aware_start_knows_the_readers(model):
    """Directions that no query looks in, and those that W_o does not take in, come last."""
    L, K, d = shape(model)
    moments = Moments(model.config)
    axes = torch.arange(1, d + 1, dtype=torch.float64)
    moments.tokens += 100
    moments.kk += 100 * torch.eye(d)            # keys and values vary alike in all directions
    moments.vv += 100 * torch.eye(d)
    moments.qq += 100 * torch.diag(axes)        # queries look more along later axes
    width = K * moments.G * d
    taken_in = axes.flip(0).repeat(K * moments.G)                   # W_o reads the first axis most
    W_o = [torch.linalg.qr(torch.randn(width, width)).Q * taken_in for _ in range(L)]
    start = query_aware(moments, W_o)
    expected = torch.eye(d).expand(L, K, d, d)
    assert relative(start.U_k.abs(), expected.flip(-1)) < 1e-5
    assert relative(start.U_v.abs(), expected) < 1e-5


# ------------------------------------------------------------------------------
# The rotation

def turned(start) -> Rotation:
    """A rotation far from its start."""
    rotation = Rotation(start)
    for parameter in rotation.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    return rotation


def test_the_rotation_starts_at_its_start(model):
    start = random_projection(model)
    p = Rotation(start)()
    assert relative(p.U_k, start.U_k) < 1e-6
    assert relative(p.U_v, start.U_v) < 1e-6
    assert torch.equal(p.mean_v, start.mean_v)


def test_the_rotation_stays_orthogonal(model):
    p = turned(random_projection(model))()
    for U in (p.U_k, p.U_v):
        assert (U.mT @ U - torch.eye(U.shape[-1])).abs().max() < 1e-5


def test_the_rotation_is_the_cayley_map_of_a_skew_symmetric_matrix(model):
    rotation = turned(random_projection(model))
    d = model.config.head_dim
    C = rotation.cayley(rotation.A_k.double())[0, 1]
    A = torch.zeros(d, d, dtype=torch.float64)
    A[rotation.rows, rotation.columns] = rotation.A_k[0, 1].double()
    A = A - A.T
    eye = torch.eye(d, dtype=torch.float64)
    assert (C.T @ C - eye).abs().max() < 1e-12
    assert relative(C, torch.linalg.inv(eye - A / 2) @ (eye + A / 2)) < 1e-9


def test_turning_within_an_eighth_would_change_no_projector(model):
    """Why those entries are not parameters."""
    _, K, d = shape(model)
    eighth = d // 8
    assert eighth == 2
    U = random_projection(model).U_k[0]
    turns = [torch.linalg.qr(torch.randn(eighth, eighth)).Q for _ in range(8)]
    within = torch.block_diag(*turns)
    for rank in range(eighth, d, eighth):
        ranks = torch.full((K,), rank)
        assert relative(projector(U @ within, ranks), projector(U, ranks)) < 1e-5


def test_parameters_are_all_entries_between_two_eighths(model):
    rotation = Rotation(random_projection(model))
    d = model.config.head_dim
    pairs = set(zip(rotation.rows.tolist(), rotation.columns.tolist(), strict=True))
    eighth = d // 8
    assert pairs == {(a, b) for b in range(d) for a in range(b) if a // eighth != b // eighth}


@pytest.mark.parametrize("B", [1, 3])
def test_an_entry_is_visible_if_a_sequence_keeps_one_of_its_columns_and_cuts_the_other(model, B):
    rotation = Rotation(random_projection(model))
    ranks = random_ranks(model, B)
    r = ranks[..., None]                                            # (2, L, B, K, 1)
    kept_and_cut = (rotation.rows < r) & (rotation.columns >= r)
    assert torch.equal(rotation.visible_entries(ranks), kept_and_cut.any(2))


def test_an_entry_that_is_not_visible_changes_nothing(model, tokens):
    """And each one that is visible does."""
    rotation = Rotation(random_projection(model))
    ranks = random_ranks(model, len(tokens))
    visible = rotation.visible_entries(ranks)
    before = model(tokens, project=rotation().at(ranks))

    def change(entries) -> float:
        with torch.no_grad():
            rotation.A_k.copy_(0.3 * entries[0])
            rotation.A_v.copy_(0.3 * entries[1])
        return relative(model(tokens, project=rotation().at(ranks)), before)

    assert change(~visible) < 1e-5
    assert change(visible) > 1e-3


def test_the_hook_of_a_step_has_gradients_for_the_entries_that_its_ranks_see_alone(model, tokens):
    """There they are those of the whole rotation, whose others are rounding noise."""
    rotation = turned(random_projection(model))
    ranks = random_ranks(model, len(tokens))
    A = rotation.A_k, rotation.A_v

    def gradients(project):
        out = model(tokens, project=project)
        return out, torch.autograd.grad(out.square().sum(), [*A, rotation.mean_v])

    out, (*mine, by_mean) = gradients(rotation.at(ranks))
    whole, (*others, by_mean_of_all) = gradients(rotation().at(ranks))
    assert torch.equal(out, whole)
    assert relative(by_mean, by_mean_of_all) < 1e-5
    for seen, gradient, other in zip(rotation.visible_entries(ranks), mine, others, strict=True):
        assert 0 < seen.sum() < seen.numel()
        assert (gradient[~seen] == 0).all()
        assert (gradient[seen] != 0).all()
        assert relative(gradient[seen], other[seen]) < 1e-5


# ------------------------------------------------------------------------------
# Plans

def test_wrong_ranks_are_refused(model):
    L, K, d = shape(model)
    good = torch.full((2, L, K), d // 2)
    check_ranks(good, L, K, d)
    for wrong in (good[:1], good[:, :1], good.float(), good * 0, good * 3, good + 1, -good):
        with pytest.raises(ValueError, match="rank"):
            random_projection(model).at(wrong)


def test_ranks_of_too_few_dimensions_are_refused_with_their_shape(model):
    L, K, d = shape(model)
    for wrong in (torch.full((L, K), d), torch.full((K,), d), torch.tensor(d)):
        with pytest.raises(ValueError, match="ranks of shape"):
            check_ranks(wrong, L, K, d)


def test_uniform_ranks_are_rounded_down(model):
    L, K, d = shape(model)
    for budget, eighths in ((1.0, 8), (0.99, 7), (0.875, 7), (0.3, 2), (0.25, 2), (0.125, 1)):
        expected = torch.full((2, L, K), eighths * d // 8)
        assert torch.equal(uniform_ranks(budget, model.config), expected)


def test_the_budget_reached_is_the_largest_not_above_the_one_asked_for(model):
    L, K, d = shape(model)
    order = torch.arange(8)
    one = 1 / (2 * L * K * 8)
    for lowered, taken in ((0, 0), (0.5, 1), (1, 1), (3.2, 4), (8, 8)):
        budget = 1 - lowered * one
        share = plan_at(order, model.config, budget).sum().item() / (2 * L * K * d)
        assert share <= budget < share + one
        assert share == 1 - taken * one
    with pytest.raises(ValueError, match="ends at"):
        plan_at(order, model.config, 1 - 9 * one)


def test_a_plan_for_a_larger_budget_is_a_prefix(model):
    L, K, d = shape(model)
    heads = 2 * L * K
    order = torch.cat([torch.randperm(heads) for _ in range(7)])
    for taken in range(len(order) + 1):
        plan = plan_at(order, model.config, 1 - taken / (8 * heads))
        lowered = order[:taken].bincount(minlength=heads)
        assert torch.equal(plan.flatten(), d - d // 8 * lowered)
