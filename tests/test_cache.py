"""The cache: the projected model's logits to rounding, from exactly the bytes that ranks say."""
import itertools
from unittest.mock import Mock

import pytest
import torch
from conftest import CKPT, GOLDEN, full_cache, random_projection, random_ranks, relative, shape

import cache as cache_module
from cache import KVCache
from model import frequencies, load
from projection import Projection, uniform_ranks

CHUNKS = [6, 1, 1, 9, 4]        # a prompt, single tokens, longer ones that follow


def through(cache, model, tokens, chunks):
    """The logits of tokens that pass through the cache in chunks."""
    parts = tokens.split(chunks, dim=1)
    return torch.cat([model(part, cache=cache) for part in parts], dim=1)


@pytest.fixture
def many_heads():
    """A tiny random model with four key-value heads, and G = 1."""
    return load(GOLDEN / "llama_mha")


def plan_called(name, model):
    d = model.config.head_dim
    if name in ("uniform", "full"):
        return uniform_ranks({"uniform": 0.375, "full": 1.0}[name], model.config)
    ranks = random_ranks(model)
    if name == "one head full":
        ranks[:, :, 0] = d
        ranks[:, :, 1] = d // 2
    if name == "apart":         # heads of a rank are no neighbours, of keys and of values others
        ranks[0] = torch.tensor([3, 5, 3, 1]) * d // 8
        ranks[1] = torch.tensor([2, 4, 6, 4]) * d // 8
    return ranks


# ------------------------------------------------------------------------------
# The same logits

def assert_projected(model, plan, batch, chunks):
    p, ranks = random_projection(model), plan_called(plan, model)
    tokens = torch.randint(3, 96, (batch, 21))
    cache = KVCache(p, ranks, batch=batch, max_len=24)
    logits = through(cache, model, tokens, chunks)
    assert relative(logits, model(tokens, project=p.at(ranks))) < 1e-4
    assert cache.length == 21
    assert cache.data.numel() == batch * 24 * ranks.sum()


@pytest.mark.parametrize("chunks", [[20, 1], [1, 13, 7]])
def test_the_cache_gives_the_logits_of_the_projected_model(every_model, chunks):
    assert_projected(every_model, "ragged", 3, chunks)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plan", ["uniform", "full", "one head full"])
def test_any_plan_has_the_logits_of_its_projection(model, plan, batch):
    assert_projected(model, plan, batch, CHUNKS)


@pytest.mark.parametrize("chunks", [[20, 1], CHUNKS])
def test_heads_whose_ranks_lie_apart_find_their_queries_and_values(many_heads, chunks):
    assert_projected(many_heads, "apart", 3, chunks)


@pytest.mark.parametrize("chunks", [[21], [20, 1]])
def test_the_full_cache_is_the_base_model(every_model, tokens, chunks):
    cache = full_cache(every_model, batch=3, max_len=21)
    assert relative(through(cache, every_model, tokens, chunks), every_model(tokens)) < 1e-5


@pytest.mark.parametrize("chunks", [[1] * 25, [10, 1, 1, 5, 8]])
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


