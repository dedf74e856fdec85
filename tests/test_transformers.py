"""adapters/transformers_cache.py against model.py and cache.py, and against transformers alone."""
import copy
import gc
import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, random_projection, script

pytest.importorskip("transformers")
from test_rounding import random_rounding
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, logging

from adapters.transformers_bits import BitsCache
from adapters.transformers_cache import Adapted, MatryoshkaCache, Rope, calibrate, far
from bits import Bits
from bits.rounding import BITS, Rounding, water_filling
from model import load
from projection import Projection, shape_of, uniform_ranks
from search import Windows, find_order, find_start

logging.set_verbosity_error()
KINDS = ["llama_mha", "llama_gqa_tied_llama3", "mistral_window", "qwen2", "qwen3"]


def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ragged(config):
    L, K, d = shape_of(config)
    return d // 8 * torch.randint(1, 9, (2, L, K))


def made(kind: str, **more):
    """A random model of a kind that model.py may refuse, its weights large enough to matter."""
    said = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(said | more))).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(x + 0.1 * torch.randn_like(x) if x.ndim == 1 else 4 * x)
    return model


def gemma3(**more):
    return made("gemma3_text", **({"head_dim": 16, "sliding_window": 8, "layer_types": [
        "sliding_attention", "full_attention"] * 2} | more))


def logits_of(model, p, ranks, tokens):
    """With keys and values projected, and no cache."""
    adapted = Adapted(model)
    with torch.no_grad():
        states = adapted.norm(adapted.hidden(tokens, p.at(ranks)))
        return states @ adapted.lm_head.weight.T


@torch.no_grad()
def in_parts(model, cache, tokens, parts, **more):
    return torch.cat([model(part, cache=cache, **more).logits
                      for part in tokens.split(parts, dim=1)], dim=1)


# ------------------------------------------------------------------------------
# The same as model.py and cache.py

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [0, 3])
def test_logits_are_those_of_the_projected_model(kind, whole, tokens):
    mine, model = load(GOLDEN / kind), theirs(GOLDEN / kind)
    p = random_projection(mine, whole, mean=1.0)
    for ranks in (ragged(mine.config), uniform_ranks(0.125, mine.config)):
        expected = mine(tokens, project=p.at(ranks))
        found = in_parts(model, MatryoshkaCache(model, p, ranks=ranks), tokens, [2, 9, 1, 1, 8])
        assert torch.allclose(found, expected, atol=2e-5 * expected.abs().max())
        assert far(expected, mine(tokens)) > 1e-3


def test_a_full_plan_is_the_model_to_the_bit(tokens):
    model = theirs(GOLDEN / "qwen2")
    p = random_projection(load(GOLDEN / "qwen2"), 2, mean=1.0)
    cache = MatryoshkaCache(model, p, budget=1.0)
    parts = [5, 1, 15]
    assert torch.equal(in_parts(model, cache, tokens, parts),
                       in_parts(model, DynamicCache(config=model.config), tokens, parts))


@pytest.mark.parametrize(("make", "k_of"), [
    (lambda: theirs(GOLDEN / "llama_gqa_tied_llama3"), "k_proj"), (gemma3, "k_norm")])
def test_keys_before_rope_are_those_of_the_model(make, k_of, tokens):
    """What a hook is shown as k, and its `turn`, against the model's own products and rotation."""
    model = make()
    adapted, seen, before = Adapted(model), {}, {}
    for i, layer in enumerate(model.model.layers):
        getattr(layer.self_attn, k_of).register_forward_hook(
            lambda _, args, out, i=i: before.update({i: out}))
    K, d = adapted.config.num_key_value_heads, adapted.config.head_dim
    adapted.hidden(tokens, observe=lambda i, q, k, v, turn: seen.update({i: (k, turn(k))}),
                   start=torch.tensor([0, 300, 41]))
    assert len(before) == adapted.config.num_hidden_layers
    for i, k in before.items():
        k = k if k.ndim == 4 else k.view(*tokens.shape, K, d).transpose(1, 2)
        assert torch.allclose(seen[i][0], k, atol=1e-4)
        assert not torch.allclose(seen[i][1], k, atol=1e-2)


