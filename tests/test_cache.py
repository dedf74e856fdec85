"""The cache: the projected model's logits to rounding, from exactly the bytes that ranks say."""
import itertools
import json
import weakref
from unittest.mock import Mock

import pytest
import torch
from conftest import GOLDEN, full_cache, random_projection, random_ranks, relative, shape

import folding
from cache import KVCache
from model import frequencies, load
from plans import order_of, read_plan
from projection import uniform_ranks


def through(cache, model, tokens, chunks):
    """The logits of tokens that pass through the cache in chunks."""
    parts = tokens.split(chunks, dim=1)
    return torch.cat([model(part, cache=cache) for part in parts], dim=1)


# ------------------------------------------------------------------------------
# The same logits

def plan_called(name, model):
    if name in ("uniform", "full"):
        return uniform_ranks({"uniform": 0.375, "full": 1.0}[name], model.config)
    ranks = random_ranks(model)
    if name == "one head full":
        ranks[:, :, 0] = model.config.head_dim
    return ranks


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("chunks", [[21], [1] * 21, [1, 13, 7], [20, 1], [6, 1, 1, 9, 4]])
@pytest.mark.parametrize("plan", ["uniform", "ragged", "full", "one head full"])
def test_the_cache_gives_the_logits_of_the_projected_model(model, batch, chunks, plan):
    p, ranks = random_projection(model), plan_called(plan, model)
    tokens = torch.randint(3, 96, (batch, 21))
    cache = KVCache(p, ranks, batch=batch, max_len=24)
    logits = through(cache, model, tokens, chunks)
    assert relative(logits, model(tokens, project=p.at(ranks))) < 1e-4
    assert cache.length == 21
    assert cache.data.numel() == batch * 24 * ranks.sum()


@pytest.mark.parametrize("chunks", [[21], [20, 1]])
def test_the_full_cache_is_the_base_model(model, tokens, chunks):
    cache = full_cache(model, batch=3, max_len=21)
    assert relative(through(cache, model, tokens, chunks), model(tokens)) < 1e-5


@pytest.mark.parametrize("chunks", [[25], [1] * 25, [10, 1, 1, 5, 8]])
def test_a_sliding_window_limits_what_is_attended_to(chunks):
    model = load(GOLDEN / "mistral_window")
    p, ranks = random_projection(model), random_ranks(model)
    tokens = torch.randint(3, 96, (2, 25))
    cache = KVCache(p, ranks, batch=2, max_len=25)
    logits = through(cache, model, tokens, chunks)
    assert relative(logits, model(tokens, project=p.at(ranks))) < 1e-4