@pytest.mark.parametrize("chunks", [[40], [39, 1], [17, 23]])
def test_large_scores_of_two_bytes_are_not_rounded_before_the_softmax(model, chunks):
    """Scores near 80, where bfloat16 moves in steps of a half: a softmax would be off by an eighth.

    Against float64, from the same bfloat16 q, k and v: as near as from float32 scores, with the
    weights and the result in bfloat16.
    """
    _, K, d = shape(model)
    G = model.config.num_attention_heads // K
    direction = torch.ones(d) * d ** -0.5                       # one that all keys share
    qk = torch.randn(2, K, G + 1, 40, d)
    qk[:, :, :-1] = 0.8 * qk[:, :, :-1] + 20 * direction
    qk[:, :, -1] = 0.3 * qk[:, :, -1] + 16 * direction
    qk, v = qk.bfloat16(), torch.randn(2, 40, K * d).bfloat16()

    full = uniform_ranks(1.0, model.config)
    cache = KVCache(Projection.identity(model.config), full, 2, 40, torch.bfloat16)
    out = []
    for tokens in torch.arange(40).split(chunks):
        out.append(cache.attend(0, qk[:, :, :, tokens], v[:, tokens]))
        cache.length += len(tokens)

    def computed(scores_in, weights_in):
        q, k = qk[:, :, :-1].to(scores_in), qk[:, :, -1:].to(scores_in)
        scores = (q @ k.mT * d ** -0.5).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
        weights = scores.softmax(-1).to(weights_in)
        values = v.view(2, 40, K, 1, d).permute(0, 2, 3, 1, 4).to(weights_in)
        a = weights @ values                                    # (B, K, G, T, d)
        return scores, a.permute(0, 3, 1, 2, 4).flatten(2)

    scores, exact = computed(torch.float64, torch.float64)
    seen = scores[scores.isfinite()]
    assert 60 < seen.min() < seen.max() < 110
    _, usual = computed(torch.float32, torch.bfloat16)
    _, rounded = computed(torch.bfloat16, torch.bfloat16)
    begin = chunks[0] if chunks[1:] else 0                      # of what reads the cache
    mine = torch.cat(out, dim=1)[:, begin:]
    usual, rounded, exact = (x[:, begin:] for x in (usual, rounded, exact))
    assert relative(mine, exact) < 1.5 * relative(usual, exact)
    assert relative(rounded, exact) > 5 * relative(usual, exact)


def test_a_long_chunk_in_pieces_is_the_chunk_in_one(model, tokens, monkeypatch):
    """17 tokens behind 4: five of them at a time, then two."""
    p, ranks = random_projection(model), random_ranks(model)
    sizes, plain = [], cache_module.attend_rows

    def attend_rows(layout, q, *others):
        sizes.append(q.shape[3])
        return plain(layout, q, *others)

    monkeypatch.setattr("cache.attend_rows", attend_rows)
    logits = []
    for most in (cache_module.SCORES, 5 * 3 * 4 * 21):
        monkeypatch.setattr("cache.SCORES", most)
        cache = KVCache(p, ranks, batch=3, max_len=21)
        logits.append(through(cache, model, tokens, [4, 17]))
    assert sizes == 2 * [17] + 2 * [5, 5, 5, 2]                     # of each layer
    assert relative(*logits) < 1e-5


def test_nothing_beyond_the_length_is_read(model, tokens):
    p, ranks = random_projection(model), random_ranks(model)
    clean, dirty = (KVCache(p, ranks, batch=3, max_len=50) for _ in range(2))
    dirty.data.fill_(torch.nan)
    for part in tokens.split([18, 1, 2], dim=1):
        assert torch.equal(model(part, cache=clean), model(part, cache=dirty))


# ------------------------------------------------------------------------------
# Positions, and a length that is set

def test_tokens_that_cross_position_512_one_by_one_are_those_of_one_pass(model):
    """Where RoPE's first table ends."""
    p, ranks = random_projection(model), random_ranks(model)
    tokens = torch.randint(3, 96, (1, 530))
    cache = KVCache(p, ranks, batch=1, max_len=530)
    fresh = load(CKPT)                      # the same weights, and a table that no pass has grown
    logits = through(cache, fresh, tokens, [505] + [1] * 25)
    assert relative(logits, model(tokens, project=p.at(ranks))) < 1e-4


