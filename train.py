"""Train the projections: distil the model into itself, with its KV cache cut to random ranks (arXiv 2410.14731, section 3).

The teacher is the model; the student is the same weights, with the key of every token replaced by k̂ = k U_r U_rᵀ and
the value by v̂ = μ + (v − μ) U_r U_rᵀ, where U_r is the first r columns of an orthogonal U, one for each head. A budget is
the share of the cache, of the columns, that is kept. Only U = U_start · rotation(A) and the means μ learn (projection.py):

    minimise   KL( p_teacher(· | text) ‖ p_student(· | text; ranks) )     over random text and random ranks

Since the ranks are drawn anew for every sequence, each leading group of columns must do as well as it can without those
that follow: nested dolls. One U then serves every rank. The steps of a run:

    calibrate -> train -> save OUT/projections.safetensors -> evaluate on held-out text -> OUT/train.json, OUT/train.png

Two recipes. `--recipe paper` is the paper's as its authors' code has it: starts from PCA; ranks independent for every
head; the mean of 0.25 KL + 0.75 cross-entropy; Adam at 0.001, cosine. It gains where little of the cache is left and
loses to plain PCA where most of it is. `--recipe ours`, the default, must not lose anywhere, and differs in four places:

  start      PCA weighted by what reads the keys and values (Moments.aware). Better than PCA before any training.
  ranks      one level for a sequence, each head at most one step off. Independent ranks always average to about half
             of the cache, so the paper's recipe never sees a nearly full one, nor a quarter of it. With --ranks FILE a
             random plan of the path that search.py found, each head at most a step off: then the columns learn for
             the plans that will be used.
  objective  the mean of log(KL + 0.001) over sequences. KL at 25% is some fifty times that at 87.5%: in a plain mean the
             small ranks drown the rest, and the columns that only large ranks see follow noise. In the logarithm a
             tenth less KL counts the same at every budget (down to about 0.001). No cross-entropy: it pulls towards the text, away from the
             model, also where the cache is full and there is nothing to mend.
  rate       0.5 / head_dim. Adam moves every angle of a rotation equally fast, and a column turns by head_dim of them.

One copy of the weights, no gradient for any of them, logits only ever 256 tokens at a time, and with --checkpoint one
layer's inner states at a time: a 7B model in bfloat16 trains in some 16 GB (`peak_memory`; predicted, not measured on a GPU).

    python train.py                                                         # the demo on Python's own documentation
    python train.py --ckpt /path/to/Llama-2-7b-hf --data redpajama.jsonl --seq 2048 --batch 1 --accumulate 8
    python train.py --recipe paper --out out_paper                          # the paper's recipe, to compare
    python train.py --ranks out/ranks.json --out out_path                   # along the path that search.py found
    torchrun --nproc_per_node=8 train.py --ckpt ... --data ...              # several GPUs, each with its own sequences
    python train.py --resume                     # with the options of the stopped run: goes on where it was
    python train.py --eval                       # with the same options: the report again, and of OUT/ranks.json if there
    python train.py --eval --tasks demo/questions.jsonl                     # and multiple-choice questions at every budget
"""
import argparse
import ast
import itertools
import json
import math
import os
import sys
import sysconfig
import time
import zlib
from array import array
from datetime import timedelta
from pathlib import Path
from textwrap import indent

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.utils.checkpoint import checkpoint

from cache import KVCache
from model import Config, Model, arguments, blame, fail, load, load_tokenizer, prepare, read_config, within
from projection import (BUDGETS, STEPS, Moments, Projection, Rotation, open_safetensors, plan_on_path, read_json,
                        read_plan, read_ranks, uniform_ranks, write_file, write_tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Text: one long run of token ids to train on, and one that is held out

def load_data(path: Path | None, ckpt: Path, vocab_size: int, out: Path = Path("out")) -> tuple[np.ndarray, np.ndarray]:
    """Token ids as (training, held out), each a one-dimensional array of integers, memory-mapped if they come from a file.

    `path` is a .txt, a .jsonl (one {"text": …} a line), a .bin of ids (uint16 if the vocabulary has at most 65,536
    pieces, else uint32), a .npy of ids, or None for Python's own text. Text is tokenised once, into a .bin in the folder
    `out`. Of a file the last tenth is held out. Raises ValueError naming the file and what is wrong with it.
    """
    if path is None:
        tokenizer = load_tokenizer(ckpt)
        return tuple(encode(tokenizer, documents) for documents in python_documents())
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix in (".txt", ".jsonl"):
        path = tokenise(path, ckpt, vocab_size, out)
    tokens = load_tokens(path, vocab_size)
    for start in range(0, len(tokens), 2 ** 22):   # read, not mapped: mapped pages would count as memory of ours
        part = np.fromfile(path, tokens.dtype, min(2 ** 22, len(tokens) - start), offset=tokens.offset + start * tokens.itemsize)
        if part.min() < 0 or part.max() >= vocab_size:
            wrong = part[(part < 0) | (part >= vocab_size)][0]
            raise ValueError(f"{path}: holds the token id {wrong}, outside the model's vocabulary of {vocab_size}")
    cut = len(tokens) - len(tokens) // 10
    return tokens[:cut], tokens[cut:]


def load_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """The memory-mapped ids of a .bin or .npy file."""
    if path.suffix == ".bin":
        kind = id_dtype(vocab_size)
        if path.stat().st_size % kind.itemsize:
            raise ValueError(f"{path}: {path.stat().st_size} bytes are not a whole number of {kind} token ids")
        return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path}: not a .npy file of numbers ({error})") from None
        if not isinstance(tokens, np.ndarray):
            raise ValueError(f"{path}: not a .npy file of numbers")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{path}: {tokens.dtype} of shape {tokens.shape}; expected integers of shape (n,), token ids")
        return tokens
    raise ValueError(f"{path}: not a kind of file that is known; expected .txt, .jsonl, .bin or .npy")


