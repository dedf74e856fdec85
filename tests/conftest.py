import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(2)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"   # before anything imports triton

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(params=["llama_mha", "llama_gqa_tied_llama3", "mistral_sharded_head_dim"])
def model(request):
    """A tiny random model, of each kind of attention: G = 1, G = 2, head_dim unlike hidden / H."""
    from model import load
    return load(GOLDEN / request.param)


@pytest.fixture
def tokens():
    return torch.randint(3, 96, (3, 21))


def relative(a, b) -> float:
    """Largest error as a share of the largest value."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
