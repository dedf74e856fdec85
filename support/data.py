"""A file, or Python's own documentation, becomes windows of token ids.

Training, calibration and search read random windows of one long row of ids; every report reads
windows of another, which is held out: the last tenth of a user's file, and of Python's own text the
modules and topics that a hash of their name picks. Each document begins with the tokenizer's
beginning of sequence.

    python -m support.data                                  # what Python's own text amounts to
    python -m support.data --ckpt DIR --data text.jsonl     # tokenises it, and says what it found

--data takes a .txt, a .jsonl with a "text" field, a .bin of token ids (uint16 if the vocabulary has
at most 65,536 pieces, else uint32) or a .npy of them. A text is tokenised once, streaming, into a
.bin in the --out folder, and mapped from there.
"""
import ast
import itertools
import json
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
from torch import Tensor, distributed

from support import processes
from support.checkpoint import read_config
from support.cli import arguments, blame, data_arguments, out_argument, run_script
from support.files import check_folder, read_json, write_json, written_whole
from support.tokenizer import load_tokenizer, with_beginning

# ------------------------------------------------------------------------------
# Windows

class Ids(np.ndarray):
    """A row of token ids whose windows all begin with `beginning`, in place of their first."""
    beginning = None

    def __array_finalize__(self, other) -> None:        # so that a part of it has it too
        self.beginning = getattr(other, "beginning", None)


def windows(tokens: np.ndarray, starts: Tensor, T: int) -> Tensor:
    """The windows of T + 1 tokens at `starts`, (B, T + 1): inputs are [:, :-1], targets [:, 1:]."""
    rows = np.stack([tokens[start:start + T + 1] for start in starts.tolist()]).astype(np.int64)
    if (beginning := getattr(tokens, "beginning", None)) is not None:
        rows[:, 0] = beginning
    return torch.from_numpy(np.asarray(rows))


def set_apart(tokens: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Training tokens and the last n, for validation; none of these where the text is short."""
    if len(tokens) <= 10 * n:
        n = 0
    return tokens[:len(tokens) - n], tokens[len(tokens) - n:]


def random_windows(tokens: np.ndarray, B: int, T: int, generator: torch.Generator,
                   mine: slice = slice(None)) -> Tensor:
    """B random windows of T + 1 tokens, or those of them that are this process's share."""
    starts = torch.randint(len(tokens) - T, (B,), generator=generator)
    return windows(tokens, starts[mine], T)


def random_starts(B: int, T: int, positions: int, generator: torch.Generator) -> Tensor:
    """Positions (B,) of the first tokens of windows that lie anywhere in 0 … positions − 1.

    Near 0 more often, by the cube of a random number: long texts lose little by it, and short ones
    are as good as with all windows at 0 (docs/log.md). All 0, and nothing is drawn, where windows
    fill the positions.
    """
    if positions <= T:
        return torch.zeros(B, dtype=torch.long)
    u = torch.rand(B, generator=generator)
    return (u ** 3 * (positions - T + 1)).long()


def even_windows(tokens: np.ndarray, count: int, T: int) -> Tensor:
    """Up to `count` windows of T + 1 tokens, spaced evenly over all of them: (count, T + 1).

    ValueError where the tokens do not fill one.
    """
    if len(tokens) <= T:
        raise ValueError(f"too short, {len(tokens)} tokens for windows of {T}")
    count = min(count, (len(tokens) - 1) // T)
    stride = (len(tokens) - 1) // count
    return windows(tokens, torch.arange(count) * stride, T)


PASSAGE = 64            # tokens that are said twice, for the recall


def held_out_passages(args, held_out: np.ndarray, config, n: int = PASSAGE) -> Tensor | None:
    """--passages of n tokens (N, n), of fewer where the model has no positions for two; or None."""
    if not args.passages:
        return None
    n = min(n, config.max_position_embeddings // 2)
    with blame("--passages"):
        return even_windows(held_out, args.passages, n)[:, 1:]


# ------------------------------------------------------------------------------
# Ids

def load_data(path: Path | None, ckpt: Path, vocab_size: int, out: Path = Path("out")):
    """Token ids as (training, held out), each (n,) integers, memory-mapped if they are of a file.

    `path` is what --data takes, or None for Python's own text; a text is tokenised into the folder
    `out`. ValueError names the file and what is wrong with it.
    """
    if path is None:
        tokenizer = load_tokenizer(ckpt)
        training, held_out = python_documents()
        return encode(tokenizer, training), encode(tokenizer, held_out)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix in (".txt", ".jsonl"):
        path = tokenise(path, ckpt, vocab_size, out)
    tokens = load_ids(path, vocab_size)
    if path.suffix == ".bin":
        check_width(path, tokens)
    check_ids(path, tokens, vocab_size)
    cut = len(tokens) - len(tokens) // 10
    return tokens[:cut], tokens[cut:]


def load_ids(path: Path, vocab_size: int) -> np.ndarray:
    """The memory-mapped ids of a .bin or .npy file."""
    if path.suffix == ".bin":
        dtype = id_dtype(vocab_size)
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise ValueError(f"{path}: {size} bytes are not a whole number of {dtype} token ids")
        return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)
    if path.suffix != ".npy":
        raise ValueError(f"{path}: an unknown kind of file; expected .txt, .jsonl, .bin or .npy")
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:      # numpy parses the header as Python: a cut one raises anything
        raise ValueError(f"{path}: not a .npy file of numbers ({error})") from None
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"{path}: not a .npy file of numbers")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{path}: {tokens.dtype} of shape {tokens.shape}; expected integers of "
                         "shape (n,), token ids")
    return tokens


