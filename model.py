"""LLaMA and Mistral from scratch, loaded from the safetensors files that Hugging Face folders hold.

One layer of the transformer, for a token's state x, in the order in which data meets it:

    q, k, v = split(RMSNorm(x) Wq), split(RMSNorm(x) Wk), split(RMSNorm(x) Wv)
    q, k    = RoPE(q), RoPE(k)                          # rotate pairs of coordinates by position · frequency
    x       = x + softmax(q kᵀ / sqrt(d)) v Wo          # query head h reads key-value head h // G
    x       = x + (silu(RMSNorm(x) Wgate) * RMSNorm(x) Wup) Wdown

What this project compresses is k (after RoPE) and v, the two things a model keeps of every past token. So `forward` has
three hooks on exactly that spot, and knows nothing else of the method:

    project(layer, k, v) -> (k̂, v̂)     replaces them: a projection to a smaller rank, seen in the original space
    observe(layer, q, k, v)             is shown them: calibration
    cache                               keeps them, in small coordinates, and attends to what it kept (cache.py);
                                        it brings its own Wv and Wo, and the other two hooks are not called

Letters: B batch, T tokens, L layers, H query heads, K key-value heads, G = H / K (grouped-query attention), d = head_dim.
The weights are frozen: this project trains rotations around them, never the weights themselves.

    python model.py --prompt "The json module"                             # the demo checkpoint
    python model.py --ckpt /path/to/Llama-2-7b-hf --prompt "..." --tokens 100
"""
import argparse
import contextlib
import ctypes
import itertools
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from cache import KVCache
from projection import Projection, open_safetensors, read_json, read_ranks, uniform_ranks

DEMO = Path(__file__).resolve().parent / "demo"


# ---------------------------------------------------------------------------------------------------------------------
# config.json

@dataclass(frozen=True, eq=False)
class Config:
    """What config.json says of a model, under Hugging Face's names; `rope_scaling` is None or LLaMA-3.1's settings."""
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


def read_config(path: Path) -> Config:
    """Read and check `path` (a config.json). Raises ValueError, naming what is missing or not supported."""
    raw = read_json(path)
    name = raw.get("model_type") or (raw.get("architectures") or ["unnamed"])[0]
    if name.lower().removesuffix("forcausallm") not in ("llama", "mistral"):
        raise ValueError(f"{path}: the architecture is {name}; only llama and mistral are supported")
    for key, only in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if raw.get(key) not in (None, only):
            raise ValueError(f"{path}: {key} is {raw[key]!r}; only {only!r} is supported")
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"{path}: {key} is {raw[key]!r}; expected an object or null")
    # Older files hold rope_theta at the top and rope_scaling beside it; newer ones hold both inside rope_parameters.
    rope = {"rope_theta": raw.get("rope_theta") or 10000.0, **(raw.get("rope_scaling") or {}),
            **(raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path}: the rope type is {kind!r}; only 'default' and 'llama3' are supported")
    eos = raw.get("eos_token_id")
    try:
        heads = int(raw["num_attention_heads"])
        config = Config(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=int(raw["hidden_size"]),
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=float(rope["rope_theta"]),
            rope_scaling={k: float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor",
                          "original_max_position_embeddings")} if kind == "llama3" else None,
            sliding_window=int(raw["sliding_window"]) if raw.get("sliding_window") is not None else None,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=int(raw.get("max_position_embeddings") or 2048),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )
    except KeyError as missing:
        raise ValueError(f"{path}: no {missing.args[0]!r}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: a setting has the wrong type or value ({error})") from None
    if min(config.vocab_size, config.hidden_size, config.num_hidden_layers, heads, config.num_key_value_heads, config.head_dim,
           1 if config.sliding_window is None else config.sliding_window) < 1:
        raise ValueError(f"{path}: a size is not positive")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{path}: {config.num_attention_heads} query heads do not divide among "
                         f"{config.num_key_value_heads} key-value heads")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# The transformer. The modules only hold the weights, under Hugging Face's names; the arithmetic is in Model.layer, with
# F.linear on the weights: calling a module costs as much as a small product, and a decoded token makes many.

class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_proj.weight), F.linear(x, self.up_proj.weight)
        return F.linear(F.silu(gate) * up, self.down_proj.weight)


class RMSNorm(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c.hidden_size))
        self.eps = c.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)             # x / sqrt(mean x² + eps)


class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c)
        self.mlp = MLP(c)