def id_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def tokenise(path: Path, ckpt: Path, vocab_size: int, out: Path) -> Path:
    """The token ids of a .txt or .jsonl as a .bin in `out`, made unless it is there and neither text nor tokenizer changed.

    Streams: memory does not grow with the file. Returns the path of the .bin.
    """
    tokenizer, size = load_tokenizer(ckpt), path.stat()
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{path.name}.bin"
    origin = {"source": str(path.resolve()), "bytes": size.st_size, "modified": size.st_mtime_ns, "vocab_size": vocab_size,
              "tokenizer": zlib.crc32((ckpt / "tokenizer.model").read_bytes())}
    note = target.with_suffix(".json")                              # what the .bin was made from; written last
    if target.exists() and note.exists() and read_json(note) == origin:
        return target
    texts = text_pieces(path) if path.suffix == ".txt" else jsonl_documents(path)
    began, shown, part = time.time(), time.time(), Path(f"{target}.part")
    try:
        with open(part, "wb") as file:
            for ids in token_stream(tokenizer, texts, one_document=path.suffix == ".txt"):
                if len(ids) and ids.max() >= vocab_size:
                    raise ValueError(f"{ckpt}: its tokenizer.model makes the token id {ids.max()}, outside the vocabulary of {vocab_size}")
                ids.astype(id_dtype(vocab_size)).tofile(file)
                if time.time() - shown > 10:
                    shown, done = time.time(), file.tell()
                    print(f"Tokenising {path}: {done // id_dtype(vocab_size).itemsize:,} tokens, {shown - began:.0f} s", file=sys.stderr)
        note.unlink(missing_ok=True)
        part.replace(target)
        write_file(note, json.dumps(origin).encode())
    finally:
        part.unlink(missing_ok=True)
    return target


def encode(tokenizer, texts, one_document: bool = False) -> np.ndarray:
    """Token ids of texts end to end; the beginning-of-sequence token goes before each, or before the first alone."""
    return np.concatenate([np.empty(0, np.uint32), *token_stream(tokenizer, texts, one_document)])


def token_stream(tokenizer, texts, one_document: bool):
    """The same in pieces: some texts at a time, shared among the cores by SentencePiece."""
    batch, characters, before = [], 0, [tokenizer.bos_id()] * (tokenizer.bos_id() >= 0)
    for text in itertools.chain(texts, [None]):
        if text is None or characters > 2 ** 20:
            ids = array("I")
            for found in tokenizer.encode(batch, num_threads=os.cpu_count()):
                ids.extend(before + found)
                before = [] if one_document else before
            yield np.array(ids, np.uint32)
            batch, characters = [], 0
        if text is not None:
            batch.append(text)
            characters += len(text)


