"""The model is LLaMA and Mistral: its logits are those of Hugging Face's transformers, whatever the layout on disk."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import GOLDEN, relative
from model import generate, load, load_tokenizer, read_config


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_logits_are_those_of_transformers(name):
    golden = load_file(GOLDEN / name / "golden.safetensors")
    error = relative(load(GOLDEN / name)(golden["tokens"]), golden["logits"])
    print(f"{name}: relative error {error:.1e}")
    assert error < 1e-4
    assert relative(load(GOLDEN / name, dtype=torch.float64)(golden["tokens"]), golden["logits"]) < 1e-4


def test_bfloat16_logits_are_those_of_transformers():
    golden = load_file(GOLDEN / "llama_bfloat16" / "golden.safetensors")
    logits = load(GOLDEN / "llama_bfloat16", dtype=torch.bfloat16)(golden["tokens"])
    assert logits.dtype == torch.bfloat16
    assert relative(logits, golden["logits_low"]) < 2e-2


def test_the_model_is_frozen_and_keeps_its_dtype():
    model = load(GOLDEN / "mistral_window", dtype=torch.bfloat16)
    assert not model.training
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at Linux's list of mappings")
def test_weights_stay_views_of_the_mapped_file():
    """Loading in the file's own dtype copies nothing."""
    mapped = load(GOLDEN / "llama_bfloat16", dtype=torch.bfloat16).lm_head.weight
    ranges = [(*(int(x, 16) for x in line.split()[0].split("-")), line) for line in open("/proc/self/maps")]
    assert "model.safetensors" in next(line for low, high, line in ranges if low <= mapped.data_ptr() < high)


def test_a_token_does_not_see_the_future(model, tokens):
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 96
    a, b = model(tokens), model(changed)
    assert relative(a[:, :10], b[:, :10]) < 1e-6
    assert relative(a[:, 10:], b[:, 10:]) > 1e-2


def test_a_sliding_window_hides_what_is_older():
    model = load(GOLDEN / "mistral_window")
    tokens = torch.randint(3, 96, (1, 30))
    changed = tokens.clone()
    changed[0, 0] = 4 + (changed[0, 0] == 4)
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, 13:], b[:, 13:])          # two layers of a window of 7 reach 12 tokens back
    assert not torch.equal(a[:, 12], b[:, 12])


def test_the_three_parts_make_the_whole(model, tokens):
    x = model.embed(tokens)
    for i in range(model.config.num_hidden_layers):
        x = model.layer(i, x)
    assert torch.equal(model.head(x), model(tokens))


def test_greedy_generation_follows_the_logits(model):
    prompt = [1, 5, 9]
    made = list(generate(model, prompt, 6))
    for i, token in enumerate(made):
        assert model(torch.tensor([prompt + made[:i]]))[0, -1].argmax() == token


# Folders that are wrong, each in one way

@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "mistral_sharded_head_dim", tmp_path / "ckpt")


def edit(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_other_files_of_the_folder_are_not_read(folder):
    """Mistral's consolidated.safetensors holds the weights again, under other names."""
    save_file({"tok_embeddings.weight": torch.zeros(3)}, folder / "consolidated.safetensors")
    (folder / "model.safetensors.bin").write_bytes(b"not for us")
    golden = load_file(folder / "golden.safetensors")
    assert relative(load(folder)(golden["tokens"]), golden["logits"]) < 1e-4


def test_old_and_new_names_of_settings_say_the_same(folder):
    config = folder / "config.json"
    edit(config, rope_parameters=None, rope_theta=5e5, rope_scaling=None, eos_token_id=[2, 3], torch_dtype="float32")
    assert read_config(config).rope_theta == 5e5
    assert read_config(config).eos_token_id == (2, 3)
    edit(config, rope_parameters={"rope_theta": 7e5, "rope_type": "default"}, rope_theta=None)
    assert read_config(config).rope_theta == 7e5
    edit(config, rope_parameters=None, rope_theta=None)
    assert read_config(config).rope_theta == 10000


@pytest.mark.parametrize("settings, culprit", [
    (dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"]), "qwen2"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "yarn"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(hidden_act="gelu"), "gelu"),
    (dict(num_key_value_heads=3), "3 key-value heads"),
    (dict(hidden_size="wide"), "wide"),
    (dict(head_dim=8), "shape"),
    (dict(rope_scaling=[8]), "rope_scaling"),
    (dict(num_hidden_layers=0), "positive"),
])
def test_a_config_that_is_not_supported_is_refused_by_name(folder, settings, culprit):
    edit(folder / "config.json", **settings)
    with pytest.raises(ValueError, match=culprit):
        load(folder)


def test_broken_folders_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    shard = folder / "model-00002-of-00004.safetensors"
    whole = shard.read_bytes()
    for broken in (whole[:-100], whole[:20], b"", b"\xff" * 300):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=shard.name):
            load(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        load(folder)
    shard.write_bytes(whole)
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != name}, shard)
    with pytest.raises(ValueError, match=name):
        load(folder)
    save_file(tensors | {name: torch.zeros(3, 5)}, shard)
    with pytest.raises(ValueError, match=rf"{name}.*shape"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json.*JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json"):
        load(folder)


def test_a_bias_betrays_another_architecture(tmp_path):
    folder = shutil.copytree(GOLDEN / "mistral_window", tmp_path / "ckpt")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="q_proj.bias"):
        load(folder)


def test_a_tokenizer_of_another_kind_is_said_to_be_one(folder):
    with pytest.raises(ValueError, match="no tokenizer.model"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"bytes of something else")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(folder)
