"""Generation: the cache's tokens are those of whole passes, with the values' weights replaced."""
import dataclasses

import pytest
import torch
from conftest import DEMO, call, full_cache, random_projection, random_ranks, relative

from cache import KVCache
from generate import decode, fold
from model import generate


def greedy(model, prompt, count, project=None) -> list[int]:
    """The likeliest tokens, each from a pass over all before it."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]), project=project)
        tokens.append(logits[0, -1].argmax().item())
    return tokens[len(prompt):]


PROMPT = [1, 5, 9, 40]


@pytest.fixture
def endless(model):
    """A model without an end of the sequence, so that every text gets its length."""
    model.config = dataclasses.replace(model.config, eos_token_id=(None,))
    return model


def test_the_full_cache_continues_as_the_model_does(endless):
    made = list(decode(endless, full_cache(endless, batch=1, max_len=20), PROMPT, 12))
    assert made == list(generate(endless, PROMPT, 12)) == greedy(endless, PROMPT, 12)


def test_a_compressed_cache_continues_as_the_projected_model_does(endless):
    p, ranks = random_projection(endless), random_ranks(endless)
    cache = KVCache(p, ranks, batch=1, max_len=20)
    made = list(decode(endless, cache, PROMPT, 12))
    assert made == greedy(endless, PROMPT, 12, p.at(ranks))


def test_the_cache_needs_no_room_for_the_last_token(endless):
    n = len(PROMPT)
    made = list(decode(endless, full_cache(endless, batch=1, max_len=n + 4), PROMPT, 5))
    assert len(made) == 5
    with pytest.raises(ValueError, match="full"):
        list(decode(endless, full_cache(endless, batch=1, max_len=n + 3), PROMPT, 5))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_fixed_step_continues_as_others_do(endless, temperature):
    p, ranks = random_projection(endless), random_ranks(endless)
    made = []
    for graph in (False, True):
        cache = KVCache(p, ranks, batch=1, max_len=20)
        torch.manual_seed(1)
        made.append(list(decode(endless, cache, PROMPT, 12, temperature, graph)))
    assert made[0] == made[1]
    assert cache.position.item() == cache.length == len(PROMPT) + 11


def test_the_end_of_the_sequence_is_not_yielded(endless):
    made = list(decode(endless, full_cache(endless, batch=1, max_len=20), PROMPT, 8))
    endless.config = dataclasses.replace(endless.config, eos_token_id=(made[3],))
    until = list(decode(endless, full_cache(endless, batch=1, max_len=20), PROMPT, 8))
    assert until == made[:made.index(made[3])]


def test_folded_weights_replace_those_of_the_values(model, tokens):
    p, ranks = random_projection(model), random_ranks(model)
    expected = model(tokens, project=p.at(ranks))
    cache = KVCache(p, ranks, batch=3, max_len=21)
    size = fold(model, cache)
    assert size == sum(W.nbytes for layer in cache.folded for W in layer if W is not None)
    assert all(layer.self_attn.v_proj is None for layer in model.layers)
    assert all(layer.self_attn.o_proj is None for layer in model.layers)
    assert relative(model(tokens, cache=cache), expected) < 1e-4


# ------------------------------------------------------------------------------
# The script

OPTIONS = ["--ckpt", DEMO, "--prompt", "The json module", "--tokens", 6]


@pytest.fixture
def run(capsys):
    """Runs generate.py on the demo; what it printed, and its figures."""
    def generate_script(*options):
        capsys.readouterr()
        call("generate", *OPTIONS, *options)
        return capsys.readouterr()

    return generate_script


def test_prompt_and_continuation_go_to_stdout_and_figures_to_stderr(run, demo):
    model, tokenizer = demo
    prompt = [tokenizer.bos_id(), *tokenizer.encode("The json module")]
    text = tokenizer.decode(prompt + greedy(model, prompt, 6))
    said = run()
    assert said.out == text + "\n"
    assert "100.0% of the full" in said.err


def test_without_a_plan_no_projections_are_needed(run):
    assert run().out == run("--proj", "nowhere.safetensors").out


def test_a_budget_alone_is_uniform_ranks(run, demo, tmp_path):
    model, _ = demo
    random_projection(model).save(tmp_path / "p.safetensors")
    said = run("--proj", tmp_path / "p.safetensors", "--budget", 0.3)
    assert "25.0% of the full" in said.err
    assert "folded" in said.err


def test_a_graph_changes_no_token(run):
    assert run("--graph").out == run().out


def test_a_graph_is_of_one_layout(refusal):
    assert "--graph" in refusal("generate", *OPTIONS, "--graph", "--shrink-to", 0.5)


def test_the_tokens_of_a_seed_are_its_own(run):
    one, again, other = (run("--temperature", 2, "--seed", seed).out for seed in (1, 1, 2))
    assert one == again != other


def test_a_prompt_that_is_empty_begins_with_the_beginning(run):
    assert "prefill 1 tokens" in run("--prompt", "").err


def test_a_tokenizer_without_a_beginning_needs_a_prompt(refusal, monkeypatch):
    class Nothing:
        def bos_id(self):
            return -1

        def encode(self, text):
            return []

    monkeypatch.setattr("common.load_tokenizer", lambda *_: Nothing())
    line = refusal("generate", *OPTIONS, "--prompt", "")
    assert "--prompt" in line
    assert "nothing to continue" in line
