#!/bin/bash
# A sliding layer of transformers' DynamicCache (5.24.0) is said to keep the last window − 1 tokens,
# and the shape of what it keeps is that. But it keeps a view: after a prefill of 8,192 tokens with a
# window of 512 all of the prefill's keys and values stay in memory, 16 times as much, until the next
# token's concatenation. Who prefills many prompts before decoding holds all of them whole.
# Exits 1 where that has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.24.0
cat > held.py <<'PYTHON'
import torch
import transformers
from transformers import DynamicCache, Gemma3TextConfig

config = Gemma3TextConfig(num_hidden_layers=1, layer_types=["sliding_attention"],
                          sliding_window=512)
cache = DynamicCache(config=config)
print(f"transformers {transformers.__version__}, torch {torch.__version__}, window 512")
held = []
for tokens in (8192, 1, 1):
    states = torch.zeros(1, 1, tokens, 256)
    cache.update(states, states, 0)
    keys = cache.layers[0].keys
    held.append(keys.untyped_storage().nbytes())
    print(f"  {tokens:5,d} more tokens: keys of {keys.shape[2]}, {keys.nbytes:,} bytes; "
          f"held in memory {held[-1]:,}")
raise SystemExit(held != [8192 * 1024, 512 * 1024, 512 * 1024])
PYTHON
HF_HUB_OFFLINE=1 venv/bin/python held.py
