"""A checkpoint as it is found on disk: config.json and safetensors become settings and tensors.

Older and newer folders say the same in several ways: where rope_theta stands, whether weights lie
in shards, under which name tied ones are stored. Whatever a folder holds that the model would not
compute with is refused by name.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from support.files import open_safetensors, read_json, tensor_files

# ------------------------------------------------------------------------------
# config.json

@dataclass(frozen=True)
class Config:
    """What config.json says, under Hugging Face's names; rope_scaling is LLaMA-3.1's, or None."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    sliding_window: int | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    model_type: str = "llama"       # or one of the others below


# What a file that does not say it means, where that is no common rule: as in transformers 5.24.
UNSAID = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072,
                "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(path: Path) -> Config:
    """Read and check `path` (a config.json). ValueError names what is missing or not supported."""
    raw = read_json(path)
    generation = Path(path).with_name("generation_config.json")
    said = read_json(generation) if generation.exists() else {}
    raw["eos_token_id"] = ends_of(raw) + ends_of(said)      # chat models add theirs there
    listed = raw.get("architectures")
    name = raw.get("model_type") or (listed[0] if isinstance(listed, list) and listed else listed)
    raw["model_type"] = str(name).lower().removesuffix("forcausallm")
    if raw["model_type"] not in UNSAID:
        raise ValueError(f"{path}: the architecture is {name}; known: {', '.join(UNSAID)}")
    for key in ("quantization_config", "compression_config"):
        if said := raw.get(key):
            method = said.get("quant_method", "some way") if isinstance(said, dict) else said
            raise ValueError(f"{path}: {key}: the weights are quantised by {method}; only plain "
                             "ones, in 16 bits or more, are read")
    for key, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu"),
                      ("use_sliding_window", False), ("partial_rotary_factor", 1)):
        if raw.get(key) not in (None, only):
            raise ValueError(f"{path}: {key} is {raw[key]!r}; only {only!r} is supported")
    kinds = raw.get("layer_types") or []
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind != "full_attention":
            raise ValueError(f"{path}: layer_types has {kind!r}; only 'full_attention' is known")
    raw = UNSAID[raw["model_type"]] | raw
    try:
        config = parse_config(raw)
    except KeyError as missing:
        raise ValueError(f"{path}: no {missing.args[0]!r}") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError, AttributeError) as error:
        raise ValueError(f"{path}: a setting has the wrong type or value ({error})") from None
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                "num_attention_heads", "num_key_value_heads", "sliding_window",
                "max_position_embeddings"):
        size = getattr(config, key)
        if size is not None and not 1 <= size < 2 ** 31:
            raise ValueError(f"{path}: {key} is {size}, not a positive size")
    for key in ("rms_norm_eps", "rope_theta"):
        if not 0 < getattr(config, key) < math.inf:
            raise ValueError(f"{path}: {key} is {getattr(config, key)}, not a positive number")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{path}: {config.num_attention_heads} query heads do not divide among "
                         f"{config.num_key_value_heads} key-value heads")
    return config