def text_pieces(path: Path, characters: int = 2 ** 17):
    """A text file in pieces that end with a line, or in the midst of a line of more than so many characters."""
    with open(path, encoding="utf-8") as file:
        try:
            while piece := file.read(characters):
                yield piece + file.readline(characters)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def jsonl_documents(path: Path):
    """The "text" fields of a file of JSON lines; empty lines are skipped."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()                                           # JSON can spell half a character
            except (ValueError, KeyError, TypeError, AttributeError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path}: line {number} is not a JSON object with a "text"')
            yield text


def python_documents(sources: bool = False) -> tuple[list[str], list[str]]:
    """The text that every Python carries, as (training documents, held-out documents).

    A document is a topic of the language reference (pydoc_data.topics) or the docstrings of one module of the standard
    library. With `sources` (the demo's training) each module's source is one too, and so are the library's own tests. A
    hash of the topic's or module's name decides its side, one in ten held out, so that a module's docstrings and source fall
    on one side in every version of Python. Paragraphs of a held-out text that stand in a training one too are cut.
    """
    from pydoc_data.topics import topics
    library = Path(sysconfig.get_paths()["stdlib"])
    sides = {True: [], False: []}                                       # held out?
    for name, text in sorted(topics.items()):
        sides[zlib.crc32(name.encode()) % 10 == 0].append(text)
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        documented = not {"test", "tests", "idlelib", "lib2to3"} & set(parts)
        if {"site-packages", "dist-packages", "pydoc_data", "encodings"} & set(parts) or not (documented or sources):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        try:
            source = file.read_text(encoding="utf-8")
            texts = [docstrings(module, ast.parse(source))] * documented + [source] * sources
        except (SyntaxError, ValueError):                               # some tests are broken on purpose
            continue
        sides[zlib.crc32(module.encode()) % 10 == 0] += [text for text in texts if text]
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


def windows(tokens: np.ndarray, starts: Tensor, T: int) -> Tensor:
    """The runs of T + 1 tokens that begin at `starts`: (B, T + 1) int64; inputs are [:, :-1], targets [:, 1:]."""
    return torch.from_numpy(np.stack([tokens[s:s + T + 1] for s in starts.tolist()]).astype(np.int64))


def random_windows(tokens: np.ndarray, B: int, T: int, generator: torch.Generator, mine: slice = slice(None)) -> Tensor:
    """B random runs of T + 1 tokens, or those of them that are this process's share."""
    return windows(tokens, torch.randint(len(tokens) - T, (B,), generator=generator)[mine], T)


# ---------------------------------------------------------------------------------------------------------------------
# The loss

CHUNK = 256   # tokens whose logits exist at a time; so few that on a CPU they stay in its cache


def log_probabilities(model: Model, *states: Tensor):
    """For normed states (n, hidden) of the same tokens: the log-probabilities, chunk by chunk of tokens, so that two
    (tokens × vocabulary) matrices never exist whole. Yields (slice, log p of the first, log p of the second, …)."""
    for start in range(0, len(states[0]), CHUNK):
        rows = slice(start, start + CHUNK)
        yield rows, *(logits(x[rows], model.lm_head.weight).log_softmax(-1) for x in states)


def logits(x: Tensor, W: Tensor) -> Tensor:
    """x Wᵀ of states (n, hidden) and W (vocab, hidden), in float32 or float64. A bfloat16 result would carry eight bits,
    and small KLs drown in that. So bfloat16 weights are widened, some pieces of the vocabulary at a time."""
    if x.dtype == wide(x.dtype):
        return x @ W.T
    return torch.cat([x.float() @ part.float().T for part in W.split(2 ** 13)], dim=-1)


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
# Training

RECIPES = {
    "ours": {"start": "aware", "ranks": "levels", "objective": "log", "ce": 0.0},
    "paper": {"start": "pca", "ranks": "independent", "objective": "mean", "ce": 0.75},
}


def draw_ranks(kind: str, B: int, config, generator: torch.Generator, path: Tensor | None = None) -> Tensor:
    """Random ranks (2, L, B, K) for every sequence, layer and head, keys and values apart: multiples of d/8.

    "independent" draws each from all eight (the paper). "levels" deals every sequence one of the levels from 25 to 87.5%,
    and each head is at most one step off. So budgets really differ from sequence to sequence; independent ranks
    always average to about 56% of the cache. With a `path` of the search (projection.path_order) a sequence's budget is drawn
    evenly from 15 to 100%, its ranks are the path's plan for it, and again each head is at most one step off.
    """
    L, K, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    if kind == "independent":
        return torch.randint(1, STEPS + 1, (2, L, B, K), generator=generator) * (d // STEPS)
    if path is None:
        deals = [torch.randperm(STEPS - 2, generator=generator) + 2 for _ in range(math.ceil(B / (STEPS - 2)))]
        levels = torch.cat(deals)[:B, None].expand(2, L, B, K)
    else:
        lowest = max(0.15, 1 - len(path) / (2 * L * K * STEPS))
        budgets = lowest + (1 - lowest) * torch.rand(B, generator=generator)
        levels = torch.stack([plan_on_path(path, config, b) for b in budgets.tolist()], dim=2) // (d // STEPS)
    off = torch.randint(-1, 2, (2, L, B, K), generator=generator)
    return (levels + off).clamp(1, STEPS) * (d // STEPS)


@torch.no_grad()
def calibrate(model: Model, tokens: np.ndarray, B: int, T: int, seed: int, batches: int = 16) -> Moments:
    """Second moments of queries, keys and values over random runs of the training text."""
    moments = Moments(model.config, model.device)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        model.hidden(random_windows(tokens, WORLD * B, T, generator, my_share(B))[:, :-1].to(model.device), observe=moments)
    for total in (moments.n, moments.k, moments.v, moments.kk, moments.vv, moments.qq):
        sum_over_processes(total)
    return moments


def train(model: Model, tokens: np.ndarray, valid: np.ndarray, run: "Run") -> None:
    """Rotate the projections so that the model that reads the compressed cache says what the model itself says."""
    args, config, recipe, rotation = run.args, model.config, RECIPES[run.args.recipe], run.rotation
    progress = Progress(args.steps)
    for step in range(run.step, args.steps):
        # Everything random in a step follows from the seed and its number, so a resumed run draws what it would have.
        # N processes with batches of B draw what one with N · B would, and each takes its share.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        total, seen = torch.zeros(1, dtype=torch.float64), False
        for _ in range(args.accumulate):
            block = random_windows(tokens, WORLD * args.batch, args.seq, generator, my_share(args.batch)).to(model.device)
            ranks = draw_ranks(recipe["ranks"], WORLD * args.batch, config, generator, run.path)
            project, seen = rotation().at(ranks[:, :, my_share(args.batch)]), rotation.told_apart(ranks) | seen
            with run.fast_products():
                with torch.no_grad():                   # the teacher: the same weights, nothing projected
                    teacher = model.hidden(block[:, :-1])
                student = student_states(model, block[:, :-1], project, args.checkpoint)
            teacher, student = model.norm(teacher), model.norm(student)
            loss, kl = Distill.apply(student, teacher, model, block[:, 1:], args.ce)                # (B,), (B,)
            objective = torch.log(loss + 1e-3).mean() if recipe["objective"] == "log" else loss.mean()
            (objective / args.accumulate).backward()
            total += kl.mean().item() / args.accumulate
        for gradient in (total, *(p.grad for p in rotation.parameters())):
            sum_over_processes(gradient).div_(WORLD)
        rotation.A_k.grad.mul_(seen[0])
        rotation.A_v.grad.mul_(seen[1])
        if not (math.isfinite(total) and all(p.grad.isfinite().all() for p in rotation.parameters())):
            fail(f"--lr {args.lr}: the loss of step {step + 1} or its gradient is not a number; {args.out}/projections.safetensors "
                 f"is as it was. Start again with a smaller --lr or another --dtype")
        run.optimizer.param_groups[0]["lr"] = args.lr * schedule(step, args.steps)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.losses.append(total.item())
        progress(step + 1, f"KL {run.losses[-1]:.4f}", args.accumulate * WORLD * args.batch * args.seq)
        if (step + 1) % args.check_every == 0 or step + 1 == args.steps:
            run.keep_best(model, valid, step + 1)
        run.save_sometimes(step + 1)


def student_states(model: Model, tokens: Tensor, project, recompute: bool) -> Tensor:
    """model.hidden with projections; with `recompute` a layer's inner states are not kept for the backward pass but made
    again there (activation checkpointing): a third more operations for a layer's worth of memory instead of all layers'."""
    x = model.embed(tokens)
    for i in range(model.config.num_hidden_layers):
        x = checkpoint(model.layer, i, x, project, use_reentrant=False) if recompute else model.layer(i, x, project)
    return x


def schedule(step: int, steps: int) -> float:
    """The learning rate's factor: warm-up over the first tenth, cosine to zero."""
    return min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


# ---------------------------------------------------------------------------------------------------------------------
# Several processes (torchrun): the same weights in each, other sequences; gradients are averaged, the first one writes

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))


def join_processes(device: torch.device) -> None:
    """Meet the other processes, each with its own device; only the first one keeps its standard output."""
    if WORLD == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2))   # of tokenising
    if RANK:
        sys.stdout = open(os.devnull, "w")


