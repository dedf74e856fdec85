"""LLaMA, Mistral and Qwen from scratch: a folder of safetensors becomes logits.

One layer, for a token's state x (a row), in the order in which data meets it:

    q, k, v = split(RMSNorm(x) Wq), split(RMSNorm(x) Wk), split(RMSNorm(x) Wv)
    q, k    = RMSNorm(q), RMSNorm(k)                # Qwen3 alone; Qwen2 adds biases above instead
    q, k    = RoPE(q), RoPE(k)                      # rotated by position · frequency
    x       = x + softmax(q kᵀ / sqrt(d)) v Wo      # query head h reads key-value head h // G
    x       = x + (silu(RMSNorm(x) Wgate) * RMSNorm(x) Wup) Wdown

What this project compresses is k (after RoPE) and v, the two things that a model keeps of every
past token. So `forward` has three hooks on that spot:

    project(layer, k, v, turn)          replaces them: gives k̂ (after RoPE) and v̂ (projection.py)
    observe(layer, q, k, v, turn)       is shown them (calibration)
    cache                               keeps them in few coordinates, and attends to what it keeps
                                        by weights of its own (cache.py)

The first two get k before RoPE, and the function `turn` that applies it: before RoPE the keys' mean
is one vector, after it one for each position. q is after RoPE. A `project` may bring an `attention`
of its own (bits/rounding.py).

Letters: B batch, T tokens, L layers, H query heads, K key-value heads, G = H / K (grouped-query
attention), d = head_dim. The weights are frozen: this project trains rotations around them.
Equations have rows, x W; a weight as it is stored is Wᵀ, (out, in), and F.linear(x, Wᵀ) is x W.

Run as a script, the model speaks without any cache: every new token costs a whole pass over all the
tokens before it, which is what a cache is for (generate.py).

    python model.py --prompt "The json module"                   # the demo checkpoint
    python model.py --ckpt /path/to/Llama-2-7b-hf --prompt "..." --tokens 20
"""
import contextlib
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support import cli
from support.checkpoint import Config, load_weights, read_config
from support.tokenizer import encode_prompt, load_tokenizer, show

# ------------------------------------------------------------------------------
# The transformer. Attention and Layer only hold weights, under Hugging Face's names; the arithmetic
# is in Model.layer.

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
        gate, up = linear(x, self.gate_proj), linear(x, self.up_proj)
        return linear(F.silu(gate) * up, self.down_proj)


class RMSNorm(nn.Module):
    def __init__(self, c: Config, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = c.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.eps)        # w x / sqrt(mean x² + eps)


class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c, c.hidden_size)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c, c.hidden_size)
        self.mlp = MLP(c)


