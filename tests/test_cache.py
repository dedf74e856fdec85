"""The cache: the projected model's logits to rounding, from exactly the bytes that ranks say."""
import dataclasses
import itertools
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    CKPT,
    GOLDEN,
    full_cache,
    mean_kl,
    random_projection,
    random_ranks,
    relative,
    shape,
)

import cache as cache_module
from cache import KVCache
from model import Model, frequencies, load
from projection import Moments, Projection, leading, uniform_ranks

CHUNKS = [6, 1, 1, 9, 4]        # a prompt, single tokens, longer ones that follow
PIECES = ([21], [1] * 21, [3, 18], [2, 1, 1, 5, 12])        # edges among the first four tokens


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
    if name == "one side full":                 # of a layer: it is stored unturned
        ranks[0, 0] = ranks[1, 1] = d
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


@pytest.mark.parametrize("whole, mean", [(0, 0.0), (6, 1.0)])
def test_a_long_chunk_in_pieces_is_the_chunk_in_one(model, tokens, monkeypatch, whole, mean):
    """17 tokens behind 4: five of them at a time, then two."""
    p, ranks = random_projection(model, whole, mean), random_ranks(model)
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
    for whole, mean, chunks in ((0, 0.0, [18, 1, 2]), (4, 1.0, [2, 1, 16, 2])):
        p, ranks = random_projection(model, whole, mean), random_ranks(model)
        clean, dirty = (KVCache(p, ranks, batch=3, max_len=50) for _ in range(2))
        dirty.data.fill_(torch.nan)
        dirty.first.fill_(torch.nan)
        for part in tokens.split(chunks, dim=1):
            assert torch.equal(model(part, cache=clean), model(part, cache=dirty))


# ------------------------------------------------------------------------------
# First tokens that stay whole, and a mean that is turned

def exact_projection(model, whole, mean=2.0):
    """In the model's dtype, and orthogonal to its last digit."""
    p = random_projection(model, whole, mean).to(None, torch.float64)
    p.U_k, p.U_v = (torch.linalg.qr(U).Q for U in (p.U_k, p.U_v))
    return p.to(None, model.dtype)


def assert_projected_whole(model, plans):
    for dtype, bound, pieces in ((torch.float64, 1e-12, PIECES), (torch.float32, 1e-4, PIECES[3:])):
        model = model.to(dtype)
        for whole, plan in itertools.product((0, 1, 4), plans):
            p, ranks = exact_projection(model, whole), plan_called(plan, model)
            tokens = torch.randint(3, 96, (3, 21))
            expected = model(tokens, project=p.at(ranks))
            for chunks in pieces:
                cache = KVCache(p, ranks, batch=3, max_len=24, dtype=dtype)
                assert relative(through(cache, model, tokens, chunks), expected) < bound


def test_with_whole_tokens_and_a_mean_the_cache_is_the_projected_model(every_model):
    assert_projected_whole(every_model, ["ragged", "one side full"])


@pytest.mark.parametrize("kind", ["mistral_window", "llama_mha", "qwen2", "qwen3"])
def test_so_it_is_with_a_window_and_with_heads_whose_ranks_lie_apart(kind):
    """Apart are those of four heads: of a model of the kind that has as many."""
    model = load(GOLDEN / kind)
    if kind.startswith("qwen"):
        model = Model(dataclasses.replace(model.config, num_key_value_heads=4))
        for parameter in model.requires_grad_(False).parameters():
            parameter.normal_(float(parameter.ndim == 1), 0.2)
    assert_projected_whole(model, ["ragged" if kind == "mistral_window" else "apart"])


