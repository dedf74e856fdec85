"""The kernel, run by Triton's interpreter, gives the reference's attention and reads the plan."""
import itertools

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

from kernel import BOUNDS, constants, decode_attention, example, reference

# What lies beyond the end, anything, is masked after the product.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in matmul:RuntimeWarning")

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
CASES = [(torch.float32, *size) for size in SIZES]
CASES += [(dtype, *size) for dtype in (torch.float16, torch.bfloat16) for size in SIZES[1:4]]


@pytest.mark.parametrize("dtype, B, K, G, d, begin, end, stretches", CASES)
def test_the_kernels_are_the_reference(dtype, B, K, G, d, begin, end, stretches):
    """`example` puts NaN beyond the end, before the first token and between the blocks."""
    inputs = example(B, K, G, d, end + 7, begin, end, dtype)
    out = decode_attention(*inputs, stretches=stretches)
    assert out.dtype == dtype
    assert relative(out, reference(*inputs)) < BOUNDS[dtype]


WHOLE = [       # whole, B, K, G, d, begin, end, stretches: begin or end among the whole tokens too
    (1, 1, 2, 1, 64, 0, 1, 1),
    (4, 3, 2, 2, 16, 0, 3, 1),
    (4, 2, 3, 2, 32, 2, 70, 2),
    (4, 1, 2, 8, 128, 0, 65, 3),
    (16, 2, 2, 8, 16, 9, 130, 2),
    (16, 1, 2, 1, 128, 0, 40, 5),
    (16, 1, 2, 2, 64, 171, 300, 2),
]


@pytest.mark.parametrize("whole, B, K, G, d, begin, end, stretches", WHOLE)
def test_with_whole_tokens_and_a_mean_they_are_too(whole, B, K, G, d, begin, end, stretches):
    """Of whole tokens too nothing is seen beyond the end and before the first."""
    for dtype in BOUNDS if (whole, G) in ((4, 2), (16, 8)) else (torch.float32,):
        inputs = example(B, K, G, d, end + 7, begin, end, dtype, whole=whole)
        out = decode_attention(*inputs, stretches=stretches)
        assert out.dtype == dtype
        assert relative(out, reference(*inputs)) < BOUNDS[dtype]


def test_a_mean_and_whole_keys_and_whole_values_may_each_be_absent():
    *given, raw, mean, turns, first_keys, whole = example(
        1, 2, 2, 32, 23, 0, 19, torch.float32, whole=4)
    of_mean, seen = (raw, mean, turns), []
    *rest, width, scale = given
    for a, b in itertools.product((of_mean, 3 * (None,)), (first_keys, None)):
        expected = reference(*given, *a, b, whole)
        assert relative(decode_attention(*given, *a, b, whole), expected) < BOUNDS[torch.float32]
        narrow = decode_attention(*rest, width - 2 * 2 * whole, scale, *a, b, 0)
        assert relative(narrow, expected[:, :narrow.shape[1]]) < BOUNDS[torch.float32]
        assert all(relative(expected, other) > 1e-2 for other in seen)
        seen.append(expected)


@pytest.mark.parametrize("begin, stretches, whole", [(0, 1, 0), (5, 3, 0), (75, 2, 0), (5, 3, 16)])
def test_it_reads_the_plan_and_no_more(monkeypatch, begin, stretches, whole):
    """Each number of every block at most once, from the tile of `begin` to the next 16 tokens."""
    B, K, G, d, end = 2, 3, 2, 64, 140
    inputs = example(B, K, G, d, end + 9, begin, end, torch.float32, whole=whole)
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
    tile = constants(K, G, d, q.dtype, whole > 0)["TILE"]
    in_reach = (token >= begin // tile * tile) & (token < 144)
    assert np.array_equal(reads, (in_plan & in_reach).flatten().int().numpy())


@pytest.mark.parametrize("kind", ["mistral_sharded_head_dim", "llama_mha"])
def test_a_token_by_the_kernels_is_a_token_without_them(kind, tokens):
    """Also where keys and values have their heads in other orders, and in a full cache."""
    model = load(GOLDEN / kind)
    ragged = random_ranks(model)
    if kind == "llama_mha":
        ragged[0, 0], ragged[1, 0] = torch.tensor([3, 5, 3, 1]), torch.tensor([2, 4, 6, 4])
    for ranks in (ragged, uniform_ranks(1.0, model.config)):
        assert_alike(model, random_projection(model), ranks, tokens[:, :21], 19)


# Of tokens still to come it reads what memory holds, maybe NaN, before it masks their scores.
@pytest.mark.filterwarnings("ignore:invalid value encountered in add")
@pytest.mark.parametrize("kind", ["mistral_sharded_head_dim", "llama_mha"])
def test_so_it_is_with_whole_tokens_and_a_mean(kind, tokens):
    """Two of the whole tokens come in the prompt, two one by one; also where one side is full."""
    model = load(GOLDEN / kind)
    p, ranks = random_projection(model, 4, 1.0), random_ranks(model)
    if kind == "llama_mha":
        ranks[0, 0], ranks[1, 0] = torch.tensor([3, 5, 3, 1]), torch.tensor([2, 4, 6, 4])
    assert_alike(model, p, ranks, tokens[:2, :5], 2)
    ranks[0, 1] = ranks[1, 0] = model.config.head_dim
    assert_alike(model, p, ranks, tokens[:2, :5], 3)


def assert_alike(model, p, ranks, tokens, prompt):
    """The logits of tokens behind a prompt, one by one."""
    logits = []
    for by_kernel in (False, True):
        cache = KVCache(p, ranks, batch=len(tokens), max_len=30)
        model(tokens[:, :prompt], cache=cache)
        cache.by_kernel = by_kernel
        parts = tokens[:, prompt:].split(1, dim=1)
        logits.append(torch.cat([model(part, cache=cache) for part in parts], dim=1))
        assert cache.by_kernel == by_kernel
    assert relative(*logits) < 1e-5


@pytest.mark.parametrize("n, whole, mean", [(21, 0, 0.0), (4, 0, 0.0), (8, 4, 1.0)])
def test_the_kernels_keep_to_a_sliding_window_and_to_a_length_that_is_set_back(n, whole, mean):
    """Also to one that the window is longer than, and where it hides a few of the whole tokens."""
    model = load(GOLDEN / "mistral_window")
    p, ranks, logits = random_projection(model, whole, mean), random_ranks(model), []
    tokens = torch.randint(3, 96, (2, 25))
    for by_kernel in (False, True):
        cache = KVCache(p, ranks, batch=2, max_len=30)
        model(tokens[:, :24], cache=cache)
        cache.by_kernel = by_kernel
        model(tokens[:, 24:], cache=cache)
        cache.length = n
        parts = tokens[:, :2].split(1, dim=1)
        logits.append(torch.cat([model(part, cache=cache) for part in parts], dim=1))
        assert cache.by_kernel == by_kernel
    assert relative(*logits) < 1e-5


def test_sizes_that_do_not_fit_are_refused():
    q, rows, table, *others = example(1, 2, 1, 64, 10, 0, 5, torch.float32)
    for wrong in ((q[..., :60], rows, table), (q.half(), rows, table), (q, rows, table[:, :1]),
                  (q, rows, table[:4])):
        with pytest.raises(ValueError, match="expected a head_dim"):
            decode_attention(*wrong, *others)