def linear(x: Tensor, module: nn.Linear) -> Tensor:
    """x W + b in the dtype of x: the search has float32 states over bfloat16 weights."""
    W, b = module.weight, module.bias
    return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Random numbers, but on "meta", where these would import torch._dynamo: a whole second."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Model(nn.Module):
    """A LLaMA, Mistral or Qwen decoder: `model(tokens)` gives logits."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
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
        return linear(self.norm(self.hidden(tokens, project, observe, cache)), self.lm_head)

    def hidden(self, tokens: Tensor, project=None, observe=None, cache=None, start=0,
               recompute=False):
        """The states (B, T, hidden) that leave the last layer, before the final norm.

        start: the position of each sequence's first token, one for all or (B,) on the CPU; with a
        cache, its length. Attention is relative: without a hook the states do not depend on it.
        With `project` they do, as keys are cut where RoPE has turned them to.

        With `recompute`, which goes with `project` alone, a layer's inner states are made again in
        the backward pass (activation checkpointing): one more forward pass, for one layer's memory
        instead of all layers'.
        """
        T = tokens.shape[1]
        if cache is not None:
            cache.before_pass(self, *tokens.shape)
            start = cache.length
        x = self.embed_tokens(tokens)                               # (B, T, hidden)
        cos_sin = self.rope.rows(start, T, x.dtype, x.device)
        for i in range(self.config.num_hidden_layers):
            if recompute:
                x = checkpoint(self.layer, i, x, cos_sin, project, use_reentrant=False)
            else:
                x = self.layer(i, x, cos_sin, project, observe, cache)
        if cache is not None:
            cache.after_pass(T)
        return x

    def layer(self, i: int, x: Tensor, cos_sin, project=None, observe=None, cache=None) -> Tensor:
        """Layer i over states x (B, T, hidden); cos_sin: Rope.rows of their positions."""
        layer = self.layers[i]
        h = layer.input_layernorm(x)
        if cache is not None:
            x = x + self.attend_by_cache(i, h, cos_sin, cache)
        else:
            x = x + self.attend(i, h, cos_sin, project, observe)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def attend(self, i: int, h: Tensor, cos_sin, project, observe) -> Tensor:
        """Layer i's attention among the tokens passed: (B, T, hidden), from normed states h."""
        c, weights = self.config, self.layers[i].self_attn
        q = self.split_heads(linear(h, weights.q_proj))             # (B, H, T, d)
        k = self.split_heads(linear(h, weights.k_proj))             # (B, K, T, d)
        v = self.split_heads(linear(h, weights.v_proj))
        if weights.q_norm is not None:
            q, k = weights.q_norm(q), weights.k_norm(k)

        def turn(x: Tensor) -> Tensor:
            return rotate(x, *cos_sin)

        q = turn(q)
        if observe is not None:
            observe(i, q, k, v, turn)
        k, v = (turn(k), v) if project is None else project(i, k, v, turn)
        attention = getattr(project, "attention", causal_attention)         # bits/ has its own
        a = attention(q, k, v, c.sliding_window)                    # (B, H, T, d)
        return linear(a.transpose(1, 2).flatten(2), weights.o_proj)

    def attend_by_cache(self, i: int, h: Tensor, cos_sin, cache) -> Tensor:
        """Layer i's attention to what the cache keeps: (B, T, hidden), from normed states h.

        One product gives, for each key-value head, its G queries and its key, so that one rotation
        turns both; behind them the values. Decoding is many small operations, and each one counts.
        """
        c, weights = self.config, self.layers[i].self_attn
        folded = cache.fold(i, weights)
        K = c.num_key_value_heads
        width_qk = (c.num_attention_heads + K) * c.head_dim
        qk, v = F.linear(h, folded.W_qkv, folded.b_qkv).tensor_split((width_qk,), dim=-1)
        qk = self.split_heads(qk)                                   # (B, H + K, T, d)
        if weights.q_norm is not None:
            of_heads = qk.unflatten(1, (K, -1))
            q, k = weights.q_norm(of_heads[:, :, :-1]), weights.k_norm(of_heads[:, :, -1:])
            if folded.mean_k is not None:               # None: there is none, or it is in b_qkv
                k = k - folded.mean_k[:, None]
            qk = torch.cat((q, k), dim=2).flatten(1, 2)
        qk = rotate(qk, *cos_sin).unflatten(1, (K, -1))             # (B, K, G + 1, T, d)
        return cache.output(i, cache.attend(i, qk, v, c.sliding_window))

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


# ------------------------------------------------------------------------------
# RoPE: the position of a token, as rotations of its queries and keys

class Rope:
    """cos and ∓sin of position · frequency: one table for all layers, which grows when needed."""

    def __init__(self, config: Config):
        self.config = config
        self.cos = self.sin = None                                  # (positions, d)

    def rows(self, start: int | Tensor, T: int, dtype, device) -> tuple[Tensor, Tensor]:
        """What `rotate` takes for positions start … start + T − 1: two of (T, d).

        Of (B, 1, T, d) where every sequence has a start of its own, (B,) on the CPU.
        """
        if isinstance(start, Tensor) and not start.any():
            start = 0
        end = int(start.max() if isinstance(start, Tensor) else start) + T
        table = self.cos
        if table is None or end > len(table) or (table.dtype, table.device) != (dtype, device):
            self.grow(max(512, 2 ** (end - 1).bit_length()), dtype, device)
        if isinstance(start, Tensor):
            positions = (start[:, None] + torch.arange(T)).to(device)
            return self.cos[positions][:, None], self.sin[positions][:, None]
        return self.cos[start:end], self.sin[start:end]

    @torch.inference_mode(False)    # the table outlives a generation, and training may use it next
    def grow(self, positions: int, dtype, device) -> None:
        """Make the table for so many positions, in float64, as they run to 10⁵; then round."""
        position = torch.arange(positions, dtype=torch.float64)
        angle = position[:, None] * frequencies(self.config)        # (positions, d / 2)
        cos, sin = angle.cos(), angle.sin()
        self.cos = torch.cat((cos, cos), 1).to(device, dtype)
        self.sin = torch.cat((-sin, sin), 1).to(device, dtype)      # signed as `rotate` needs it


