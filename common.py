"""What every script needs and no reader of the method must read.

The command line and errors of one line; files that are written whole or not at all; a training's
state; pictures; progress; tokenizers, text in and out; processes (torchrun); what a training will
take, in memory and time.
An error of the user is one line on stderr and exit code 2: the option as it was typed, the file,
and what is wrong.
"""
import argparse
import contextlib
import ctypes
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, distributed

BEGAN = time.time()
DEMO = Path(__file__).resolve().parent / "demo"


# ------------------------------------------------------------------------------
# The command line

def fail(message: str, code: int = 2) -> NoReturn:
    """Say one line on stderr and leave; exit code 2 is an error of the user."""
    print(" ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def blame(option: str):
    """Turn an error about what the user passed into `fail`, with the option as typed in front."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(f"{option}: {error}")
    except KeyError as error:
        fail(f"{option}: the file has no entry {error}")


def arguments(doc: str, several: bool = False) -> argparse.ArgumentParser:
    """A parser with a script's docstring as its help, and with the options of all scripts.

    `several`: the script may run in several processes (torchrun).
    """
    if WORLD > 1 and not several:
        fail("torchrun: only train.py and bits.py run in several processes; use python")
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--ckpt", type=Path, default=DEMO, help="folder of the checkpoint [demo]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="[cuda if there, else cpu]")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32", "float64"],
                        help="[bfloat16 on cuda, float16 before sm_80, float32 on cpu]")
    parser.add_argument("--seed", type=within(0, 2 ** 32), default=0, help="[0]")
    return parser


def within(low, high):
    """An argparse type: a number of the type of `low`, from `low` to `high`."""
    def parse(text: str):
        value = type(low)(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = type(low).__name__
    return parse


def prepare(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and dtype asked for, PyTorch set up; fails where the device is not there."""
    torch.manual_seed(args.seed)
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):      # others lack float64, which calibration sums in
            fail(f"--device {args.device}: only cpu and cuda are supported")
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:     # torchrun: a GPU each
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f"--device {args.device}: not a device of this machine or this build of PyTorch")
    if device.type == "cuda":
        return device, prepare_cuda(device, args.dtype)
    return device, getattr(torch, args.dtype or "float32")


def prepare_cuda(device: torch.device, name: str | None) -> torch.dtype:
    """Set PyTorch up for this GPU; the dtype of that name, or the one that suits it."""
    if device.index is not None:            # who asks for memory or time means this GPU
        torch.cuda.set_device(device)
    if name is None and torch.cuda.get_device_capability() < (8, 0):
        print("This GPU has no units for bfloat16: --dtype float16", file=sys.stderr)
        name = "float16"
    dtype = getattr(torch, name or "bfloat16")
    # cuDNN's attention builds a graph for each new shape, and a ragged prefill has dozens.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # float32 products may round their inputs to TF32's 11 bits: 2-byte weights are exact in it.
    torch.backends.cuda.matmul.allow_tf32 = dtype.itemsize == 2
    return dtype


def prepare_training(args, config, levels: int) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a training; checks --out, the model, its memory; meets the processes."""
    device, dtype = prepare(args)
    keep_freed_memory()
    args.dtype = str(dtype).removeprefix("torch.")
    if args.amp and dtype != torch.float32:
        fail(f"--amp: is for float32 weights, not {args.dtype}")
    if config.head_dim % levels:
        fail(f"--ckpt: {args.ckpt}: head_dim {config.head_dim} does not divide into {levels} "
             "levels of rank")
    if RANK == 0:
        check_folder(args.out)
    join_processes(device)
    plan_memory(args, config, device, dtype)
    if device.type == "cpu" and dtype == torch.float32 and has_bfloat16_units() and not args.amp:
        print("This CPU has units for bfloat16 products: --amp would pay")
    return device, dtype


def run_script(main) -> None:
    """Run a script's main; a GPU that is too small is said in one line."""
    try:
        main()
    except torch.OutOfMemoryError:
        fail("--device: its memory does not suffice; a smaller --batch, --seq or --tokens takes "
             "less, and for train.py --accumulate or --checkpoint")


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next step.

    glibc hands blocks above 32 MB back and gets them back page by page, zeroed: a third of a
    training step on a CPU. Elsewhere (macOS, Windows, musl) this does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)                     # no block of its own mapping
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)     # never shrink the heap
    except (OSError, AttributeError, TypeError):
        pass


