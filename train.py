import argparse
import ast
import contextlib
import ctypes
import json
import math
import os
import sys
import sysconfig
import time
import zlib
from array import array
from pathlib import Path
from textwrap import indent

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Model, arguments, blame, fail, load, load_tokenizer, prepare, within
from projection import (BUDGETS, STEPS, Moments, Projection, Rotation, open_safetensors, uniform_ranks, write_file,
                        write_tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Text: one long run of token ids to train on, and one that is held out

def load_data(path: Path | None, ckpt: Path, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids as (training, held out), each a one-dimensional integer array, memory-mapped where the file allows it.

    `path`: .txt, .jsonl (one {"text": …} a line), .bin (uint16 if the vocabulary has at most 65,536 pieces, else
    uint32), .npy, or None for Python's own text. Of a file the last tenth is held out. Raises ValueError.
    """
    if path is None:
        tokenizer = load_tokenizer(ckpt)
        train, held = (encode(tokenizer, documents) for documents in python_documents())
    else:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if path.suffix in (".txt", ".jsonl"):
            tokenizer = load_tokenizer(ckpt)
            tokens = encode(tokenizer, text_pieces(path) if path.suffix == ".txt" else jsonl_documents(path))
        elif path.suffix == ".bin":
            tokens = np.memmap(path, np.uint16 if vocab_size <= 65536 else np.uint32, "r") if path.stat().st_size else np.empty(0)
        elif path.suffix == ".npy":
            try:
                tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise ValueError(f"{path}: not a .npy array ({error})") from None
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise ValueError(f"{path}: holds {tokens.dtype} of shape {tokens.shape}; expected token ids, a one-dimensional array of integers")
        else:
            raise ValueError(f"{path}: the kind of file is not known; expected .txt, .jsonl, .bin or .npy")
        train, held = tokens[:-(len(tokens) // 10) or None], tokens[len(tokens) - len(tokens) // 10:]
    for part in (train, held):
        for start in range(0, len(part), 2 ** 24):   # in pieces: the file may be larger than memory
            worst = int(part[start:start + 2 ** 24].max())
            if worst >= vocab_size or int(part[start:start + 2 ** 24].min()) < 0:
                raise ValueError(f"{path or ckpt}: holds the token id {worst}, beyond the vocabulary of {vocab_size}")
    return train, held


def encode(tokenizer, documents) -> np.ndarray:
    """Token ids of all documents end to end, each after the beginning-of-sequence token."""
    ids = array("I")
    for text in documents:
        ids.extend([tokenizer.bos_id()] * (tokenizer.bos_id() >= 0) + tokenizer.encode(text))
    return np.frombuffer(ids, np.uint32) if ids else np.empty(0, np.uint32)


def text_pieces(path: Path):
    yield path.read_text()


def jsonl_documents(path: Path):
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{path}: line {number} is not a JSON object with a "text" field') from None


def python_documents(sources: bool = False) -> tuple[list[str], list[str]]:
    """The text that every Python carries, as (training documents, held-out documents).

    A document is a topic of the language reference (pydoc_data.topics) or the docstrings of one module of the standard
    library; with `sources` each module's source follows as a document of its own (the demo's training). A hash of the
    topic's or module's name decides its side, one in ten held out, so that a module's docstrings and source fall on
    one side in every version of Python. Paragraphs of a held-out text that stand in a training one too are cut.
    """
    from pydoc_data.topics import topics
    library = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}
    sides = {True: [], False: []}                                       # held out?
    for name, text in sorted(topics.items()):
        sides[zlib.crc32(name.encode()) % 10 == 0].append(text)
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if skip & set(parts):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        try:
            source = file.read_text(encoding="utf-8")
            text = docstrings(module, ast.parse(source))
        except (SyntaxError, UnicodeDecodeError):
            continue
        side = sides[zlib.crc32(module.encode()) % 10 == 0]
        side.extend([text] * (text != "") + [source] * (sources and source != ""))
    known = {p for text in sides[False] for p in text.split("\n\n") if len(p) > 30}
    held = ["\n\n".join(p for p in text.split("\n\n") if p not in known) for text in sides[True]]
    return sides[False], [text for text in held if text]


def docstrings(name: str, node: ast.AST) -> str:
    """The docstrings of a module, with the signatures that they describe, as pydoc would print them."""
    text = ""
    if (doc := ast.get_docstring(node)):
        arguments = f"({ast.unparse(node.args)})" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else ""
        text = f"{name}{arguments}\n{indent(doc, '    ')}\n\n"
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text += docstrings(f"{name}.{child.name}", child)
    return text


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next step. glibc hands every block above 32 MB back to the system
    and gets it back page by page, zeroed: a third of a step on a CPU. Elsewhere (macOS, Windows, musl) does nothing."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)             # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD: never shrink the heap
    except (OSError, AttributeError, TypeError):
        pass


def windows(tokens: np.ndarray, starts: Tensor, T: int) -> Tensor:
    """The runs of T + 1 tokens that begin at `starts`: (B, T + 1) int64; inputs are [:, :-1], targets [:, 1:]."""
    return torch.from_numpy(np.stack([tokens[s:s + T + 1] for s in starts.tolist()]).astype(np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# The loss

def log_probabilities(model: Model, *states: Tensor):
    """For normed states (n, hidden) of the same tokens: the log-probabilities, chunk by chunk of tokens, so that two
    (tokens × vocabulary) matrices never exist whole. Yields (slice, log p of the first, log p of the second, …)."""
    W = model.lm_head.weight
    size = max(1, 2 ** 22 // len(W))
    for start in range(0, len(states[0]), size):
        rows = slice(start, start + size)
        yield rows, *((x[rows] @ W.T).to(wide(x.dtype)).log_softmax(-1) for x in states)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that probabilities are computed in: float32, or float64 for a float64 model."""
    return dtype if dtype == torch.float64 else torch.float32


class Distill(torch.autograd.Function):
    """(1 − c) KL(p_teacher ‖ p_student) + c · cross-entropy, the mean over the tokens of each sequence: (B,); and the KL.

    The gradient for the student's logits is p_student − ((1 − c) p_teacher + c · onehot(target)), so it is taken in the
    same pass, chunk by chunk, while the probabilities are at hand: no logits are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, model: Model, targets: Tensor, c: float):
        B, T, _ = student.shape
        s, t, y = student.flatten(0, 1), teacher.flatten(0, 1), targets.flatten()[:, None]
        gradient, kl = torch.empty_like(s), s.new_empty(B * T, dtype=wide(s.dtype))
        ce = torch.zeros_like(kl)
        for rows, log_q, log_p in log_probabilities(model, s, t):
            p = log_p.exp()
            kl[rows] = log_p.sub_(log_q).mul_(p).sum(-1)
            if c:
                ce[rows] = -log_q.gather(1, y[rows])[:, 0]
                p.mul_(1 - c).scatter_add_(1, y[rows], torch.full_like(p[:, :1], c))
            gradient[rows] = log_q.exp_().sub_(p).to(s.dtype) @ model.lm_head.weight
        ctx.save_for_backward(gradient.view_as(student).div_(T))
        kl, ce = kl.view(B, T).mean(1), ce.view(B, T).mean(1)
        ctx.mark_non_differentiable(kl)
        return (1 - c) * kl + c * ce, kl

    @staticmethod
    def backward(ctx, of_loss: Tensor, _):
        gradient, = ctx.saved_tensors
        return gradient * of_loss[:, None, None].to(gradient), None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------

def draw_ranks(recipe: str, B: int, config, generator: torch.Generator) -> Tensor:
    L, K = config.num_hidden_layers, config.num_key_value_heads
    if recipe == "paper":
        levels = torch.randint(1, STEPS + 1, (2, L, B, K), generator=generator)
    else:
        level = torch.randint(1, STEPS + 1, (B,), generator=generator)[:, None]
        levels = (level + torch.randint(-1, 2, (2, L, B, K), generator=generator)).clamp(1, STEPS)
    return levels * (config.head_dim // STEPS)


@torch.no_grad()
def calibrate(model: Model, tokens: np.ndarray, B: int, T: int, batches: int, seed: int) -> Moments:
    moments = Moments(model.config, model.lm_head.weight.device)
    g = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        x = windows(tokens, torch.randint(len(tokens) - T, (B,), generator=g), T)[:, :-1]
        model.hidden(x.to(model.lm_head.weight.device), observe=moments)
    return moments


@torch.no_grad()
def evaluate(model: Model, tokens: np.ndarray, plans: dict, B: int, T: int, limit: int) -> tuple[dict, dict]:
    n = min(limit, (len(tokens) - 1) // T)
    base = torch.zeros(2, dtype=torch.float64)
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in plans}
    for rows in torch.arange(n).split(B):
        block = windows(tokens, rows * T, T).to(model.lm_head.weight.device)
        x, y = block[:, :-1], block[:, 1:].flatten()
        t = model.norm(model.hidden(x)).flatten(0, 1)
        for r, log_p in log_probabilities(model, t):
            base += torch.stack([-log_p.gather(1, y[r, None]).double().sum(), (log_p.argmax(-1) == y[r]).double().sum()]).cpu()
        for name, project in plans.items():
            s = model.norm(model.hidden(x, project)).flatten(0, 1)
            for r, log_p, log_q in log_probabilities(model, t, s):
                kl = (log_p.exp() * (log_p - log_q)).sum(-1).double().sum()
                sums[name] += torch.stack([kl, -log_q.gather(1, y[r, None]).double().sum(), (log_q.argmax(-1) == y[r]).double().sum()]).cpu()
    n = n * T
    return ({"perplexity": math.exp(base[0] / n), "accuracy": (base[1] / n).item()},
            {k: {"kl": (v[0] / n).item(), "perplexity": math.exp(v[1] / n), "accuracy": (v[2] / n).item()} for k, v in sums.items()})