def frequencies(c: Config) -> Tensor:
    """Radians per position of the d/2 pairs of coordinates, float64: theta^(−2j/d)."""
    frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    if c.rope_scaling is None:
        return frequency
    # LLaMA 3.1: slow frequencies are slowed by `factor`, fast ones kept, those between blended.
    s = c.rope_scaling
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
    return torch.lerp(frequency / s["factor"], frequency, keep.clamp(0, 1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (B, heads, T, d): coordinates j and j + d/2 rotate, Hugging Face's layout."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin)                     # a cos − b sin, b cos + a sin


# ------------------------------------------------------------------------------
# Loading

def load(path: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The model in folder `path` (config.json and safetensors, sharded or not), frozen.

    Peak memory is the model's size, once. ValueError names the file and its fault.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    config = read_config(path / "config.json")
    with torch.device("meta"):      # shapes alone: the weights are about to be replaced
        model = Model(config)
    load_weights(model, path, device, dtype)
    return model.eval()


# ------------------------------------------------------------------------------
# From states to probabilities, and to text

CHUNK = 256     # tokens whose logits exist at a time; so few that on a CPU they stay in its cache


def log_probabilities(model: Model, *states: Tensor):
    """log p of states (n, hidden) behind the model's last norm, of the same tokens, by chunks.

    Yields (slice of the tokens, log p of the first states, of the second, …), never all at once.
    """
    for start in range(0, len(states[0]), CHUNK):
        rows = slice(start, start + CHUNK)
        yield rows, *(logits(x[rows], model.lm_head.weight).log_softmax(-1) for x in states)


def logits(x: Tensor, W: Tensor) -> Tensor:
    """x Wᵀ of states (n, hidden) and W (vocab, hidden), in float32 or float64.

    In a bfloat16 result small KLs drown and likeliest tokens tie, so its weights are widened, 8,192
    rows of the vocabulary at a time.
    """
    x = x.to(wide(x.dtype))
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype == W.dtype:
            return x @ W.T
        return torch.cat([x @ piece.to(x.dtype).T for piece in W.split(2 ** 13)], dim=-1)


@contextlib.contextmanager
def products_in_bfloat16(device: torch.device, wanted: bool = True):
    """Where this is wanted, float32 factors of a product are rounded to bfloat16; sums are not.

    Results are bfloat16 too, but for logits. Norms, softmax and losses stay float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if wanted else before)      # for logits
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=wanted):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that probabilities are computed in: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


@torch.inference_mode()
def generate(model: Model, tokens: list[int], count: int, temperature: float = 0.0, cache=None):
    """Yields up to `count` tokens that follow `tokens`, or those up to the end of the sequence.

    A cache, of one sequence, must have room for len(tokens) + count − 1: the first pass fills it
    with the prompt (prefill), and every later one is of a single token (decode). Without one each
    pass is of all tokens again.
    """
    passed = torch.tensor([tokens], device=model.device)
    for _ in range(count):
        states = model.hidden(passed, cache=cache)
        token = pick(last_logits(model, states[:, -1]), temperature)        # (1, 1)
        if token.item() in model.config.eos_token_id:
            return
        yield token.item()
        passed = torch.cat((passed, token), dim=1) if cache is None else token


def last_logits(model: Model, x: Tensor, recomputed: int = 64) -> Tensor:
    """Float32 logits (B, vocab) of states x (B, hidden) that left the last layer.

    Rounded to 2 bytes many logits tie, so the largest few are computed again. Widening all of the
    head's weights would copy them for every token.
    """
    x = model.norm(x)
    scores = linear(x, model.lm_head).float()
    if model.dtype.itemsize > 2:
        return scores
    best = scores.topk(min(recomputed, scores.shape[-1])).indices
    rows = model.lm_head.weight[best].float()                       # (B, recomputed, hidden)
    exact = (rows @ x.float()[..., None])[..., 0]
    scores = scores.minimum(exact.amin(-1, keepdim=True))           # one left out may be rounded up
    return scores.scatter(1, best, exact)


def pick(scores: Tensor, temperature: float) -> Tensor:
    """The next token of each sequence, (B, 1), from logits (B, vocab): greedy at temperature 0."""
    if temperature == 0:
        return scores.argmax(-1, keepdim=True)
    scores = scores - scores.amax(-1, keepdim=True)     # so that no temperature overflows
    likely = (scores / temperature).softmax(-1)
    # torch.multinomial's own way for one draw, without its checks, which wait for a GPU.
    return (likely / torch.empty_like(likely).exponential_()).argmax(-1, keepdim=True)


def main():
    parser = cli.arguments(__doc__)
    cli.prompt_arguments(parser)
    args = parser.parse_args()
    device, dtype = cli.prepare(args)
    with cli.blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
        tokenizer = load_tokenizer(args.ckpt, model.config.vocab_size)
    with cli.blame("--prompt"):
        prompt = encode_prompt(tokenizer, args.prompt)

    began = time.perf_counter()
    made = show(tokenizer, prompt, generate(model, prompt, args.tokens, args.temperature))
    seconds = time.perf_counter() - began
    print(f"{len(made)} tokens at {len(made) / seconds:,.0f} tokens/s, each a whole pass",
          file=sys.stderr)


if __name__ == "__main__":
    cli.run_script(main)
