"""Several processes (torchrun): the same weights, other sequences, averaged gradients."""
import os
import sys
from datetime import timedelta

import torch
from torch import Tensor, distributed

WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))


def join(device: torch.device) -> None:
    """Meet the other processes, each with its own device; only the first keeps its stdout."""
    if WORLD == 1:
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    # The others wait while the first one tokenises, which may take hours.
    distributed.init_process_group(backend, timeout=timedelta(days=2))
    if RANK:
        sys.stdout = open(os.devnull, "w")


def leave() -> None:
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


def sum_over(total: Tensor) -> Tensor:
    """In place. Small tensors on the CPU travel with gloo, or through the GPU with nccl."""
    if WORLD > 1:
        there = total.cuda() if distributed.get_backend() == "nccl" else total
        distributed.all_reduce(there)
        total.copy_(there)
    return total