def attention_by_hand(model, h, p, ranks):
    """Layer 0's attention, (B, T, hidden), of normed states h: the equations, head by head."""
    c, weights = model.config, model.layers[0].self_attn
    (B, T, _), d = h.shape, c.head_dim

    def heads(projected, norm=None):
        x = h @ projected.weight.T + (0 if projected.bias is None else projected.bias)
        x = x.view(B, T, -1, d).transpose(1, 2)
        if norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        return x

    position = torch.arange(T, dtype=torch.float64)[:, None]
    turn = torch.polar(torch.ones(T, d // 2, dtype=torch.float64), position * frequencies(c))

    def turned(x):
        z = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    def cut(x, center, U, r):                           # (B, T, d)
        x_hat = center + (x - center) @ U[:, :r] @ U[:, :r].T
        return torch.cat((x[:, :p.whole], x_hat[:, p.whole:]), dim=1) if r < d else x

    age = position - position.T
    unseen = (age < 0) | (age >= (c.sliding_window or T))
    q, k = heads(weights.q_proj, weights.q_norm), heads(weights.k_proj, weights.k_norm)
    v, out = heads(weights.v_proj), []
    G = q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        j = h // G
        m = torch.zeros(d).double() if p.mean_k is None else p.mean_k[0, j]
        k_hat = cut(turned(k[:, j]), turned(m.expand(T, d)), p.U_k[0, j], ranks[0, 0, j])
        v_hat = cut(v[:, j], p.mean_v[0, j], p.U_v[0, j], ranks[1, 0, j])
        scores = turned(q[:, h]) @ k_hat.mT / d ** 0.5
        out.append(scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v_hat)
    return torch.cat(out, dim=-1) @ weights.o_proj.weight.T


@pytest.mark.parametrize("kind", ["llama_mha", "mistral_window", "qwen2", "qwen3"])
def test_a_layer_attends_as_the_equations_say_with_and_without_the_cache(kind):
    """Keys turned as complex numbers, one head at a time, in float64."""
    model = load(GOLDEN / kind, dtype=torch.float64)
    h = torch.randn(3, 21, model.config.hidden_size, dtype=torch.float64)
    for whole, mean in ((0, 0.0), (0, 2.0), (1, 2.0), (4, 2.0)):
        p, ranks = exact_projection(model, whole, mean), random_ranks(model)
        ranks[0, 0, 1] = ranks[1, 0, 0] = model.config.head_dim
        ranks[0, 0, 0] = ranks[1, 0, 1] = model.config.head_dim // 2
        expected = attention_by_hand(model, h, p, ranks)
        cos_sin = model.rope.rows(0, 21, model.dtype, model.device)
        assert relative(model.attend(0, h, cos_sin, p.at(ranks), None), expected) < 1e-12
        for chunks in PIECES:
            cache, out = KVCache(p, ranks, batch=3, max_len=21, dtype=model.dtype), []
            for part in h.split(chunks, dim=1):
                T = part.shape[1]
                cache.before_pass(model, 3, T)
                cos_sin = model.rope.rows(cache.length, T, model.dtype, model.device)
                out.append(model.attend_by_cache(0, part, cos_sin, cache))
                cache.after_pass(T)
            assert relative(torch.cat(out, dim=1), expected) < 1e-12


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])            # biases; norms of queries and keys
def test_a_full_plan_knows_nothing_of_whole_tokens_and_of_a_mean(kind, tokens):
    for dtype in (torch.float32, torch.bfloat16):
        model = load(GOLDEN / kind, dtype=dtype)
        full = uniform_ranks(1.0, model.config)
        expected = through(KVCache(Projection.identity(model.config), full, 3, 21, dtype),
                           model, tokens, [2, 1, 18])
        cache = KVCache(random_projection(model, 4, 600.0), full, 3, 21, dtype)
        assert torch.equal(through(cache, model, tokens, [2, 1, 18]), expected)


# ------------------------------------------------------------------------------
# A mean as large as biases of Qwen2.5 make it