def check_ids(path: Path, tokens: np.ndarray, vocab_size: int, piece: int = 2 ** 22) -> None:
    """ValueError for an id outside the vocabulary. Reads the file: mapped pages count as memory."""
    for start in range(0, len(tokens), piece):
        count = min(piece, len(tokens) - start)
        offset = tokens.offset + start * tokens.itemsize
        part = np.fromfile(path, tokens.dtype, count, offset=offset)
        if part.min() < 0 or part.max() >= vocab_size:
            wrong = part[(part < 0) | (part >= vocab_size)][0]
            raise ValueError(f"{path}: holds the token id {wrong}, outside the model's vocabulary "
                             f"of {vocab_size}")


LLM_C = (20240520, 20240801)        # the first number of llm.c's files of ids: GPT-2's, LLaMA-3's


def check_width(path: Path, tokens: np.ndarray, piece: int = 2 ** 22) -> None:
    """ValueError for a .bin whose numbers are wider than ids of this vocabulary, or have a header.

    Such a file says neither; read as narrower ones, wide ids have a 0 behind each.
    """
    if len(tokens) < 8:
        return
    first = int(np.fromfile(path, "<i4", 1)[0])
    if first in LLM_C:
        raise ValueError(f"{path}: begins with {first}, llm.c's header of 1,024 bytes; save the "
                         "ids behind it as a .npy")
    if not any(tokens[at + 1:at + piece:2].any() for at in range(0, len(tokens) - 1, piece)):
        bits = 8 * tokens.itemsize
        raise ValueError(f"{path}: every second number is 0: is it uint{2 * bits}? It is read as "
                         f"uint{bits}, for a vocabulary of this size; a .npy says its own type")


def id_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def text_for(args, config) -> tuple[np.ndarray, np.ndarray]:
    """The (training, held-out) ids that --data asks for; fails if they do not fill one window."""
    with blame("--data"):
        if processes.RANK:                                 # the first process tokenises,
            distributed.barrier()
        tokens, held_out = load_data(args.data, args.ckpt, config.vocab_size, args.out)
        if processes.WORLD > 1 and processes.RANK == 0:       # and the others then find the file
            distributed.barrier()
        for part, name in ((tokens, "training"), (held_out, "held-out")):
            if len(part) <= args.seq:
                raise ValueError(f"{args.data or 'Python'}: too short, {len(part)} {name} tokens "
                                 f"for windows of --seq {args.seq}")
    if args.begin:
        with blame("--begin"):
            beginning = load_tokenizer(args.ckpt).bos_id()
            if beginning < 0:
                raise ValueError(f"{args.ckpt}: its tokenizer has no beginning of sequence")
        tokens, held_out = begun(tokens, beginning), begun(held_out, beginning)
    print(f"{args.data or 'Python documentation'}: {len(tokens):,} tokens to train on, "
          f"{len(held_out):,} held out", flush=True)
    return tokens, held_out


def begun(ids: np.ndarray, beginning: int) -> Ids:
    """These ids, whose windows are from now on to begin with that token."""
    ids = ids.view(Ids)
    ids.beginning = beginning
    return ids


# ------------------------------------------------------------------------------
# Text to ids

def tokenise(path: Path, ckpt: Path, vocab_size: int, out: Path) -> Path:
    """The ids of a .txt or .jsonl as a .bin in `out`; the path of the .bin.

    Made unless it is there and neither text nor tokenizer changed. Streams: memory does not grow
    with the file.
    """
    tokenizer = load_tokenizer(ckpt)
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{path.name}.bin"
    note = target.with_suffix(".json")                  # what the .bin was made from; written last
    origin = {
        "made": 2,                                      # raised where the same text gets other ids
        "source": str(path.resolve()),
        "bytes": path.stat().st_size,
        "modified": path.stat().st_mtime_ns,
        "vocab_size": vocab_size,
        "tokenizer": [zlib.crc32(file.read_bytes()) for pattern in ("added_tokens*", "tokenizer*")
                      for file in sorted(ckpt.glob(pattern))],
    }
    if target.exists() and note.exists():
        if read_json(note) == origin | {"size": target.stat().st_size}:
            return target
    is_one = path.suffix == ".txt"
    texts = text_pieces(path) if is_one else jsonl_documents(path)
    dtype = id_dtype(vocab_size)
    began = shown = time.time()
    with written_whole(target) as file:
        for ids in token_stream(tokenizer, texts, one_document=is_one):
            if len(ids) and ids.max() >= vocab_size:
                raise ValueError(f"{ckpt}: its tokenizer.model or .json makes the token id "
                                 f"{ids.max()}, outside the model's vocabulary of {vocab_size}")
            file.write(ids.astype(dtype).tobytes())
            if time.time() - shown > 10:
                shown = time.time()
                print(f"Tokenising {path}: {file.tell() // dtype.itemsize:,} tokens, "
                      f"{shown - began:.0f} s", file=sys.stderr)
        note.unlink(missing_ok=True)
    write_json(note, origin | {"size": target.stat().st_size})
    return target


