"""Files: reading gives a ValueError that names the file; writing leaves a whole file or none.

What is written goes to a temporary name first, and is then renamed: a failure never costs what was
there before.
"""
import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from support.cli import blame, fail

try:
    import fcntl
except ImportError:                         # not on Windows
    fcntl = None


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
    """Which file holds which tensor. Never a glob: some folders hold all weights twice.

    Where there are a single file and an index of shards the single one counts, as in transformers.
    """
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if single.exists():
        with open_safetensors(single) as file:
            return {name: single for name in file.keys()}
    if not index.exists():
        raise ValueError(f"{path}: neither model.safetensors nor model.safetensors.index.json")
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index}: no weight_map")
    return {name: path / file for name, file in files.items()}


def read_json(path: str | Path) -> dict:
    """The object in a JSON file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


@contextlib.contextmanager
def written_whole(path: str | Path):
    """Yields a file PATH.….part, open for bytes; once written it takes the place of PATH.

    Its name is this process's own: of two that write the same PATH the later one's counts, whole.
    """
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:                # what a full disk says names no file
        raise OSError(error.errno, error.strerror, str(part)) from None
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


def check_folder(path: Path) -> None:
    """Make the folder of --out; fail before any work is done if nothing can be written there."""
    with blame("--out"):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()        # has no name: two runs do not collide


HELD = {}       # folders that this process holds, and the open files by which it does


def hold_folder(path: Path) -> None:
    """Let no other training write to the folder of --out until this process ends.

    A lock of the system, on the folder itself: it goes with the process, whatever ends that.
    """
    path = path.resolve()
    if fcntl is None or path in HELD:
        return
    try:
        held = os.open(path, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out: {path}: another run is writing there; give one of them another folder")
    except OSError:                         # a file system without locks, or not to be read
        return
    HELD[path] = held


def fingerprint(*sources: Path | np.ndarray) -> str:
    """A hash of the sizes of files or arrays (n,), and of 256 pieces of 64 KB spread over each."""
    digest = hashlib.sha256()
    for source in sources:
        if isinstance(source, Path):
            source = np.memmap(source, np.uint8, "r") if source.stat().st_size else np.empty(0)
        digest.update(f"{len(source)} {source.dtype}".encode())
        length = 2 ** 16 // source.itemsize
        for start in np.linspace(0, max(0, len(source) - length), 256).astype(int):
            digest.update(source[start:start + length].tobytes())
    return digest.hexdigest()


def fingerprint_of_model(ckpt: Path) -> str:
    """The fingerprint of a folder's config and weights."""
    return fingerprint(ckpt / "config.json", *sorted(set(tensor_files(ckpt).values())))


def hash_of(*tensors: Tensor, text: str = "") -> str:
    """The sha256 of the bytes of float32 tensors, one after the other, then of a text."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    digest.update(text.encode())
    return digest.hexdigest()