# ------------------------------------------------------------------------------
# Files. Reading gives a ValueError that names the file; writing goes to a temporary name first and
# is then renamed, so that a failure never costs what was there.

def open_safetensors(path: str | Path):
    """safetensors.safe_open; its tensors on a CPU are views of the memory-mapped file."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file, or a truncated one ({error})") from None


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}


def tensor_files(path: Path) -> dict[str, Path]:
    """Which file holds which tensor. Never a glob: some folders hold all weights twice."""
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{index}: no weight_map")
        return {name: path / file for name, file in files.items()}
    if not single.exists():
        raise ValueError(f"{path}: neither model.safetensors nor model.safetensors.index.json")
    with open_safetensors(single) as file:
        return {name: single for name in file.keys()}


def read_json(path: str | Path) -> dict:
    """The object in a JSON file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


@contextlib.contextmanager
def written_whole(path: str | Path):
    """Yields PATH.part, open for bytes; once written, it is flushed and takes the place of PATH."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:                                # after a failure: a full disk is left no fuller
        part.unlink(missing_ok=True)


def write_json(path: str | Path, value: dict, indent: int | None = None) -> None:
    with written_whole(path) as file:
        file.write(json.dumps(value, indent=indent).encode())


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata=None) -> None:
    """A safetensors file; `metadata` (str to str) is what it says beside the tensors."""
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    with written_whole(path) as file:
        file.write(serialize(copies, metadata))


def save_state(path: Path, module, optimizer, tensors: dict[str, Tensor], said: dict) -> None:
    """A training's state: parameters, Adam's moments, other tensors, and facts in JSON."""
    tensors = dict(tensors)
    for name, parameter in module.named_parameters():
        tensors[f"parameter.{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"adam.{name}.{key}"] = value
    with blame("--out"):
        write_tensors(path, tensors, {"said": json.dumps(said)})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """All tensors of `save_state`, and its facts. ValueError if the file is something else."""
    with open_safetensors(path) as file:
        said = json.loads((file.metadata() or {}).get("said", "null"))
    if not isinstance(said, dict) or not isinstance(said.get("config"), dict):
        raise ValueError(f"{path}: not the state of a training")
    return read_tensors(path), said


def restore_state(module, optimizer, tensors: dict[str, Tensor]) -> None:
    """Put parameters and Adam's moments where `save_state` found them."""
    for name, parameter in module.named_parameters():
        parameter.data.copy_(tensors[f"parameter.{name}"])
        adam = f"adam.{name}."
        for key in [key for key in tensors if key.startswith(adam)]:
            moment = key.removeprefix(adam)                 # Adam keeps its step on the CPU
            value = tensors[key] if moment == "step" else tensors[key].to(parameter)
            optimizer.state[parameter][moment] = value


def check_same(path: Path, before: dict, now: dict) -> None:
    """ValueError where settings differ from those that the state in `path` was made with."""
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(f"{path}: was made with --{name} {before.get(name)}, not {value}")


def check_folder(path: Path) -> None:
    """Make the folder of --out; fail before any work is done if nothing can be written there."""
    with blame("--out"):
        path.mkdir(parents=True, exist_ok=True)
        with written_whole(path / "writable"):
            pass
        (path / "writable").unlink()


# ------------------------------------------------------------------------------
# Pictures

@contextlib.contextmanager
def picture(path: Path, columns: int = 1, width: float = 10, height: float = 4, **options):
    """Yields the axes of a figure with so many panels, then saves it as a PNG, whole or not."""
    from matplotlib.figure import Figure  # slow to import, and needed at the end alone

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure.subplots(1, columns, **options)
    with written_whole(path) as file:
        figure.savefig(file, dpi=130, format="png")


