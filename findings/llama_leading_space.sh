#!/bin/bash
# A text that begins with a space: transformers' LlamaTokenizer and SentencePiece, from one and the
# same tokenizer.model, give it different ids. SentencePiece puts a space before every text, so " b"
# has two; LlamaTokenizer leaves it at one, AutoTokenizer at two where no tokenizer_config.json names
# that class. Exits 1 where that has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    transformers==5.24.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

import sentencepiece
import transformers

Path("text").write_text("the cat sat on a mat b b b the cats\n" * 50)
sentencepiece.SentencePieceTrainer.train(
    input="text", model_prefix="tokenizer", vocab_size=300, model_type="bpe", byte_fallback=True,
    hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
    remove_extra_whitespaces=False)
pieces = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model")
Path("config.json").write_text(json.dumps({"model_type": "llama"}))


def theirs(text: str) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(".")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    print(f"  {type(tokenizer).__name__:20s}", tokenizer.convert_ids_to_tokens(ids))
    return tokenizer.convert_ids_to_tokens(ids)


print("transformers", transformers.__version__, "sentencepiece", sentencepiece.__version__)
print("The text ' b':")
print(f"  {'SentencePiece':20s}", pieces.encode(" b", out_type=str))
unnamed = theirs(" b")
Path("tokenizer_config.json").write_text(json.dumps({
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}))
named = theirs(" b")
raise SystemExit(not (pieces.encode(" b", out_type=str) == unnamed == ["▁", "▁b"]
                      and named == ["▁b"]))
PYTHON
