"""LLaMA, Mistral and Qwen from scratch: a folder of safetensors becomes logits.

One layer, for a token's state x (a row), in the order in which data meets it:

    q, k, v = split(RMSNorm(x) Wq), split(RMSNorm(x) Wk), split(RMSNorm(x) Wv)
    q, k    = RMSNorm(q), RMSNorm(k)                # Qwen3 alone; Qwen2 adds biases above instead
    q, k    = RoPE(q), RoPE(k)                      # rotated by position · frequency
    x       = x + softmax(q kᵀ / sqrt(d)) v Wo      # query head h reads key-value head h // G
    x       = x + (silu(RMSNorm(x) Wgate) * RMSNorm(x) Wup) Wdown

What this project compresses is k (after RoPE) and v, the two things that a model keeps of every
past token. So `forward` has three hooks on that spot, one at a time, and knows nothing else:

    project(layer, k, v) -> (k̂, v̂)     replaces them by their projections (projection.py), and may
                                        add an attention in place of the causal one (rounding.py)
    observe(layer, q, k, v)             is shown them: calibration
    cache                               keeps them, in few coordinates, and attends by weights of
                                        its own (begin, fold, attend, advance); then no other hook

Letters: B batch, T tokens, L layers, H query heads, K key-value heads, G = H / K (grouped-query
attention), d = head_dim. The weights are frozen: this project trains rotations around them.
Equations have rows, x W; a weight as it is stored is Wᵀ, (out, in), and F.linear(x, Wᵀ) is x W.

Run as a script, the model speaks without any cache: every new token costs a whole pass over all the
tokens before it, which is what a cache is for (generate.py).

    python model.py --prompt "The json module"                   # the demo checkpoint
    python model.py --ckpt /path/to/Llama-2-7b-hf --prompt "..." --tokens 20
"""
import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import common

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


ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(path: Path) -> Config:
    """Read and check `path` (a config.json). ValueError names what is missing or not supported."""
    raw = common.read_json(path)
    generation = Path(path).with_name("generation_config.json")
    said = common.read_json(generation) if generation.exists() else {}
    raw["eos_token_id"] = ends_of(raw) + ends_of(said)      # chat models add theirs there
    listed = raw.get("architectures")
    name = raw.get("model_type") or (listed[0] if isinstance(listed, list) and listed else listed)
    raw["model_type"] = str(name).lower().removesuffix("forcausallm")
    if raw["model_type"] not in ARCHITECTURES:
        raise ValueError(f"{path}: the architecture is {name}; known: {', '.join(ARCHITECTURES)}")
    for key, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu"),
                      ("use_sliding_window", False)):
        if raw.get(key) not in (None, only):
            raise ValueError(f"{path}: {key} is {raw[key]!r}; only {only!r} is supported")
    try:
        config = parse_config(raw)
    except KeyError as missing:
        raise ValueError(f"{path}: no {missing.args[0]!r}") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError, AttributeError) as error:
        raise ValueError(f"{path}: a setting has the wrong type or value ({error})") from None
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                "num_attention_heads", "num_key_value_heads", "sliding_window"):
        size = getattr(config, key)
        if size is not None and not 1 <= size < 2 ** 31:
            raise ValueError(f"{path}: {key} is {size}, not a positive size")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{path}: {config.num_attention_heads} query heads do not divide among "
                         f"{config.num_key_value_heads} key-value heads")
    return config


def parse_config(raw: dict) -> Config:
    """The settings of a config.json, old or new. Raises KeyError, TypeError or ValueError."""
    heads = int(raw["num_attention_heads"])
    window = raw.get("sliding_window") if raw["model_type"] == "mistral" else None
    # Older files hold rope_theta at the top and rope_scaling beside it; newer ones hold both inside
    # rope_parameters.
    rope = {"rope_theta": raw.get("rope_theta") or 10000.0}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"{key} is {raw[key]!r}; expected an object or null")
        rope.update(raw.get(key) or {})
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
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
# The transformer. Attention and Layer only hold weights, under Hugging Face's names; the arithmetic
# is in Model.layer, by F.linear on the weights: a module's call costs as much as a small product.