# ------------------------------------------------------------------------------
# Progress

class Progress:
    """One line that is rewritten on a terminal; elsewhere a plain line every ten seconds.

    Called after each of `total` steps with its number, a text, and how many tokens it took.
    """

    def __init__(self, total: int, what: str = "step"):
        self.total, self.what = total, what
        self.began = time.time()
        self.shown = 0.0
        self.tokens = self.done = 0

    def __call__(self, step: int, text: str, tokens: int = 0) -> None:
        self.tokens += tokens
        self.done += 1
        now, terminal, last = time.time(), sys.stderr.isatty(), step == self.total
        pause = 0.2 if terminal else 10
        if RANK or (now - self.shown < pause and not last):
            return
        self.shown = now
        seconds = now - self.began
        minutes_left = (self.total - step) * seconds / self.done / 60
        speed = f"  {self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        line = f"{self.what} {step}/{self.total}  {text}{speed}  {minutes_left:.1f} min left"
        if terminal:
            print(f"\r{line:<79s}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------
# Tokenizers: SentencePiece's own class for a tokenizer.model, and for a tokenizer.json one like it

def load_tokenizer(path: str | Path, vocab_size: int | None = None):
    """The tokenizer of a model folder; ValueError where none fits the vocabulary."""
    file, other = Path(path) / "tokenizer.model", Path(path) / "tokenizer.json"
    tokenizer = read_sentencepiece(file)
    if tokenizer is None and other.exists():
        file, tokenizer = other, JsonTokenizer(other)
    if tokenizer is None:
        fault = "not a SentencePiece model" if file.exists() else "no such file"
        raise ValueError(f"{file}: {fault}, and there is no tokenizer.json; train.py and search.py "
                         "take token ids too, --data tokens.bin")
    if vocab_size and tokenizer.get_piece_size() > vocab_size:
        raise ValueError(f"{file}: has more pieces than the model's vocabulary, {vocab_size}")
    return tokenizer


def read_sentencepiece(file: Path):
    """A SentencePieceProcessor, or None where the file is missing or something else."""
    from sentencepiece import SentencePieceProcessor
    try:
        proto = file.read_bytes()                       # it takes an empty one, and fails later
        return SentencePieceProcessor(model_proto=proto) if proto else None
    except (OSError, RuntimeError):
        return None


class JsonTokenizer:
    """A tokenizer.json, read by Hugging Face's library; its methods are called as SentencePiece's.

    A text's beginning is what the file's post-processor, or add_bos_token in tokenizer_config.json,
    puts before it; `bos_id` is −1 where they put nothing, as for Qwen.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            from tokenizers import Tokenizer
            self.inner = Tokenizer.from_file(str(file))
        except ImportError:
            raise ValueError(f"{file}: first run pip install tokenizers, which reads it") from None
        except Exception as error:                      # the library has no class of its own
            raise ValueError(f"{file}: not a tokenizer, or a truncated one ({error})") from None
        self.inner.no_truncation()                      # what a file says of batches
        self.inner.no_padding()
        self.beginning = self.find_beginning(file.with_name("tokenizer_config.json"))

    def find_beginning(self, config: Path) -> int:
        processed, text = (self.ids(["a"], whole)[0] for whole in (True, False))
        if processed[:1] != text[:1]:
            return processed[0]
        said = read_json(config) if config.exists() else {}
        token = said.get("bos_token")
        name = token.get("content") if isinstance(token, dict) else token
        asked = said.get("add_bos_token") is True and isinstance(name, str)
        id = self.inner.token_to_id(name) if asked else None
        return -1 if id is None else id

    def ids(self, texts: list[str], processed: bool) -> list[list[int]]:
        """The library shares the texts among the cores."""
        try:
            found = self.inner.encode_batch_fast(texts, add_special_tokens=processed)
        except Exception as error:
            raise ValueError(f"{self.file}: {error}") from None
        return [encoding.ids for encoding in found]

    def bos_id(self) -> int:
        return self.beginning

    def get_piece_size(self) -> int:
        return 1 + max(self.inner.get_vocab().values(), default=-1)

    def encode(self, text: str | list[str], num_threads: int = 0):
        is_one = isinstance(text, str)
        found = self.ids([text] if is_one else text, processed=False)
        return found[0] if is_one else found

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)


# ------------------------------------------------------------------------------
# Text in and out

def with_beginning(tokenizer, ids: list[int]) -> list[int]:
    """The ids of a text, the beginning of sequence first: once, also where the text spells it."""
    bos = tokenizer.bos_id()
    return ids if bos < 0 or ids[:1] == [bos] else [bos, *ids]


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Token ids of a prompt, the beginning of sequence first. ValueError if there are none."""
    ids = with_beginning(tokenizer, tokenizer.encode(text))
    if not ids:
        raise ValueError("nothing to continue, and the tokenizer has no beginning of sequence")
    return ids


def show(tokenizer, prompt: list[int], new_tokens) -> list[int]:
    """Print the prompt, then each new token's text as it comes. Returns the new tokens."""
    tokens = list(prompt)
    shown = tokenizer.decode(tokens)
    print(shown, end="", flush=True)
    for token in new_tokens:
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):     # half a character, spelled in bytes: wait for the rest
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(tokenizer.decode(tokens)[len(shown):])
    return tokens[len(prompt):]


