#!/bin/bash
# A LLaMA's folder with a tokenizer.model alone, whose tokenizer_config.json names the class and the
# tokens but does not say add_bos_token: transformers 4.57 begins each text with the beginning of
# sequence, 5.24 with nothing, and no line says so. With "add_bos_token": true both put it.
# Exits 1 where that has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > ids.py <<'PYTHON'
import json
from pathlib import Path

import sentencepiece
import transformers

Path("text").write_text("the cat sat on a mat b b b the cats\n" * 50)
sentencepiece.SentencePieceTrainer.train(
    input="text", model_prefix="tokenizer", vocab_size=300, model_type="bpe", byte_fallback=True,
    hard_vocab_limit=False, minloglevel=2)
Path("config.json").write_text(json.dumps({"model_type": "llama"}))
said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
ids = []
for more in ({}, {"add_bos_token": True}):
    Path("tokenizer_config.json").write_text(json.dumps(said | more))
    tokenizer = transformers.AutoTokenizer.from_pretrained(".")
    ids.append(tokenizer("the cat")["input_ids"])
    print(f"  transformers {transformers.__version__:8s} {more or 'not said'!s:25s}",
          tokenizer.convert_ids_to_tokens(ids[-1]))
begins = [some[0] == 1 for some in ids]
expected = [transformers.__version__.startswith("4."), True]
raise SystemExit(begins != expected)
PYTHON
for version in 4.57.6 5.24.0; do
    python3 -m venv "venv$version"
    "venv$version/bin/pip" install -q --disable-pip-version-check \
        transformers==$version sentencepiece==0.2.3 protobuf==7.36.2
    HF_HUB_OFFLINE=1 "venv$version/bin/python" ids.py
done