def test_bfloat16(tokens):
    model = theirs(GOLDEN / "llama_mha")
    p = random_projection(load(GOLDEN / "llama_mha"), 2, mean=1.0)
    ranks = ragged(Adapted(model).config)
    expected = in_parts(model, MatryoshkaCache(model, p, ranks=ranks), tokens, [12, 9])
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_mha", dtype=torch.bfloat16)
    cache = MatryoshkaCache(model, p, ranks=ranks)
    found = in_parts(model, cache, tokens, [12, 9])
    assert far(found.float(), expected) < 0.04
    assert cache.layers[0].keys.dtype == torch.bfloat16


# ------------------------------------------------------------------------------
# Models that model.py refuses

OTHERS = {
    "gemma3_text": {"head_dim": 16, "sliding_window": 8,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi": {}, "olmo2": {}, "stablelm": {}, "glm": {"head_dim": 16}, "cohere2": {
        "head_dim": 16, "sliding_window": 8}, "smollm3": {"no_rope_layer_interval": 2},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models(kind):
    """Partial and interleaved RoPE, two thetas, none, biased heads, scaled logits, windows."""
    model, tokens = made(kind, **OTHERS[kind]), torch.randint(3, 96, (2, 29))
    adapted = Adapted(model)
    p, ranks = random_projection(adapted, 3, mean=0.5), ragged(adapted.config)
    expected = logits_of(model, p, ranks, tokens)
    found = in_parts(model, MatryoshkaCache(model, p, ranks=ranks), tokens, [13, 1, 1, 6, 8])
    assert far(found, expected) < 1e-5
    with torch.no_grad():
        own = model(tokens).logits
        full = logits_of(model, p, uniform_ranks(1.0, adapted.config), tokens)
    assert far(full, own) < 1e-5 and far(expected, own) > 1e-2


@pytest.mark.parametrize(("kind", "more", "said"), [
    ("gemma2", {"head_dim": 16}, "bends its logits"),
    ("llama4_text", {"head_dim": 16, "num_local_experts": 2}, "layers of chunked_attention"),
    ("qwen3_next", {}, "layers of linear_attention"),
    ("gpt2", {"n_embd": 64, "n_head": 4}, "RoPE is not where"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
     "RoPE of the type dynamic"),
])
def test_models_that_are_refused(kind, more, said):
    with pytest.raises(ValueError, match=said):
        Adapted(made(kind, **more))


def test_another_rope_than_the_model_has_is_noticed(monkeypatch):
    model = theirs(GOLDEN / "llama_mha")
    monkeypatch.setattr(Rope, "turn_back", lambda self, x, cos_sin: x * cos_sin[0])
    with pytest.raises(ValueError, match="how positions turn the keys of layer 0"):
        Adapted(model)


# ------------------------------------------------------------------------------
# Batches

LENGTHS = (5, 12, 2)


def padded(tokens):
    """Texts of LENGTHS, padded on the left; their mask, and positions as `generate` has them."""
    n = max(LENGTHS)
    mask = torch.tensor([[0] * (n - length) + [1] * length for length in LENGTHS])
    ids = torch.zeros_like(mask)
    for row, length in enumerate(LENGTHS):
        ids[row, n - length:] = tokens[row, :length]
    return ids, mask, (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)


@pytest.mark.parametrize("make", [lambda: theirs(GOLDEN / "llama_gqa_tied_llama3"), gemma3])
@pytest.mark.parametrize("parts", [[12], [3, 8, 1]])
def test_each_text_of_a_padded_batch_is_as_alone(make, parts, tokens):
    model = make()
    adapted = Adapted(model)
    p, ranks = random_projection(adapted, 3, mean=0.5), ragged(adapted.config)
    ids, mask, positions = padded(tokens)
    more = torch.randint(3, 96, (3, 1))
    cache, n, found = MatryoshkaCache(model, p, ranks=ranks), 0, []
    with torch.no_grad():
        for part in parts:                      # pads may fill a whole part
            now = slice(n, n := n + part)
            found.append(model(ids[:, now], attention_mask=mask[:, :n], cache=cache,
                               position_ids=positions[:, now]).logits)
        found.append(model(more, attention_mask=torch.cat((mask, mask[:, -1:]), 1),
                           cache=cache, position_ids=positions[:, -1:] + 1).logits)
        found = torch.cat(found, dim=1)
        for row, length in enumerate(LENGTHS):
            text = torch.cat((tokens[row:row + 1, :length], more[row:row + 1]), dim=1)
            alone = in_parts(model, MatryoshkaCache(model, p, ranks=ranks), text, [length, 1])
            assert far(found[row:row + 1, -length - 1:], alone) < 1e-5


def test_generate_of_a_padded_batch(tokens):
    model = theirs(GOLDEN / "llama_mha")
    p = random_projection(load(GOLDEN / "llama_mha"), 2, mean=1.0)
    ranks = ragged(Adapted(model).config)
    ids, mask, _ = padded(tokens)
    said = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **said,
                              cache=MatryoshkaCache(model, p, ranks=ranks))
    for row, length in enumerate(LENGTHS):
        alone = model.generate(tokens[row:row + 1, :length], **said,
                               cache=MatryoshkaCache(model, p, ranks=ranks))
        assert torch.equal(together[row, -8:], alone[0, -8:])


