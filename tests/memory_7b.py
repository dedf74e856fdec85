"""What LLaMA-2-7B's shapes take in memory: run by hand, on Linux, with 24 GB of memory and 14 GB of disk.

Makes checkpoints of random bfloat16 weights in a temporary folder, sharded with an index, and measures fresh processes:
the peak of loading all 32 layers and one short forward pass against the size of the weights, and the peak of two training
steps with 2 layers against train.py's prediction.

    python tests/memory_7b.py [FOLDER]
"""
import json
import resource
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
from model import Model, load, read_config  # noqa: E402

CONFIG = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
          "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
    import train
    sys.argv = ["train.py", "--ckpt", folder, "--data", data, "--steps", "2", "--batch", "1", "--seq", "1024", "--runs", "1",
                "--dtype", dtype, checkpoint, "--out", f"{folder}/out"]
    train.calibrate.__defaults__ = (1,)                 # one batch of text, not 16, and no report: the peak is the same
    train.report = lambda *_: None
    before = peak()
    train.main()
    predicted = sum(train.peak_memory(read_config(Path(folder) / "config.json"), 1, 1024, getattr(torch, dtype),
                                      checkpoint == "--checkpoint").values())
    print(json.dumps({"peak": peak() - before, "predicted": predicted}))


def child(function: str, *arguments) -> dict:
    done = subprocess.run([sys.executable, __file__, function, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
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