def test_a_length_that_is_set_is_the_position_of_the_next_key(every_model):
    """The key in the cache is the unturned one, turned by position · frequency in float64."""
    model = every_model
    layer, token = model.layers[0], torch.tensor([[7]])
    key = layer.self_attn.k_proj(layer.input_layernorm(model.embed_tokens(token)))
    key = model.split_heads(key)
    if layer.self_attn.k_norm is not None:
        key = layer.self_attn.k_norm(key)
    key = key[0, :, 0].double()                                     # (K, d)
    real, imaginary = key.chunk(2, dim=-1)

    cache = full_cache(model, batch=1, max_len=5001)
    cache.data.zero_()
    for length in (511, 512, 513, 5000, 0):
        cache.length = length
        model(token, cache=cache)
        angle = length * frequencies(model.config)
        turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
        expected = torch.cat((turned.real, turned.imag), dim=-1)
        stored = torch.cat([cache.block(0, 0, j)[..., length] for j in range(len(key))])
        assert stored.shape == expected.shape
        assert relative(stored, expected) < 1e-5


@pytest.mark.parametrize("kind", ["mistral_sharded_head_dim", "mistral_window"])
def test_a_rewound_cache_goes_on_as_one_that_never_went_further(kind):
    """To the start, to one token, into a chunk and to its end, and to where it is."""
    model = load(GOLDEN / kind)
    p, ranks = random_projection(model), random_ranks(model)
    tokens, others = torch.randint(3, 96, (2, 2, 21))
    for n, chunks in itertools.product((0, 1, 3, 6, 7, 8, 20, 21), ([9], [1, 1, 7])):
        rewound, fresh = (KVCache(p, ranks, batch=2, max_len=30) for _ in range(2))
        through(rewound, model, tokens, CHUNKS)
        rewound.length = n
        whole = torch.cat((tokens[:, :n], others[:, :9]), dim=1)
        expected = through(fresh, model, whole, [n, *chunks] if n else chunks)[:, n:]
        assert relative(through(rewound, model, others[:, :9], chunks), expected) < 1e-5
        assert rewound.length == fresh.length == n + 9
        assert relative(expected, model(whole, project=p.at(ranks))[:, n:]) < 1e-4


def test_a_length_that_the_cache_has_no_room_for_is_refused(model, tokens):
    cache = KVCache(random_projection(model), random_ranks(model), batch=3, max_len=25)
    model(tokens, cache=cache)
    for length in (-1, 26):
        with pytest.raises(ValueError, match=f"length {length} .* 0 to 25"):
            cache.length = length
    assert cache.length == 21
    for length in (25, 0):
        cache.length = length


# ------------------------------------------------------------------------------
# One tensor

def test_blocks_lie_end_to_end_without_padding(many_heads):
    L, K, _ = shape(many_heads)
    for name in ("apart", "ragged", "uniform"):
        ranks = plan_called(name, many_heads)
        cache = KVCache(random_projection(many_heads), ranks, batch=2, max_len=5)
        end = 0
        for layer in range(L):
            for side in range(2):
                order = cache.head_order[side, layer].tolist()
                assert sorted(order) == list(range(K))
                for head in order:
                    assert cache.offsets[side, layer, head] == end
                    end += 2 * 5 * ranks[side, layer, head]
        assert end == cache.data.numel()


def test_a_group_is_all_heads_of_a_rank_as_one_view(many_heads):
    L, K, _ = shape(many_heads)
    for name in ("apart", "ragged", "uniform"):
        ranks = plan_called(name, many_heads)
        cache = KVCache(random_projection(many_heads), ranks, batch=2, max_len=5)
        for side, layer in itertools.product(range(2), range(L)):
            groups = cache.layout(layer, 1)[side]
            assert len(groups) == len(ranks[side, layer].unique())
            cache.data.zero_()
            for number, (_, rows) in enumerate(groups, 1):
                rows += number
            for heads, rows in groups:
                members = cache.head_order[side, layer].repeat_interleave(2)[heads]
                assert (ranks[side, layer, members] == rows.shape[1]).all()
                blocks = [cache.block(side, layer, j) for j in members[::2]]
                assert torch.equal(torch.cat(blocks), rows)