class Model(nn.Module):
    """A LLaMA or Mistral decoder. `model(tokens)` gives logits; `embed`, `layer` and `head` are its three parts."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def forward(self, tokens: Tensor, project=None, observe=None, cache=None) -> Tensor:
        """Logits (B, T, vocab) of tokens (B, T) int64; `project` and `observe` as in the text on top of this file.

        With a cache (cache.py) the tokens follow those that it holds, and are appended to it.
        """
        return self.head(self.hidden(tokens, project, observe, cache))

    def hidden(self, tokens: Tensor, project=None, observe=None, cache=None) -> Tensor:
        """The states (B, T, hidden) that leave the last layer, before the final norm."""
        if cache is not None:
            cache.check_room(self, *tokens.shape)
        x = self.embed(tokens)
        for i in range(self.config.num_hidden_layers):
            x = self.layer(i, x, project, observe, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(tokens)                                                # (B, T, hidden)

    def head(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x))                                               # (..., vocab)

    def layer(self, i: int, x: Tensor, project=None, observe=None, cache=None) -> Tensor:
        """Layer i over the states x (B, T, hidden) of positions 0 … T−1, or of those that follow the cache."""
        c, layer, (B, T, _) = self.config, self.layers[i], x.shape
        attention = layer.self_attn
        heads = lambda y: y.view(B, T, -1, c.head_dim).transpose(1, 2)                  # (B, heads, T, d)
        h = layer.input_layernorm(x)
        table = rope_table(c, cache.length if cache is not None else 0, T, x.dtype, x.device)
        qk = torch.cat((F.linear(h, attention.q_proj.weight), F.linear(h, attention.k_proj.weight)), dim=-1)
        q, k = rotate(heads(qk), *table).split((c.num_attention_heads, c.num_key_value_heads), dim=1)
        if cache is not None:                                                           # values stay coordinates
            W_v, W_o, bias = cache.fold(i, attention)
            a = F.linear(cache.attend(i, q, k, F.linear(h, W_v), c.sliding_window), W_o, bias)
        else:
            v = heads(attention.v_proj(h))                                              # (B, K, T, d)
            if observe is not None:
                observe(i, q, k, v)
            if project is not None:
                k, v = project(i, k, v)
            a = attention.o_proj(self.attend(q, k, v).transpose(1, 2).reshape(B, T, -1))
        x = x + a
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of q (B, H, T, d) over k, v (B, K, T, d), each token seeing at most the last
        `sliding_window` tokens, itself included."""
        (B, H, T, d), K, window = q.shape, k.shape[1], self.config.sliding_window
        if window is None or window >= T:
            if torch.is_autocast_enabled("cpu") and T <= 256:
                # Training in bfloat16 products (train.py), written out: PyTorch's CPU kernel takes more than twice as long
                # on sequences this short. Scores are rounded to bfloat16, which gradients bear and reports should not.
                future = torch.full((T, T), -torch.inf).triu(1).repeat(H // K, 1)  # (G·T, T)
                q, k, v = q.reshape(B * K, -1, d), k.reshape(B * K, T, d), v.reshape(B * K, T, d)
                scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=d ** -0.5)
                return (scores.softmax(-1) @ v).view(B, H, T, d)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        age = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(age >= 0) & (age < window), enable_gqa=True)


@lru_cache(maxsize=4)            # every layer of a pass asks for the same table
def rope_table(c: Config, start: int, T: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `rotate` multiplies with at positions from `start` on: cos and ∓sin of position · frequency, (T, d) each."""
    first = start - start % 512
    rows = slice(start - first, start - first + T)
    cos, sin = rope_block(c, first, -(-rows.stop // 512) * 512, dtype, device)
    return cos[rows], sin[rows]


@lru_cache(maxsize=4)            # the same for hundreds of generated tokens
@torch.inference_mode(False)     # it outlives the pass, and the next one may be of training
def rope_block(c: Config, start: int, T: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same, computed: in float64 up to the cosine, since positions run to 10⁵ and beyond."""
    frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    if c.rope_scaling:   # LLaMA 3.1: slow frequencies are slowed by `factor`, fast ones kept, those between blended
        s = c.rope_scaling
        turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        frequency = torch.lerp(frequency / s["factor"], frequency, keep.clamp(0, 1))
    angle = torch.arange(start, start + T, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), 1).to(device, dtype), torch.cat((-sin, sin), 1).to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (B, heads, T, d): coordinate j turns together with coordinate j + d/2, as in Hugging Face's layout."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin            # a cos − b sin, then b cos + a sin


