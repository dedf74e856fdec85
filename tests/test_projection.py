"""Projections: orthogonal, nested, harmless at full rank, and free on the value side."""
import hashlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import random_projection, random_ranks, relative, shape
from safetensors import safe_open

from cache import fold_head
from model import causal_attention, rotate
from projection import (
    Moments,
    Projection,
    Rotation,
    check_ranks,
    plan_at,
    projector,
    uniform_ranks,
)
from support.files import write_tensors

# ------------------------------------------------------------------------------
# The projection

PLAIN, TURNED = {}, {"whole": 2, "mean": 3.0}       # the paper's; with whole tokens and a mean


def test_full_rank_is_the_base_model(model, tokens):
    full = uniform_ranks(1.0, model.config)
    for kind, start in itertools.product((PLAIN, TURNED), (0, 37, torch.tensor([3, 0, 40]))):
        project = random_projection(model, **kind).at(full)
        projected = model.hidden(tokens, project, start=start)
        assert torch.equal(projected, model.hidden(tokens, start=start))


@pytest.mark.parametrize("kind", [PLAIN, TURNED], ids=["plain", "turned"])
def test_a_head_at_full_rank_passes_through_untouched(model, kind):
    """Where k U Uᵀ would be rounded; beside heads that are projected."""
    L, K, d = shape(model)
    ranks = random_ranks(model)
    ranks[:, :, 1] = d
    ranks[:, :, 0] = d // 2
    for dtype in (torch.float32, torch.bfloat16):
        k, v = torch.randn(2, 3, K, 7, d).to(dtype)
        k_hat, v_hat = random_projection(model, **kind).at(ranks)(1, k, v, torch.flipud)
        assert torch.equal(k_hat[:, 1], torch.flipud(k)[:, 1])
        assert torch.equal(v_hat[:, 1], v[:, 1])
        assert not torch.equal(k_hat[:, 0], torch.flipud(k)[:, 0])


@pytest.mark.parametrize("kind", [PLAIN, TURNED], ids=["plain", "turned"])
def test_columns_beyond_the_rank_have_no_influence(model, tokens, kind):
    p, ranks = random_projection(model, **kind), random_ranks(model)
    d = model.config.head_dim

    def with_noise(U, ranks):
        beyond = torch.arange(d) >= ranks[..., None]                # (L, K, d)
        beyond &= (ranks < d)[..., None]
        return torch.where(beyond[..., None, :], torch.full_like(U, 7.0), U)

    U = with_noise(p.U_k, ranks[0]), with_noise(p.U_v, ranks[1])
    noisy = Projection(*U, p.mean_v, p.mean_k, p.whole)
    assert not torch.equal(noisy.U_k, p.U_k)
    assert torch.equal(model(tokens, project=p.at(ranks)), model(tokens, project=noisy.at(ranks)))


def test_a_key_mean_after_rope_would_change_nothing(model, tokens):
    """softmax does not see a constant added to every key, so that one is not kept."""
    _, K, d = shape(model)
    constant = torch.randn(K, 1, d)
    shifted = model(tokens, project=lambda layer, k, v, turn: (turn(k) + constant, v))
    assert relative(shifted, model(tokens)) < 1e-5


def test_what_a_value_loses_is_replaced_by_the_mean(model):
    """v̂ = v P + μ (I − P): a value that is the mean stays as it is, whatever the rank."""
    _, K, d = shape(model)
    p, ranks = random_projection(model), random_ranks(model)
    v = p.mean_v[1][:, None].expand(1, K, 4, d)
    _, v_hat = p.at(ranks)(1, v, v, torch.clone)
    assert relative(v_hat, v) < 1e-5


