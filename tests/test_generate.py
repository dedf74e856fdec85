"""Generation: the cache's tokens are those of whole passes, with the values' weights replaced."""
import dataclasses
import io
import json
import math

import pytest
import torch
from conftest import (
    DEMO,
    GOLDEN,
    call,
    full_cache,
    random_projection,
    random_ranks,
    relative,
    shape,
)

from cache import KVCache
from generate import fold
from model import generate, load
from projection import Projection, uniform_ranks
from support.checkpoint import read_config
from support.plans import PROJECTIONS

PROMPT = [1, 5, 9, 40]


def greedy(model, prompt, count, project=None) -> list[int]:
    """The likeliest tokens, each from a pass over all before it."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]), project=project)
        tokens.append(logits[0, -1].argmax().item())
    return tokens[len(prompt):]


def without_end(model):
    """The model without an end of the sequence, so that every text gets its length."""
    model.config = dataclasses.replace(model.config, eos_token_id=())
    return model


@pytest.fixture
def endless(model):
    return without_end(model)


def test_the_full_cache_continues_as_the_model_does(endless):
    made = list(generate(endless, PROMPT, 12, cache=full_cache(endless, 1, max_len=20)))
    assert made == list(generate(endless, PROMPT, 12)) == greedy(endless, PROMPT, 12)


def test_with_and_without_a_cache_the_tokens_of_a_seed_are_the_same(endless):
    """One loop draws both: as many random numbers, from the same logits but for rounding."""
    made = []
    for cache in (None, full_cache(endless, 1, max_len=20)):
        torch.manual_seed(1)
        made.append(list(generate(endless, PROMPT, 12, temperature=1.0, cache=cache)))
    assert made[0] == made[1] != greedy(endless, PROMPT, 12)


def test_a_compressed_cache_continues_as_the_projected_model_does(every_model):
    """Also where more first tokens stay whole than the prompt has."""
    model = without_end(every_model)
    for whole, mean in ((0, 0.0), (6, 1.0)):
        p, ranks = random_projection(model, whole, mean), random_ranks(model)
        cache = KVCache(p, ranks, batch=1, max_len=20)
        made = list(generate(model, PROMPT, 12, cache=cache))
        assert made == greedy(model, PROMPT, 12, p.at(ranks))
        assert cache.length == len(PROMPT) + 11


def test_a_sliding_window_moves_on_with_the_tokens():
    model = without_end(load(GOLDEN / "mistral_window"))
    for whole, mean in ((0, 0.0), (6, 1.0)):
        p, ranks = random_projection(model, whole, mean), random_ranks(model)
        made = list(generate(model, PROMPT, 30, cache=KVCache(p, ranks, batch=1, max_len=40)))
        assert made == greedy(model, PROMPT, 30, p.at(ranks))


def test_the_cache_needs_no_room_for_the_last_token(endless):
    n = len(PROMPT)
    made = list(generate(endless, PROMPT, 5, cache=full_cache(endless, 1, max_len=n + 4)))
    assert len(made) == 5
    with pytest.raises(ValueError, match="full"):
        list(generate(endless, PROMPT, 5, cache=full_cache(endless, 1, max_len=n + 3)))


def test_the_end_of_the_sequence_is_not_yielded(endless):
    made = list(generate(endless, PROMPT, 8, cache=full_cache(endless, 1, max_len=20)))
    endless.config = dataclasses.replace(endless.config, eos_token_id=(made[3],))
    until = list(generate(endless, PROMPT, 8, cache=full_cache(endless, 1, max_len=20)))
    assert until == made[:made.index(made[3])]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])            # biases; norms of queries and keys
def test_folded_weights_replace_those_of_the_values(kind, tokens):
    """Where first tokens are whole, also of their passes, and their bytes are counted once."""
    model = load(GOLDEN / kind)
    p, ranks = random_projection(model), random_ranks(model)
    expected = model(tokens, project=p.at(ranks))
    cache = KVCache(p, ranks, batch=3, max_len=21)
    fold(model, cache, drop=True)
    for layer in cache.folded:
        assert layer.nbytes == sum(W.nbytes for W in layer if torch.is_tensor(W))
    for layer in model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert getattr(layer.self_attn, name) is None
    assert relative(model(tokens, cache=cache), expected) < 1e-4

    model, p = load(GOLDEN / kind), random_projection(model, 4, 1.0)
    ranks[:, :, 0] = model.config.head_dim // 2
    expected = model(tokens, project=p.at(ranks))
    cache = KVCache(p, ranks, batch=3, max_len=21)
    fold(model, cache, drop=True)
    L, K, d = shape(model)
    hidden, H = model.config.hidden_size, model.config.num_attention_heads
    numbers = (H + 2 * K) * d * (hidden + 1)                        # W_qkv' and its bias
    numbers += (H * d + 1) * hidden                                 # W_o' and its bias
    assert sum(layer.nbytes for layer in cache.folded) == 4 * L * numbers
    logits = []
    for part in tokens.split([2, 1, 3, 15], dim=1):
        logits.append(model(part, cache=cache))
        cache.settle()                      # once all first tokens are there, and again
        assert cache.settled == (cache.length > 3)
    assert relative(torch.cat(logits, dim=1), expected) < 1e-4
    sums = ranks[1].sum(1)                                          # Σ r of each layer's values
    columns = hidden + (kind == "qwen2")                            # of weights, and of a bias
    numbers = L * ((H + K) * d * columns + hidden) + (sums * columns).sum()
    numbers += (H // K * sums * hidden).sum()
    assert sum(layer.nbytes for layer in cache.folded) == 4 * numbers
    for layer in cache.folded:
        assert layer.W_qkv.untyped_storage().nbytes() == layer.W_qkv.nbytes
    assert cache.first_nbytes == 4 * 3 * L * 4 * (2 * K * d + H * hidden)
    cache.length = 3
    with pytest.raises(ValueError, match="weights of first tokens were given back"):
        model(tokens[:, 3:], cache=cache)
    cache.length = 9                        # and nothing is lost by the attempt
    assert relative(model(tokens[:, 9:], cache=cache), expected[:, 9:]) < 1e-4


def test_a_settled_cache_goes_back_before_its_first_tokens_with_the_models_weights(model, tokens):
    p, ranks = random_projection(model, 4, 1.0), random_ranks(model)
    cache = KVCache(p, ranks, batch=3, max_len=21)
    expected = model(tokens, cache=cache)
    for n in (0, 2):
        cache.settle()
        assert cache.settled
        cache.length = n
        assert relative(model(tokens[:, n:], cache=cache), expected[:, n:]) < 1e-5


def test_weights_that_were_dropped_are_not_there_for_another_plan(model, tokens):
    """So a cache that is to shrink keeps them."""
    p, half = random_projection(model), uniform_ranks(0.5, model.config)
    for drop in (False, True):
        cache = KVCache(p, uniform_ranks(0.75, model.config), batch=3, max_len=21)
        fold(model, cache, drop)
        model.hidden(tokens[:, :20], cache=cache)
        cache.shrink(half)
        if drop:
            with pytest.raises(ValueError, match="weights were dropped"):
                model.hidden(tokens[:, 20:], cache=cache)
        else:
            model.hidden(tokens[:, 20:], cache=cache)


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


def test_without_a_plan_projections_are_not_taken_in_silence(refusal):
    assert "add --budget or --ranks" in refusal("generate", "--proj", "nowhere.safetensors")


def test_a_budget_alone_is_uniform_ranks(run, demo, tmp_path):
    model, _ = demo
    random_projection(model).save(tmp_path / "p.safetensors")
    said = run("--proj", tmp_path / "p.safetensors", "--budget", 0.3)
    assert "the same rank everywhere" in said.err
    assert "25.0% of the full" in said.err
    assert "folded" in said.err


def test_beside_an_order_a_budget_is_a_prefix_of_it(run, demo, tmp_path):
    """And a cache that shrinks goes along it."""
    model, _ = demo
    random_projection(model).save(tmp_path / PROJECTIONS)
    L, K, _ = shape(model)
    order = list(range(2 * L * K)) * 7
    (tmp_path / "train.json").write_text(json.dumps({"order": order}))
    said = run("--proj", tmp_path / PROJECTIONS, "--budget", 0.3, "--shrink-to", 0.2)
    assert f"along the order in {tmp_path / 'train.json'}" in said.err
    eighths = 16 * L * K
    before, after = (1 - math.ceil((1 - budget) * eighths) / eighths for budget in (0.3, 0.2))
    assert f"{before:.1%} of the full" in said.err
    assert "after 3 new tokens" in said.err
    assert f"{after:.1%} of the full" in said.err


def test_what_whole_tokens_add_is_said_beside_the_cache(run, demo, tmp_path):
    model, _ = demo
    random_projection(model, 4, 1.0).save(tmp_path / "p.safetensors")
    said = run("--proj", tmp_path / "p.safetensors", "--budget", 0.25)
    L, K, d = shape(model)
    outputs = model.config.num_attention_heads * model.config.hidden_size
    assert "25.0% of the full" in said.err
    size = 4 * 4 * L * (2 * K * d + outputs)
    assert f"; {size:,} bytes for 4 whole first tokens; " in said.err
    random_projection(model, 0, 1.0).save(tmp_path / "p.safetensors")
    assert "whole" not in run("--proj", tmp_path / "p.safetensors", "--budget", 0.25).err


@pytest.fixture
def with_template(tmp_path):
    """A folder with the demo's files, its tokenizer.model too, and this chat template."""
    def folder(template):
        for file in DEMO.iterdir():
            link = tmp_path / file.name
            if not link.exists():
                link.symlink_to(file)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(
            {"bos_token": "<s>", "chat_template": template}))
        return tmp_path

    return folder


