"""Writes tests/golden: tiny random checkpoints, and the logits that transformers has for them.

And tests/tokenizers: small tokenizer.json files, and the ids that transformers has for some lines.
Run by hand; the tests need only what it wrote. One folder for each layout that checkpoints come in.

    pip install transformers && python tests/make_golden.py
"""
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.tokenizer import ids_of_transformers, make_tokenizer, mixed_lines

GOLDEN = Path(__file__).parent / "golden"
TOKENIZERS = Path(__file__).parent / "tokenizers"
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA32 = LLAMA3 | {"rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 128}
QWEN = {"rope_type": "default", "rope_theta": 1e6}
LONG = torch.arange(19, 640, 20)        # of 640 tokens, those whose logits are kept


def make(name, config, architecture, dtype=torch.float32, shard="1GB", edit=None, kept=None):
    torch.manual_seed(sum(name.encode()))
    model = architecture(config)
    for parameter in model.parameters():        # larger than at a usual start, so that attention
        mean = float(parameter.ndim == 1)       # is far from uniform
        torch.nn.init.normal_(parameter, mean=mean, std=0.2)
    model = model.to(dtype)
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    shape = (2, 37) if kept is None else (1, 640)
    tokens = torch.randint(3, config.vocab_size, shape)

    def logits(dtype):
        loaded = architecture.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        logits = loaded(tokens).logits
        return logits if kept is None else logits[:, kept].contiguous()

    with torch.no_grad():
        golden = {"tokens": tokens, "logits": logits(torch.float32)}
        if dtype != torch.float32:
            golden["logits_low"] = logits(dtype)
    if kept is not None:
        golden["kept"] = kept
    save_file(golden, folder / "golden.safetensors")
    if edit:
        edit(folder)


def as_in_2023(folder: Path) -> None:
    """What older folders look like.

    rope_theta at the top, no number of key-value heads, inv_freq among the weights.
    """
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config["rope_scaling"] = None
    del config["num_key_value_heads"], config["head_dim"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def as_on_the_hub(folder: Path) -> None:
    """What the folders of LLaMA-3.2 and Qwen look like: settings of 2024, and one end more."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    if "qwen" in config["model_type"]:
        config |= {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 1}
        config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ends = {"eos_token_id": [config["eos_token_id"], 95]}
    (folder / "generation_config.json").write_text(json.dumps(ends))


mha = LlamaConfig(**TINY | {"num_key_value_heads": 4})
make("llama_mha", mha, LlamaForCausalLM, edit=as_in_2023)
tied = LlamaConfig(**TINY, tie_word_embeddings=True, rope_parameters=LLAMA3)
make("llama_gqa_tied_llama3", tied, LlamaForCausalLM)
wide = MistralConfig(**TINY, head_dim=16, sliding_window=None)
make("mistral_sharded_head_dim", wide, MistralForCausalLM, shard="30KB")
make("mistral_window", MistralConfig(**TINY, sliding_window=7), MistralForCausalLM)
make("llama_bfloat16", LlamaConfig(**TINY), LlamaForCausalLM, dtype=torch.bfloat16)

hub = {"edit": as_on_the_hub, "kept": LONG}
tied = LlamaConfig(**TINY, tie_word_embeddings=True, rope_parameters=LLAMA32)
make("llama32", tied, LlamaForCausalLM, **hub)
make("qwen2", Qwen2Config(**TINY, rope_parameters=QWEN), Qwen2ForCausalLM, **hub)
tied = Qwen2Config(**TINY, rope_parameters=QWEN, tie_word_embeddings=True)
make("qwen2_tied", tied, Qwen2ForCausalLM, **hub)
wide = Qwen3Config(**TINY, head_dim=16, rope_parameters=QWEN, tie_word_embeddings=True)
make("qwen3", wide, Qwen3ForCausalLM, **hub)

for kind in ("llama3", "qwen2", "unigram"):
    make_tokenizer(kind, TOKENIZERS / kind, vocab_size=400)
    lines = mixed_lines(60)
    golden = {"lines": lines, "ids": ids_of_transformers(TOKENIZERS / kind, lines)}
    (TOKENIZERS / kind / "ids.json").write_text(json.dumps(golden))
