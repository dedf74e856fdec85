"""What LLaMA-2-7B's shapes take in memory: run by hand, on Linux, with 24 GB of memory and 14 GB of disk.

Makes checkpoints of random bfloat16 weights in a temporary folder, sharded with an index, and measures fresh processes:
the peak of loading all 32 layers and one short forward pass against the size of the weights, and the peak of two training
steps with 2 layers against train.py's prediction.

    python tests/memory_7b.py table          # the prediction alone, for three public models
    python tests/memory_7b.py                # and the measurements
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from model import Model, load, read_config  # noqa: E402
from train import peak_memory  # noqa: E402

CONFIG = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
          "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}

OTHERS = {"LLaMA-2-7B": {}, "Mistral-7B-v0.3": {"model_type": "mistral", "vocab_size": 32768, "intermediate_size": 14336, "num_key_value_heads": 8},
          "LLaMA-3.1-8B": {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8}}


def table(folder: Path) -> None:
    """What train.py predicts for a GPU: bfloat16, one sequence of 2,048 tokens, with and without recomputed layers."""
    for name, changes in OTHERS.items():
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        config = read_config(folder / "config.json")
        for recompute in (True, False):
            parts = peak_memory(config, 1, 2048, torch.bfloat16, recompute)
            print(f"{name:16s} {'--checkpoint' if recompute else '--no-checkpoint':16s}"
                  + ", ".join(f"{part} {n / 1e9:.2f}" for part, n in parts.items()) + f"; {sum(parts.values()) / 1e9:.1f} GB in all")


def peak() -> int:
    """Bytes of this process in memory at its largest (not getrusage: a child inherits its parent's)."""
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])


def make(folder: Path, layers: int) -> int:
    """Write the checkpoint, a shard for every layer; its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    with torch.device("meta"):
        model = Model(read_config(folder / "config.json"))
    values, shards, places, size = torch.randn(2 ** 28).mul_(0.02).bfloat16(), {}, {}, 0
    for name, p in model.named_parameters():
        name = name if name.startswith("lm_head") else f"model.{name}"
        shard = f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors"
        shards.setdefault(shard, {})[name] = p.shape
        places[name], size = shard, size + 2 * p.numel()
    for shard, shapes in shards.items():
        save_file({n: (values[:s.numel()].view(s) if len(s) > 1 else torch.ones(s, dtype=torch.bfloat16)).clone()
                   for n, s in shapes.items()}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return size


def measure_load(folder: str) -> None:
    before, start = peak(), time.time()
    model = load(folder, dtype=torch.bfloat16)
    loaded = time.time() - start
    start = time.time()
    model(torch.arange(3, 11)[None])
    print(json.dumps({"peak": peak(), "before": before, "load": loaded, "forward": time.time() - start}))


def measure_training(folder: str, data: str, dtype: str, checkpoint: str) -> None:
    sys.argv = ["train.py", "--ckpt", folder, "--data", data, "--steps", "2", "--batch", "1", "--seq", "1024", "--runs", "1",
                "--dtype", dtype, checkpoint, "--out", f"{folder}/out"]
    train.calibrate.__defaults__ = (1,)                 # one batch of text, not 16, and no report: the peak is the same
    train.report = lambda *_: None
    before = peak()
    train.main()
    predicted = sum(peak_memory(read_config(Path(folder) / "config.json"), 1, 1024, getattr(torch, dtype),
                                      checkpoint == "--checkpoint").values())
    print(json.dumps({"peak": peak() - before, "predicted": predicted}))


def child(function: str, *arguments) -> dict:
    done = subprocess.run([sys.executable, __file__, function, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    with tempfile.TemporaryDirectory() as folder:
        table(Path(folder))
        if sys.argv[1:] == ["table"]:
            return
        small = Path(folder) / "small"
        make(small, 2)
        np.save(small / "tokens.npy", np.random.default_rng(0).integers(3, 32000, 50000))
        for checkpoint in ("--no-checkpoint", "--checkpoint"):
            got = child("measure_training", small, small / "tokens.npy", "float32", checkpoint)
            print(f"2 layers, T = 1,024, float32, {checkpoint:15s}: peak {got['peak'] / 1e9:.2f} GB, predicted "
                  f"{got['predicted'] / 1e9:.2f} GB, ratio {got['peak'] / got['predicted']:.2f}", flush=True)
        size = make(Path(folder) / "large", 32)
        got = child("measure_load", Path(folder) / "large")
        print(f"32 layers, load in bfloat16 {got['load']:.1f} s, first forward {got['forward']:.1f} s, peak {got['peak'] / 1e9:.2f} GB, "
              f"{got['peak'] / size:.2f} of the weights' {size / 1e9:.2f} GB ({got['before'] / 1e9:.2f} GB are Python and PyTorch)")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        globals()[sys.argv[1]](*sys.argv[2:])
    else:
        main()