def prompt_arguments(parser) -> None:
    parser.add_argument("--prompt", default="Return the ", help="text to continue")
    parser.add_argument("--tokens", type=within(1, 10 ** 6), default=100,
                        help="how many new ones at most [100]")
    parser.add_argument("--temperature", type=within(0.0, 100.0), default=0.0,
                        help="0 takes the likeliest token [0]")


# ------------------------------------------------------------------------------
# Several processes (torchrun): the same weights, other sequences, averaged gradients

WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))


def join_processes(device: torch.device) -> None:
    """Meet the other processes, each with its own device; only the first keeps its stdout."""
    if WORLD == 1:
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    # The others wait while the first one tokenises, which may take hours.
    distributed.init_process_group(backend, timeout=timedelta(days=2))
    if RANK:
        sys.stdout = open(os.devnull, "w")


def leave_processes() -> None:
    """All together: gloo aborts a process that leaves while others still talk.

    And at once: a thread of its own may outlive the group, and would abort Python's end.
    """
    if WORLD > 1:
        distributed.barrier()
        distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


def my_share(B: int) -> slice:
    """Of WORLD · B sequences, those of this process."""
    return slice(RANK * B, (RANK + 1) * B)


def sum_over_processes(total: Tensor) -> Tensor:
    """In place. Small tensors on the CPU travel with gloo, or through the GPU with nccl."""
    if WORLD > 1:
        there = total.cuda() if distributed.get_backend() == "nccl" else total
        distributed.all_reduce(there)
        total.copy_(there)
    return total


# ------------------------------------------------------------------------------
# What a training will take: a step's memory, predicted, and the run's time, from its first steps

CHUNK = 256     # tokens whose logits exist at a time; so few that on a CPU they stay in its cache


