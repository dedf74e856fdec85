"""Spoils the files that scripts read, a little and at random, and looks how the scripts take it.

Each case changes one file of a small folder (a random LLaMA, a tokenizer, projections, ranks, a
text, questions): a byte, the end, a value of the JSON. Then a script reads it, in one process that
takes case after case, and is started anew where one of them ends it. What may come of it: the
script's own words (exit code 2, one line), or success. A traceback, a hang and a crash may not.
Where it succeeds with another output than before, the case is counted by kind, and a few are shown:
a value that means something else is no fault, a byte that nobody noticed is.

    python bench/mutations.py                       # 500 cases
    python bench/mutations.py --count 5000 --seed 3
    python bench/mutations.py --ckpt DIR --kinds config token      # with the files of another model
"""
import collections
import contextlib
import importlib
import io
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import arguments
from model import Model
from support import cli
from support.checkpoint import read_config
from support.files import write_json, write_tensors
from support.progress import Progress
from support.training import TrainingState

SECONDS = 60            # that a case may take
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
ODD = (None, True, False, 0, -1, 1, 7, 2 ** 31, 2 ** 70, -0.5, 1e-320, float("inf"), float("nan"),
       "", "x", "\ud800", "4", [], [0], [[]], {}, {"a": 1})

GENERATE = "generate --ckpt {0} --prompt The --tokens 20"
BITS = ("bits.train --ckpt {0} --data {0}/a.npy --proj {0}/out/projections.safetensors --steps 0 "
        "--seq 64 --batch 1 --windows 1 --sweep-windows 1 --passages 0")
TRAIN = ("train --ckpt {0} --data {0}/a.npy --out {0}/out --steps 2 --seq 16 --batch 1 --windows 1 "
         "--sweep-windows 1")
KINDS = {               # file, where it is there: the script that reads it
    "config.json": GENERATE,
    "generation_config.json": GENERATE,
    "model.safetensors": GENERATE,
    "tokenizer.model": GENERATE,
    "tokenizer_config.json": GENERATE,
    "added_tokens.json": GENERATE,
    "tokenizer.json": GENERATE,
    "json/tokenizer.json": GENERATE.replace("{0}", "{0}/json"),
    "out/projections.safetensors": GENERATE + " --proj {0}/out/projections.safetensors --budget .5",
    "out/ranks.json": GENERATE + " --ranks {0}/out/ranks.json",
    "out/bits.safetensors": GENERATE + " --bits {0}/out/bits.json --budget .25",
    "out/bits.json": GENERATE + " --bits {0}/out/bits.json --budget .25",
    "out/train.json": "evaluate --ckpt {0} --data {0}/a.npy --out {0}/out --seq 16 --windows 1 "
                      "--batch 1 --passages 0",
    "out/train.state.safetensors": TRAIN + " --resume",
    "a.txt": "support.data --ckpt {0} --data {0}/a.txt --out {0}/out",
    "a.jsonl": "support.data --ckpt {0} --data {0}/a.jsonl --out {0}/out",
    "a.bin": "support.data --ckpt {0} --data {0}/a.bin --out {0}/out",
    "a.npy": "support.data --ckpt {0} --data {0}/a.npy --out {0}/out",
    "tasks.jsonl": "evaluate --ckpt {0} --data {0}/a.npy --out {0}/out --seq 16 --windows 1 "
                   "--batch 1 --passages 0 --tasks {0}/tasks.jsonl",
}


# ------------------------------------------------------------------------------
# The folder

def make_folder(folder: Path, ckpt: Path) -> None:
    """A random model of TINY sizes with the tokenizer of `ckpt`, and what scripts make of it."""
    torch.manual_seed(0)
    for file in ckpt.glob("tokenizer*"):
        shutil.copy(file, folder)
    said = json.loads((ckpt / "config.json").read_text()) | TINY
    write_json(folder / "config.json", said)
    write_json(folder / "generation_config.json", {"eos_token_id": said.get("eos_token_id", 2)})
    config = read_config(folder / "config.json")
    model = Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    names = {name: name if name.startswith("lm_head.") else f"model.{name}"
             for name, _ in model.named_parameters()}
    write_tensors(folder / "model.safetensors",
                  {names[name]: p for name, p in model.named_parameters()})
    if not list(folder.glob("tokenizer*.json")):
        write_json(folder / "tokenizer_config.json", {
            "add_bos_token": True, "bos_token": "<s>", "tokenizer_class": "LlamaTokenizer",
            "added_tokens_decoder": {"1": {"content": "<s>", "special": True}}})
    own = (folder / "tokenizer.json").exists()          # with ids of its own
    write_json(folder / "added_tokens.json", {} if own else {"<s>": 1})
    (folder / "json").mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, folder / "json")
    shutil.copy(ROOT / "tests/tokenizers/llama3/tokenizer.json", folder / "json")

    text = "The json module. " * 400
    (folder / "a.txt").write_text(text)
    (folder / "a.jsonl").write_text(2 * (json.dumps({"text": text}) + "\n"))
    ids = np.arange(3000) % 250
    ids.astype(np.uint16).tofile(folder / "a.bin")
    np.save(folder / "a.npy", ids)
    question = {"context": "The json ", "choices": ["module", "text"], "label": 0}
    (folder / "tasks.jsonl").write_text(2 * (json.dumps(question) + "\n"))

    with mock.patch.object(TrainingState, "remove"):            # so the state stays
        for command in (TRAIN, BITS):
            end, said = run(command.format(folder))
            if end != "ok":
                cli.fail(f"{command}: {said}", code=1)


# ------------------------------------------------------------------------------
# One case

