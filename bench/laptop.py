"""A model of 135 million parameters on this machine: what train.py announces, and what it takes.

Random weights of SmolLM2-135M's shapes and random ids are made in a temporary folder. train.py then
runs on them in a process of its own, with its defaults but for the options below. The table is what
it announced after its fourth step against what it took: the median of the later steps, the peak of
its memory (Linux), and the time of the whole run.

    python bench/laptop.py                          # on one core a quarter of an hour
    python bench/laptop.py --steps 50 --windows 64  # the report as long as it is by default
"""
import contextlib
import io
import re
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train
from bench.memory import make_checkpoint
from bench.tools import arguments, in_fresh_process, need_linux, peak
from support import cli

SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def watched_training(options: list[str]) -> dict:
    """train.py with these options: what it said, the seconds of each step, the peak, the time."""
    ends = []

    class Watched(train.Forecast):
        def __call__(self):
            super().__call__()
            ends.append(time.perf_counter())

    train.Forecast = Watched
    sys.argv = ["train.py", *options]
    said = io.StringIO()
    began = time.perf_counter()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        train.main()
    return {
        "said": said.getvalue(),
        "steps": [b - a for a, b in pairwise(ends)],
        "peak": peak(),
        "seconds": time.perf_counter() - began,
    }


def main():
    parser = arguments(__doc__)
    count = cli.within(8, 10 ** 6)
    parser.add_argument("--steps", type=count, default=12, help="at least 8 [12]")
    parser.add_argument("--windows", type=count, default=8, help="of the report, as train.py's [8]")
    parser.add_argument("--batch", type=cli.within(1, 10 ** 5), default=8, help="[8]")
    parser.add_argument("--seq", type=cli.within(2, 10 ** 6), default=256, help="[256]")
    args = parser.parse_args()
    need_linux()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "smollm2"
        make_checkpoint(folder, SMOLLM2_135M)
        ids = np.random.default_rng(0).integers(3, 49152, 200_000)
        np.save(folder / "tokens.npy", ids.astype(np.uint16))
        options = {
            "--ckpt": folder,
            "--data": folder / "tokens.npy",
            "--out": Path(name) / "out",
            "--device": "cpu",
        }
        options |= {f"--{key}": value for key, value in vars(args).items()}
        words = [str(word) for pair in options.items() for word in pair]
        run = in_fresh_process(watched_training, words)

    predicted, announced = re.findall(r"(Memory of a step.*|Measured:.*)", run["said"])
    print(f"{predicted}\n{announced}\n")
    step, most, minutes = map(float, re.findall(r"([\d.]+) (?:s a|GB|minutes,)", announced)[:3])
    later = statistics.median(run["steps"][3:])
    rows = (("seconds a step", step, later),
            ("GB at the peak", most, run["peak"] / 1e9),
            ("minutes of the run", minutes, run["seconds"] / 60))
    for what, said, was in rows:
        print(f"  {what:20s} announced {said:8.2f}  was {was:8.2f}  ({was / said - 1:+.1%})")


if __name__ == "__main__":
    cli.run_script(main)