def peak_memory(c, batch: int, seq: int, dtype: torch.dtype, recompute: bool) -> dict[str, float]:
    """Bytes that a training step holds at its peak, by what holds them. c: the model's config.

    Frozen linear layers keep no input for the backward pass. The layer whose turn it is holds
    gradients and results on the way beside what it keeps. `recompute` is --checkpoint.
    """
    hidden, inner, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    H, K, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    tokens, size = batch * seq, dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32).itemsize

    attention = 2 * hidden * H * d + 2 * hidden * K * d
    embeddings = c.vocab_size * hidden * (1 if c.tie_word_embeddings else 2)
    weights = L * (attention + 3 * hidden * inner) + embeddings
    # Numbers per token: the inputs of both norms and the normed states; q and what attention gives;
    # k and v before and after projection; three of the MLP.
    kept = 4 * hidden + 2 * H * d + 4 * K * d + 3 * inner
    on_the_way = 6 * hidden + 4 * inner
    # Some 16 matrices per head: start, A, its gradient, Adam's moments, the Cayley map's graph.
    projections = 16 * L * K * d * d
    projectors = 4 * batch * K * d * d              # U_r and P of every sequence, keys and values
    return {
        "weights": weights * size,
        "projections": projections * 4,
        "projectors": projectors * wide * (1 if recompute else L),
        "between layers": tokens * hidden * size * (L if recompute else 1),
        "within layers": tokens * size * (kept * (1 if recompute else L) + on_the_way),
        "loss": 6 * min(CHUNK, tokens) * c.vocab_size * wide + 5 * tokens * hidden * size,
    }


def free_memory(device: torch.device) -> float:
    """Bytes that a process can still get; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = linux_says("meminfo", "MemAvailable")
    return available / WORLD if available else math.inf


def linux_says(file: str, entry: str) -> int:
    """Bytes that an entry of /proc/FILE stands for; 0 where there is none."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
        value = dict(line.split(":", 1) for line in lines)[entry]
        return 1024 * int(value.split()[0])
    except (OSError, KeyError, ValueError):
        return 0


def plan_memory(args, config, device: torch.device, dtype: torch.dtype) -> None:
    """Say what a step will take; decide --checkpoint where the user did not; fail if too large."""
    def need(recompute: bool) -> dict[str, float]:
        return peak_memory(config, args.batch, args.seq, dtype, recompute)

    free = free_memory(device)
    if args.checkpoint is None:
        args.checkpoint = sum(need(False).values()) > 0.8 * free
    parts = need(args.checkpoint)
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts.items())
    how = ", layers recomputed in the backward pass" if args.checkpoint else ""
    print(f"Memory of a step, predicted: {listed}; {total / 1e6:,.0f} MB in all{how}")
    if total > free:
        fail(f"--batch {args.batch} --seq {args.seq}: a step needs about {total / 1e9:.1f} GB and "
             f"{free / 1e9:.1f} GB are free on {device}; take a smaller --batch or --seq")


class Forecast:
    """Called after each step of a training: after the fourth it says what the run will take.

    Beside its steps a run is what went before them, validations, four passes of a batch each, and
    the report: one for the model, and for every curve one at each of six budgets. A step is about
    8/3 of a pass.
    """

    def __init__(self, args, device: torch.device, left: int):
        self.args, self.device = args, device
        self.left = left                                # steps, fewer where a run is resumed
        self.before = time.time() - BEGAN
        self.warm = self.done = 0

    def __call__(self) -> None:
        self.done += 1
        if self.done == 1:                              # the slowest
            self.warm = time.time()
        if self.done == 4:
            self.say((time.time() - self.warm) / 3)

    def say(self, step: float) -> None:
        args = self.args
        one_pass = step * 3 / 8 / args.accumulate
        hooks = 6 * (2 if args.uniform else 4)
        report = math.ceil(args.windows / args.batch) * (1 + hooks)
        validation = 4 * math.ceil(8 / args.batch)
        around = self.before + one_pass * (report + validation)
        each = step + one_pass * validation / args.check_every
        minutes = (around + self.left * each) / 60
        fit = int((20 * 60 - around) / each)
        advice = f"--steps {fit} would fit in 20" if fit > 0 else "fewer --windows would shorten it"
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self.device)
        else:
            peak = linux_says("self/status", "VmHWM")
        memory = f", {peak / 1e9:.2f} GB at the peak" if peak else ""
        print(f"\nMeasured: {step:.2f} s a step{memory}. The run takes about {minutes:.1f} "
              f"minutes, {around / 60:.1f} of them before and after its steps; {advice}",
              file=sys.stderr, flush=True)


def has_bfloat16_units() -> bool:
    """Whether this CPU has units for bfloat16 products, as Linux says (AVX512-BF16, AMX, ARM's)."""
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