# ---------------------------------------------------------------------------------------------------------------------
# Loading

def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The model in folder `path` (config.json and safetensors, single or sharded), frozen and in eval mode.

    Peak memory is the model's size, once: tensors arrive one by one, and on a CPU those that have the dtype already
    stay views of the memory-mapped file. Raises ValueError naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    config = read_config(path / "config.json")
    with torch.device("meta"):   # shapes only: no memory is spent on weights about to be replaced
        model = Model(config)
    files = tensor_files(path)
    wanted = {(k if k.startswith("lm_head.") else f"model.{k}"): p for k, p in model.named_parameters()}
    for name in files:           # biases and further norms mean another architecture, whatever config.json says
        tied = config.tie_word_embeddings and name == "lm_head.weight"
        if name not in wanted and not tied and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"{files[name]}: holds {name}, which no llama or mistral has")
    for name, parameter in wanted.items():
        tensor = read_tensor(files, name, path, device, dtype)
        if tensor.shape != parameter.shape:
            raise ValueError(f"{files[name]}: {name} has the shape {list(tensor.shape)}, "
                             f"but config.json asks for {list(parameter.shape)}")
        module, _, leaf = name.removeprefix("model.").rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def tensor_files(path: Path) -> dict[str, Path]:
    """Which file holds which tensor: what the index says, or all that a lone model.safetensors holds.

    Never a glob: folders hold the same weights again under other names (consolidated.safetensors, *.bin).
    """
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: no weight_map")
        return {name: path / file for name, file in weight_map.items()}
    if not single.exists():
        raise ValueError(f"{path}: neither model.safetensors nor model.safetensors.index.json")
    with open_safetensors(single) as file:
        return {name: single for name in file.keys()}


def read_tensor(files: dict[str, Path], name: str, path: Path, device, dtype: torch.dtype) -> Tensor:
    """One tensor, moved and converted. The file is opened anew for each, so that what was converted can be unmapped."""
    if name not in files:
        raise ValueError(f"{path}: the tensor {name} is missing")
    with open_safetensors(files[name]) as file:
        try:
            return file.get_tensor(name).to(device, dtype)
        except SafetensorError:
            raise ValueError(f"{files[name]}: the tensor {name} is missing") from None


def load_tokenizer(path: str | Path):
    """The SentencePiece tokenizer of a model folder. Raises ValueError where there is none or it is something else."""
    from sentencepiece import SentencePieceProcessor
    file = Path(path) / "tokenizer.model"
    if not file.exists():
        raise ValueError(f"{path}: no tokenizer.model; pass token ids instead, such as --data tokens.bin")
    try:
        return SentencePieceProcessor(model_proto=file.read_bytes())
    except (OSError, RuntimeError):
        raise ValueError(f"{file}: not a SentencePiece model; pass token ids instead, such as --data tokens.bin") from None


# ---------------------------------------------------------------------------------------------------------------------
# What every script of this project needs

def fail(message: str) -> NoReturn:
    """Say one line on stderr and leave with exit code 2: an error of the user."""
    print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def blame(option: str):
    """Turn an error about what the user passed into `fail`, with the option as typed in front."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(f"{option}: {error}")
    except KeyError as error:
        fail(f"{option}: the file has no entry {error}")


def arguments(doc: str) -> argparse.ArgumentParser:
    """A parser with a script's docstring as its help, the options that all scripts share, and errors of one line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--ckpt", type=Path, default=DEMO, help="folder of the checkpoint [demo]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[cuda if there, else cpu]")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float64"],
                        help="[bfloat16 on cuda, float32 on cpu]")
    parser.add_argument("--seed", type=within(0, 2 ** 32), default=0, help="[0]")
    return parser