def test_bfloat16_agrees_within_its_rounding():
    """And the cache is no farther from the float32 model than the projection is.

    Root mean square over the logits: the single worst one of 4,000 is off by up to 2.6% in one draw
    of fifteen, with the cache and without it.
    """
    folder = GOLDEN / "llama_bfloat16"
    model, exact = (load(folder, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    p, tokens = random_projection(model), torch.randint(3, 96, (2, 21))

    def distance(a, b):
        return ((a.double() - b.double()).norm() / b.double().norm()).item()

    for ranks in (random_ranks(model), uniform_ranks(1.0, model.config)):
        cache = KVCache(p, ranks, batch=2, max_len=21, dtype=torch.bfloat16)
        logits = through(cache, model, tokens, [15, 1, 5])
        projected, truth = (m(tokens, project=p.at(ranks)) for m in (model, exact))
        assert distance(logits, projected) < 2e-2
        assert distance(logits, truth) < 1.5 * distance(projected, truth)


def test_a_long_prompt_in_pieces_is_the_prompt_in_one(model, tokens, monkeypatch):
    p, ranks = random_projection(model), random_ranks(model)
    whole = model(tokens, cache=KVCache(p, ranks, batch=3, max_len=21))
    monkeypatch.setattr("attention.SCORES", 3 * 5 * 21)
    pieces = model(tokens, cache=KVCache(p, ranks, batch=3, max_len=21))
    assert relative(pieces, whole) < 1e-5


def test_nothing_beyond_the_length_is_read(model, tokens):
    p, ranks = random_projection(model), random_ranks(model)
    clean, dirty = (KVCache(p, ranks, batch=3, max_len=50) for _ in range(2))
    dirty.data.fill_(torch.nan)
    for part in tokens.split([18, 1, 2], dim=1):
        assert torch.equal(model(part, cache=clean), model(part, cache=dirty))


# ------------------------------------------------------------------------------
# Positions beyond 512, where RoPE's first table ends

def test_tokens_that_cross_position_512_one_by_one_are_those_of_one_pass(model):
    p, ranks = random_projection(model), random_ranks(model)
    tokens = torch.randint(3, 96, (1, 530))
    cache = KVCache(p, ranks, batch=1, max_len=530)
    fresh = load_again(model)
    logits = through(cache, fresh, tokens, [505] + [1] * 25)
    assert relative(logits, model(tokens, project=p.at(ranks))) < 1e-4


def load_again(model):
    """The same weights, and a table of RoPE that no other pass has grown."""
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    return fresh.eval().requires_grad_(False)


@pytest.mark.parametrize("length", [511, 512, 513, 700, 5000])
def test_a_length_that_is_set_is_the_position_of_the_next_key(model, length):
    """The key in the cache is the unturned one, turned by position · frequency in float64."""
    cache = full_cache(model, batch=1, max_len=length + 1)
    cache.data.zero_()
    cache.length = length
    token = torch.tensor([[7]])
    model(token, cache=cache)

    layer = model.layers[0]
    key = layer.self_attn.k_proj(layer.input_layernorm(model.embed(token)))
    key = model.split_heads(key)
    if layer.self_attn.k_norm is not None:
        key = layer.self_attn.k_norm(key)
    key = key[0, :, 0].double()                                     # (K, d)
    real, imaginary = key.chunk(2, dim=-1)
    angle = length * frequencies(model.config)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), dim=-1)

    heads, rows = cache.groups[0][0][0]
    assert rows[:, :, length].shape == expected[heads].shape == key.shape
    assert relative(rows[:, :, length], expected) < 1e-5


# ------------------------------------------------------------------------------
# One tensor

def test_blocks_lie_end_to_end_without_padding(model):
    L, K, _ = shape(model)
    for ranks in (random_ranks(model), uniform_ranks(0.5, model.config)):
        cache = KVCache(random_projection(model), ranks, batch=2, max_len=5)
        end = 0
        for layer in range(L):
            for side in range(2):
                order = cache.head_order[side, layer].tolist()
                assert sorted(order) == list(range(K))
                for head in order:
                    assert cache.offsets[side, layer, head] == end
                    end += 2 * 5 * ranks[side, layer, head]
        assert end == cache.data.numel()


def test_a_group_is_all_heads_of_a_rank_as_one_view(model):
    L, K, _ = shape(model)
    for ranks in (random_ranks(model), uniform_ranks(0.5, model.config)):
        cache = KVCache(random_projection(model), ranks, batch=2, max_len=5)
        for side, layer in itertools.product(range(2), range(L)):
            groups = cache.groups[layer][side]
            assert len(groups) == len(ranks[side, layer].unique())
            cache.data.zero_()
            for number, (_, rows) in enumerate(groups, 1):
                rows += number
            for heads, rows in groups:
                members = cache.head_order[side, layer].repeat_interleave(2)[heads]
                assert (ranks[side, layer, members] == rows.shape[1]).all()
                blocks = [cache.block(side, layer, j) for j in members[::2]]
                assert torch.equal(torch.cat(blocks), rows)


def test_a_row_is_one_coordinate_of_one_sequence_over_the_tokens(model, tokens):
    """Keys U_kᵀ k and values U_vᵀ v, read from the cache, against the model's own hooks."""
    p, ranks = random_projection(model), random_ranks(model)
    cache = KVCache(p, ranks, batch=3, max_len=25)
    model(tokens, cache=cache)
    seen = {}
    model.hidden(tokens, project=p.at(ranks), observe=lambda i, q, k, v: seen.update({i: (k, v)}))
    for i, sides in seen.items():
        for side, (x, U) in enumerate(zip(sides, (p.U_k, p.U_v), strict=True)):
            d = x.shape[-1]
            for j, r in enumerate(ranks[side, i].tolist()):
                basis = torch.eye(d) if (ranks[side, i] == d).all() else U[i, j]
                stored = cache.block(side, i, j)[..., :21]
                assert relative(stored, (x[:, j] @ basis[:, :r]).mT) < 1e-4