class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        bias = c.model_type == "qwen2"
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        normed = c.model_type == "qwen3"
        self.q_norm = RMSNorm(c, c.head_dim) if normed else None
        self.k_norm = RMSNorm(c, c.head_dim) if normed else None


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.linear(x, self.gate_proj.weight)
        up = F.linear(x, self.up_proj.weight)
        return F.linear(F.silu(gate) * up, self.down_proj.weight)


class RMSNorm(nn.Module):
    def __init__(self, c: Config, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = c.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # w x / sqrt(mean x² + eps)


class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c, c.hidden_size)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c, c.hidden_size)
        self.mlp = MLP(c)


class Model(nn.Module):
    """A LLaMA, Mistral or Qwen decoder: `model(tokens)` gives logits, by embed, layer and head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.rope = Rope(config)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def forward(self, tokens: Tensor, project=None, observe=None, cache=None) -> Tensor:
        """Logits (B, T, vocab) of tokens (B, T) int64; the hooks are those on top of this file.

        With a cache the tokens follow those that it holds, and are appended to it.
        """
        return self.head(self.hidden(tokens, project, observe, cache))

    def hidden(self, tokens: Tensor, project=None, observe=None, cache=None, recompute=False):
        """The states (B, T, hidden) that leave the last layer, before the final norm.

        With `recompute` a layer's inner states are made again in the backward pass (activation
        checkpointing): one more forward pass, for one layer's memory instead of all layers'.
        """
        x = self.embed(tokens)
        cos_sin = None if cache is None else cache.begin(self, *tokens.shape)
        for i in range(self.config.num_hidden_layers):
            if recompute:
                x = checkpoint(self.layer, i, x, project, use_reentrant=False)
            else:
                x = self.layer(i, x, project, observe, cache, cos_sin)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(tokens)                            # (B, T, hidden)

    def head(self, x: Tensor) -> Tensor:
        norm, lm_head = (self.widened(module, x.dtype) for module in (self.norm, self.lm_head))
        return lm_head(norm(x))                                     # (..., vocab)

    def widened(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """A part as it is, or a copy for states wider than the weights: float32 over bfloat16."""
        return module if dtype == self.dtype else copy.deepcopy(module).to(dtype)

    def layer(self, i: int, x: Tensor, project=None, observe=None, cache=None, cos_sin=None):
        """Layer i over states x (B, T, hidden): of positions 0 … T−1, or behind the cache.

        cos_sin: the cosines and sines of those positions (Rope.rows), which a cache knows.
        """
        layer = self.widened(self.layers[i], x.dtype)
        weights = layer.self_attn
        h = layer.input_layernorm(x)
        if cache is not None:
            a = self.attend_by_cache(i, h, cache, cos_sin)
        else:
            q, k, v = (self.split_heads(part(h))
                       for part in (weights.q_proj, weights.k_proj, weights.v_proj))
            if weights.q_norm is not None:
                q, k = weights.q_norm(q), weights.k_norm(k)
            cos_sin = self.rope.rows(0, x.shape[1], x.dtype, x.device)
            q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
            if observe is not None:
                observe(i, q, k, v)
            attention = causal_attention
            if project is not None:
                k, v, attention = (*project(i, k, v), attention)[:3]
            a = attention(q, k, v, self.config.sliding_window)              # (B, H, T, d)
            a = weights.o_proj(a.transpose(1, 2).flatten(2))
        x = x + a
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def attend_by_cache(self, i: int, h: Tensor, cache, cos_sin) -> Tensor:
        """Layer i's attention to what the cache keeps: (B, T, hidden), from normed states h.

        One product makes all: of each key-value head its G queries and then its key, which one
        rotation takes; then values. Decoding is many small operations, and each one counts.
        """
        c, weights = self.config, self.layers[i].self_attn
        W_qkv, b_qkv, W_o, bias = cache.fold(i, weights)
        K = c.num_key_value_heads
        width_qk = (c.num_attention_heads + K) * c.head_dim
        qk, v = F.linear(h, W_qkv, b_qkv).tensor_split((width_qk,), dim=-1)
        qk = self.split_heads(qk)                                   # (B, H + K, T, d)
        if weights.q_norm is not None:
            of_heads = qk.unflatten(1, (K, -1))
            q, k = of_heads[:, :, :-1], of_heads[:, :, -1:]
            qk = torch.cat((weights.q_norm(q), weights.k_norm(k)), dim=2).flatten(1, 2)
        qk = rotate(qk, *cos_sin).unflatten(1, (K, -1))             # (B, K, G + 1, T, d)
        a = cache.attend(i, qk, v, c.sliding_window)
        return F.linear(a, W_o, bias)

    def split_heads(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        return x.view(B, T, -1, self.config.head_dim).transpose(1, 2)       # (B, heads, T, d)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention of the last T of n tokens, q (B, H, T, d) over k, v (B, K, n, d): like q.

    Each token sees at most the last `window` tokens, itself included.
    """
    T, n = q.shape[2], k.shape[2]
    if T < n or (window or n) < n:
        position = torch.arange(n, device=q.device)
        age = position[-T:, None] - position
        mask = (age >= 0) & (age < (window or n))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def stored_for_rows(W: Tensor) -> Tensor:
    """The same matrix (out, in), on a CPU with its columns end to end if they are its longer side.

    One row times it, x W, then runs along memory, which is faster; with short columns it is not.
    """
    rows, columns = W.shape
    return W if W.is_cuda or rows <= columns else W.T.contiguous().T