def spoil(file: Path, dice: random.Random) -> str:
    """Change a file; what was done to it, in words."""
    whole = file.read_bytes()
    if file.suffix == ".json" and dice.random() < 0.7:
        value = json.loads(whole)
        where, said = spoil_value(value, dice)
        file.write_text(json.dumps(value))
        return f"{where} = {said!r}"
    kind = dice.choice(("byte", "byte", "byte", "cut", "insert", "swap"))
    # What says how to read the others stands at the beginning of most files.
    at = dice.randrange(min(len(whole), dice.choice((12, 200, 2000, len(whole)))))
    if kind == "byte":
        some = bytes([whole[at] ^ (1 << dice.randrange(8))])
        file.write_bytes(whole[:at] + some + whole[at + 1:])
    elif kind == "cut":
        file.write_bytes(whole[:at])
    elif kind == "insert":
        some = dice.choice((b"\0", b"\xff", b"\n", b"\r\n", b"{", b"\xef\xbb\xbf"))
        file.write_bytes(whole[:at] + some + whole[at:])
    else:
        to = dice.randrange(len(whole))
        file.write_bytes(whole[:at] + whole[to:to + 8] + whole[at + 8:])
    return f"{kind} at {at}"


def spoil_value(value, dice: random.Random) -> tuple[str, object]:
    """Replace, remove or double something at a random depth of a JSON value, in place."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return "nothing", None
    key = dice.choice(keys)
    if isinstance(value[key], (dict, list)) and value[key] and dice.random() < 0.7:
        where, said = spoil_value(value[key], dice)
        return f"{key}.{where}", said
    if dice.random() < 0.25:
        value.pop(key)
        return str(key), "removed"
    value[key] = dice.choice(ODD)
    return str(key), value[key]


class Hang(BaseException):
    """A case took too long; no `except Exception` may swallow it."""


def alarm(*_):
    raise Hang


def run(command: str) -> tuple[str, str]:
    """How a script ends ("ok", "refused", "traceback", …), and what it printed or where it broke.
    """
    name, *words = command.split()
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [name, *words]
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            importlib.import_module(name).main()
        return "ok", out.getvalue()
    except SystemExit as left:
        lines = err.getvalue().strip().splitlines()
        return ("refused" if left.code == 2 else f"code {left.code}"), lines[-1] if lines else ""
    except Hang:
        return "hang", ""
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)
        sys.argv = before


def run_spoiled(good: Path, folder: Path, file: str, seed: str) -> tuple[str, str, str]:
    """A case: what was done to the file of a copy of `good`, how the script ended, its words."""
    shutil.rmtree(folder, ignore_errors=True)           # of a case that ended its process
    shutil.copytree(good, folder)
    done = spoil(folder / file, random.Random(seed))
    return done, *run(KINDS[file].format(folder))


def new_process() -> ProcessPoolExecutor:
    """Spawned: a fork would take the locks of PyTorch's threads along."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin)


def begin() -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, alarm)


# ------------------------------------------------------------------------------
# The script

def options():
    parser = arguments(__doc__)
    add = parser.add_argument
    count = cli.within(1, 10 ** 7)
    add("--ckpt", type=Path, default=cli.DEMO, help="whose tokenizer and config it is [demo]")
    add("--count", type=count, default=500, help="cases [500]")
    add("--seed", type=cli.within(0, 2 ** 32), default=0, help="[0]")
    add("--kinds", nargs="+", help="files whose name holds one of these [all]")
    add("--show", type=count, default=40, help="how many with other output [40]")
    return parser.parse_args()


def main():
    args = options()
    begin()
    kinds = [file for file in KINDS
             if not args.kinds or any(kind in file for kind in args.kinds)]
    dice = random.Random(args.seed)
    counts, found = collections.defaultdict(collections.Counter), []
    with tempfile.TemporaryDirectory() as scratch:
        good, folder = Path(scratch, "good"), Path(scratch, "case")
        folder.mkdir()
        make_folder(folder, args.ckpt)
        folder.rename(good)                 # a state knows the paths of its training
        kinds = [file for file in kinds if (good / file).exists()]
        expected = {}
        for file in kinds:
            shutil.copytree(good, folder)
            expected[file] = run(KINDS[file].format(folder))
            shutil.rmtree(folder)
            if expected[file][0] != "ok":
                cli.fail(f"{file}, as it should be: {expected[file]}", code=1)
        pool = new_process()
        progress = Progress(args.count, "case")
        for case in range(args.count):
            file, began = dice.choice(kinds), time.time()
            try:
                seed = f"{args.seed} {case}"
                done, end, said = pool.submit(run_spoiled, good, folder, file, seed).result()
            except BrokenProcessPool:
                done, end, said = "", "crash", ""
                pool = new_process()
            if end == "ok" and said != expected[file][1]:
                end = "other output"
            counts[file][end] += 1
            if end not in ("ok", "refused"):
                found.append((case, file, done, end, said, time.time() - began))
            progress(case + 1, f"{len(found)} to look at")
        pool.shutdown()
    ends = sorted({end for of_file in counts.values() for end in of_file})
    print(f"\nseed {args.seed}, {args.count} cases" + "".join(f"{end:>14s}" for end in ends))
    for file in kinds:
        print(f"  {file:28s}" + "".join(f"{counts[file][end]:14d}" for end in ends))
    for case, file, done, end, said, seconds in found:
        if end != "other output":
            print(f"\ncase {case}, {file}, {done}: {end} after {seconds:.1f} s\n{said}")
    others = [each for each in found if each[3] == "other output"]
    print("\nOther output, the first of them:")
    for case, file, done, *_ in others[:args.show]:
        print(f"  case {case}, {file}: {done}")
    if len(others) < len(found):
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run_script(main)