def test_padding_without_positions_is_refused(tokens):
    model = theirs(GOLDEN / "llama_mha")
    cache = MatryoshkaCache(model, random_projection(Adapted(model)), budget=0.5)
    ids, mask, positions = padded(tokens)
    with pytest.raises(ValueError, match="needs position_ids"):
        model(ids, attention_mask=mask, cache=cache)
    for wrong in (positions.flip(1), torch.arange(12)[None]):
        with pytest.raises(ValueError, match="must count up"):
            model(ids, attention_mask=mask, cache=cache, position_ids=wrong)
    model(ids, attention_mask=torch.ones_like(mask), cache=cache)
    cache.reset()
    model(ids, attention_mask=mask.bool(), position_ids=positions, cache=cache)


def test_a_refused_pass_leaves_the_cache_as_it_was(tokens):
    model = theirs(GOLDEN / "llama_mha")
    p = random_projection(Adapted(model), 3, mean=1.0)
    cache = MatryoshkaCache(model, p, budget=0.5)
    in_parts(model, cache, tokens[:, :9], [9], position_ids=7 + torch.arange(9)[None])
    for more in ({"position_ids": torch.arange(12)[None]}, {}):     # none: transformers counts on
        with pytest.raises(ValueError, match="must count up"):      # from the cache's length
            model(tokens[:, 9:], cache=cache, **more)
    found = in_parts(model, cache, tokens[:, 9:], [12], position_ids=16 + torch.arange(12)[None])
    fresh = MatryoshkaCache(model, p, budget=0.5)
    expected = in_parts(model, fresh, tokens, [21], position_ids=7 + torch.arange(21)[None])
    assert far(found, expected[:, 9:]) < 1e-5
    with torch.no_grad():                               # positions as the third in a row
        states = model.model(tokens, None, 7 + torch.arange(21)[None],
                             cache=MatryoshkaCache(model, p, budget=0.5)).last_hidden_state
    assert far(model.lm_head(states), expected) < 1e-5


def test_a_text_at_another_position(tokens):
    """Whole tokens are its first, and keys are turned to where it lies."""
    model = theirs(GOLDEN / "llama_mha")
    p = random_projection(Adapted(model), 3, mean=1.0)
    mine, ranks = load(GOLDEN / "llama_mha"), ragged(Adapted(model).config)
    start = torch.tensor([7, 0, 30])
    cache = MatryoshkaCache(model, p, ranks=ranks)
    positions = start[:, None] + torch.arange(tokens.shape[1])
    with torch.no_grad():
        found = torch.cat([model(part, position_ids=place, cache=cache).logits
                           for part, place in zip(tokens.split([2, 19], 1),
                                                  positions.split([2, 19], 1), strict=True)], 1)
    states = mine.norm(mine.hidden(tokens, p.at(ranks), start=start))
    assert torch.allclose(found, states @ mine.lm_head.weight.T, atol=1e-4)


# ------------------------------------------------------------------------------
# What users do with a cache