# ------------------------------------------------------------------------------
# Shrinking

@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("before, after", [("full", "ragged"), ("ragged", "ragged"),
                                           ("full", "full"), ("one head full", "uniform")])
def test_a_shrunk_cache_is_one_whose_coordinates_were_cut_by_hand(model, batch, before, after):
    """And what follows has the logits of the smaller plan over the tokens' larger one."""
    p, large = random_projection(model), plan_called(before, model)
    small = torch.minimum(plan_called(after, model), large)
    tokens = torch.randint(3, 96, (batch, 21))
    cache = KVCache(p, large, batch=batch, max_len=24)
    model(tokens[:, :18], cache=cache)
    by_hand = KVCache(p, small, batch=batch, max_len=24)
    for side, i, j in itertools.product(*map(range, large.shape)):
        block = cache.block(side, i, j)
        d = model.config.head_dim
        if (large[side, i] == d).all() and (small[side, i] < d).any():
            block = (p.U_k, p.U_v)[side][i, j].T @ block
        by_hand.block(side, i, j)[:] = block[:, :small[side, i, j]]
    by_hand.length = 18
    cache.shrink(small)
    assert cache.data.numel() == batch * 24 * small.sum()
    for part in tokens[:, 18:].split([1, 2], dim=1):
        assert relative(model(part, cache=cache), model(part, cache=by_hand)) < 1e-4


@pytest.mark.parametrize("before", ["full", "ragged"])
def test_shrinking_needs_no_weights_of_the_model(model, before):
    """The folds that are there are cut: twice, and their bias follows."""
    p, large = random_projection(model), plan_called(before, model)
    cache = KVCache(p, large, batch=1, max_len=24)
    for i, layer in enumerate(model.layers):
        cache.fold(i, layer.self_attn)
    least = torch.full_like(large, model.config.head_dim // 8)
    for small in (torch.minimum(random_ranks(model), large), least):
        cache.shrink(small)
        fresh = KVCache(p, small, batch=1, max_len=24)
        for i, layer in enumerate(model.layers):
            for mine, expected in zip(cache.folded[i], fresh.fold(i, layer.self_attn), strict=True):
                assert (mine is None) == (expected is None)
                if mine is not None:
                    assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-5)


