"""What the tests share: tiny random models, random projections and plans, and scripts to run."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cache import KVCache
from model import load
from projection import Projection, shape_of, uniform_ranks
from search import Windows, find_start
from support import cli
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
CKPT = GOLDEN / "mistral_sharded_head_dim"      # what scripts are run on; it has no tokenizer
DEMO = ROOT / "demo"

cli.has_bfloat16_units = lambda: False          # the same numbers on every machine
torch.set_num_threads(1)                        # tiny tensors gain nothing from threads,
os.environ["OMP_NUM_THREADS"] = "1"             # here and in the processes that tests start
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # before anything imports triton

# ------------------------------------------------------------------------------
# Models, projections, plans

KINDS = ["llama_mha", "llama_gqa_tied_llama3", "mistral_sharded_head_dim", "qwen2", "qwen3"]


@pytest.fixture(params=KINDS)
def every_model(request):
    """A tiny random model of each kind: G = 1, G = 2, head_dim unlike hidden / H, biases, norms.

    For what an architecture may change; `model` is for all else.
    """
    return load(GOLDEN / request.param)


@pytest.fixture
def model():
    """A tiny random model: G = 2, and head_dim unlike hidden / H."""
    return load(CKPT)


@pytest.fixture
def tokens():
    return torch.randint(3, 96, (3, 21))


@pytest.fixture(scope="session")
def demo():
    """The demo's model and its tokenizer."""
    return load(DEMO), load_tokenizer(DEMO)


def shape(model) -> tuple[int, int, int]:
    """(L, K, d)"""
    return shape_of(model.config)


def random_projection(model, whole: int = 0, mean: float = 0.0) -> Projection:
    """`mean`: the size of a mean of the keys; `whole` needs one."""
    L, K, d = shape(model)
    U_k, U_v = torch.linalg.qr(torch.randn(2, L, K, d, d)).Q
    mean_k = mean * torch.randn(L, K, d) if mean else None
    return Projection(U_k, U_v, torch.randn(L, K, d), mean_k, whole)


def random_ranks(model, *batch) -> torch.Tensor:
    """A plan (2, L, K), or one for each sequence, (2, L, B, K)."""
    L, K, d = shape(model)
    return torch.randint(1, 9, (2, L, *batch, K)) * (d // 8)


def random_start(model, whole: int = 0) -> Projection:
    """The start of the sweeps over a random text."""
    tokens = torch.randint(3, 96, (400,)).numpy()
    return find_start(model, Windows(tokens, 8, 8, 40, 1, 0), whole)


def full_cache(model, batch: int, max_len: int) -> KVCache:
    """The base model's own: every rank d, nothing turned."""
    unturned = Projection.identity(model.config)
    return KVCache(unturned, uniform_ranks(1.0, model.config), batch=batch, max_len=max_len)


# ------------------------------------------------------------------------------
# Distances

def relative(a, b) -> float:
    """Largest error as a share of the largest value."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def mean_kl(log_p, log_q) -> float:
    """PyTorch's own KL(p ‖ q), the mean over tokens, of log-probabilities (B, T, vocab)."""
    total = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    return total.item() / log_p[..., 0].numel()


# ------------------------------------------------------------------------------
# Scripts

def script(*arguments) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` in a process of its own, which spends seconds on its imports."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def call(name: str, *arguments) -> None:
    """The main of a script, in this process: `call("train", "--steps", 3)`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        importlib.import_module(name).main()


@pytest.fixture
def refusal(capsys):
    """`refusal(name, *arguments)`: the one line on stderr with which a script leaves, code 2."""
    def line_of(name: str, *arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            call(name, *arguments)
        lines = capsys.readouterr().err.strip().splitlines()
        assert left.value.code == 2, (name, arguments, lines)
        assert len(lines) == 1, (name, arguments, lines)
        return lines[0]

    return line_of


def small(folder: Path) -> list:
    """Options for a training on the random tokens in `folder`."""
    return ["--ckpt", CKPT, "--data", folder / "tokens.npy", "--seq", 32, "--batch", 8]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with tokens.npy, random ids, and out/, what 150 steps of training on them left."""
    folder = tmp_path_factory.mktemp("trained")
    ids = np.random.default_rng(1).integers(3, 96, 4000)
    np.save(folder / "tokens.npy", ids.astype(np.uint16))
    call("train", *small(folder), "--steps", 150, "--out", folder / "out")
    return folder