@pytest.mark.parametrize("back", [1, 6, 19, 21])
def test_crop(back, tokens):
    """Also to fewer tokens than are whole, and to none."""
    model = theirs(GOLDEN / "llama_mha")
    p = random_projection(Adapted(model), 4, mean=1.0)
    ranks, other = ragged(Adapted(model).config), torch.randint(3, 96, (3, 9))
    cache = MatryoshkaCache(model, p, ranks=ranks)
    in_parts(model, cache, tokens, [21])
    cache.crop(-back)
    found = in_parts(model, cache, other, [4, 5])
    both = torch.cat((tokens[:, :21 - back], other), dim=1)
    expected = in_parts(model, MatryoshkaCache(model, p, ranks=ranks), both, [both.shape[1]])
    assert far(found, expected[:, -9:]) < 1e-5
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    again = in_parts(model, cache, both, [both.shape[1]])
    assert torch.equal(again, expected)


def test_crop_into_padding(tokens):
    """Of the shortest text nothing is left but padding, and it comes again."""
    model = theirs(GOLDEN / "llama_mha")
    p = random_projection(Adapted(model), 2, mean=1.0)
    ids, mask, positions = padded(tokens)
    cache = MatryoshkaCache(model, p, budget=0.5)
    said = {"attention_mask": mask, "past_key_values": cache}
    expected = model(ids, position_ids=positions, **said).logits[:, 3:]
    cache.crop(-9)
    found = model(ids[:, 3:], position_ids=positions[:, 3:], **said).logits
    seen = mask[:, 3:, None].bool()
    assert far(found * seen, expected * seen) < 1e-5


def test_beams_keep_their_own_tokens(tokens):
    model = theirs(GOLDEN / "llama_mha")
    p, more = random_projection(Adapted(model), 4, mean=1.0), torch.randint(3, 96, (3, 1))
    idx = torch.tensor([2, 0, 0])
    for change, rows in ((lambda c: c.reorder_cache(idx), idx),
                         (lambda c: c.batch_select_indices(idx), idx)):
        cache = MatryoshkaCache(model, p, budget=0.5)
        in_parts(model, cache, tokens, [21])
        change(cache)
        whole = torch.cat((tokens[rows], more), dim=1)
        fresh = in_parts(model, MatryoshkaCache(model, p, budget=0.5), whole, [22])
        assert far(in_parts(model, cache, more, [1]), fresh[:, -1:]) < 1e-5
    said = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = MatryoshkaCache(model, p, budget=0.5)
    found = model.generate(tokens[:2], num_beams=3, cache=cache, **said)
    one_by_one = [model.generate(row[None], num_beams=3, **said, cache=MatryoshkaCache(
        model, p, budget=0.5)) for row in tokens[:2]]
    assert torch.equal(found, torch.cat(one_by_one))


def test_two_caches_of_one_model(tokens):
    model = theirs(GOLDEN / "llama_mha")
    p = random_projection(Adapted(model), 2, mean=1.0)
    caches = [MatryoshkaCache(model, p, budget=b) for b in (0.25, 0.75)]
    found = [[model(part, cache=cache).logits for cache in caches]
             for part in tokens.split([10, 1, 10], dim=1)]
    for number, budget in enumerate((0.25, 0.75)):
        alone = in_parts(model, MatryoshkaCache(model, p, budget=budget), tokens, [10, 1, 10])
        assert torch.equal(torch.cat([of[number] for of in found], dim=1), alone)
    other = theirs(GOLDEN / "llama_mha")
    for _ in range(2):                                  # also when that one has had its own
        with pytest.raises(ValueError, match="made for another model"):
            other(tokens, cache=MatryoshkaCache(model, p, budget=0.5))
        MatryoshkaCache(other, p, budget=0.5)


@pytest.mark.parametrize("make", [lambda: theirs(GOLDEN / "llama_mha"), gemma3])
def test_one_text_one_token_at_a_time(make, tokens):
    model = make()
    p = random_projection(Adapted(model), 2, mean=1.0)
    cache, text = MatryoshkaCache(model, p, budget=0.5), tokens[:1]
    for _ in range(2):                                  # again, on the same cache
        found = in_parts(model, cache, text, [1] * 21)
        expected = in_parts(model, MatryoshkaCache(model, p, budget=0.5), text, [21])
        assert far(found, expected) < 1e-5
        cache.reset()


