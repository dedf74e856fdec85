"""Trains the demo checkpoint from scratch: a small Mistral that knows Python's own documentation.

The text is what every Python carries (python_documents in support/data.py): the language
reference's topics, the standard library's docstrings, sources and tests, less the one module in ten
that is held out. The model is this project's own, in bfloat16 autocast; matrices learn by Muon
(their update is orthogonalised), the rest by AdamW; the learning rate warms up, holds, and falls to
zero over the last third. Sequences of 256 tokens, then of 512 for the last sixth.

    python demo/make_demo.py                # about an hour on 2 idle cores; resumes by itself
    python demo/make_demo.py --steps 300    # a trial

The result is an ordinary Hugging Face folder: config.json, model.safetensors (bfloat16),
tokenizer.model. The checkpoint in the repository took 1,600 steps, 13 million tokens. This script
grew while it ran: the tokenizer and the first 1,137 steps saw no tests of the library, and more of
the documentation instead, so that a fresh run will not end at the same weights.
"""
import argparse
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from model import Model
from support.checkpoint import read_config
from support.cli import keep_freed_memory
from support.data import encode, python_documents
from support.files import open_safetensors, read_tensors, write_tensors, written_whole
from support.tokenizer import load_tokenizer

CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "torch_dtype": "bfloat16",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "use_cache": True,
}


def train_tokenizer(documents: list[str]) -> None:
    """A SentencePiece BPE that gives every text back unchanged.

    Bytes for what it does not know (newlines among them), runs of spaces as pieces, nothing
    normalised.
    """
    import sentencepiece
    model = io.BytesIO()
    lines = [line for text in documents for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=CONFIG["vocab_size"],
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentence_length=10000,
        num_threads=os.cpu_count(),
        minloglevel=2)
    with written_whole(HERE / "tokenizer.model") as file:
        file.write(model.getvalue())


def ids(tokenizer, documents: list[str]) -> torch.Tensor:
    return torch.from_numpy(encode(tokenizer, documents).astype(np.int64))


def build() -> Model:
    model = Model(read_config(HERE / "config.json"))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(model.layers)) if deep else 0.02)
    return model


def rate(step: int, steps: int) -> float:
    """Warm-up over 100 steps, constant, then linear to zero over the last third."""
    return min((step + 1) / 100, 1.0, (steps - step) / (steps / 3))


def batch(tokens: torch.Tensor, step: int, steps: int) -> torch.Tensor:
    """The 8,192 tokens of a step: a function of the step alone, also in a resumed run."""
    T = 256 if step < steps * 5 / 6 else 512
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(len(tokens) - T, (8192 // T,), generator=generator)
    return tokens[start[:, None] + torch.arange(T + 1)]


@torch.no_grad()
def held_out_loss(model: Model, tokens: torch.Tensor, T: int = 512) -> float:
    """Mean cross-entropy in nats a token over consecutive runs of the held-out documents."""
    total = count = 0
    for block in tokens[:len(tokens) // (T + 1) * (T + 1)].view(-1, T + 1).split(8):
        logits = model(block[:, :-1]).flatten(0, 1).float()
        targets = block[:, 1:].flatten()
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    return total / count


def save(model: Model, optimizers: list, step: int, state: Path) -> None:
    """The checkpoint as users see it, and beside it the float32 weights and moments, to resume."""
    weights = {}
    for n, p in model.named_parameters():
        name = n if n.startswith("lm_head.") else f"model.{n}"
        weights[name] = p.bfloat16()
    write_tensors(HERE / "model.safetensors", weights, {"format": "pt"})
    tensors = {f"weight.{n}": p for n, p in model.named_parameters()}
    for o, optimizer in enumerate(optimizers):
        for i, moments in optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                tensors[f"moment.{o}.{i}.{key}"] = torch.as_tensor(value)
    write_tensors(state, tensors, {"step": str(step)})


def resume(model: Model, optimizers: list, state: Path) -> int:
    with open_safetensors(state) as file:
        step = int(file.metadata()["step"])
    tensors = read_tensors(state)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(tensors[f"weight.{n}"])
    for o, optimizer in enumerate(optimizers):
        packed = optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"moment.{o}."):
                _, _, i, moment = key.split(".")
                packed["state"].setdefault(int(i), {})[moment] = value
        optimizer.load_state_dict(packed)
    return step


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--lr", type=float, default=0.004)
    parser.add_argument("--restart", action="store_true",
                        help="begin anew, even if there is something to resume")
    args = parser.parse_args()

    state = HERE / "make_demo.state"
    if args.restart:
        state.unlink(missing_ok=True)
        (HERE / "tokenizer.model").unlink(missing_ok=True)
    with written_whole(HERE / "config.json") as file:
        file.write((json.dumps(CONFIG, indent=2) + "\n").encode())
    documents, held = python_documents(sources=True)
    if not (HERE / "tokenizer.model").exists():
        train_tokenizer(documents)
    tokenizer = load_tokenizer(HERE)
    _, held = python_documents()        # the held-out loss is that of documentation, not of code
    tokens, held_tokens = ids(tokenizer, documents), ids(tokenizer, held)
    characters = sum(map(len, held)) / len(held_tokens)
    print(f"{len(tokens):,} tokens to train on, {len(held_tokens):,} held out, "
          f"{characters:.2f} characters a token")

    keep_freed_memory()
    torch.manual_seed(0)
    model = build()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    decay = {"lr": args.lr, "weight_decay": 0.1}
    optimizers = [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **decay),
        torch.optim.AdamW(others, betas=(0.9, 0.95), **decay),
    ]
    first = resume(model, optimizers, state) if state.exists() else 0
    saved = last = time.time()
    for step in range(first, args.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(step, args.steps)
        block = batch(tokens, step, args.steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(block[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), block[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0:
            now = time.time()
            speed = 8192 * 10 / (now - last) if step > first else 0
            left = (args.steps - step) * 8192 / speed / 60 if speed else 0
            last = now
            print(f"step {step:5d}  loss {loss.item():.4f}  {speed:6.0f} tokens/s  "
                  f"{left:5.1f} min left", flush=True)
        if time.time() - saved > 600 or step == args.steps - 1:
            save(model, optimizers, step + 1, state)
            nats = held_out_loss(model, held_tokens[:64 * 513])
            print(f"saved at step {step + 1}; held-out {nats:.4f} nats a token, "
                  f"{nats / characters:.4f} a character", flush=True)
            saved = last = time.time()
    nats = held_out_loss(model, held_tokens)
    print(f"held-out loss over all {len(held_tokens):,} tokens: {nats:.4f} nats a token, "
          f"{nats / characters:.4f} a character")


if __name__ == "__main__":
    main()