def with_large_biases(size, dtype=torch.float32):
    """A tiny Qwen2, and its keys' biases (L, K, d): in layer 0 of norm `size`, unless that is 0.

    They lie in the slowest pair: along others scores of hundreds would leave a head one token.
    """
    model = load(GOLDEN / "qwen2")
    _, K, d = shape(model)
    biases = [layer.self_attn.k_proj.bias for layer in model.layers]
    if size:
        large = biases[0].view(K, d)[:, d // 2 - 1::d // 2]
        large.copy_(torch.nn.functional.normalize(torch.randn(K, 2), dim=-1) * size)
    return model.to(dtype), torch.stack(biases).view(-1, K, d)


def test_biases_of_600_cost_nothing_once_they_are_the_mean():
    """Not even far behind the positions that the bases were made at. With another they cost a lot.
    """
    text, held_out = torch.randint(3, 96, (2, 16, 40))
    kls = {}
    for size in (0, 600):
        model, mean_k = with_large_biases(size)
        moments = Moments(model.config)

        def observe(layer, _, k, v, turn, mean_k=mean_k, moments=moments):
            moments.add(0, layer, turn(k - mean_k[layer][:, None]))
            moments.add(1, layer, v)

        model.hidden(text, observe=observe)
        U_k, U_v = leading(moments.second()[0]), leading(moments.covariance()[1])
        for factor in (1, 0):
            p = Projection(U_k, U_v, moments.mean()[1].float(), factor * mean_k, whole=4)
            for start, budget in itertools.product((0, 200), (0.75, 0.5)):
                log_p, log_q = (
                    model.lm_head(model.norm(model.hidden(held_out, project, start=start)))
                    for project in (None, p.at(uniform_ranks(budget, model.config))))
                kl = mean_kl(log_p.log_softmax(-1), log_q.log_softmax(-1))
                kls.setdefault((size, factor), []).append(kl)
    usual, large, without = (torch.tensor(kls[key]) for key in ((0, 1), (600, 1), (600, 0)))
    assert (large < 1.2 * usual).all()
    assert (without > 1.5 * usual).all()


@pytest.mark.parametrize("chunks", [[1] * 40, [1, 39]])
def test_what_a_mean_of_600_adds_to_scores_is_not_rounded_to_bfloat16(chunks):
    """Against float64, from the same bfloat16 q, k and v: as near as from float64 scores."""
    model = load(CKPT, dtype=torch.bfloat16)
    _, K, d = shape(model)
    G, r = model.config.num_attention_heads // K, d // 2
    unturned = Projection.identity(model.config)
    m = 600 * torch.nn.functional.normalize(torch.randn_like(unturned.mean_v), dim=-1)
    p = Projection(unturned.U_k, unturned.U_v, unturned.mean_v, m)
    qk = torch.randn(2, K, G + 1, 40, d)
    qk[:, :, :-1] *= 0.05                                       # scores of a few
    qk, v = qk.bfloat16(), torch.randn(2, 40, K * r).bfloat16()
    cache, out = KVCache(p, uniform_ranks(0.5, model.config), 2, 40, torch.bfloat16), []
    for tokens in torch.arange(40).split(chunks):
        cache.before_pass(model, 2, len(tokens))
        out.append(cache.attend(0, qk[:, :, :, tokens], v[:, tokens]))
        cache.after_pass(len(tokens))

    angle = torch.arange(40)[:, None] * frequencies(model.config)
    turned = torch.complex(*m[0].double().chunk(2, dim=-1))[:, None] * torch.polar(
        torch.ones_like(angle), angle)
    turned = torch.cat((turned.real, turned.imag), dim=-1)[:, None]     # (K, 1, 40, d)
    q, k = qk[:, :, :-1].double(), qk[:, :, -1:].double()
    scores = (q[..., :r] @ k[..., :r].mT + q @ turned.mT) * d ** -0.5
    future = torch.ones(40, 40).triu(1).bool()

    def computed(scores_in, weights_in):
        seen = scores.to(scores_in).to(torch.float64).masked_fill(future, -torch.inf)
        weights = seen.softmax(-1).to(weights_in)
        values = v.view(2, 40, K, 1, r).permute(0, 2, 3, 1, 4).to(weights_in)
        return (weights @ values).permute(0, 3, 1, 2, 4).flatten(2)     # (B, T, K·G·r)

    exact, usual = (computed(torch.float64, dtype) for dtype in (torch.float64, torch.bfloat16))
    rounded = computed(torch.bfloat16, torch.bfloat16)
    assert relative(torch.cat(out, dim=1), exact) < 1.2 * relative(usual, exact)
    assert relative(rounded, exact) > 2 * relative(usual, exact)


def test_with_biases_of_600_a_cache_of_two_bytes_is_nearer_than_the_model_of_two_bytes():
    """To float64 over the same weights: keys of that size lose what the cache never adds to them.

    But a prompt in one pass attends to such keys.
    """
    low, mean_k = with_large_biases(600, torch.bfloat16)
    exact = with_large_biases(600)[0].double()
    exact.load_state_dict(low.state_dict())
    p = random_projection(low, 4, 1.0)
    p = Projection(p.U_k, p.U_v, p.mean_v, mean_k.float(), 4)
    tokens, ranks = torch.randint(3, 96, (2, 40)), uniform_ranks(0.75, low.config)

    def distance(a, b):
        return ((a.double() - b.double()).norm() / b.double().norm()).item()

    truth = exact(tokens, project=p.to(None, torch.float64).at(ranks))
    projected = distance(low(tokens, project=p.at(ranks)), truth)
    for chunks, bound in (([1] * 40, 2e-2), ([1, 39], 2e-2), ([40], 1.5 * projected)):
        cache = KVCache(p, ranks, batch=2, max_len=40, dtype=torch.bfloat16)
        assert distance(through(cache, low, tokens, chunks), truth) < bound
    assert projected > 5e-2


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


@pytest.mark.parametrize("kind, whole, mean", [
    ("mistral_sharded_head_dim", 0, 0.0), ("mistral_window", 0, 0.0), ("mistral_window", 4, 1.0),
    ("qwen3", 4, 1.0)])
def test_a_rewound_cache_goes_on_as_one_that_never_went_further(kind, whole, mean):
    """To the start, to one token, into a chunk and to its end, and to where it is."""
    model = load(GOLDEN / kind)
    p, ranks = random_projection(model, whole, mean), random_ranks(model)
    tokens, others = torch.randint(3, 96, (2, 2, 21))
    for n, chunks in itertools.product((0, 1, 3, 6, 7, 8, 20, 21), ([9], [1, 1, 7])):
        rewound, fresh = (KVCache(p, ranks, batch=2, max_len=30) for _ in range(2))
        through(rewound, model, tokens, CHUNKS)
        rewound.length = n
        both = torch.cat((tokens[:, :n], others[:, :9]), dim=1)
        expected = through(fresh, model, both, [n, *chunks] if n else chunks)[:, n:]
        assert relative(through(rewound, model, others[:, :9], chunks), expected) < 1e-5
        assert rewound.length == fresh.length == n + 9
        assert relative(expected, model(both, project=p.at(ranks))[:, n:]) < 1e-4


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
    """Keys U_kᵀ R (x − m) and values U_vᵀ v, in the cache, against the model's own hooks."""
    model = many_heads
    for mean in (0.0, 2.0):
        p, ranks = random_projection(model, 0, mean), plan_called("apart", model)
        ranks[0, 1] = model.config.head_dim             # all keys of a layer full: stored unturned
        cache = KVCache(p, ranks, batch=3, max_len=25)
        through(cache, model, tokens, chunks)
        expected = coordinates(model, p, ranks, ranks, tokens)
        for (side, i, j), r in numbered(ranks):
            stored = cache.block(side, i, j)[..., :21]
            assert relative(stored, expected[side, i, j][:, :r]) < 1e-4


def numbered(ranks):
    """((side, layer, head), its rank) of all of a plan's."""
    return zip(itertools.product(*map(range, ranks.shape)), ranks.flatten().tolist(), strict=True)


def coordinates(model, p, ranks, seen_at, tokens):
    """All coordinates (B, d, T) that a cache at `ranks` knows of, by (side, layer, head).

    Of keys and values as the model has them whose cache is at the plan `seen_at`.
    """
    found, d = {}, model.config.head_dim

    def observe(i, _, k, v, turn):
        is_full = (ranks[:, i] == d).all(-1)
        mean = 0 if is_full[0] or p.mean_k is None else p.mean_k[i][:, None]
        for side, (x, U) in enumerate(((turn(k - mean), p.U_k[i]), (v, p.U_v[i]))):
            x = x if is_full[side] else x @ U
            for j in range(x.shape[1]):
                found[side, i, j] = x[:, j].mT

    model.hidden(tokens, project=p.at(seen_at), observe=observe)
    return found


def test_whole_tokens_come_on_top_of_the_budget(model):
    """And a mean costs no byte."""
    L, K, d = shape(model)
    for whole, dtype in itertools.product((0, 1, 4), (torch.float32, torch.bfloat16)):
        ranks = random_ranks(model)
        cache = KVCache(random_projection(model, whole, 1.0), ranks, 3, max_len=24, dtype=dtype)
        for plan in (ranks, torch.full_like(ranks, d // 8)):
            cache.shrink(plan)
            assert cache.data.nbytes == 3 * 24 * plan.sum() * dtype.itemsize
            assert cache.first.nbytes == 3 * whole * 2 * L * K * d * dtype.itemsize


# ------------------------------------------------------------------------------
# Shrinking

def cut_by_hand(model, p, ranks, seen_at, tokens):
    """A cache at `ranks` of tokens that went into one at `seen_at`: each number put where it lies.

    Of whole values what the bias adds, μ U beyond the rank, is taken off.
    """
    (B, n), w = tokens.shape, min(p.whole, tokens.shape[1])
    cache = KVCache(p, ranks, batch=B, max_len=24, dtype=model.dtype)
    found = coordinates(model, p, ranks, seen_at, tokens) if n else {}
    for (side, i, j), r in numbered(ranks):
        x = found[side, i, j]
        cache.block(side, i, j)[..., :n] = x[:, :r]
        if not (ranks[side, i] == model.config.head_dim).all():
            x = x[..., :w].clone()
            x[:, :r] = 0
            if side == 1:
                x[:, r:] -= (p.mean_v[i, j] @ p.U_v[i, j])[r:, None]
            place = cache.head_order[0, i].tolist().index(j)
            cache.first[i, side, place, ..., :w] = x
    cache.length = n
    return cache


def assert_cut_by_hand(model, *plans, whole=0, mean=0.0, passed=18, n=18):
    """`passed` tokens in a cache of the first plan, set back to n, which shrinks to the others."""
    model = model.double()
    p, d = exact_projection(model, whole, mean), model.config.head_dim
    tokens = torch.randint(3, 96, (3, 21))
    cache = KVCache(p, plans[0], batch=3, max_len=24, dtype=model.dtype)
    model(tokens[:, :passed], cache=cache)
    cache.length = n
    for plan in plans[1:]:
        cache.shrink(plan)
    by_hand = cut_by_hand(model, p, plans[-1], plans[0], tokens[:, :n])
    assert cache.data.numel() == 3 * 24 * plans[-1].sum()
    for (side, i, j), _ in numbered(plans[-1]):
        mine, expected = (x.block(side, i, j)[..., :n] for x in (cache, by_hand))
        assert relative(mine, expected) < 1e-12
    w = min(whole, n)
    for i, side in itertools.product(range(len(model.layers)), range(2)):
        if w and not (plans[-1][side, i] == d).all():
            mine, expected = (x.first[i, side, ..., :w] for x in (cache, by_hand))
            assert relative(mine, expected) < 1e-12
    for part in tokens[:, n:n + 3].split([1, 2], dim=1):
        assert relative(model(part, cache=cache), model(part, cache=by_hand)) < 1e-12


PROJECTIONS = [(0, 0.0), (0, 2.0), (4, 2.0)]            # whole, mean


@pytest.mark.parametrize("before, after", [("full", "ragged"), ("ragged", "ragged"),
                                           ("full", "full"), ("one head full", "uniform"),
                                           ("one side full", "ragged")])
def test_a_shrunk_cache_is_one_whose_coordinates_were_cut_by_hand(model, before, after):
    """And what follows has the logits of the smaller plan over the tokens' larger one."""
    for whole, mean in PROJECTIONS:
        large = plan_called(before, model)
        small = torch.minimum(plan_called(after, model), large)
        assert_cut_by_hand(model, large, small, whole=whole, mean=mean)


def test_heads_that_lie_elsewhere_after_shrinking_keep_their_coordinates(many_heads):
    """Of one rank before, so in another order of blocks than after."""
    apart = plan_called("apart", many_heads)
    for budget, (whole, mean) in itertools.product((0.75, 1.0), PROJECTIONS):
        large = uniform_ranks(budget, many_heads.config)
        assert_cut_by_hand(many_heads, large, apart, whole=whole, mean=mean)


@pytest.mark.parametrize("before", ["full", "ragged"])
def test_a_cache_may_shrink_twice_and_when_it_is_shorter_than_its_whole_tokens(model, before):
    """Two tokens of four; or set back to three, the others' numbers left where they were."""
    large = plan_called(before, model)
    middle = torch.minimum(large, uniform_ranks(0.625, model.config))
    small = torch.minimum(middle, random_ranks(model))
    for plans in ((large, small), (large, middle, small)):
        for passed, n in ((18, 18), (2, 2), (18, 3)):
            assert_cut_by_hand(model, *plans, whole=4, mean=2.0, passed=passed, n=n)


def test_a_cache_that_nothing_went_into_may_shrink(model, tokens):
    p, small = random_projection(model, 4, 1.0), random_ranks(model)
    for length in (0, 7):                   # set ahead, as benchmarks do
        cache = KVCache(p, uniform_ranks(1.0, model.config), batch=3, max_len=24)
        cache.length = length
        cache.shrink(small)
        cache.length = 0
        assert relative(model(tokens, cache=cache), model(tokens, project=p.at(small))) < 1e-4


def test_projections_may_lie_on_another_device_than_the_cache_that_shrinks(model):
    """As a GPU's cache does beside projections just loaded; "meta" has no numbers, but rules."""
    p = random_projection(model, 4, 1.0)
    cache = KVCache(p, uniform_ranks(1.0, model.config), batch=3, max_len=24, device="meta")
    cache.turns = torch.empty(model.config.head_dim, 24, device="meta")
    cache.length = 18
    cache.shrink(random_ranks(model))
    assert cache.data.device == cache.first.device == torch.device("meta")


def test_first_tokens_that_are_not_there_are_not_read(model, tokens):
    """Set back below them, or shrunk without them; what memory holds there may be no number."""
    p, ranks = random_projection(model, 4, 1.0), random_ranks(model)
    for n, plan in ((2, ranks), (0, uniform_ranks(1.0, model.config))):
        cache = KVCache(p, plan, batch=3, max_len=24)
        model(tokens, cache=cache)
        cache.first[..., 3] = torch.nan
        if n == 0:
            cache.data.fill_(torch.nan)
        cache.length = n
        cache.shrink(ranks)
        fresh = KVCache(p, ranks, batch=3, max_len=24)
        if n:
            model(tokens[:, :n], cache=fresh)
        assert relative(*(model(tokens[:, n:n + 1], cache=c) for c in (cache, fresh))) < 1e-5


def fold_all(cache, model):
    return [cache.fold(i, layer.self_attn) for i, layer in enumerate(model.layers)]


def test_a_shrunk_cache_folds_the_models_own_weights_again(every_model):
    """Not what was folded before: the same numbers as in a cache that always had the plan."""
    model = every_model
    p, large = random_projection(model, 4, 1.0), random_ranks(model)
    small = torch.minimum(random_ranks(model), large)
    cache, fresh = KVCache(p, large, 1, max_len=24), KVCache(p, small, 1, max_len=24)
    fold_all(cache, model)
    cache.shrink(small)
    for mine, expected in zip(fold_all(cache, model), fold_all(fresh, model), strict=True):
        mine, expected = ((*x.for_first()[:5], *x[:5], *x.W_o_cut) for x in (mine, expected))
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


@pytest.mark.parametrize("allocation", [1, 2, 5])
def test_a_cache_that_finds_no_memory_to_shrink_stays_as_it_was(
        model, tokens, monkeypatch, allocation):
    """Of `data`, of `first`, or on the way; it goes on, and may shrink when there is memory."""
    p, large = random_projection(model, 4, 1.0), random_ranks(model)
    small = torch.full_like(large, model.config.head_dim // 8)
    caches = [KVCache(p, large, batch=3, max_len=24) for _ in range(2)]
    for cache in caches:
        model(tokens[:, :9], cache=cache)
    calls = itertools.count(1)

    def full(make):
        def allocate(*arguments, **options):
            if next(calls) == allocation:
                raise MemoryError
            return make(*arguments, **options)
        return allocate

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "empty", full(torch.empty))
        patch.setattr(torch, "zeros", full(torch.zeros))
        patch.setattr(torch.Tensor, "clone", full(torch.Tensor.clone))
        caches[0].shrink(small)
    assert (caches[0].ranks == large).all()
    for part, plan in ((tokens[:, 9:11], None), (tokens[:, 11:13], small)):
        if plan is not None:
            for cache in caches:
                cache.shrink(plan)
        a, b = (model(part, cache=cache) for cache in caches)
        assert torch.equal(a, b)


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
    p, ranks = random_projection(model, 4, 1.0), random_ranks(model)
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