def test_modes_and_copies(tokens):
    """Gradients, inference mode and then none, training, deepcopy, crops that give back memory."""
    model = theirs(GOLDEN / "llama_mha").train()
    p = random_projection(Adapted(theirs(GOLDEN / "llama_mha")), 4, mean=1.0)
    caches = [MatryoshkaCache(model, p, budget=0.5) for _ in range(3)]
    assert model.training and model.lm_head.weight.requires_grad
    model.eval()
    expected = in_parts(model, caches[0], tokens, [21])
    with torch.inference_mode():
        model(tokens[:, :2], cache=caches[1])
    copied = copy.deepcopy(caches[1])
    for cache in (caches[1], copied):
        assert far(in_parts(model, cache, tokens[:, 2:], [19]), expected[:, 2:]) < 1e-5
    x = model.model.embed_tokens(tokens)
    model(inputs_embeds=x, cache=caches[2]).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0
    caches[1].crop(-15)
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for layer in caches[1].layers for x in (layer.keys, layer.values)}
    firsts = sum(x.nbytes for sides in caches[1].first for x in sides)
    assert caches[1].nbytes == sum(held.values()) + firsts


@pytest.mark.parametrize(("said", "fault"), [
    ({"budget": float("nan")}, "a budget of nan"), ({}, "either ranks or a budget"),
    ({"ranks": 3}, "one plan"), ({"budget": 0.01}, "budget")])
def test_what_a_cache_refuses(said, fault):
    model = theirs(GOLDEN / "llama_mha")
    p = random_projection(Adapted(model))
    if "ranks" in said:                                 # a plan for each of so many texts
        said = {"ranks": ragged(Adapted(model).config)[:, :, None].expand(-1, -1, 3, -1)}
    with pytest.raises(ValueError, match=fault):
        MatryoshkaCache(model, p, **said)
    with pytest.raises(ValueError, match="has no lm_head"):
        MatryoshkaCache(theirs(GOLDEN / "llama_mha").model, p, budget=0.5)


# ------------------------------------------------------------------------------
# Bytes

@pytest.mark.parametrize("make", [lambda: theirs(GOLDEN / "qwen2"), gemma3])
def test_bytes_are_the_plan_and_first_tokens(make, tokens):
    model = make()
    adapted = Adapted(model)
    L, K, d = shape_of(adapted.config)
    p, ranks = random_projection(adapted, 3, mean=0.5), ragged(adapted.config)
    ranks[:, 0] = d                             # a layer that stays as it is has no first tokens
    cache = MatryoshkaCache(model, p, ranks=ranks)
    in_parts(model, cache, tokens, [9, 1, 11])
    B, n = tokens.shape
    window = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", ["full_attention"] * L)
    kept = [window - 1 if kind == "sliding_attention" and window else n for kind in kinds]
    expected = sum(B * 4 * kept[i] * int(ranks[:, i].sum()) for i in range(L))
    partly = sum((ranks[side, i] < d).any().item() for side in (0, 1) for i in range(L))
    expected += 4 * B * K * p.whole * d * partly
    assert cache.nbytes == expected
    stored = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
              for layer in cache.layers for x in (layer.keys, layer.values)}
    firsts = sum(x.nbytes for sides in cache.first for x in sides if x is not None)
    assert sum(stored.values()) + firsts == expected


def test_nothing_of_full_width_outlives_a_pass(tokens):
    model = theirs(GOLDEN / "llama_mha")
    adapted = Adapted(model)
    _, K, d = shape_of(adapted.config)
    cache = MatryoshkaCache(model, random_projection(adapted, 2, mean=1.0), budget=0.5)
    many = tokens.repeat(1, 20)
    with torch.no_grad():
        model.model(many, cache=cache)
    gc.collect()
    alive = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)
             and x.shape[-3:] == (K, many.shape[1], d)]
    assert not alive


# ------------------------------------------------------------------------------
# Calibration

def test_calibrate_is_search(tokens):
    """The same start and order as of model.py's own sweeps; signs of columns are free."""
    mine, model = load(GOLDEN / "llama_gqa_tied_llama3"), theirs(GOLDEN / "llama_gqa_tied_llama3")
    text = torch.randint(3, 96, (900,)).numpy()
    windows = Windows(text, 8, 4, 32, 256, 0)
    start = find_start(mine, windows, 3)
    p, order = calibrate(model, text, whole=3, windows=8, batch=4, seq=32, positions=256)
    assert torch.allclose(p.mean_k, start.mean_k, atol=1e-4) and p.whole == 3
    for name in ("U_k", "U_v"):
        alike = (getattr(p, name).mT @ getattr(start, name)).diagonal(dim1=-2, dim2=-1).abs()
        assert alike.min() > 0.99
    expected = find_order(mine, start, windows)
    assert len(order) == len(expected) and torch.equal(order.bincount(), expected.bincount())
    assert (order == expected).double().mean() > 0.9