@pytest.mark.parametrize("kind", [PLAIN, TURNED], ids=["plain", "turned"])
def test_every_sequence_may_have_ranks_of_its_own(model, tokens, kind):
    p, ranks = random_projection(model, **kind), random_ranks(model, len(tokens))
    ranks[:, :, 0, 0] = model.config.head_dim
    together = model(tokens, project=p.at(ranks))
    for b in range(len(tokens)):
        alone = model(tokens[b:b + 1], project=p.at(ranks[:, :, b]))
        assert relative(together[b:b + 1], alone) < 1e-5


# ------------------------------------------------------------------------------
# Whole tokens and the turned mean, by hand: RoPE as a product of complex numbers

def by_hand(config, x, start):
    """R x of vectors (B, heads, T, d), float64: pair (j, j + d/2) times e^(i · position · θ_j)."""
    d = config.head_dim
    pairs = torch.complex(*x.double().chunk(2, -1))
    speed = torch.tensor([config.rope_theta ** (-2 * j / d) for j in range(d // 2)]).double()
    positions = torch.as_tensor(start).view(-1, 1, 1) + torch.arange(x.shape[2])    # (B, 1, T)
    angle = positions[..., None] * speed
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag), -1)


@pytest.mark.parametrize("whole, start", [
    (0, 37), (3, 0), (3, 37), (3, torch.tensor([5, 0, 43]))],
    ids=["0 at 37", "3 at 0", "3 at 37", "3 anywhere"])
def test_keys_are_projected_about_their_turned_mean_and_first_tokens_not_at_all(
        model, tokens, whole, start):
    """k̂ = R m + (R k − R m) P, with one plan, or one for each sequence."""
    _, K, d = shape(model)
    p = random_projection(model, whole, mean=2.0)
    ranks = random_ranks(model, *[len(tokens)] * isinstance(start, torch.Tensor)) % d
    ranks[ranks == 0] = d // 8                                      # none is full
    seen = []

    def spy(layer, k, v, turn):
        seen.append((k, v, *p.at(ranks)(layer, k, v, turn)))
        return seen[-1][2:]

    model.hidden(tokens, spy, start=start)
    for layer, (k, v, k_hat, v_hat) in enumerate(seen):
        P_k, P_v = ((U[layer].double() * (torch.arange(d) < r[..., None, None]))
                    @ U[layer].double().mT
                    for U, r in zip((p.U_k, p.U_v), ranks[:, layer], strict=True))
        turned = by_hand(model.config, k, start)
        m = p.mean_k[layer][:, None].expand(K, k.shape[2], d)[None]
        R_m = by_hand(model.config, m, start)
        mu = p.mean_v[layer][:, None].double()
        expected_k = R_m + (turned - R_m) @ P_k
        expected_v = mu + (v.double() - mu) @ P_v
        expected_k[:, :, :whole] = turned[:, :, :whole]
        expected_v[:, :, :whole] = v[:, :, :whole]
        assert relative(k_hat, expected_k) < 1e-5
        assert relative(v_hat, expected_v) < 1e-5
        assert torch.equal(v_hat[:, :, :whole], v[:, :, :whole])
        assert relative(expected_k[:, :, whole:], turned[:, :, whole:]) > 0.1
    assert len(seen) == len(model.layers)


def test_the_mean_is_subtracted_before_it_is_turned(model):
    """As large as Qwen's biases make it, 600, and in bfloat16.

    It lies in one pair of coordinates. The others of k̂ hold the residual alone, and P brings them
    what that pair is wrong by.
    """
    _, K, d = shape(model)
    p = random_projection(model, mean=1.0)
    p.mean_k = torch.zeros_like(p.mean_k)
    p.mean_k[..., 0], p.mean_k[..., d // 2] = 480, 360              # numbers of bfloat16
    m = p.mean_k[0][:, None]
    k = (m + 4 * torch.randn(2, K, 20, d)).bfloat16()
    ranks = torch.full(random_ranks(model).shape, d // 2)
    cos, sin = model.rope.rows(37, 20, torch.bfloat16, "cpu")

    def turn(x):
        return rotate(x, cos, sin)

    k_hat, _ = p.at(ranks)(0, k, k, turn)
    m = m.expand(k.shape)
    P = projector(p.U_k[0].double(), ranks[0, 0])
    residual = by_hand(model.config, k - m, 37) @ P
    late = (turn(k) - turn(m.bfloat16())) @ P.bfloat16()            # for comparison
    others = torch.arange(d) % (d // 2) != 0

    def error(found):
        return ((found.double() - residual)[..., others].norm() / residual[..., others].norm())

    assert error(k_hat) < 0.01
    assert error(late) > 0.03


def test_whole_tokens_need_a_mean_of_the_keys_and_it_fits(model):
    p = random_projection(model, mean=1.0)
    U = p.U_k, p.U_v, p.mean_v
    for mean_k, whole in ((None, 1), (p.mean_k, -1), (None, -1)):
        with pytest.raises(ValueError, match=f"whole {whole}"):
            Projection(*U, mean_k, whole)
    for mean_k in (p.mean_k[:1], p.mean_k[..., 1:], p.mean_k[0], torch.tensor(0.0)):
        with pytest.raises(ValueError, match="mean_k of shape"):
            Projection(*U, mean_k)


# ------------------------------------------------------------------------------
# In files

def test_save_and_load_give_the_same(model, tmp_path):
    """PCA in the same file has neither whole tokens nor a mean of the keys."""
    path = tmp_path / "p.safetensors"
    p, pca = random_projection(model, **TURNED), random_projection(model)
    p.save(path, pca=pca)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"whole": "2", "positions": "0"}
    for saved, prefix in ((p, ""), (pca, "pca_")):
        loaded = Projection.load(path, prefix)
        assert loaded.whole == saved.whole
        assert loaded.tensors().keys() == saved.tensors().keys()
        for name, tensor in saved.tensors().items():
            assert torch.equal(tensor, getattr(loaded, name))


def test_a_file_without_pca_says_so(model, tmp_path):
    random_projection(model).save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="p.safetensors: no tensor .?pca_U_k"):
        Projection.load(tmp_path / "p.safetensors", "pca_")


def test_an_older_file_has_no_whole_tokens_and_no_mean(model, tmp_path):
    p = random_projection(model)
    write_tensors(tmp_path / "p.safetensors", p.tensors())          # and no metadata
    loaded = Projection.load(tmp_path / "p.safetensors")
    assert (loaded.whole, loaded.mean_k) == (0, None)
    assert loaded.hash() == p.hash()


def test_whole_tokens_that_a_file_cannot_mean_are_refused_with_the_file(model, tmp_path):
    file = tmp_path / "p.safetensors"
    for whole in ("x", "-1", "", "1.5", "²"):
        write_tensors(file, random_projection(model, mean=1.0).tensors(), {"whole": whole})
        with pytest.raises(ValueError, match="p.safetensors: its metadata says whole"):
            Projection.load(file)
    write_tensors(file, random_projection(model).tensors(), {"whole": "4"})
    with pytest.raises(ValueError, match="p.safetensors: whole 4: needs a mean_k"):
        Projection.load(file)


def test_numbers_that_are_not_finite_are_refused_with_the_file(model, tmp_path):
    for name, number in zip(("U_k", "U_v", "mean_v", "mean_k"), (torch.nan, -torch.inf) * 2,
                            strict=True):
        p = random_projection(model, **TURNED)
        getattr(p, name)[-1, -1, -1, ...] = number
        p.save(tmp_path / "p.safetensors")
        with pytest.raises(ValueError, match=f"p.safetensors: {name} holds .* not finite"):
            Projection.load(tmp_path / "p.safetensors")


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


def test_projections_of_another_dtype_are_read_as_float32(model, tmp_path):
    """In a file that another script wrote; half of one dtype would fail in the midst of a pass."""
    p = random_projection(model, mean=1.0)
    p.mean_v, p.mean_k = p.mean_v.double(), p.mean_k.bfloat16()
    p.save(tmp_path / "p.safetensors")
    loaded = Projection.load(tmp_path / "p.safetensors")
    assert {x.dtype for x in loaded.tensors().values()} == {torch.float32}
    assert torch.equal(loaded.mean_v, p.mean_v.float())
    assert torch.equal(loaded.mean_k, p.mean_k.float())


def test_the_hash_tells_all_that_keys_hang_on_and_nothing_else(model, tmp_path):
    """To the last digit; a file, another dtype and other means of values are no change."""
    p = random_projection(model, whole=2, mean=1.0)
    assert Projection(p.U_k, p.U_v, p.mean_v + 1, p.mean_k, 2).hash() == p.hash()
    assert p.to("cpu", torch.float64).hash() == p.hash()
    p.save(tmp_path / "p.safetensors")
    assert Projection.load(tmp_path / "p.safetensors").hash() == p.hash()
    hashes = {p.hash(), Projection(p.U_v, p.U_k, p.mean_v, p.mean_k, 2).hash()}
    hashes |= {Projection.of(p.tensors(), whole=whole).hash() for whole in (0, 1, 22)}
    hashes.add(Projection(p.U_k, p.U_v, p.mean_v).hash())
    for name, place in itertools.product(("U_k", "U_v", "mean_k"), (0, -1)):
        tensors = {key: x.clone() for key, x in p.tensors().items()}
        number = tensors[name][(place,) * tensors[name].ndim]
        number.copy_(number.nextafter(torch.tensor(9.0)))           # by its last digit
        hashes.add(Projection.of(tensors, whole=2).hash())
    assert len(hashes) == 12


def test_without_a_mean_the_hash_is_that_of_older_files(model):
    """The sha256 of the bytes of U_k and U_v, which their ranks.json hold."""
    p = random_projection(model)
    expected = hashlib.sha256(p.U_k.numpy().tobytes() + p.U_v.numpy().tobytes()).hexdigest()
    assert p.hash() == expected


# ------------------------------------------------------------------------------
# Folding

def test_folding_values_into_the_weights_changes_nothing(every_model, tokens):
    """softmax(q kᵀ) v̂ W_o from the coordinates that a cache would hold, against v̂ itself."""
    model, ranks = every_model, random_ranks(every_model)
    seen = {}
    model.hidden(tokens, observe=lambda i, q, k, v, turn: seen.update({i: (q, turn(k))}))
    for whole, (i, (q, k)) in itertools.product((0, 3), seen.items()):
        p, weights = random_projection(model, whole, mean=1.0), model.layers[i].self_attn
        _, K, d = shape(model)
        G = model.config.num_attention_heads // K
        x = torch.randn(*tokens.shape, model.config.hidden_size)
        v = model.split_heads(weights.v_proj(x))
        _, v_hat = p.at(ranks)(i, k, v, torch.clone)
        expected = weights.o_proj(causal_attention(q, k, v_hat, None).transpose(1, 2).flatten(2))

        attention = causal_weights(q, k.repeat_interleave(G, 1))
        W_v, W_o = weights.v_proj.weight.split(d), weights.o_proj.weight.unflatten(1, (K, G, d))
        b_v = weights.v_proj.bias
        b_v = torch.zeros(K, d) if b_v is None else b_v.view(K, d)
        total = 0
        for j, r in enumerate(ranks[1, i].tolist()):
            W, b, W_out, bias = fold_head(
                W_v[j], b_v[j], W_o[:, j], p.U_v[i, j], p.mean_v[i, j], r)
            assert (W.shape[0], W_out.shape[1:]) == (d, (G, d))
            coordinates = F.linear(x, W, b)                         # (B, T, d)
            coordinates[:, whole:, r:] = 0                          # first tokens alone have them
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
    """All keys after RoPE and values of some batches, (2, L, K, n, d) float64."""
    L, K, d = shape(model)
    found = []
    for tokens in sequences:
        keys_values = torch.zeros(2, L, *tokens.shape, K, d, dtype=torch.float64)

        def observe(layer, q, k, v, turn, found=keys_values):
            found[0, layer] = by_hand(model.config, k, 0).transpose(1, 2)
            found[1, layer] = v.transpose(1, 2)

        model.hidden(tokens, observe=observe)
        found.append(keys_values.flatten(2, 3))
    return torch.cat(found, 2).transpose(2, 3)


def test_moments_are_those_of_keys_after_rope_and_of_values(model):
    sequences = [torch.randint(3, 96, (B, 25)) for B in (4, 1)]
    moments = Moments(model.config)
    for tokens in sequences:
        model.hidden(tokens, observe=moments)
    x = observed(model, sequences)
    n = x.shape[3]
    assert n == 5 * 25
    centered = x - x.mean(3, keepdim=True)
    assert relative(moments.mean(), x.mean(3)) < 1e-5
    assert relative(moments.second(), x.mT @ x / n) < 1e-5
    assert relative(moments.covariance(), centered.mT @ centered / n) < 1e-5


def test_pca_keeps_the_most_variance_of_all_projections(model):
    sequences = [torch.randint(3, 96, (4, 25)) for _ in range(3)]
    moments = Moments(model.config)
    for tokens in sequences:
        model.hidden(tokens, observe=moments)
    pca = moments.pca()
    assert (pca.mean_k, pca.whole) == (None, 0)
    k, v = observed(model, sequences)
    assert relative(pca.mean_v, v.mean(2)) < 1e-6
    for U, x in ((pca.U_k, k), (pca.U_v, v)):
        centered = x - x.mean(2, keepdim=True)
        most = torch.linalg.svdvals(centered).square()
        kept = (centered @ U.double()).square().sum(2)
        assert relative(kept.cumsum(-1), most.cumsum(-1)) < 1e-5


# ------------------------------------------------------------------------------
# The rotation

def turned(start) -> Rotation:
    """A rotation far from its start."""
    rotation = Rotation(start)
    for parameter in rotation.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    return rotation


def test_the_rotation_starts_at_its_start(model):
    start = random_projection(model, **TURNED)
    p = Rotation(start)()
    assert relative(p.U_k, start.U_k) < 1e-6
    assert relative(p.U_v, start.U_v) < 1e-6
    assert torch.equal(p.mean_v, start.mean_v)


def test_the_mean_of_keys_and_the_whole_tokens_stay_what_they_were(model):
    """They are no parameters."""
    start = random_projection(model, **TURNED)
    rotation = turned(start)
    assert {name for name, _ in rotation.named_parameters()} == {"A_k", "A_v", "mean_v"}
    p = rotation(torch.float64)
    assert torch.equal(p.mean_k, start.mean_k.double())
    assert p.whole == start.whole == 2
    assert p.mean_k.dtype == p.U_k.dtype == torch.float64


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
    rotation = Rotation(random_projection(model, **TURNED))
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
    rotation = turned(random_projection(model, **TURNED))
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


def test_a_file_that_holds_no_projections_is_refused(model, tmp_path):
    p, file = random_projection(model, whole=2, mean=1.0), tmp_path / "p.safetensors"
    for name, U in (("U_k", 5 * p.U_k), ("U_v", 0 * p.U_v)):
        write_tensors(file, p.tensors() | {name: U}, {"whole": "2", "positions": "0"})
        with pytest.raises(ValueError, match=f"{name} is not orthogonal"):
            Projection.load(file)
    for said, words in (({}, "does not say whole"), ({"whole": "9" * 30}, "not a number of")):
        write_tensors(file, p.tensors(), said)
        with pytest.raises(ValueError, match=words):
            Projection.load(file)
