"""The packed cache: what it says is what the rounding says, and what it holds is what was asked."""
import copy
import dataclasses
import re

import pytest
import torch
from conftest import relative, shape
from test_rounding import random_bits, random_rounding

from bits import packed
from bits.packed import PackedCache
from bits.rounding import GROUP, same_bits

CHUNKS = (1, 2, 9, 1, 1, 50, 1, 40)


@pytest.fixture
def double(model):
    """In float64, where no number lies so near to a boundary that it is rounded another way."""
    return model.double()


def read_in(model, cache, tokens, chunks=CHUNKS) -> torch.Tensor:
    parts = tokens.split(chunks, dim=1)
    return torch.cat([model(part, cache=cache) for part in parts], dim=1)


# ------------------------------------------------------------------------------
# Logits

@pytest.fixture
def several_tiles(monkeypatch):
    """`several_tiles(n)`: from now on a tile has n tokens, words from 32 on; pieces are short."""
    def of_tokens(n):
        monkeypatch.setattr(packed, "UNPACKED", 0)
        monkeypatch.setattr(packed, "LEAST", n)
        monkeypatch.setattr(packed, "LONG", 32)
        monkeypatch.setattr("cache.SCORES", 4000)

    return of_tokens


def check_logits(model, batch, window, least):
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


def test_the_cache_gives_the_logits_of_the_hook(every_model, several_tiles):
    """In chunks and token by token, over several tiles, with grouped queries and without."""
    several_tiles(16)
    check_logits(every_model.double(), 3, None, 16)


@pytest.mark.parametrize("batch, window, least", [      # 64: tiles that are shifted by words
    (1, None, 64), (3, 7, 64), (1, 7, 16), (3, 45, 16)])
def test_any_batch_window_and_tile_has_the_logits_of_the_hook(
        double, several_tiles, batch, window, least):
    several_tiles(least)
    check_logits(double, batch, window, least)


@pytest.mark.parametrize("whole", [0, 1, 40])
def test_any_number_of_whole_tokens_has_the_logits_of_the_hook(double, several_tiles, whole):
    """More of them than a group has, too; and behind a length that was set back."""
    several_tiles(16)
    r, bits = random_rounding(double, torch.float64, whole), random_bits(double)
    tokens = torch.randint(3, 96, (2, sum(CHUNKS)))
    cache = PackedCache(r, bits, 2, sum(CHUNKS), torch.float64)
    expected = double(tokens, project=r.at(bits))
    assert relative(read_in(double, cache, tokens), expected) < 1e-10
    cache.length = 0
    assert relative(read_in(double, cache, tokens, (33, 50, 22)), expected) < 1e-10


def test_each_number_of_bits_is_written_and_read(double):
    tokens = torch.randint(3, 96, (2, 80))                          # two groups become codes
    for bits in (0, 1, 2, 3, 4, 6, 8):
        r, plan = random_rounding(double, torch.float64), same_bits(bits, double.config)
        cache = PackedCache(r, plan, 2, 80, torch.float64)
        found = read_in(double, cache, tokens, (13, 1, 66))
        assert relative(found, double(tokens, project=r.at(plan))) < 1e-10, bits


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


# ------------------------------------------------------------------------------
# Setting the length back

MAX_LEN = 260
LATER = (1, 1, 5, 40, 1), (33, 1)       # what comes behind a length that was set back, twice


@pytest.fixture
def rounded(double):
    """A model, and `cache()`: an empty one of one plan, for two sequences."""
    r, bits = random_rounding(double, torch.float64), random_bits(double)

    def cache(max_len=MAX_LEN):
        return PackedCache(r, bits, 2, max_len, torch.float64)

    return double, cache


def goes_on(rounded, length: int, n: int, again: int) -> None:
    """A cache of `length` tokens set back to n, and `again` tokens back once more.

    Each time it goes on with other tokens as a fresh cache of the whole sequence does.
    """
    model, cache = rounded
    old = cache()
    tokens = torch.randint(3, 96, (2, length))
    model(tokens, cache=old)
    for back, chunks in zip((length - n, again), LATER, strict=True):
        kept = tokens[:, :old.length - back]
        old.length -= back
        assert old.length == kept.shape[1]
        new = torch.randint(3, 96, (2, sum(chunks)))
        tokens = torch.cat((kept, new), dim=1)
        found = read_in(model, old, new, chunks)
        expected = model(tokens, cache=cache())[:, kept.shape[1]:]
        assert relative(found, expected) < 1e-10, (length, n, again)