def prepare(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and dtype asked for, the seed set; fails where the device is not there."""
    keep_freed_memory()
    torch.manual_seed(args.seed)
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):      # others lack float64, which calibration sums in
            fail(f"--device {args.device}: only cpu and cuda are supported")
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:   # torchrun: a GPU for each process
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f"--device {args.device}: not a device of this machine or this build of PyTorch")
    return device, getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next step. glibc hands every block above 32 MB back to the system
    and gets it back page by page, zeroed: a third of a step on a CPU. Elsewhere (macOS, Windows, musl) does nothing."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)             # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD: never shrink the heap
    except (OSError, AttributeError, TypeError):
        pass


def within(low, high):
    """An argparse type: a number of the type of `low`, from `low` to `high`."""
    def parse(text: str):
        value = type(low)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = type(low).__name__
    return parse


# ---------------------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def generate(model: Model, tokens: list[int], count: int, temperature: float = 0.0, cache: KVCache | None = None):
    """Yields up to `count` tokens that follow `tokens`, greedy at temperature 0; stops at the end of the sequence.

    The first forward pass, the prefill, fills the cache with the prompt; every later one is of a single token. Without a
    `cache` (which must have room for len(tokens) + count − 1) the base model's full one is used.
    """
    if cache is None:
        cache = KVCache.full(model.config, 1, len(tokens) + count, model.dtype, model.device)
    new = torch.tensor([tokens], device=model.device)
    for _ in range(count):
        logits = model.head(model.hidden(new, cache=cache)[:, -1]).float()              # (1, vocab)
        new = (logits.argmax(-1, keepdim=True) if temperature == 0
               else torch.multinomial(((logits - logits.amax()) / temperature).softmax(-1), 1))   # (1, 1)
        token = new.item()
        if token in model.config.eos_token_id:
            return
        yield token


def plan_for(args, model: Model) -> tuple[Projection, Tensor] | None:
    """The projections and ranks that --proj, --ranks and --budget ask for; None for the base model."""
    if args.ranks is None and args.budget is None:
        return None
    with blame("--proj"):
        projection = Projection.load(args.proj)
        projection.check_fits(model.config)
    with blame("--ranks"):
        ranks = (uniform_ranks(args.budget, model.config) if args.ranks is None
                 else read_ranks(args.ranks, model.config, args.budget))
    return projection.to(model.device), ranks


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--proj", type=Path, default=Path("out/projections.safetensors"),
                        help="projections, for --ranks and --budget [out/projections.safetensors]")
    parser.add_argument("--ranks", type=Path, help="a plan that search.py wrote, such as out/ranks.json")
    parser.add_argument("--budget", type=within(0.125, 1.0),
                        help="share of the cache to keep: a prefix of the plan's path, or without --ranks the same rank everywhere")


def main():
    parser = arguments(__doc__)
    plan_arguments(parser)
    parser.add_argument("--prompt", default="Return the ", help="text to go on from")
    parser.add_argument("--tokens", type=within(1, 10 ** 6), default=100, help="how many new tokens at most [100]")
    parser.add_argument("--temperature", type=within(0.0, 100.0), default=0.0, help="0 takes the likeliest token [0]")
    args = parser.parse_args()
    device, dtype = prepare(args)
    with blame("--ckpt"):
        model, tokenizer = load(args.ckpt, device, dtype), load_tokenizer(args.ckpt)
    plan = plan_for(args, model)

    prompt = [tokenizer.bos_id()] * (tokenizer.bos_id() >= 0) + tokenizer.encode(args.prompt)
    if not prompt:
        fail("--prompt: nothing to go on from, and the tokenizer has no beginning of sequence")
    size = dict(batch=1, max_len=len(prompt) + args.tokens, dtype=dtype, device=device)
    full_bytes = uniform_ranks(1.0, model.config).sum().item() * size["max_len"] * dtype.itemsize
    cache = KVCache(*plan, **size) if plan else KVCache.full(model.config, **size)
    if plan:   # one plan only: the folded weights take the place of the originals
        for i, layer in enumerate(model.layers):
            cache.fold(i, layer.self_attn)
            layer.self_attn.v_proj = layer.self_attn.o_proj = None

    tokens, shown, start, first = list(prompt), "", time.perf_counter(), None
    for token in itertools.chain([None], generate(model, prompt, args.tokens, args.temperature, cache)):
        if token is not None:
            tokens.append(token)
            first = first or time.perf_counter()
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):   # a character spelled in bytes may still be incomplete: wait for the rest
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(tokenizer.decode(tokens)[len(shown):])
    made, end = len(tokens) - len(prompt), time.perf_counter()
    print(f"prefill {len(prompt)} tokens" + (f" at {len(prompt) / (first - start):,.0f} tokens/s" if first else "")
          + (f", decode {made - 1} at {(made - 1) / (end - first):,.0f} tokens/s" if made > 1 else "")
          + f"; cache {cache.data.nbytes:,} bytes for {cache.max_len} tokens, {cache.data.nbytes / full_bytes:.1%} of the full "
            f"{full_bytes:,}" + (f"; values folded into {sum(W.nbytes for fold in cache.folded for W in fold if W is not None):,} "
                                 f"bytes of weights" if plan else ""), file=sys.stderr)


if __name__ == "__main__":
    main()
