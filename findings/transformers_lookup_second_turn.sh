#!/bin/bash
# A cache that is kept between two calls of transformers' generate (5.24.0), as in a chat: the second
# call is given the whole text, and passes only what the cache has not. With prompt_lookup_num_tokens,
# which is to change nothing but speed, it passes the whole text again, behind what the cache holds:
# the same greedy call gives other tokens, and the cache ends longer than the text. No line says so.
# Exits 1 where that has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cat > turns.py <<'PYTHON'
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                     num_attention_heads=4, max_position_embeddings=512, pad_token_id=0,
                     bos_token_id=None, eos_token_id=None)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():                   # larger weights, so that a token's context matters
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.mul_(4)
prompt, question = torch.randint(3, 64, (1, 20)), torch.randint(3, 64, (1, 6))
print(f"transformers {transformers.__version__}, greedy, 20 tokens and 12 new, then 6 and 12 new")
found = []
for lookup in (None, 3):
    cache = DynamicCache(config=config)
    said = {"do_sample": False, "max_new_tokens": 12, "cache": cache,
            "prompt_lookup_num_tokens": lookup}
    first = model.generate(prompt, **said)
    passed = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, given: passed.append(given["input_ids"].shape[1]), with_kwargs=True)
    second = model.generate(torch.cat((first, question), dim=1), **said)
    hook.remove()
    found.append((first[0, 20:].tolist(), second[0, -12:].tolist(), passed[0],
                  cache.get_seq_length()))
    print(f"  prompt_lookup_num_tokens {lookup!s:5s} first turn {found[-1][0]}\n"
          f"{'':32s}second {found[-1][1]}\n{'':32s}its first pass has {passed[0]} tokens, the cache "
          f"ends with {found[-1][3]}")
plain, looked_up = found
as_seen = (plain[0] == looked_up[0] and plain[1] != looked_up[1]
           and plain[2:] == (7, 49) and looked_up[2] == 38 and looked_up[3] > 49)
raise SystemExit(not as_seen)
PYTHON
HF_HUB_OFFLINE=1 venv/bin/python turns.py
