"""Second chapter: bits in place of ranks. README.md beside this file tells it; in this order read

    rounding.py     a coordinate of the cache in a few bits, in place of all or none
    packed.py       a cache of those codes, and nothing else of the past
    costs.py        what a coordinate costs in so many bits
    train.py        train through the rounding

    from bits import load_bits
    cache = load_bits("out/bits.json").cache(0.125, batch=1, max_len=512)
    logits = model(tokens, cache=cache)
"""
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from bits.packed import PackedCache
from bits.rounding import GROUP, Rounding, bits_at, path_of_rows, path_to_rows
from support import files


class Bits:
    """What bits.train made of a model: a Rounding and the path of its plans, for any budget."""

    def __init__(self, rounding: Rounding, path: Tensor, config):
        rounding.p.check_fits(config)
        self.rounding, self.path, self.config = rounding, path, config

    def at(self, budget: float):
        """The hook `project=` at a budget, the share of a 16-bit cache."""
        return self.rounding.at(self.plan(budget))

    def plan(self, budget: float) -> Tensor:
        return bits_at(self.path, self.config, budget)

    def cache(self, budget: float, batch: int, max_len: int, dtype=torch.float32, device="cpu"):
        """A PackedCache at the largest plan within the budget."""
        return PackedCache(self.rounding, self.plan(budget), batch, max_len, dtype, device)

    def save(self, file: Path, said: dict) -> None:
        """The tensors, then the path, with a hash of them: both are of the same training, or none.
        """
        self.rounding.save(file.with_suffix(".safetensors"))
        files.write_json(file, {
            "head_dim": self.config.head_dim,
            "whole": self.rounding.p.whole,
            "newest": GROUP,
            "rounding": self.rounding.hash(),
            "path": path_to_rows(self.path, self.config),
        } | said)


def load_bits(file: str | Path) -> Bits:
    """Read OUT/bits.json and the .safetensors beside it. ValueError names the file."""
    file = Path(file)
    said = files.read_json(file)
    if "exact" in said:
        raise ValueError(f"{file}: of a version whose keys had another mean; run bits.train again")
    rounding = Rounding.load(file.with_suffix(".safetensors"))
    L, K, d = rounding.p.mean_v.shape
    shape = SimpleNamespace(num_hidden_layers=L, num_key_value_heads=K, head_dim=d)
    try:
        for name, here in {"head_dim": d, "whole": rounding.p.whole, "newest": GROUP}.items():
            if said[name] != here:
                raise ValueError(f"{name} {said[name]!r}, for {here}")
        if said["rounding"] != rounding.hash():
            raise ValueError(f"it is of another training than {file.with_suffix('.safetensors')}")
        return Bits(rounding, path_of_rows(said["path"], shape), shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not what bits.train writes ({error})") from None