@pytest.mark.parametrize("chunks", [[21], [1] * 21])
def test_a_row_is_one_coordinate_of_one_sequence_over_the_tokens(many_heads, tokens, chunks):
    """Keys U_kᵀ k and values U_vᵀ v, read from the cache, against the model's own hooks."""
    model = many_heads
    p, ranks = random_projection(model), plan_called("apart", model)
    ranks[0, 1] = model.config.head_dim                 # all keys of a layer full: stored unturned
    cache = KVCache(p, ranks, batch=3, max_len=25)
    through(cache, model, tokens, chunks)
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

def assert_cut_by_hand(model, batch, large, small):
    p = random_projection(model)
    small = torch.minimum(small, large)
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


@pytest.mark.parametrize("before, after", [("full", "ragged"), ("ragged", "ragged"),
                                           ("full", "full"), ("one head full", "uniform")])
def test_a_shrunk_cache_is_one_whose_coordinates_were_cut_by_hand(model, before, after):
    """And what follows has the logits of the smaller plan over the tokens' larger one."""
    assert_cut_by_hand(model, 3, plan_called(before, model), plan_called(after, model))


def test_heads_that_lie_elsewhere_after_shrinking_keep_their_coordinates(many_heads):
    """Of one rank before, so in another order of blocks than after."""
    large = uniform_ranks(0.75, many_heads.config)
    assert_cut_by_hand(many_heads, 2, large, plan_called("apart", many_heads))


def fold_all(cache, model):
    return [cache.fold(i, layer.self_attn) for i, layer in enumerate(model.layers)]


def test_a_shrunk_cache_folds_the_models_own_weights_again(every_model):
    """Not what was folded before: the same numbers as in a cache that always had the plan."""
    model = every_model
    p, large = random_projection(model), random_ranks(model)
    small = torch.minimum(random_ranks(model), large)
    cache, fresh = KVCache(p, large, 1, max_len=24), KVCache(p, small, 1, max_len=24)
    fold_all(cache, model)
    cache.shrink(small)
    for mine, expected in zip(fold_all(cache, model), fold_all(fresh, model), strict=True):
        for a, b in zip(mine, expected, strict=True):
            assert a is b is None or torch.equal(a, b)


def test_shrinking_needs_the_models_weights(model):
    """They may be dropped where nothing will shrink; what was folded of them goes on."""
    p, large = random_projection(model), random_ranks(model)
    cache = KVCache(p, large, batch=1, max_len=24)
    folded = fold_all(cache, model)
    for layer in model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, None)
    model(torch.tensor([[3, 4, 5]]), cache=cache)
    assert all(a is b for a, b in zip(fold_all(cache, model), folded, strict=True))
    cache.shrink(torch.full_like(large, model.config.head_dim // 8))
    with pytest.raises(ValueError, match="weights were dropped"):
        model(torch.tensor([[3]]), cache=cache)
    assert cache.length == 3


def test_a_cache_never_grows_by_shrinking(model):
    d = model.config.head_dim
    cache = KVCache(random_projection(model), uniform_ranks(0.5, model.config), batch=1, max_len=5)
    data = cache.data
    larger = cache.ranks.clone()
    larger[1, 0, 1] += d // 8
    for wrong in (larger, cache.ranks[:, :1]):
        with pytest.raises(ValueError, match="at or below"):
            cache.shrink(wrong)
    assert (cache.ranks == d // 2).all()
    assert cache.data is data


def test_values_that_stay_whole_stay_in_the_models_own_weights(model):
    """While its keys shrink, a layer makes no second copy of W_o."""
    cache = full_cache(model, batch=1, max_len=5)
    W_o = model.layers[0].self_attn.o_proj.weight
    assert cache.fold(0, model.layers[0].self_attn).W_o is W_o
    small = cache.ranks.clone()
    small[0] //= 2
    cache.shrink(small)
    assert cache.fold(0, model.layers[0].self_attn).W_o is W_o


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