def parse_config(raw: dict) -> Config:
    """The settings of a config.json, old or new. Raises KeyError, TypeError or ValueError."""
    heads = int(raw["num_attention_heads"])
    has_window = raw["model_type"] == "mistral" and not raw.get("layer_types")  # those are full
    window = raw.get("sliding_window") if has_window else None
    # Older files hold rope_theta at the top and rope_scaling beside it; newer ones hold both inside
    # rope_parameters.
    rope = {"rope_theta": raw.get("rope_theta") or 10000.0}
    for key in ("rope_parameters", "rope_scaling"):     # where both are, the last counts
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"{key} is {raw[key]!r}; expected an object or null")
        given = raw.get(key) or {}
        kind = given.get("rope_type") or given.get("type") or rope.get("rope_type")
        rope = rope | given | {"rope_type": kind}
    rope_type = rope["rope_type"] or "default"
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1 is "
                         "supported")
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"the rope type is {rope_type!r}; only 'default' and 'llama3' are known")
    return Config(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_hidden_layers=int(raw["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=float(rope["rope_theta"]),
        rope_scaling={key: float(rope[key]) for key in LLAMA3} if rope_type == "llama3" else None,
        sliding_window=None if window is None else int(window),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position_embeddings=int(raw.get("max_position_embeddings") or 2048),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=raw["eos_token_id"],
        model_type=raw["model_type"],
    )


def ends_of(said: dict) -> tuple:
    """The ends of a sequence that a config names: one, several, or none."""
    ends = said.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return tuple(end for end in ends if end is not None)


# ------------------------------------------------------------------------------
# Weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_weights(model: nn.Module, path: Path, device, dtype: torch.dtype) -> None:
    """Give every parameter of a model its tensor in folder `path`, frozen.

    Peak memory is the model's size, once: tensors arrive one by one, and on a CPU those that have
    the dtype already stay views of the mapped file. ValueError names the file and its fault.
    """
    files = tensor_files(path)
    wanted = {name if name.startswith("lm_head.") else f"model.{name}": parameter
              for name, parameter in model.named_parameters()}
    tied = [model.embed_tokens, model.lm_head] if model.config.tie_word_embeddings else []
    if tied and EMBEDDING not in files and HEAD in files:   # the one matrix may have either name
        wanted[HEAD] = wanted.pop(EMBEDDING)
        tied.reverse()
    for name in files:              # other biases and norms mean another architecture
        twice = name == HEAD and tied
        if name not in wanted and not twice and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"{files[name]}: holds {name}, which no {model.config.model_type} has")
    for name, parameter in wanted.items():
        tensor = read_tensor(files, name, path, device, dtype)
        check_shape(files, name, tensor, parameter)
        module, _, leaf = name.removeprefix("model.").rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
    if tied:
        tied[1].weight = tied[0].weight
    if tied and EMBEDDING in files and HEAD in files:
        head = read_tensor(files, HEAD, path, device, dtype)
        if not torch.equal(head, model.embed_tokens.weight):
            check_shape(files, HEAD, head, model.lm_head.weight)
            print(f"{files[HEAD]}: {HEAD} is not the embedding, though config.json has "
                  "tie_word_embeddings: both are used", file=sys.stderr)
            model.lm_head.weight = nn.Parameter(head, requires_grad=False)


def check_shape(files: dict[str, Path], name: str, tensor: Tensor, wanted: Tensor) -> None:
    if tensor.shape != wanted.shape:
        raise ValueError(f"{files[name]}: {name} has the shape {list(tensor.shape)}, "
                         f"but config.json asks for {list(wanted.shape)}")


READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_tensor(files: dict[str, Path], name: str, path: Path, device, dtype) -> Tensor:
    """One tensor, moved and converted. The file is opened for each, so that it can be unmapped."""
    if name not in files:
        raise ValueError(f"{path}: the tensor {name} is missing")
    with open_safetensors(files[name]) as file:
        try:
            tensor = file.get_tensor(name)
        except SafetensorError:
            raise ValueError(f"{files[name]}: the tensor {name} is missing") from None
        if tensor.dtype not in READABLE:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{files[name]}: {name} is in {kind}; only float64, float32, float16 "
                             "and bfloat16 are read")
        is_product = tensor.ndim == 2 and name != EMBEDDING
        if is_product and tensor.dtype != dtype:        # is copied anyway
            tensor = stored_for_rows(tensor)
        return tensor.to(device, dtype)


def stored_for_rows(W: Tensor) -> Tensor:
    """The same matrix (out, in), on a CPU with its columns end to end if they are its longer side.

    One row times it, x W, then runs along memory, which is faster; with short columns it is not.
    """
    rows, columns = W.shape
    return W if W.is_cuda or rows <= columns else W.T.contiguous().T