def test_the_script_writes_what_train_writes(tmp_path):
    text = tmp_path / "tokens.npy"
    np.save(text, np.random.default_rng(0).integers(3, 96, 4000).astype(np.uint16))
    folder, few = GOLDEN / "llama_gqa_tied_llama3", [
        "--data", str(text), "--seq", "32", "--batch", "4", "--sweep-windows", "8",
        "--windows", "4"]
    outs = [tmp_path / "theirs", tmp_path / "mine"]
    script("adapters/transformers_cache.py", str(folder), *few, "--out", str(outs[0]))
    script("train.py", "--ckpt", str(folder), "--steps", "0", *few, "--out", str(outs[1]))
    files = [sorted(x.name for x in out.iterdir()) for out in outs]
    assert files[0] == files[1] and "ranks.json" in files[0]
    kls = [[row["trained_ordered"]["kl"] for row in json.loads((out / "train.json").read_text())[
        "budgets"]] for out in outs]
    assert kls[0] == pytest.approx(kls[1], rel=0.05)
    model = theirs(folder)
    p = Projection.load(outs[0] / "projections.safetensors")
    cache = MatryoshkaCache(model, outs[0] / "projections.safetensors", budget=0.5)
    L, K, d = shape_of(Adapted(model).config)
    of_plan = [U.shape[1] for sides in cache.sides for side in sides for U in side.U]
    assert sum(of_plan) == L * K * d and len(set(of_plan)) > 1 and p.whole == 4


# ------------------------------------------------------------------------------
# Bits

def with_bits(kind: str, batch: int, budget: float = 0.25):
    """model.py's model and its PackedCache, transformers' and its BitsCache, at the same plan."""
    mine, model = load(GOLDEN / kind), theirs(GOLDEN / kind)
    rounding = random_rounding(mine, whole=3)
    costs = torch.rand(2, *shape_of(mine.config)[:2], 8, len(BITS)).sort(-1, descending=True).values
    bits = Bits(rounding, water_filling(costs), mine.config)
    return (mine, bits.cache(budget, batch, 512)), (model, BitsCache(model, bits, budget)), bits


@pytest.mark.parametrize("kind", ["llama_gqa_tied_llama3", "qwen2"])
def test_bits_are_those_of_the_packed_cache(kind):
    """Chunks of a group see themselves as they are, there as here; then tokens one by one.

    Of 80,000 codes one or another may be rounded to the other side, as RoPE differs in its 7th
    digit; the last tokens then differ by a thousandth.
    """
    (mine, packed), (model, cache), _ = with_bits(kind, 2, budget=0.125)
    tokens = torch.randint(3, 96, (2, 330))             # more than a tile of 256
    parts = tokens.split([32] * 9 + [1] * 42, dim=1)
    with torch.no_grad():
        for part in parts:
            expected, found = mine(part, cache=packed), model(part, cache=cache).logits
            assert far(found, expected) < 0.01
    assert cache.layers[0].length == 330 and cache.layers[0].tiles == 2
    base = mine(tokens)[:, -1:]
    assert far(expected, base) > 0.2


def test_bytes_of_bits(tokens):
    _, (model, cache), bits = with_bits("qwen2", 1)
    plan, B, n = bits.plan(0.25), 3, 512
    L, K, d = shape_of(bits.config)
    model(tokens.repeat(1, 25)[:, :n], cache=cache)
    newest = 2 * L * K * B * 32 * d * 4
    first = 2 * L * K * B * 3 * d * 4
    assert cache.nbytes == B * n * int(plan.sum()) * d // 8 // 8 + newest + first
    assert int(plan.sum()) / plan.numel() / 16 <= 0.25


def test_bits_in_other_modes_and_copies(tokens):
    _, (model, cache), bits = with_bits("llama_mha", 3)
    text = tokens.repeat(1, 20)
    expected = in_parts(model, BitsCache(model, bits, 0.25), text, [100, 60, 140, 120])
    with torch.inference_mode():
        model(text[:, :100], cache=cache)
    for one in (cache, copy.deepcopy(cache)):
        found = in_parts(model, one, text[:, 100:], [60, 140, 120])
        assert far(found, expected[:, 100:]) < 1e-5


