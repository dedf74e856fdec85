"""The kernel, run by Triton's interpreter, gives the reference's attention and reads nothing that it should not."""
import pytest
import torch

from conftest import relative
from projection import uniform_ranks
from test_projection import random_projection, random_ranks

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("python kernel.py checks it on the GPU", allow_module_level=True)

from kernel import decode_attention, example, reference   # noqa: E402


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("B, K, G, d, length, first, stretches", [
    (1, 1, 1, 64, 1, 0, 1), (3, 2, 2, 64, 33, 0, 2), (1, 2, 8, 128, 65, 0, 1), (2, 3, 4, 64, 300, 171, 2), (1, 1, 1, 8, 40, 3, None)])
def test_the_kernel_is_the_reference(dtype, bound, B, K, G, d, length, first, stretches):
    """`example` puts NaN beyond the length, before the first token and between the heads' blocks."""
    q, data, table = example(B, K, G, d, length + 7, length, first, dtype)
    arguments = q, data, table, length + 7, length, d ** -0.5, first
    assert relative(decode_attention(*arguments, stretches=stretches), reference(*arguments)) < bound


def test_it_reads_the_plan_and_no_more():
    B, K, G, d, length = 2, 3, 2, 64, 70
    q, data, table = example(B, K, G, d, length + 9, length, 0, torch.float32)
    counter = torch.zeros(2, dtype=torch.int64)
    decode_attention(q, data, table, length + 9, length, 1.0, stretches=2, counter=counter)
    assert counter[0] == B * length * table[2:].sum() * (d // 8)


def test_it_attends_as_the_cache_does_on_a_cpu(model, tokens):
    from cache import KVCache
    for ranks in (random_ranks(model), uniform_ranks(1.0, model.config)):
        cache = KVCache(random_projection(model), ranks, batch=3, max_len=30)
        model(tokens, cache=cache)
        d, seen = model.config.head_dim, {}
        plain = cache.attend
        cache.attend = lambda i, q, k, v, window=None: seen.setdefault(i, (q, k, v, plain(i, q, k, v, window)))[3]
        model(tokens[:, :1], cache=cache)
        for i, (q, k, v, expected) in seen.items():
            q = q.unflatten(1, (k.shape[1], -1))
            if cache.key_bases[i] is not None:
                q = q @ cache.key_bases[i][:, None]
            assert relative(cache.attend_on_gpu(i, q, 0, 22, d ** -0.5), expected) < 1e-5


def test_lengths_that_make_no_sense_are_refused():
    q, data, table = example(1, 1, 1, 64, 10, 5, 0, torch.float32)
    for length, first in ((11, 0), (0, 0), (5, 5), (5, -1)):
        with pytest.raises(ValueError, match="tokens"):
            decode_attention(q, data, table, 10, length, 1.0, first)