def my_share(B: int) -> slice:
    """Of WORLD · B sequences, those of this process."""
    return slice(RANK * B, (RANK + 1) * B)


def sum_over_processes(total: Tensor) -> Tensor:
    """In place. Small tensors on the CPU travel with gloo or through the GPU with nccl."""
    if WORLD > 1:
        there = total.cuda() if distributed.get_backend() == "nccl" else total
        distributed.all_reduce(there)
        total.copy_(there)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Memory

def peak_memory(c: Config, batch: int, seq: int, dtype: torch.dtype, recompute: bool) -> dict[str, float]:
    """Bytes that a training step holds at its peak, by what holds them. c: the model's config.

    All linear layers are frozen, so they keep no input for the backward pass. What a layer keeps, in numbers a token: the input of
    each norm and the normed one, q and the attention's output, k and v before and after projection, and three of the MLP.
    The layer whose turn it is holds gradients and results on the way beside them.
    """
    h, i, L, K, d = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_key_value_heads, c.head_dim
    H, n, size = c.num_attention_heads, batch * seq, dtype.itemsize
    matrices = L * (2 * h * H * d + 2 * h * K * d + 3 * h * i) + c.vocab_size * h * (1 if c.tie_word_embeddings else 2)
    layer, on_the_way = 4 * h + 2 * H * d + 4 * K * d + 3 * i, 6 * h + 4 * i
    return {
        "weights": matrices * size,
        "projections": 18 * 4 * L * K * d * d,   # some 18 matrices a head: start, PCA, A, gradient, Adam, Cayley map and its graph
        "between layers": n * h * size * (L if recompute else 1),
        "within layers": n * size * (layer * (1 if recompute else L) + on_the_way),
        "loss": 6 * min(CHUNK, n) * c.vocab_size * wide(dtype).itemsize + 5 * n * h * size,
    }