@pytest.mark.parametrize("back", [1, 8, 40])
def test_crop_of_bits(back, tokens):
    _, (model, cache), bits = with_bits("llama_mha", 3)
    text, more = tokens.repeat(1, 4)[:, :74], torch.randint(3, 96, (3, 60))
    fresh = BitsCache(model, bits, 0.25)
    # As `back` tokens come again, all see the same groups as codes.
    in_parts(model, cache, text, [32, 32, 10])
    with pytest.raises(ValueError, match="codes alone"):
        cache.crop(-60)
    cache.crop(-back)
    whole = torch.cat((text[:, :74 - back], more), dim=1)
    if back == 40:
        in_parts(model, fresh, whole[:, :34], [32, 2])
    else:
        in_parts(model, fresh, whole[:, :74 - back], [32, 32, 10 - back])
    ones = [1] * more.shape[1]
    assert far(in_parts(model, cache, more, ones), in_parts(model, fresh, more, ones)) < 1e-5


def test_each_text_of_a_padded_batch_of_bits_is_as_alone():
    """Padded by whole groups, so that the same tokens are codes."""
    (_, _), (model, cache), bits = with_bits("llama_mha", 3, budget=0.125)
    lengths, more = (64, 96, 32), torch.randint(3, 96, (3, 12))
    texts = [torch.randint(3, 96, (1, length)) for length in lengths]
    ids = torch.cat([torch.cat((torch.zeros(1, 96 - text.shape[1]).long(), text), dim=1)
                     for text in texts])
    mask = (torch.arange(108) >= 96 - torch.tensor(lengths)[:, None]).long()
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    found = []
    with torch.no_grad():
        model(ids, attention_mask=mask[:, :96], position_ids=positions[:, :96], cache=cache)
        for n, token in enumerate(more.split(1, dim=1), 97):
            found.append(model(token, attention_mask=mask[:, :n], cache=cache,
                               position_ids=positions[:, n - 1:n]).logits)
        for row, text in enumerate(texts):
            whole = torch.cat((text, more[row:row + 1]), dim=1)
            parts = [text.shape[1]] + [1] * 12
            alone = in_parts(model, BitsCache(model, bits, 0.125), whole, parts)[:, -12:]
            assert far(torch.cat(found, dim=1)[row:row + 1], alone) < 0.01
            assert far(alone, model(whole).logits[:, -12:]) > 0.05
    with pytest.raises(ValueError, match="no beams"):
        cache.reorder_cache(torch.tensor([0, 0, 1]))
    cache.reset()
    assert cache.get_seq_length() == 0


def test_bits_of_a_model_with_sliding_layers():
    """At 8 bits from the least to the largest coordinate hardly anything is lost."""
    model = gemma3()
    adapted, tokens = Adapted(model), torch.randint(3, 96, (1, 94))
    rounding = random_rounding(adapted, whole=3)
    p, steps = rounding.p, rounding.steps.clone()

    def observe(i, _, k, v, turn):
        m = p.mean_k[i][:, None]
        for side, (x, U) in enumerate(((turn(k - m), p.U_k), (v - p.mean_v[i][:, None], p.U_v))):
            steps[side, i] = (x @ U[i]).abs().amax((0, 2))[..., None] / 120

    with torch.no_grad():
        adapted.hidden(tokens, observe=observe)
    path = water_filling(torch.rand(2, *shape_of(adapted.config)[:2], 8, len(BITS)).sort(
        -1, descending=True).values)
    cache = BitsCache(model, Bits(Rounding(p, steps), path, adapted.config), 0.5)
    with torch.no_grad():
        found = in_parts(model, cache, tokens, [70] + [1] * 24)[:, -24:]
        expected = model(tokens).logits[:, -24:]
        assert 1e-4 < far(found, expected) < 0.05
        other = in_parts(made_full(model), DynamicCache(config=model.config), tokens, [94])
        assert far(other[:, -24:], expected) > 0.1      # if sliding layers saw all


def made_full(model):
    """The same weights, every layer attending to all tokens."""
    full = copy.deepcopy(model)
    for layer in full.model.layers:
        layer.self_attn.sliding_window = None
    full.config.sliding_window = 512
    return full
