"""The kernel, run by Triton's interpreter, gives the reference's attention and reads the plan."""
import numpy as np
import pytest
import torch
from conftest import GOLDEN, random_projection, random_ranks, relative

from cache import KVCache
from model import load
from projection import uniform_ranks

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("python kernel.py checks it on the GPU", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder

from kernel import BOUNDS, decode_attention, example, reference, shapes

SIZES = [       # B, K, G, d, begin, end, stretches: some more than have a token
    (1, 1, 1, 64, 0, 1, 1),
    (3, 2, 2, 64, 0, 33, 2),
    (1, 2, 8, 128, 0, 65, 1),
    (2, 3, 4, 64, 171, 300, 2),
    (1, 1, 1, 8, 3, 40, None),
    (1, 2, 2, 256, 3, 45, 1),
    (1, 2, 2, 64, 3, 40, 40),
    (1, 2, 4, 64, 0, 2500, 79),         # more than merge_kernel takes at a time
]


@pytest.mark.parametrize("dtype, bound", BOUNDS.items())
@pytest.mark.parametrize("B, K, G, d, begin, end, stretches", SIZES)
def test_the_kernels_are_the_reference(dtype, bound, B, K, G, d, begin, end, stretches):
    """`example` puts NaN beyond the end, before the first token and between the blocks."""
    inputs = example(B, K, G, d, end + 7, begin, end, dtype)
    out = decode_attention(*inputs, stretches=stretches)
    assert out.dtype == dtype
    assert relative(out, reference(*inputs)) < bound


@pytest.mark.parametrize("begin, stretches", [(0, 1), (5, 3), (75, 2)])
def test_it_reads_the_plan_and_no_more(monkeypatch, begin, stretches):
    """Each number of every block at most once, from the tile of `begin` to the next 16 tokens."""
    B, K, G, d, end = 2, 3, 2, 64, 140
    inputs = example(B, K, G, d, end + 9, begin, end, torch.float32)
    q, rows, table = inputs[:3]
    reads = np.zeros(rows.numel(), dtype=int)
    plain = InterpreterBuilder.create_masked_load

    def counting(self, ptrs, mask, *rest):
        addresses = ptrs.data[mask.data].astype(np.int64)
        places = (addresses - rows.data_ptr()) // rows.itemsize
        within = (places >= 0) & (places < len(reads))
        np.add.at(reads, places[within], 1)
        return plain(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting)
    decode_attention(*inputs, stretches=stretches)
    in_plan = ~rows[:, begin:end].isnan().all(1, keepdim=True)          # example fills those alone
    assert in_plan.sum() == B * table[2:4].sum()
    token = torch.arange(end + 9)
    tile = shapes(K, G, d, q.dtype)["TILE"]
    in_reach = (token >= begin // tile * tile) & (token < 144)
    assert np.array_equal(reads, (in_plan & in_reach).flatten().int().numpy())


@pytest.mark.parametrize("is_fixed", [False, True])
def test_a_token_by_the_kernels_is_a_token_without_them(model, tokens, is_fixed):
    for ranks in (random_ranks(model), uniform_ranks(1.0, model.config)):
        p, logits = random_projection(model), []
        for by_kernel in (False, True):
            cache = KVCache(p, ranks, batch=3, max_len=30)
            model(tokens[:, :19], cache=cache)
            cache.by_kernel = by_kernel
            if by_kernel and is_fixed:
                cache.fix_launches(model)
            parts = tokens[:, 19:].split(1, dim=1)
            logits.append(torch.cat([model(part, cache=cache) for part in parts], dim=1))
            assert cache.by_kernel == by_kernel
        assert relative(*logits) < 1e-5


def test_the_kernels_keep_to_a_sliding_window():
    model = load(GOLDEN / "mistral_window")
    p, ranks, logits = random_projection(model), random_ranks(model), []
    tokens = torch.randint(3, 96, (2, 22))
    for by_kernel in (False, True):
        cache = KVCache(p, ranks, batch=2, max_len=30)
        model(tokens[:, :21], cache=cache)
        cache.by_kernel = by_kernel
        logits.append(model(tokens[:, 21:], cache=cache))
    assert relative(*logits) < 1e-5


def test_sizes_that_do_not_fit_are_refused():
    q, rows, table, *others = example(1, 2, 1, 64, 10, 0, 5, torch.float32)
    for wrong in ((q[..., :60], rows, table), (q.half(), rows, table), (q, rows, table[:, :1])):
        with pytest.raises(ValueError, match="expected a head_dim"):
            decode_attention(*wrong, *others)
