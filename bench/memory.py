"""What LLaMA-2-7B's shapes take in memory: what train.py predicts, and what processes then hold.

The table is the prediction for a training step on a GPU: bfloat16, one sequence of 2,048 tokens,
with and without recomputed layers, for three public models. Then, on this CPU, checkpoints of
random bfloat16 weights are made in a temporary folder, sharded with an index, and fresh processes
measured: the peak of two training steps with 2 layers, 1,024 tokens, float32, against the
prediction; the peak of loading all layers and one short pass against the size of the weights.

    python bench/memory.py --table          # the prediction alone
    python bench/memory.py                  # Linux, with 24 GB of memory and 14 GB of disk
    python bench/memory.py --layers 4       # a smaller model to load: 3 GB of each
"""
import contextlib
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train
from bench.tools import arguments, in_fresh_process, need_linux, peak
from model import Model, load
from projection import calibrate
from support import cli
from support.checkpoint import read_config
from support.training import peak_memory

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"intermediate_size": 14336, "num_key_value_heads": 8}
MODELS = {
    "LLaMA-2-7B": LLAMA_2_7B,
    "Mistral-7B-v0.3": LLAMA_2_7B | GROUPED | {"model_type": "mistral", "vocab_size": 32768},
    "LLaMA-3.1-8B": LLAMA_2_7B | GROUPED | {"vocab_size": 128256},
}
SEQ = 1024              # tokens of the training that is measured


def write_config(folder: Path, settings: dict):
    """The config.json in a folder, as read_config reads it back."""
    file = folder / "config.json"
    file.write_text(json.dumps(settings))
    return read_config(file)


def show_table(folder: Path) -> None:
    for name, settings in MODELS.items():
        config = write_config(folder, settings)
        for recompute in (True, False):
            parts = peak_memory(config, 1, 2048, torch.bfloat16, recompute)
            option = "--checkpoint" if recompute else "--no-checkpoint"
            listed = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts.items())
            total = sum(parts.values())
            print(f"{name:16s} {option:15s} {listed}; {total / 1e9:.1f} GB in all")


def make_checkpoint(folder: Path, settings: dict) -> int:
    """Write random weights, a shard for every layer and one for the rest; their bytes."""
    folder.mkdir()
    config = write_config(folder, settings)
    with torch.device("meta"):
        model = Model(config)
    shards = {"rest": {}}
    for name, parameter in model.named_parameters():
        shard = name.split(".")[1] if name.startswith("layers.") else "rest"
        name = name if name.startswith("lm_head.") else f"model.{name}"
        shards.setdefault(shard, {})[name] = parameter.shape

    largest = max(parameter.numel() for parameter in model.parameters())
    numbers = torch.randn(largest).mul_(0.02).bfloat16()
    places, size = {}, 0
    for shard, shapes in shards.items():
        file = f"model-{shard}.safetensors"
        tensors = {name: random_tensor(numbers, shape) for name, shape in shapes.items()}
        save_file(tensors, folder / file)
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return size


def random_tensor(numbers: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The weights of a norm are one, those of a matrix the first of `numbers`."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=numbers.dtype)
    return numbers[:shape.numel()].view(shape).clone()


# ------------------------------------------------------------------------------
# What runs in processes of its own

def training_peak(folder: Path, checkpoint: str) -> int:
    """Bytes that two steps of train.py take beyond Python and PyTorch."""
    options = {
        "--ckpt": folder,
        "--data": folder / "tokens.npy",
        "--out": folder / "out",
        "--steps": 2,
        "--batch": 1,
        "--seq": SEQ,
        "--sweep-windows": 1,
        "--device": "cpu",
        "--dtype": "float32",
    }
    pairs = [str(word) for pair in options.items() for word in pair]
    sys.argv = ["train.py", *pairs, "--uniform", checkpoint]
    # No order of lowerings, one batch of each sweep and of calibration, not 32 and 16, and no
    # report: the peak is the same.
    train.calibrate = partial(calibrate, batches=1)
    train.finish = lambda *_: None
    before = peak()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train.main()
    return peak() - before


def loading_peak(folder: Path) -> dict[str, float]:
    """Bytes at the peak, before anything was loaded and after a pass, and the seconds of both."""
    before = peak()
    began = time.perf_counter()
    model = load(folder, dtype=torch.bfloat16)
    loaded = time.perf_counter()
    model(torch.arange(3, 11)[None])
    passed = time.perf_counter()
    return {
        "before": before,
        "peak": peak(),
        "load": loaded - began,
        "pass": passed - loaded,
    }


# ------------------------------------------------------------------------------
# The script

def measure_training(folder: Path) -> None:
    make_checkpoint(folder, LLAMA_2_7B | {"num_hidden_layers": 2})
    tokens = np.random.default_rng(0).integers(3, 32000, 50000)
    np.save(folder / "tokens.npy", tokens)
    config = read_config(folder / "config.json")
    for option in ("--no-checkpoint", "--checkpoint"):
        recompute = option == "--checkpoint"
        parts = peak_memory(config, 1, SEQ, torch.float32, recompute)
        predicted = sum(parts.values())
        most = in_fresh_process(training_peak, folder, option)
        print(f"2 layers, {SEQ:,} tokens, float32, {option:15s} peak {most / 1e9:.2f} GB, "
              f"predicted {predicted / 1e9:.2f}, ratio {most / predicted:.2f}", flush=True)


def measure_loading(folder: Path, layers: int) -> None:
    size = make_checkpoint(folder, LLAMA_2_7B | {"num_hidden_layers": layers})
    got = in_fresh_process(loading_peak, folder)
    print(f"{layers} layers, bfloat16: loaded in {got['load']:.1f} s, first pass {got['pass']:.1f} "
          f"s, peak {got['peak'] / 1e9:.2f} GB, {got['peak'] / size:.2f} of the weights' "
          f"{size / 1e9:.2f} GB ({got['before'] / 1e9:.2f} GB are Python and PyTorch)")


def main():
    parser = arguments(__doc__)
    parser.add_argument("--table", action="store_true", help="the prediction alone")
    parser.add_argument("--layers", type=cli.within(1, 32), default=32,
                        help="of the model that is loaded [32]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        show_table(folder)
        if args.table:
            return
        need_linux()
        print(flush=True)
        measure_training(folder / "small")
        measure_loading(folder / "large", args.layers)


if __name__ == "__main__":
    cli.run_script(main)