def test_a_cache_never_grows_by_shrinking(model):
    d = model.config.head_dim
    cache = KVCache(random_projection(model), uniform_ranks(0.5, model.config), batch=1, max_len=5)
    with pytest.raises(ValueError, match="at or below"):
        cache.shrink(torch.full_like(cache.ranks, d))
    assert (cache.ranks == d // 2).all()


def test_a_cache_shrinks_before_its_launches_are_fixed(model):
    cache = full_cache(model, batch=1, max_len=5)
    cache.fix_launches(model)
    with pytest.raises(ValueError, match="before fix_launches"):
        cache.shrink(cache.ranks // 2)


def test_values_that_stay_whole_stay_in_the_models_own_weights(model):
    """While its keys shrink, a layer makes no second copy of W_o."""
    cache = full_cache(model, batch=1, max_len=5)
    W_o = cache.fold(0, model.layers[0].self_attn).W_o
    small = cache.ranks.clone()
    small[0] //= 2
    cache.shrink(small)
    assert cache.folded[0].W_o is W_o


def test_a_layer_is_cut_when_the_larger_ones_before_it_are_gone(model, monkeypatch):
    cache = full_cache(model, batch=1, max_len=5)
    for i, layer in enumerate(model.layers):
        cache.fold(i, layer.self_attn)
    old = [weakref.ref(folded.W_qkv) for folded in cache.folded]
    alive = []

    def counting(*layer):
        alive.append(sum(W() is not None for W in old))
        return cut(*layer)

    cut = folding.cut
    monkeypatch.setattr(folding, "cut", counting)
    cache.shrink(cache.ranks // 2)
    assert alive == list(range(len(old), 0, -1))


# ------------------------------------------------------------------------------
# The same launches at any length

def doubled(model):
    """The same weights in float64."""
    return load_again(model).double()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plan", ["uniform", "ragged", "full"])
def test_fixed_launches_decode_what_others_do(model, batch, plan):
    model = doubled(model)
    p, ranks = random_projection(model), plan_called(plan, model)
    tokens = torch.randint(3, 96, (batch, 64))
    plain, fixed = (KVCache(p, ranks, batch, max_len=70, dtype=torch.float64) for _ in range(2))
    fixed.data.fill_(torch.nan)
    for cache in (plain, fixed):
        model(tokens[:, :14], cache=cache)
    fixed.fix_launches(model)
    expected, logits = (through(c, model, tokens[:, 14:], [1] * 50) for c in (plain, fixed))
    assert relative(logits, expected) < 1e-12
    assert fixed.length == fixed.position.item() == 64


def test_fixed_launches_keep_to_a_sliding_window():
    model = doubled(load(GOLDEN / "mistral_window"))
    p, ranks = random_projection(model), random_ranks(model)
    tokens = torch.randint(3, 96, (2, 25))
    plain, fixed = (KVCache(p, ranks, 2, max_len=30, dtype=torch.float64) for _ in range(2))
    for cache in (plain, fixed):
        model(tokens[:, :3], cache=cache)
    fixed.fix_launches(model)
    expected, logits = (through(c, model, tokens[:, 3:], [1] * 22) for c in (plain, fixed))
    assert relative(logits, expected) < 1e-12


def test_a_chunk_after_fixed_launches_is_a_chunk(model):
    model = doubled(model)
    p, ranks = random_projection(model), random_ranks(model)
    tokens = torch.randint(3, 96, (2, 21))
    plain, fixed = (KVCache(p, ranks, 2, max_len=24, dtype=torch.float64) for _ in range(2))
    for cache in (plain, fixed):
        model(tokens[:, :9], cache=cache)
    fixed.fix_launches(model)
    expected, logits = (through(c, model, tokens[:, 9:], [1, 6, 5]) for c in (plain, fixed))
    assert relative(logits, expected) < 1e-12
    assert fixed.position.item() == 21


# ------------------------------------------------------------------------------
# What is refused

def test_a_cache_that_makes_no_sense_is_refused(model):
    p, ranks, d = random_projection(model), random_ranks(model), model.config.head_dim
    for batch, length in ((0, 5), (1, 0), (1, -3)):
        with pytest.raises(ValueError, match="at least 1"):
            KVCache(p, ranks, batch=batch, max_len=length)
    for wrong in (ranks * 0, ranks + d, ranks[:, :1], ranks.float(), ranks[:, :, None]):
        with pytest.raises(ValueError, match="rank"):
            KVCache(p, wrong, batch=1, max_len=5)


def test_a_full_cache_takes_no_more(model, tokens):
    cache = KVCache(random_projection(model), random_ranks(model), batch=3, max_len=20)
    with pytest.raises(ValueError, match="full"):
        model(tokens, cache=cache)
    assert cache.length == 0
    model(tokens[:, :20], cache=cache)
    with pytest.raises(ValueError, match="full"):
        model(tokens[:, :1], cache=cache)
    assert cache.length == 20


def test_a_cache_of_another_dtype_or_batch_is_refused(model, tokens):
    p, ranks = random_projection(model), random_ranks(model)
    low = KVCache(p, ranks, batch=3, max_len=30, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        model(tokens, cache=low)
    with pytest.raises(ValueError, match="2 sequences"):
        model(tokens[:2], cache=KVCache(p, ranks, batch=3, max_len=30))


def test_projections_of_another_model_are_refused(model, tokens):
    _, K, d = shape(model)
    other = random_projection(model)
    other.U_k, other.U_v, other.mean_v = (x[:1] for x in other.tensors().values())
    with pytest.raises(ValueError, match="projections"):
        model(tokens, cache=KVCache(other, torch.full((2, 1, K), d), batch=3, max_len=30))
    with pytest.raises(ValueError, match="projections"):
        model(tokens, project=other.at(torch.full((2, 1, K), d // 2)))


# ------------------------------------------------------------------------------
# Plans in files

PATH = [["keys", 0, 1, 0.1], ["values", 1, 0, 0.2], ["values", 1, 0, 0.3]]


@pytest.fixture
def write_plan(model, tmp_path):
    """Writes ranks.json with PATH, and the full plan spelled out; some entries may be others."""
    L, K, d = shape(model)

    def write(**entries):
        full = [[d] * K] * L
        plan = {"head_dim": d, "budget": 1.0, "keys": full, "values": full, "path": PATH}
        (tmp_path / "ranks.json").write_text(json.dumps(plan | entries))
        return tmp_path / "ranks.json"

    return write


def test_a_plan_is_the_longest_prefix_of_the_path_within_the_budget(model, write_plan):
    L, K, d = shape(model)
    path = write_plan()
    one = 1 / (2 * L * K * 8)
    for lowered, entries in ((0, 0), (0.5, 1), (1, 1), (1.01, 2), (3, 3)):
        expected = torch.full((2, L, K), d)
        for side, layer, head, _ in PATH[:entries]:
            expected[int(side == "values"), layer, head] -= d // 8
        _, ranks = read_plan(path, model.config, 1 - lowered * one)
        assert torch.equal(ranks, expected)


def test_without_a_budget_a_plan_is_the_one_spelled_out(model, write_plan):
    L, K, d = shape(model)
    order, ranks = read_plan(write_plan(), model.config)
    assert (ranks == d).all()
    assert torch.equal(order, order_of(PATH, model.config))
    places = torch.zeros(2, L, K, dtype=torch.long)
    places.view(-1).scatter_add_(0, order, torch.ones_like(order))
    assert places[0, 0, 1] == 1
    assert places[1, 1, 0] == 2


@pytest.mark.parametrize("broken", [
    {"head_dim": 24},
    {"head_dim": None},
    {"path": [["keys", 99, 0, 0]]},
    {"path": [["keys", 0, -1, 0]]},
    {"path": [["neither", 0, 0, 0]]},
    {"path": [["keys", 0, 0]]},
    {"path": [["keys", 0, 0, 0]] * 8},
    {"path": 3},
    {"path": None},
])
def test_a_path_that_is_not_this_models_is_refused(model, write_plan, broken):
    for budget in (None, 0.99):
        with pytest.raises(ValueError, match="ranks.json"):
            read_plan(write_plan(**broken), model.config, budget)


@pytest.mark.parametrize("keys", [[[16]], None, 3, "all", [["16", "16"]] * 2, [[16.5] * 2] * 2, {}])
def test_a_plan_that_is_not_this_models_is_refused(model, write_plan, keys):
    with pytest.raises(ValueError, match="ranks.json"):
        read_plan(write_plan(keys=keys), model.config)


def test_a_budget_below_the_end_of_the_path_is_refused(model, write_plan):
    with pytest.raises(ValueError, match="ranks.json.*ends at"):
        read_plan(write_plan(), model.config, 0.5)


# ------------------------------------------------------------------------------
# On a GPU, where the kernel cannot run

@pytest.fixture
def two_caches(model):
    """Two of one plan; the second takes itself for one on a GPU."""
    p, ranks = random_projection(model), random_ranks(model)
    plain, on_gpu = (KVCache(p, ranks, batch=3, max_len=30) for _ in range(2))
    on_gpu.by_kernel = True
    return plain, on_gpu


@pytest.mark.parametrize("error", [ImportError("no triton"), RuntimeError("no C compiler")])
def test_without_triton_or_a_compiler_pytorch_decodes(model, tokens, two_caches, error):
    plain, on_gpu = two_caches
    on_gpu.attend_on_gpu = Mock(side_effect=error)
    expected = through(plain, model, tokens, [19, 1, 1])
    with pytest.warns(UserWarning, match=str(error)):
        assert torch.equal(through(on_gpu, model, tokens, [19, 1, 1]), expected)
    assert on_gpu.attend_on_gpu.call_count == 1


def test_other_errors_of_the_kernel_are_not_hidden(model, tokens, two_caches):
    _, on_gpu = two_caches
    on_gpu.attend_on_gpu = Mock(side_effect=torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        through(on_gpu, model, tokens, [20, 1])