QUESTION = "Question: {{ messages[0]['content'] }}\nAnswer:"


def test_a_turn_of_a_chat_is_put_as_the_template_says(run, with_template, demo):
    model, tokenizer = demo
    prompt = [tokenizer.bos_id(), *tokenizer.encode("Question: The json module\nAnswer:")]
    said = run("--ckpt", with_template(QUESTION), "--chat")
    assert said.out == tokenizer.decode(prompt + greedy(model, prompt, 6)) + "\n"


def test_a_beginning_that_a_template_spells_is_the_beginning_and_no_letters(run, with_template):
    """Also where SentencePiece would read it as letters: LLaMA-2's and Mistral's templates."""
    plain = run("--ckpt", with_template(QUESTION), "--chat")
    spelled = run("--ckpt", with_template("{{ bos_token }}" + QUESTION), "--chat")
    assert spelled.out == plain.out


def test_without_a_template_there_is_no_chat(refusal, with_template):
    assert refusal("generate", *OPTIONS, "--chat").startswith(f"--chat: {DEMO}: neither ")
    failing = with_template("{{ raise_exception('turns must alternate') }}")
    line = refusal("generate", *OPTIONS, "--ckpt", failing, "--chat")
    assert line.startswith("--chat: ")
    assert "turns must alternate" in line