# ------------------------------------------------------------------------------
# RoPE: the position of a token, as rotations of its queries and keys

class Rope:
    """cos and sin of position · frequency: one table for all layers, which grows when needed."""

    def __init__(self, config: Config):
        self.config = config
        self.cos = self.sin = None                                  # (positions, d)

    def rows(self, start: int, T: int, dtype, device) -> tuple[Tensor, Tensor]:
        """What `rotate` takes for positions start … start + T − 1: two of (T, d)."""
        end = start + T
        there = self.cos
        if there is None or end > len(there) or (there.dtype, there.device) != (dtype, device):
            self.grow(max(512, 2 ** (end - 1).bit_length()), dtype, device)
        return self.cos[start:end], self.sin[start:end]

    def row(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """What `rotate` takes for one position on the device, (1,) int64, and in the table."""
        return self.cos.index_select(0, position), self.sin.index_select(0, position)

    @torch.inference_mode(False)    # the table outlives a generation, and training may use it next
    def grow(self, positions: int, dtype, device) -> None:
        """Angles and cosines are float64, since positions run to 10⁵ and beyond."""
        position = torch.arange(positions, dtype=torch.float64)
        angle = position[:, None] * frequencies(self.config)        # (positions, d / 2)
        cos, sin = angle.cos(), angle.sin()
        self.cos = torch.cat((cos, cos), 1).to(device, dtype)
        self.sin = torch.cat((-sin, sin), 1).to(device, dtype)


def frequencies(c: Config) -> Tensor:
    """Radians per position of the d/2 pairs of coordinates, float64: theta^(−2j/d)."""
    frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    if c.rope_scaling is None:
        return frequency
    # LLaMA 3.1: slow frequencies are slowed by `factor`, fast ones kept, those between blended.
    factor, low, high, length = (c.rope_scaling[key] for key in LLAMA3)
    turns = length * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(frequency / factor, frequency, keep)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (B, heads, T, d): coordinates j and j + d/2 rotate, Hugging Face's layout."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin)                     # a cos − b sin, b cos + a sin


# ------------------------------------------------------------------------------
# Loading

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The model in folder `path` (config.json and safetensors, sharded or not), frozen.

    Peak memory is the model's size, once: tensors arrive one by one, and on a CPU those that have
    the dtype already stay views of the mapped file. ValueError names the file and its fault.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    config = read_config(path / "config.json")
    with torch.device("meta"):      # shapes alone: the weights are about to be replaced
        model = Model(config)
    files = common.tensor_files(path)
    wanted = {name if name.startswith("lm_head.") else f"model.{name}": parameter
              for name, parameter in model.named_parameters()}
    tied = [model.embed_tokens, model.lm_head] if config.tie_word_embeddings else []
    if tied and EMBEDDING not in files and HEAD in files:   # the one matrix may have either name
        wanted[HEAD] = wanted.pop(EMBEDDING)
        tied.reverse()
    for name in files:              # other biases and norms mean another architecture
        twice = name == HEAD and tied
        if name not in wanted and not twice and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"{files[name]}: holds {name}, which no {config.model_type} has")
    for name, parameter in wanted.items():
        tensor = read_tensor(files, name, path, device, dtype)
        if tensor.shape != parameter.shape:
            raise ValueError(f"{files[name]}: {name} has the shape {list(tensor.shape)}, "
                             f"but config.json asks for {list(parameter.shape)}")
        module, _, leaf = name.removeprefix("model.").rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
    if tied:
        tied[1].weight = tied[0].weight
    return model.eval()