def free_memory(device: torch.device) -> float:
    """Bytes that a process can still get; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0]) / WORLD
    except (OSError, KeyError, ValueError):
        return math.inf


def plan_memory(args, config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """Say what a step will take; decide --checkpoint where the user did not; fail if it cannot fit."""
    need = lambda recompute: sum(peak_memory(config, args.batch, args.seq, dtype, recompute).values())
    free = free_memory(device)
    if args.checkpoint is None:
        args.checkpoint = need(False) > 0.8 * free
    parts = peak_memory(config, args.batch, args.seq, dtype, args.checkpoint)
    print("Memory of a step, predicted: " + ", ".join(f"{name} {n / 1e6:,.0f}" for name, n in parts.items())
          + f"; {need(args.checkpoint) / 1e6:,.0f} MB in all" + (", layers recomputed in the backward pass" if args.checkpoint else ""))
    if need(args.checkpoint) > free:
        fail(f"--batch {args.batch} --seq {args.seq}: a step needs about {need(args.checkpoint) / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on "
             f"{device}; take a smaller --seq, --batch 1 with --accumulate, or --checkpoint")


# ---------------------------------------------------------------------------------------------------------------------
# The report: KL to the base model, perplexity and accuracy of the next token, on held-out text

@torch.no_grad()
def evaluate(model: Model, tokens: np.ndarray, plans: dict[str, list], B: int, T: int, limit: int) -> tuple[dict, dict]:
    """Measure the base model and every hook `project` of `plans` over at most `limit` runs of T held-out tokens.

    Returns ({"perplexity", "accuracy"} of the base, {name: {"kl", "perplexity", "accuracy"}}).
    """
    runs = min(limit, (len(tokens) - 1) // T)
    stride = (len(tokens) - 1) // runs                              # spread evenly over all of the held-out text
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in plans}
    base = torch.zeros(3, dtype=torch.float64)
    for starts in (torch.arange(runs) * stride).split(B):
        block = windows(tokens, starts, T).to(model.device)
        x, y = block[:, :-1], block[:, 1:].flatten()
        teacher = model.norm(model.hidden(x)).flatten(0, 1)
        for rows, log_p in log_probabilities(model, teacher):
            base += measures(log_p, log_p, y[rows])
        for name, project in plans.items():
            student = model.norm(model.hidden(x, project)).flatten(0, 1)
            for rows, log_p, log_q in log_probabilities(model, teacher, student):
                sums[name] += measures(log_p, log_q, y[rows])
    result = lambda total: dict(zip(("kl", "perplexity", "accuracy"), (total / (runs * T)).tolist()))
    results = {name: result(total) for name, total in ({"base": base} | sums).items()}
    for r in results.values():
        r["perplexity"] = math.exp(r["perplexity"])
    base = results.pop("base")
    del base["kl"]
    return base, results


def measures(log_p: Tensor, log_q: Tensor, y: Tensor) -> Tensor:
    """Sums over tokens of KL(p ‖ q), of the cross-entropy of q, and of its right guesses."""
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.stack([kl.double().sum(), -log_q.gather(1, y[:, None]).double().sum(),
                        (log_q.argmax(-1) == y).double().sum()]).cpu()


def read_questions(path: Path) -> list[dict]:
    """Multiple-choice questions, {"context": …, "choices": […], "label": n} a line. Raises ValueError naming a bad line."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                question = json.loads(line)
                context, choices, label = (question[key] for key in ("context", "choices", "label"))
                if not isinstance(context, str) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices) \
                        or type(label) is not int or not 0 <= label < len(choices):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{path}: line {number} is not {{"context": text, "choices": [two texts or more], '
                                 f'"label": number of the right one, from 0}}') from None
            questions.append(question)
    if not questions:
        raise ValueError(f"{path}: holds no question")
    return questions


@torch.no_grad()
def choice_scores(model: Model, tokenizer, question: dict, cache: KVCache) -> Tensor:
    """log p(choice | context) of every choice, summed over its tokens: (choices,).

    What all choices begin with is prefilled once; the choices then follow as one batch. A choice's tokens are those that
    context + choice has beyond the context's own, at least one; space at the end of the context counts to the choices.
    """
    ids = lambda text: [tokenizer.bos_id()] * (tokenizer.bos_id() >= 0) + tokenizer.encode(text)
    context, wholes = len(ids(question["context"].rstrip())), [ids(question["context"] + choice) for choice in question["choices"]]
    same = 0
    while same < min(context, *(len(w) - 1 for w in wholes)) and len({w[same] for w in wholes}) == 1:
        same += 1
    if not same:
        raise ValueError(f"the tokenizer has no beginning of sequence, and nothing goes before {question['choices'][0]!r}")
    ends, longest = [w[same:] for w in wholes], max(map(len, wholes)) - same
    cache.length = 0
    states = model.hidden(torch.tensor([wholes[0][:same]], device=model.device), cache=cache)[:, -1:].expand(len(ends), -1, -1)
    if longest > 1:
        padded = torch.tensor([end[:-1] + [0] * (longest - len(end)) for end in ends], device=model.device)
        states = torch.cat((states, model.hidden(padded, cache=cache.spread(len(ends), longest - 1))), dim=1)
    log_p = model.head(states).to(wide(model.dtype)).log_softmax(-1)                    # (choices, longest, vocab)
    scores = []
    for row, end, whole in zip(log_p, ends, wholes):
        first = min(context, len(whole) - 1) - same                                     # tokens before belong to the context
        scores.append(row[torch.arange(first, len(end)), end[first:]].sum())
    return torch.stack(scores)


def answer(model: Model, tokenizer, questions: list[dict], projection: Projection | None, ranks: Tensor) -> dict[str, float]:
    """The share of questions whose right choice has the largest score, as it is and by character; the first of equals counts."""
    room = max(len(tokenizer.encode(q["context"])) for q in questions) + 1
    cache = KVCache(projection or Projection.identity(model.config).to(model.device), ranks, 1, room, model.dtype, model.device)
    right = torch.zeros(2)
    for q in questions:
        scores = choice_scores(model, tokenizer, q, cache).cpu()
        by_character = scores / torch.tensor([len(choice) for choice in q["choices"]])
        right += torch.tensor([x.argmax() == q["label"] for x in (scores, by_character)])
    return dict(zip(("accuracy", "accuracy_by_character"), (right / len(questions)).tolist()))


def report_tasks(model: Model, projection: Projection, plans: dict, args) -> dict:
    """Multiple choice at every budget, through the real cache: the paper's measure (section 4.1)."""
    with blame("--tasks"):
        questions, tokenizer = read_questions(args.tasks), load_tokenizer(args.ckpt)
        print(f"{args.tasks}: {len(questions)} questions, accuracy by summed log-likelihood (and by log-likelihood a character), %\n")
        base = answer(model, tokenizer, questions, None, uniform_ranks(1.0, model.config))
        rows = []
        show = lambda r: f"{100 * r['accuracy']:6.2f} ({100 * r['accuracy_by_character']:5.2f})"
        print("   cache  " + "".join(f"{name:>17s}" for name in ("base", *dict.fromkeys(name for name, _ in plans))))
        for budget in BUDGETS:
            row = {name: answer(model, tokenizer, questions, projection.pca if name == "pca" else projection, ranks)
                   for (name, b), ranks in plans.items() if b == budget}
            rows.append({"budget": budget} | row)
            print(f"  {budget:6.1%}  " + "".join(f"{show(r):>17s}" for r in (base, *row.values())), flush=True)
    return {"tasks": {"file": str(args.tasks), "questions": len(questions), "base": base, "budgets": rows}}


def report(model: Model, held: np.ndarray, projection: Projection, run: dict, args) -> None:
    """Evaluate PCA and the trained projections at the seven budgets (with --eval the searched plan, where OUT/ranks.json is,
    and --tasks), print the tables, write OUT/train.json and OUT/train.png. `run` is what train.json says of the run."""
    ranks = {}
    for budget in BUDGETS:
        ranks["pca", budget] = ranks["trained", budget] = uniform_ranks(budget, model.config)
        if args.eval and (args.out / "ranks.json").exists():   # after training it would be of older projections
            with blame("--out"):
                ranks["searched", budget] = read_ranks(args.out / "ranks.json", model.config, budget)
    plans = {(name, b): (projection.pca if name == "pca" else projection).at(r) for (name, b), r in ranks.items()}
    base, results = evaluate(model, held, plans, args.batch, args.seq, args.runs)
    rows = [{"budget": budget} | {name: results[name, budget] for name, b in plans if b == budget} for budget in BUDGETS]
    print_table(base, rows)
    tasks = report_tasks(model, projection, ranks, args) if args.tasks else {}
    with blame("--out"):
        write_file(args.out / "train.json", json.dumps(run | {"base": base, "budgets": rows} | tasks, indent=1).encode())
        draw(base, rows, args.out / "train.png")
    print(f"Saved in {args.out}: projections.safetensors, train.json, train.png")


def print_table(base: dict, rows: list[dict]) -> None:
    names = [name for name in ("pca", "trained", "searched") if name in rows[0]]
    titles = {"pca": "PCA", "trained": "trained", "searched": "searched"}
    print(f"\nHeld-out text, base model: perplexity {base['perplexity']:.3f}, accuracy {100 * base['accuracy']:.2f}%\n")
    group = lambda title: f"| {title:^{11 * len(names)}s}"
    print("  cache " + group("KL to the base model") + group("perplexity") + group("accuracy, %"))
    print("        " + ("|" + "".join(f"{titles[name]:>11s}" for name in names) + " ") * 3)
    for row in rows:
        line = f"  {100 * row['budget']:5.1f}%"
        for key, scale, digits in (("kl", 1, 5), ("perplexity", 1, 3), ("accuracy", 100, 2)):
            line += " |" + "".join(f"{scale * row[name][key]:11.{digits}f}" for name in names)
        print(line)
    print()


def draw(base: dict, rows: list[dict], path: Path) -> None:
    """KL and accuracy against the budget."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    x = [100 * row["budget"] for row in rows]
    styles = {"pca": ("PCA, uniform ranks", "C1", "s"), "trained": ("trained, uniform ranks", "C0", "o"),
              "searched": ("trained, searched ranks", "C2", "^")}
    for name, (label, color, marker) in styles.items():
        if name in rows[0]:   # a KL of exactly zero, at the full cache, has no place on a logarithmic axis
            kl = [row[name]["kl"] if row["budget"] < 1 else math.nan for row in rows]
            axes[0].plot(x, kl, color=color, marker=marker, label=label)
            axes[1].plot(x, [100 * row[name]["accuracy"] for row in rows], color=color, marker=marker, label=label)
    axes[0].set(yscale="log", ylabel="KL to the base model, nats a token", title="Distance from the base model")
    axes[1].axhline(100 * base["accuracy"], color="grey", linestyle="--", label="base model")
    axes[1].set(ylabel="accuracy of the next token, %", title="Quality on held-out text")
    for axis in axes:
        axis.set(xlabel="size of the KV cache, % of full", xticks=x)
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
        axis.legend()
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=130, format="png")
    part.replace(path)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# A run: its state on disk, its progress on the screen, its speed

VALID = 8   # runs of --seq tokens at the end of the training text that only `Run.keep_best` sees


class Run:
    """Everything of a run that a later `--resume` needs: the rotation, its start, Adam's moments, the losses so far."""

    # What must be as it was for a resumed run to end where the undisturbed one would have.
    FIXED = ("recipe", "ce", "steps", "batch", "seq", "lr", "accumulate", "seed", "dtype", "train_tokens")

    def __init__(self, args, start: Projection, path: Tensor | None = None):
        self.args, self.start, self.path, self.step, self.losses, self.checks = args, start, path, 0, [], []
        self.config = self.describe(args)
        self.rotation = Rotation(start)
        self.optimizer = torch.optim.Adam(self.rotation.parameters(), lr=args.lr)
        self.saved, self.saved_step, self.bfloat16, self.best = 0.0, 0, None, math.inf

    def fast_products(self):
        """Matrix products in bfloat16 (autocast) where that pays and no --dtype was given; sums, states, projections and the loss stay float32."""
        return torch.autocast("cpu", torch.bfloat16, enabled=bool(self.bfloat16))

    @classmethod
    def describe(cls, args) -> dict:
        return {name: getattr(args, name) for name in cls.FIXED} | {
            "ckpt": str(args.ckpt), "data": str(args.data or ""), "ranks": str(args.ranks or ""),
            "processes": WORLD}

    @staticmethod
    def state_file(args) -> Path:
        return args.out / "train.state.safetensors"

    def projection(self) -> Projection:
        """What has been learnt so far, orthogonal to float32's last digit."""
        with torch.no_grad():
            p = self.rotation(torch.float64)
        return Projection(p.U_k.float(), p.U_v.float(), p.mean_v.float(), self.start.pca)

    def keep_best(self, model: Model, valid: np.ndarray, step: int) -> None:
        """Measure on text that is neither trained on nor held out, and keep OUT/best.safetensors if it is the best so far."""
        if RANK or not len(valid):
            return
        p, c = self.projection(), model.config
        ranks = {b: uniform_ranks(b, c) if self.path is None else plan_on_path(self.path, c, b) for b in (0.75, 0.5, 0.25)}
        _, results = evaluate(model, valid, {b: p.at(r) for b, r in ranks.items()}, self.args.batch, self.args.seq, VALID)
        score = sum(math.log(r["kl"] + 1e-3) for r in results.values()) / len(results)
        self.checks.append({"step": step} | {f"{b:.0%}": r["kl"] for b, r in results.items()})
        if score < self.best:
            self.best = score
            with blame("--out"):
                p.save(self.args.out / "best.safetensors")

    def save(self, step: int) -> None:
        """Write OUT/train.state.safetensors, whole or not at all."""
        if RANK:
            return
        tensors = {f"start.{name}": getattr(self.start, name) for name in ("U_k", "U_v", "mean_v")}
        tensors |= {f"pca.{name}": getattr(self.start.pca, name) for name in ("U_k", "U_v", "mean_v")}
        for name, parameter in self.rotation.named_parameters():
            tensors[f"rotation.{name}"] = parameter
            tensors |= {f"adam.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        if self.path is not None:   # the file may be another search's by the time of --resume
            tensors["path"] = self.path
        with blame("--out"):
            write_tensors(self.state_file(self.args), tensors, {"run": json.dumps({
                "step": step, "config": self.config, "losses": self.losses, "checks": self.checks, "best": self.best,
                "bfloat16": self.bfloat16})})
        self.saved, self.saved_step = time.time(), step

    def save_sometimes(self, step: int) -> None:
        """Every --save-every seconds, between steps only: an interrupt in the midst of one must not save half of it."""
        if time.time() - self.saved >= self.args.save_every:
            self.save(step)

    @staticmethod
    def resume(args, device) -> "Run":
        """The run that `save` wrote. Raises ValueError if there is none, or one of other settings."""
        path = Run.state_file(args)
        with open_safetensors(path) as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            saved = json.loads((file.metadata() or {}).get("run", "null"))
        if saved is None:
            raise ValueError(f"{path}: not the state of a run")
        trio = lambda name: [tensors[f"{name}.{part}"] for part in ("U_k", "U_v", "mean_v")]
        run = Run(args, Projection(*trio("start"), Projection(*trio("pca"))).to(device), tensors.get("path"))
        for name, value in run.config.items():
            if saved["config"].get(name) != value:
                raise ValueError(f"{path}: was made with {'--' if hasattr(args, name) else ''}{name} {saved['config'].get(name)}, not {value}")
        for name, parameter in run.rotation.named_parameters():
            parameter.data.copy_(tensors[f"rotation.{name}"])
            run.optimizer.state[parameter] = {
                key.removeprefix(f"adam.{name}."): value if key.endswith("step") else value.to(device)
                for key, value in tensors.items() if key.startswith(f"adam.{name}.")}
        run.step = run.saved_step = saved["step"]
        run.losses, run.checks, run.best, run.bfloat16 = (saved[name] for name in ("losses", "checks", "best", "bfloat16"))
        return run


class Progress:
    """One line that is rewritten on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, total: int):
        self.total, self.start, self.shown, self.tokens, self.done = total, time.time(), 0.0, 0, 0

    def __call__(self, step: int, text: str, tokens: int) -> None:
        self.tokens, self.done = self.tokens + tokens, self.done + 1
        now, terminal = time.time(), sys.stderr.isatty()
        if RANK or step < self.total and now - self.shown < (0.2 if terminal else 10):
            return
        self.shown, seconds = now, now - self.start
        left = (self.total - step) * seconds / self.done
        line = f"step {step}/{self.total}  {text}  {self.tokens / seconds:,.0f} tokens/s  {left / 60:.1f} min left"
        print(f"\r{line:<79s}" if terminal else line, end="" if terminal and step < self.total else "\n",
              file=sys.stderr, flush=True)


def describe(model: Model) -> str:
    c = model.config
    return (f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters, {c.num_hidden_layers} layers, "
            f"{c.num_attention_heads} query heads on {c.num_key_value_heads} key-value heads of {c.head_dim}")


@torch.no_grad()
def product_rate(model: Model, rows: int, dtype: torch.dtype) -> float:
    """Operations a second that matrix products of this model's shapes reach here, on their own (median of six)."""
    operations, seconds = 0, 0.0
    for w in [p for p in model.layers[0].parameters() if p.ndim == 2] + [model.lm_head.weight]:
        w, times = w.to(dtype), []
        x = torch.randn(rows, w.shape[1], dtype=dtype, device=w.device)
        for _ in range(6):
            synchronize(model.device)
            start = time.perf_counter()
            F.linear(x, w)
            synchronize(model.device)
            times.append(time.perf_counter() - start)
        operations, seconds = operations + 2 * rows * w.numel(), seconds + sorted(times)[2]
    return operations / seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations_a_token(model: Model) -> int:
    """Matrix-product operations of a training step, for each token: teacher 2N, student 2N forward and 2N backward
    (to the states only: no weight has a gradient), N the weights in matrix products."""
    return 6 * (sum(p.numel() for p in model.layers.parameters() if p.ndim == 2) + model.lm_head.weight.numel())


def check_folder(path: Path) -> None:
    """Make the folder of --out, and fail before any work is done if nothing can be written there."""
    with blame("--out"):
        path.mkdir(parents=True, exist_ok=True)
        write_file(path / "writable", b"")
        (path / "writable").unlink()


def text_for(args, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """The (training, held-out) tokens that --data asks for; fails if they do not fill one run of --seq tokens."""
    with blame("--data"):
        if RANK:                    # the first process tokenises, the others find the file
            distributed.barrier()
        tokens, held = load_data(args.data, args.ckpt, model.config.vocab_size, args.out)
        if WORLD > 1 and RANK == 0:
            distributed.barrier()
        for part, name in ((tokens, "training"), (held, "held-out")):
            if len(part) <= args.seq:
                raise ValueError(f"{args.data or 'Python'}: too short, {len(part)} {name} tokens for runs of --seq {args.seq}")
    print(f"{args.ckpt}: {describe(model)}\n{args.data or 'Python documentation'}: {len(tokens):,} tokens to train on, "
          f"{len(held):,} held out", flush=True)
    return tokens, held


def options() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help=".txt, .jsonl, .bin or .npy [Python's own documentation]")
    parser.add_argument("--recipe", choices=list(RECIPES), default="ours", help="ours, or the paper's [ours]")
    parser.add_argument("--ranks", type=Path, help="train for the plans along the path of this file of search.py, not for uniform ranks")
    parser.add_argument("--steps", type=within(1, 10 ** 7), default=400, help="[400]")
    parser.add_argument("--batch", type=within(1, 10 ** 5), default=8, help="sequences a step [8]")
    parser.add_argument("--seq", type=within(2, 10 ** 6), default=256, help="tokens a sequence [256]")
    parser.add_argument("--accumulate", type=within(1, 10 ** 5), default=1, help="batches a step [1]")
    parser.add_argument("--lr", type=within(0.0, 10.0), help="Adam's rate at its peak [0.5 / head_dim; 0.001 for the paper's recipe]")
    parser.add_argument("--ce", type=within(0.0, 1.0), help="share of next-token cross-entropy in the loss [0; 0.75 for the paper's]")
    parser.add_argument("--runs", type=within(1, 10 ** 6), default=64, help="runs of --seq held-out tokens to report on [64]")
    parser.add_argument("--checkpoint", action=argparse.BooleanOptionalAction,
                        help="recompute each layer in the backward pass: less memory, a third more operations [if it would not fit otherwise]")
    parser.add_argument("--check-every", type=within(1, 10 ** 7), default=100, help="steps between two looks at text of its own; "
                        "the best projections are kept in OUT/best.safetensors [100]")
    parser.add_argument("--save-every", type=within(0.0, 1e6), default=30.0, help="seconds between two saves of the run's state [30]")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for what is written [out]")
    parser.add_argument("--resume", action="store_true", help="go on with the run that was stopped in --out")
    parser.add_argument("--eval", action="store_true", help="no training: report on what is in --out")
    parser.add_argument("--tasks", type=Path, help="with --eval: a .jsonl of multiple-choice questions to answer at every budget")
    return parser.parse_args()


def main():
    args = options()
    try:
        run_command(args)
    except torch.OutOfMemoryError:
        fail(f"--batch {args.batch} --seq {args.seq}: the memory of --device {args.device} does not suffice; a smaller --seq, "
             f"--batch 1 with --accumulate, or --checkpoint take less")


def run_command(args: argparse.Namespace) -> None:
    args.ce = RECIPES[args.recipe]["ce"] if args.ce is None else args.ce
    device, dtype = prepare(args)
    mixed, args.dtype = args.dtype is None and device.type == "cpu", str(dtype).removeprefix("torch.")

    if args.ranks and args.recipe == "paper":
        fail("--ranks: the paper's recipe draws its ranks independently of any plan; leave out --recipe paper or --ranks")
    if args.eval and WORLD > 1:
        fail("--eval: runs in one process; leave out torchrun")
    if args.tasks:
        if not args.eval:
            fail("--tasks: is answered by a report on what is in --out; add --eval")
        with blame("--tasks"):
            read_questions(args.tasks)
    if RANK == 0:
        check_folder(args.out)
    with blame("--ckpt"):
        config = read_config(args.ckpt / "config.json")
        if config.head_dim % STEPS:
            raise ValueError(f"{args.ckpt}: head_dim {config.head_dim} does not divide into {STEPS} steps of rank")
    join_processes(device)
    if not args.eval:
        plan_memory(args, config, device, dtype)
    with blame("--ckpt"):
        model = load(args.ckpt, device, dtype)
    if args.lr is None:
        args.lr = 0.001 if args.recipe == "paper" else 0.5 / model.config.head_dim
    with blame("--ranks"):
        path = read_plan(args.ranks, model.config)["path"] if args.ranks and not (args.resume or args.eval) else None
    tokens, held = text_for(args, model)
    args.train_tokens = len(tokens)
    cut = len(tokens) - (VALID * args.seq + 1 if len(tokens) > 10 * VALID * args.seq else 0)
    tokens, valid = tokens[:cut], tokens[cut:]

    if args.eval:
        with blame("--eval"):
            projection = Projection.load(args.out / "projections.safetensors")
            projection.check_fits(model.config)
            before = read_json(args.out / "train.json")
            now = Run.describe(args)
            for name in ("ckpt", "data", "seq"):
                if before["config"][name] != now[name]:
                    raise ValueError(f"{args.out}: was trained with --{name} {before['config'][name]}, not {now[name]}")
        return report(model, held, projection.to(device), before, args)
    if args.resume:
        with blame("--resume"):
            run = Run.resume(args, device)
    else:
        moments = calibrate(model, tokens, args.batch, args.seq, args.seed)
        start = moments.pca()
        if RECIPES[args.recipe]["start"] == "aware":
            start = moments.aware([layer.self_attn.o_proj.weight for layer in model.layers])
        start.pca = moments.pca()
        run = Run(args, start.to(device, wide(dtype)), path)
    rows = min(args.batch * args.seq, 2048)
    rate = product_rate(model, rows, dtype)
    run.bfloat16 = run.bfloat16 if mixed else False
    if mixed:                       # where no --dtype was asked for: whatever is faster here
        rate16 = product_rate(model, rows, torch.bfloat16)
        if run.bfloat16 is None:   # the first process decides for all
            run.bfloat16 = sum_over_processes(torch.tensor([RANK == 0 and rate16 > 1.5 * rate]).float()).item() > 0
        print(f"Matrix products reach {rate / 1e9:.0f} GFLOP/s in float32 and {rate16 / 1e9:.0f} in bfloat16: training uses "
              f"{'bfloat16 for the layers' if run.bfloat16 else 'float32'}, the report float32", flush=True)
    first, began = run.step, time.time()
    try:
        train(model, tokens, valid, run)
    except KeyboardInterrupt:
        if RANK == 0:
            print(f"\nStopped; the same command with --resume goes on from step {run.saved_step}" if run.saved_step else
                  "\nStopped before anything was saved", file=sys.stderr)
        raise SystemExit(130)
    synchronize(device)
    seconds, done = time.time() - began, (args.steps - first) * args.accumulate * WORLD * args.batch * args.seq
    if done:
        print(f"Trained for {seconds:.0f} s, {done / seconds:,.0f} tokens/s: the model's own operations at "
              f"{100 * operations_a_token(model) * done / seconds / rate / WORLD:.0f}% of the {rate / 1e9:.0f} GFLOP/s that its "
              f"matrix products alone reach here in {args.dtype}")
    run.save(args.steps)
    if RANK == 0:
        projection = run.projection()
        with blame("--out"):
            projection.save(args.out / "projections.safetensors")
        report(model, held, projection, {"config": run.config, "loss": run.losses, "checks": run.checks}, args)
        Run.state_file(args).unlink(missing_ok=True)
    if WORLD > 1:                   # all leave together: gloo aborts a process that leaves while others still talk
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