def test_a_cache_does_not_shrink_to_more_than_it_has(demo, tmp_path, capsys):
    random_projection(demo[0]).save(tmp_path / PROJECTIONS)
    with pytest.raises(SystemExit) as left:
        call("generate", *OPTIONS, "--proj", tmp_path / PROJECTIONS, "--budget", 0.5,
             "--shrink-to", 0.75)
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("--shrink-to 0.75: is above")


@pytest.mark.parametrize("options, words", [
    (["--at", 3], "--at"),
    (["--shrink-to", 0.5, "--at", 6], "--at 6"),
    (["--bits", "bits.json", "--shrink-to", 0.5], "--bits"),
])
def test_options_that_do_not_go_together_are_refused(refusal, options, words):
    assert words in refusal("generate", *OPTIONS, *options)


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

    monkeypatch.setattr("generate.load_tokenizer", lambda *_: Nothing())
    line = refusal("generate", *OPTIONS, "--prompt", "")
    assert "--prompt" in line
    assert "nothing to continue" in line


def test_a_line_says_where_a_text_goes_further_than_its_cache_was_made_for(tmp_path, capsys):
    p = Projection.identity(read_config(DEMO / "config.json"))
    p.positions = 64
    p.save(tmp_path / "projections.safetensors")
    assert Projection.load(tmp_path / "projections.safetensors").to("cpu").positions == 64
    options = ["--proj", tmp_path / "projections.safetensors", "--budget", 0.5]
    for tokens, warned in ((9, False), (70, True)):
        call("generate", *options, "--tokens", tokens)
        said = capsys.readouterr().err
        assert ("--proj: was made at positions below 64" in said) == warned


def test_one_prompt_at_a_time(refusal, monkeypatch, capsys):
    """Of several, of different lengths, there is no batch; from stdin one may come."""
    for name in ("generate", "model"):
        line = refusal(name, "--prompt", "a", "b")
        assert "--prompt" in line and "one text at a time" in line
        monkeypatch.setattr("sys.stdin", io.StringIO("The json module"))
        call(name, "--prompt", "-", "--tokens", 2)
        assert capsys.readouterr().out.startswith("The json module")
