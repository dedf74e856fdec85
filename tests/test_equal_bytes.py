"""The baselines that ranks are compared with: what they round, and what they leave alone."""
from functools import partial

import pytest
import torch
from conftest import random_projection, random_ranks, relative
from test_rounding import random_bits, random_rounding

from bench.equal_bytes import (
    by_group,
    by_rank_and_token,
    by_token,
    hadamard,
    in_blocks,
    rounded,
    twice,
)
from bits.rounding import GROUP


def test_a_number_is_off_by_at_most_half_a_step():
    x = torch.randn(50, 64)
    for bits in (2, 3, 4, 8):
        y = rounded(x, bits, -1)
        step = (x.amax(-1) - x.amin(-1)) / (2 ** bits - 1)
        assert ((x - y).abs().amax(-1) <= 0.5 * step + 2e-2).all()      # the scale has 16 bits too
        assert max(len(row.unique()) for row in y) <= 2 ** bits


def test_what_is_not_kept_stays_zero_and_does_not_widen_the_range():
    x, kept = torch.randn(5, 64) + 9, torch.arange(64) < 24
    y = rounded(x * kept, 4, -1, kept)
    assert (y[:, 24:] == 0).all()
    assert torch.equal(y[:, :24], rounded(x[:, :24], 4, -1))


def test_a_turn_alone_changes_nothing(model, tokens):
    d = model.config.head_dim
    Q = torch.linalg.qr(torch.randn(d, d)).Q
    fine = model(tokens, project=partial(by_token, bits=14, Q=Q))
    assert relative(fine, model(tokens)) < 1e-2
    coarse = model(tokens, project=partial(by_token, bits=2, Q=Q))
    assert relative(coarse, model(tokens)) > 1e-2


@pytest.mark.parametrize("whole, mean", [(0, 0.0), (0, 0.5), (3, 0.5)])
def test_ranks_in_many_bits_are_ranks(model, tokens, whole, mean):
    """With the mean of the keys, and whole first tokens, too."""
    p, ranks = random_projection(model, whole, mean), random_ranks(model)
    hook = partial(by_rank_and_token, p=p, ranks=ranks, bits=14)
    assert relative(model(tokens, project=hook), model(tokens, project=p.at(ranks))) < 1e-2


def test_first_tokens_of_ranks_in_few_bits_stay_whole(model, tokens):
    p, ranks = random_projection(model, 3, 0.5), random_ranks(model)
    found = model(tokens, project=partial(by_rank_and_token, p=p, ranks=ranks, bits=2))
    expected = model(tokens, project=p.at(ranks))
    assert relative(found[:, :3], expected[:, :3]) < 1e-5
    assert relative(found[:, 3:], expected[:, 3:]) > 1e-2


def test_kivi_rounds_keys_by_channel_and_group_and_values_by_token():
    """Keys behind RoPE, here a change of all signs."""
    k, v = torch.randn(2, 2, 3, 2 * GROUP + 5, 16)
    k[:, :, :, 3] *= 100                                            # a channel that stands out
    k_hat, v_hat = by_group(0, -k, v, torch.neg, 2)
    for group in (slice(0, GROUP), slice(GROUP, 2 * GROUP), slice(2 * GROUP, None)):
        assert torch.equal(k_hat[:, :, group], rounded(k[:, :, group], 2, 2))
    assert (k_hat - k)[..., 4:].abs().max() < 2                     # the others do not suffer
    assert torch.equal(v_hat, rounded(v, 2, -1))


def test_blocks_are_those_of_llama_cpp():
    """Against its two reference routines in plain Python; a block of zeros stays one."""
    x = torch.randn(3, 64)
    x[0, :32] = 0
    for bits in (8, 4):
        found = in_blocks(x, bits)
        for row, of_row in zip(x, found, strict=True):
            for block in (slice(0, 32), slice(32, 64)):
                numbers = row[block].tolist()
                furthest = max(numbers, key=abs)
                scale = abs(furthest) / 127 if bits == 8 else furthest / -8
                scale = torch.tensor(scale).half().item()
                for number, other in zip(numbers, of_row[block].tolist(), strict=True):
                    level = number / scale if scale else 0
                    level = round(level) if bits == 8 else min(int(level + 8.5), 15) - 8
                    assert other == pytest.approx(level * scale, abs=1e-6)
    H = hadamard(64)
    assert torch.allclose(H @ H.T, torch.eye(64), atol=1e-6)


def test_the_newest_group_is_exact_and_those_before_are_not(model):
    tokens = torch.randint(3, 96, (2, 2 * GROUP))
    expected = model(tokens)
    hooks = twice(partial(by_token, bits=2))
    found = model(tokens, project=hooks["exact"])
    assert relative(found[:, :GROUP], expected[:, :GROUP]) < 1e-5
    assert relative(found[:, GROUP:], expected[:, GROUP:]) > 1e-2
    assert relative(model(tokens, project=hooks["stored"])[:, :GROUP], expected[:, :GROUP]) > 1e-2


def test_ranks_are_measured_with_the_newest_group_exact(model):
    """A token that attends to its own group alone is the model's; one behind it is not."""
    p, ranks = random_projection(model, 3, 0.5), random_ranks(model)
    tokens = torch.randint(3, 96, (2, 2 * GROUP))
    hooks = twice(p.at(ranks))
    assert torch.equal(model(tokens, project=hooks["stored"]), model(tokens, project=p.at(ranks)))
    found, expected = model(tokens, project=hooks["exact"]), model(tokens)
    assert relative(found[:, :GROUP], expected[:, :GROUP]) < 1e-5
    assert relative(found[:, GROUP:], expected[:, GROUP:]) > 1e-2


def test_bits_are_measured_with_the_newest_group_exact_and_without(model):
    """Their own hook has it exact; without it there is nothing but what is stored."""
    r, bits = random_rounding(model), random_bits(model)
    tokens = torch.randint(3, 96, (2, 2 * GROUP))
    hooks = twice(r.at(bits))
    assert torch.equal(model(tokens, project=hooks["exact"]), model(tokens, project=r.at(bits)))

    expected, found = model(tokens), model(tokens, project=hooks["stored"])
    assert relative(model(tokens, project=r.at(bits))[:, :GROUP], expected[:, :GROUP]) < 1e-5
    assert relative(found[:, :4], expected[:, :4]) < 1e-5           # whole tokens
    assert relative(found[:, 4:GROUP], expected[:, 4:GROUP]) > 1e-2