def reachable(length: int) -> list[int]:
    """Where a cache of so many tokens can be set back to: 0, and its last group but one onwards."""
    return [0, *range(max(0, length // GROUP - 1) * GROUP, length + 1)]


@pytest.mark.parametrize("length, n", [
    (50, 31), (70, 33), (70, 64), (40, 2), (33, 32), (100, 0), (100, 64), (64, 32), (31, 1)])
def test_a_cache_that_is_set_back_goes_on_as_a_fresh_one(rounded, length, n):
    """Single tokens and chunks complete groups anew; then it is set back again."""
    goes_on(rounded, length, n, again=20)


@pytest.mark.slow
def test_a_cache_can_be_set_back_to_all_lengths_that_it_says(rounded):
    for length in (1, 4, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128):
        for n in reachable(length)[::3]:
            goes_on(rounded, length, n, again=n % 17)


def test_a_cache_that_is_filled_in_chunks_is_set_back_like_one_filled_at_once(rounded):
    """What is kept of it does not depend on how it came there, nor on its being set back before."""
    model, cache = rounded
    tokens = torch.randint(3, 96, (2, 130))
    for chunks in ((30, 5, 60, 1, 34), (130,), (64, 64, 2)):
        old = cache()
        read_in(model, old, tokens, chunks)
        for n in (110, 96):
            old.length = n
            found = model(tokens[:, n:n + 9], cache=old)
            assert relative(found, model(tokens[:, :n + 9], cache=cache())[:, n:]) < 1e-10
        old.length = 96
        assert relative(model(tokens[:, 96:], cache=old),
                        model(tokens, cache=cache())[:, 96:]) < 1e-10


@pytest.mark.parametrize("length, n, nearest", [
    (100, 40, 64), (64, 31, 32), (250, 3, 192)])
def test_a_length_whose_tokens_are_rounded_is_refused_and_the_nearest_named(
        rounded, length, n, nearest):
    model, cache = rounded
    old = cache()
    tokens = torch.randint(3, 96, (2, length + 5))
    model(tokens[:, :length], cache=old)
    with pytest.raises(ValueError, match=f"^length {n}: .* goes back to {nearest}, or to 0$"):
        old.length = n
    assert old.length == length                                     # and it is as it was
    found = model(tokens[:, length:], cache=old)
    assert relative(found, model(tokens, cache=cache())[:, length:]) < 1e-10


def test_what_was_rounded_stays_so_when_the_length_is_set_back(rounded):
    """Until it is set back to 0, where everything begins anew."""
    model, cache = rounded
    old = cache()
    tokens = torch.randint(3, 96, (2, 100))
    for length, n, lost, nearest in ((70, 33, 31, 32), (70, 33, 10, 32), (100, 64, 40, 64)):
        old.length = 0
        model(tokens[:, :length], cache=old)
        old.length = n
        with pytest.raises(ValueError, match=f"goes back to {nearest}, or to 0$"):
            old.length = lost
    old.length = 0
    model(tokens[:, :20], cache=old)
    old.length = 3
    found = model(tokens[:, 3:50], cache=old)
    assert relative(found, model(tokens[:, :50], cache=cache())[:, 3:]) < 1e-10


def test_a_length_that_no_cache_has_is_refused(rounded):
    _, cache = rounded
    old = cache()
    for n in (-1, MAX_LEN + 1):
        with pytest.raises(ValueError, match=f"length {n}"):
            old.length = n
    assert old.length == 0


def test_what_is_said_to_be_nearest_is_where_the_cache_can_go_on(rounded):
    model, cache = rounded
    old = cache()
    tokens = torch.randint(3, 96, (2, 100))
    model(tokens, cache=old)
    with pytest.raises(ValueError) as refused:
        old.length = 40
    n = old.length = int(re.search(r"back to (\d+)", str(refused.value)).group(1))
    new = torch.randint(3, 96, (2, 40))
    whole = torch.cat((tokens[:, :n], new), dim=1)
    found = read_in(model, old, new, (1, 38, 1))
    assert relative(found, model(whole, cache=cache())[:, n:]) < 1e-10


# ------------------------------------------------------------------------------
# What it holds

def test_bytes_are_what_the_plan_says(model, monkeypatch):
    r, bits = random_rounding(model), random_bits(model)
    L, K, d = r.p.mean_v.shape
    cache = PackedCache(r, bits, 2, 64)
    per_token = bits.sum().item() * (d // 8) / 8
    assert cache.data.nbytes == 2 * 64 * per_token
    assert cache.first.shape == (L, 2, 2 * K, d, 4) and cache.first.dtype == torch.float32
    for max_len in (80, 2500):          # up to whole bytes of bits; in long tiles whole words
        cache = PackedCache(r, bits, 1, max_len)
        allocated = cache.data.nbytes / per_token
        assert max_len <= allocated < 1.06 * max_len + 8
        if max_len < packed.LONG:
            assert allocated == max_len
    monkeypatch.setattr(packed, "UNPACKED", 0)
    cache = PackedCache(r, bits, 1, 2500)
    allocated = cache.data.nbytes / per_token
    assert 2500 <= allocated < 2500 + 10 * 8


def test_the_newest_are_two_groups_however_long_the_cache(rounded):
    model, cache = rounded
    L, K, d = shape(model)
    for max_len in (1, 64, 3000):
        assert cache(max_len).newest.shape == (L, 2, 2 * K, d, 64)


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
    with pytest.raises(ValueError, match="one plan"):
        PackedCache(r, random_bits(model, 3), 3, 20)
