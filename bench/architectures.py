"""Which models of transformers adapters/transformers_cache.py takes, seen on tiny random ones.

Of each kind in a few seconds: the logits with the cache, fed in parts, against those with keys and
values projected in one pass; which layers have RoPE, how logits are scaled. Or why it is refused.

    pip install transformers==5.24.0
    python bench/architectures.py
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from adapters.transformers_cache import (
    Adapted,
    AutoConfig,
    AutoModelForCausalLM,
    MatryoshkaCache,
    far,
)
from projection import Projection, shape_of

SAID = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE, WINDOW = {"head_dim": 16}, {"head_dim": 16, "sliding_window": 8}
KINDS = {
    "apertus": {}, "arcee": {}, "bloom": {}, "cohere": {}, "cohere2": WINDOW, "deepseek_v2": {},
    "ernie4_5": WIDE, "exaone4": {}, "gemma": WIDE, "gemma2": WINDOW,
    "gemma3_text": WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "glm": WIDE, "glm4": WIDE, "gpt2": {"n_embd": 64, "n_head": 4}, "gptj": {},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3}, "jamba": {},
    "llama": {}, "llama4_text": WIDE | {"num_local_experts": 2}, "mamba": {},
    "mistral": {"sliding_window": 8}, "mixtral": {}, "nemotron": {}, "olmo": {}, "olmo2": {},
    "olmo3": {"sliding_window": 8}, "opt": {}, "phi": {}, "phi3": {}, "qwen2": {}, "qwen3": WIDE,
    "qwen3_moe": {}, "qwen3_next": {}, "seed_oss": WIDE, "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {}, "starcoder2": {},
}


@torch.no_grad()
def tried(kind: str, more: dict) -> str:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SAID | more))).eval()
    for x in model.parameters():                        # so large that everything matters
        x.copy_(x + 0.1 * torch.randn_like(x) if x.ndim == 1 else 4 * x)
    try:
        adapted = Adapted(model)
    except ValueError as error:
        return f"refused: {error}"
    L, K, d = shape_of(adapted.config)
    U_k, U_v = torch.linalg.qr(torch.randn(2, L, K, d, d)).Q
    mean_v, mean_k = 0.3 * torch.randn(2, L, K, d)
    p = Projection(U_k, U_v, mean_v, mean_k, whole=4)
    ranks = d // 8 * torch.randint(1, 9, (2, L, K))
    tokens = torch.randint(3, 96, (2, 29))
    expected = adapted.norm(adapted.hidden(tokens, p.at(ranks))) @ adapted.lm_head.weight.T
    cache = MatryoshkaCache(model, p, ranks=ranks)
    found = [model(part, cache=cache).logits for part in tokens.split([13, 1, 1, 14], 1)]
    rope = "".join("R" if turned else "-" for turned in adapted.rope.turned)
    return (f"differs by {far(torch.cat(found, 1), expected):.1e}; RoPE {rope}; logits times "
            f"{adapted.scale:.4g}")


def main():
    from transformers import logging
    logging.set_verbosity_error()
    torch.manual_seed(0)
    for kind, more in KINDS.items():
        print(f"{kind:14s}{tried(kind, more)}", flush=True)


if __name__ == "__main__":
    main()
