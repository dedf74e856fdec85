"""The packed cache: what it says is what the rounding says, and what it holds is what was asked."""
import copy
import dataclasses

import pytest
import torch
from conftest import GOLDEN, KINDS, relative
from test_rounding import random_bits, random_rounding

import attention
import packed
from model import load
from packed import PackedCache
from rounding import EXACT, same_bits

CHUNKS = (1, 2, 9, 1, 1, 50, 1, 40)


@pytest.fixture(params=KINDS)
def wide_model(request):
    """In float64, where no number lies so near to a boundary that it is rounded another way."""
    return load(GOLDEN / request.param, dtype=torch.float64)


def read_in(model, cache, tokens, chunks=CHUNKS) -> torch.Tensor:
    parts = tokens.split(chunks, dim=1)
    return torch.cat([model(part, cache=cache) for part in parts], dim=1)


@pytest.mark.parametrize("least", [16, 64])         # tiles shifted by bytes, and by words
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_gives_the_logits_of_the_hook(wide_model, batch, window, least, monkeypatch):
    """In chunks and token by token, over several tiles, with grouped queries and without."""
    monkeypatch.setattr(packed, "TILE", 0)
    monkeypatch.setattr(packed, "LEAST", least)
    monkeypatch.setattr(packed, "LONG", 32)
    monkeypatch.setattr(attention, "SCORES", 600)
    model = wide_model
    model.config = dataclasses.replace(model.config, sliding_window=window)
    r, bits = random_rounding(model, torch.float64), random_bits(model)
    tokens = torch.randint(3, 96, (batch, sum(CHUNKS)))
    expected = model(tokens, project=r.at(bits))
    cache = PackedCache(r, bits, batch, sum(CHUNKS) + 3, torch.float64)
    assert len(cache.layers[0].sides[0].sections[0].words) > 1      # tiles
    assert cache.unpacked.dtype == (torch.int64 if least == 64 else torch.uint8)
    assert relative(read_in(model, cache, tokens), expected) < 1e-10
    cache.length = 0                                                # what is left in it is no harm
    other = torch.randint(3, 96, (batch, sum(CHUNKS)))
    expected = model(other, project=r.at(bits))
    assert relative(read_in(model, cache, other, (sum(CHUNKS) - 5, 1, 1, 1, 1, 1)),
                    expected) < 1e-10


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 6, 8])
def test_each_number_of_bits_is_written_and_read(wide_model, bits):
    model = wide_model
    r, plan = random_rounding(model, torch.float64), same_bits(bits, model.config)
    tokens = torch.randint(3, 96, (2, 80))                          # two groups become codes
    cache = PackedCache(r, plan, 2, 80, torch.float64)
    assert relative(read_in(model, cache, tokens, (13, 1, 66)),
                    model(tokens, project=r.at(plan))) < 1e-10


def test_in_float32_too(model):
    r, bits = random_rounding(model), random_bits(model).clamp(min=2)
    tokens = torch.randint(3, 96, (2, 45))
    cache = PackedCache(r, bits, 2, 45)
    expected = model(tokens, project=r.at(bits))
    found = read_in(model, cache, tokens, (12, 1, 32))
    close = (found - expected).abs().amax(-1) < 1e-4 * expected.abs().max()
    assert close.double().mean() > 0.8              # the others: a number on the other side of ½


@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16_loses_no_more_by_packing_than_it_does_anyway(model, bits):
    """Sums of codes lie around 2^b / 2: in bfloat16 their last place would be as much as a code."""
    plan = same_bits(bits, model.config)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    lost = torch.zeros(2)
    for _ in range(4):
        r, tokens = random_rounding(model), torch.randint(3, 96, (8, 60))
        exact = model(tokens, project=r.at(plan))
        by_hook = narrow(tokens, project=r.at(plan))
        by_cache = narrow(tokens, cache=PackedCache(r, plan, 8, 60, torch.bfloat16))
        lost += torch.stack([(found - exact).square().mean() for found in (by_hook, by_cache)])
    assert lost[1] < 1.5 * lost[0]


def test_bytes_are_what_the_plan_says(model, monkeypatch):
    r, bits = random_rounding(model), random_bits(model)
    L, K, d = r.p.mean_v.shape
    cache = PackedCache(r, bits, 2, 64)
    exact = 2 * L * K * d * EXACT * 2 * 2
    per_token = bits.sum().item() * (d // 8) / 8
    assert cache.data.nbytes == exact + 2 * 64 * per_token
    for max_len in (80, 2500):          # up to whole bytes of bits; in long tiles whole words
        cache = PackedCache(r, bits, 1, max_len)
        allocated = (cache.data.nbytes - exact / 2) / per_token
        assert max_len <= allocated < 1.06 * max_len + 8
        if max_len < packed.LONG:
            assert allocated == max_len
    monkeypatch.setattr(packed, "TILE", 0)
    cache = PackedCache(r, bits, 1, 2500)
    allocated = (cache.data.nbytes - exact / 2) / per_token
    assert 2500 <= allocated < 2500 + 10 * 8


def test_what_does_not_fit_is_refused(model, tokens):
    r, bits = random_rounding(model), random_bits(model)
    cache = PackedCache(r, bits, 3, 20)
    with pytest.raises(ValueError, match="full"):
        model(tokens, cache=cache)
    with pytest.raises(ValueError, match="sequences"):
        model(tokens[:1], cache=cache)
    with pytest.raises(ValueError, match="bfloat16"):
        model(tokens[:, :2], cache=PackedCache(r, bits, 3, 20, torch.bfloat16))
    with pytest.raises(ValueError, match="at least 1"):
        PackedCache(r, bits, 0, 20)