def read_tensor(files: dict[str, Path], name: str, path: Path, device, dtype) -> Tensor:
    """One tensor, moved and converted. The file is opened for each, so that it can be unmapped."""
    if name not in files:
        raise ValueError(f"{path}: the tensor {name} is missing")
    with common.open_safetensors(files[name]) as file:
        try:
            tensor = file.get_tensor(name)
        except SafetensorError:
            raise ValueError(f"{files[name]}: the tensor {name} is missing") from None
        is_product = tensor.ndim == 2 and name != EMBEDDING
        if is_product and tensor.dtype != dtype:        # is copied anyway
            tensor = stored_for_rows(tensor)
        return tensor.to(device, dtype)


# ------------------------------------------------------------------------------
# Text

def pick(logits: Tensor, temperature: float) -> Tensor:
    """The next token of each sequence, (B, 1), from logits (B, vocab): greedy at temperature 0."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits - logits.amax(-1, keepdim=True)     # so that no temperature overflows
    likely = (logits / temperature).softmax(-1)
    # torch.multinomial's own way for one draw, without its checks, which wait for a GPU.
    return (likely / torch.empty_like(likely).exponential_()).argmax(-1, keepdim=True)


@torch.inference_mode()
def generate(model: Model, tokens: list[int], count: int, temperature: float = 0.0):
    """Yields up to `count` tokens that follow `tokens`, or those up to the end of the sequence."""
    tokens = list(tokens)
    for _ in range(count):
        states = model.hidden(torch.tensor([tokens], device=model.device))
        wide = torch.promote_types(model.dtype, torch.float32)      # in bfloat16 many logits tie
        token = pick(model.head(states[:, -1].to(wide)), temperature).item()
        if token in model.config.eos_token_id:
            return
        tokens.append(token)
        yield token


def main():
    parser = common.arguments(__doc__)
    common.prompt_arguments(parser)
    args = parser.parse_args()
    device, dtype = common.prepare(args)
    with common.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
        tokenizer = common.load_tokenizer(args.ckpt, model.config.vocab_size)
    with common.blame("--prompt"):
        prompt = common.encode_prompt(tokenizer, args.prompt)

    began = time.perf_counter()
    made = common.show(tokenizer, prompt, generate(model, prompt, args.tokens, args.temperature))
    seconds = time.perf_counter() - began
    print(f"{len(made)} tokens at {len(made) / seconds:,.0f} tokens/s, each a whole pass",
          file=sys.stderr)


if __name__ == "__main__":
    common.run_script(main)