def encode(tokenizer, texts, one_document: bool = False) -> np.ndarray:
    """Ids of texts end to end, the beginning of sequence before each (or before the first)."""
    return np.concatenate([np.empty(0, np.uint32), *token_stream(tokenizer, texts, one_document)])


def token_stream(tokenizer, texts, one_document: bool):
    """Ids of texts, piece by piece: a megabyte of them at a time, shared among the cores."""
    batch, characters, within = [], 0, False
    for text in itertools.chain(texts, [None]):         # None: the end
        if text is None or characters > 2 ** 20:
            ids = array("I")
            for found in tokenizer.encode(batch, num_threads=os.cpu_count()):
                ids.extend(found if within else with_beginning(tokenizer, found))
                within = one_document
            yield np.array(ids, np.uint32)
            batch, characters = [], 0
        if text is not None:
            batch.append(text)
            characters += len(text)


def text_pieces(path: Path, characters: int = 2 ** 17):
    """A text file in pieces that end with a line, or within a line that is longer than one."""
    with open(path, encoding="utf-8-sig") as file:      # without the mark that Windows puts first
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
                text.encode()                           # JSON can spell half a character
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path}: line {number} is not a JSON object with a "text"')
            yield text


# ------------------------------------------------------------------------------
# Python's own text

CODE = {"test", "tests", "idlelib", "lib2to3"}          # sources that are no documentation
DATA = {"site-packages", "dist-packages", "pydoc_data", "encodings"}


def python_documents(sources: bool = False) -> tuple[list[str], list[str]]:
    """The text that every Python carries, as (training documents, held-out documents).

    A document is a topic of the language reference or the docstrings of one module of the standard
    library. With `sources` (the demo's training) each module's source is one too, and so are the
    library's own tests. A hash of the topic's or module's name holds one in ten out, so that a
    module's docstrings and source fall on one side in every version of Python. Paragraphs of a
    held-out text that stand in a training one too are cut.
    """
    from pydoc_data.topics import topics
    library = Path(sysconfig.get_paths()["stdlib"])
    training, held_out = [], []
    for name, text in sorted(topics.items()):
        side = held_out if is_held_out(name) else training
        side.append(text)
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        documented = not CODE & set(parts)
        if DATA & set(parts) or not (documented or sources):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        try:
            source = file.read_text(encoding="utf-8")
            texts = [docstrings(module, ast.parse(source))] if documented else []
        except (SyntaxError, ValueError):               # some tests are broken on purpose
            continue
        if sources:
            texts.append(source)
        side = held_out if is_held_out(module) else training
        side += [text for text in texts if text]
    known = {p for text in training for p in text.split("\n\n") if len(p) > 30}
    held_out = ["\n\n".join(p for p in text.split("\n\n") if p not in known) for text in held_out]
    return training, [text for text in held_out if text]


def is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % 10 == 0


def docstrings(name: str, node: ast.AST) -> str:
    """The docstrings of a module, under the signatures that they describe, as pydoc prints them."""
    text = ""
    if (doc := ast.get_docstring(node)):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        signature = f"({ast.unparse(node.args)})" if is_function else ""
        text = f"{name}{signature}\n{indent(doc, '    ')}\n\n"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text += docstrings(f"{name}.{child.name}", child)
    return text


def main():
    parser = arguments(__doc__)
    data_arguments(parser)
    out_argument(parser)
    args = parser.parse_args()
    args.seq = 1
    check_folder(args.out)
    with blame("--ckpt"):
        config = read_config(args.ckpt / "config.json")
    tokens, held_out = text_for(args, config)
    seen = np.zeros(config.vocab_size, bool)
    for start in range(0, len(tokens), 2 ** 22):
        seen[tokens[start:start + 2 ** 22]] = True
    print(f"{seen.sum():,} of the {config.vocab_size:,} ids occur in the training text")
    try:
        tokenizer = load_tokenizer(args.ckpt)
    except ValueError as error:
        print(error)
        return
    for name, ids in (("training", tokens), ("held-out", held_out)):
        print(f"\nThe {name} text begins:\n\n{indent(tokenizer.decode(ids[:60].tolist()), '    ')}")


if __name__ == "__main__":
    run_script(main)
