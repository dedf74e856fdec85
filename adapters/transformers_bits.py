"""Bits in transformers: MatryoshkaCache's second chapter, codes in place of coordinates.

    from adapters.transformers_bits import BitsCache
    cache = BitsCache(model, "out/bits.json", budget=0.125)
    model.generate(**inputs, cache=cache)

bits.json is what bits.train made of the same weights. A pass gets back x̂ = (code − top) Δ of the
groups of 32 tokens that were complete before it, and what came since as it is: so a prefill attends
to exact keys and values, as in the quantised caches of transformers, and each token of generate to
what bits/packed.py would give it. Codes lie in tiles of 256 tokens, each packed as there.
"""
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adapters.transformers_cache import MatryoshkaCache
from bits import Bits, load_bits
from bits.packed import PackedLayer, word_of
from bits.rounding import GROUP, to_code
from model import wide
from projection import LEVELS

TILE = 256              # tokens


class CodesLayer(CacheLayerMixin):
    """Of a layer the codes of all complete groups, and coordinates of the tokens since.

    Coordinates are (2, K, B, tokens, d), of keys and of values. bits (2, K, 8), step and top
    (2, K, 1, 1, d). `newest` are those from token `kept_from` on, one complete group at most, so
    that `crop` can go back so far.
    """
    is_sliding = False
    is_croppable = True

    def __init__(self, bits: Tensor, step: Tensor, top: Tensor):
        super().__init__()
        self.bits, self.step, self.top = bits, step, top
        self.forget()

    def forget(self) -> None:
        self.tiles, self.newest, self.length, self.kept_from = [], None, 0, 0

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        self.is_initialized = True

    def update(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Store coordinates of T new tokens, in `dtype`; returns all, as a pass sees them."""
        x = x.to(dtype)
        if self.newest is None:
            self.lazy_initialization(x, x)
            self.newest = x[..., :0, :]
        group = self.length // GROUP * GROUP            # of the token before the new ones
        codes = self.decoded(x, group)
        kept = torch.cat((self.newest, x), dim=-2)
        since = kept[..., group - self.kept_from:, :]
        complete = since.shape[-2] // GROUP * GROUP
        if complete:
            self.write(since[..., :complete, :], group)
        self.length += x.shape[-2]
        kept_from = max(self.kept_from, (self.length // GROUP - 1) * GROUP)
        self.newest = kept[..., kept_from - self.kept_from:, :].clone()
        self.kept_from = kept_from
        return torch.cat((codes, since.to(codes)), dim=-2)

    def write(self, x: Tensor, begin: int) -> None:
        """Codes of whole groups, the tokens from `begin` on."""
        _, K, B, n, d = x.shape
        codes = to_code(x.to(self.step), self.step, self.top).mT.flatten(0, 3)
        while len(self.tiles) * TILE < begin + n:
            size = B * d // LEVELS * int(self.bits.sum()) * TILE // 8
            data = torch.zeros(size, dtype=torch.uint8, device=x.device)
            self.tiles.append(PackedLayer(self.bits, B, d, 1, TILE, data))
        for number, tile in enumerate(self.tiles):
            a, b = max(begin, number * TILE), min(begin + n, (number + 1) * TILE)
            if a < b:
                tile.write(codes[:, a - begin:b - begin], a - number * TILE)

    def decoded(self, like: Tensor, n: int) -> Tensor:
        """x̂ of the first n tokens, in the dtype of the steps."""
        _, K, B, _, d = like.shape
        found = self.step.new_empty(2, K, B, n, d)
        word = word_of(TILE)
        for side in range(2 if n else 0):
            rows = self.tiles[0].sides[side].rows
            fields = torch.zeros(rows, TILE // word.itemsize, dtype=word, device=like.device)
            codes = fields.new_empty(K * B * d, fields.shape[1])
            for number, begin in enumerate(range(0, n, TILE)):
                self.tiles[number].sides[side].read(0, fields, codes)
                part = codes.view(torch.uint8).view(K, B, d, TILE)[..., :n - begin]
                found[side, :, :, begin:begin + TILE] = part.mT
        return (found - self.top) * self.step

    @property
    def nbytes(self) -> int:
        newest = 0 if self.newest is None else self.newest.nbytes
        return newest + sum(tile.size for tile in self.tiles)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, as DynamicLayer does: a number below 0."""
        n = self.length + tokens_to_remove
        if tokens_to_remove > 0 or n < self.kept_from:
            raise ValueError(f"crop({tokens_to_remove}) of {self.length} tokens: those before "
                             f"{self.kept_from} are codes alone")
        if self.newest is not None:
            self.newest = self.newest[..., :n - self.kept_from, :]
        self.length = n


class BitsCache(MatryoshkaCache):
    """A cache of transformers 5.x that keeps codes: a plan of bits for the model, at a budget.

    model and what may be done with it: as MatryoshkaCache, but for beams. bits: a Bits or its file,
    bits.json; budget: the share of 16 bits a number. First tokens are whole, and 32 to 63 newest
    are kept as they are; all count in `nbytes`. Sliding layers keep all tokens. ValueError for a
    model that does not fit, and for a crop into tokens that are codes alone.
    """

    def __init__(self, model, bits: Bits | str | Path, budget: float):
        DynamicCache.__init__(self, config=model.config)
        config = self.watch(model)
        bits = bits if isinstance(bits, Bits) else load_bits(bits)
        bits.rounding.p.check_fits(config)
        rounding = bits.rounding.to(model.device, wide(model.dtype))
        self.projection = p = rounding.p
        self.U = torch.stack((p.U_k, p.U_v), dim=1)[:, :, :, None]      # (L, 2, K, 1, d, d)
        plan = bits.plan(budget)
        self.layers = []
        for i in range(config.num_hidden_layers):
            grids = [rounding.grid(side, i, plan[side, i]) for side in (0, 1)]
            step, top = (torch.stack(of)[:, :, None] for of in zip(*grids, strict=True))
            self.layers.append(CodesLayer(plan[:, i], step, top))

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args, **kwargs):
        """Store keys, after RoPE, and values (B, K, T, d); returns k̂ and v̂ of all that is seen."""
        i, T = layer_idx, k.shape[2]
        if self.start is None:
            raise ValueError("a cache that was made for another model")
        layer = self.layers[i]
        turned = self.turned_mean(i, 0, layer.length + T)       # R_n m, (K, B or 1, n, d)
        mean = self.projection.mean_v[i][:, None, None]
        k_in, v_in = (x.transpose(0, 1).to(turned) for x in (k, v))
        x = torch.stack((k_in - turned[:, :, -T:], v_in - mean)) @ self.U[i]
        keys, values = layer.update(x, k.dtype) @ self.U[i].mT
        k_hat, v_hat = ((x_hat + rest).transpose(0, 1).to(k.dtype)
                        for x_hat, rest in ((keys, turned), (values, mean)))
        return self.with_whole(i, 0, k_hat, k, 0), self.with_whole(i, 1, v_hat, v, 0)

    @property
    def nbytes(self) -> int:
        first = (x.nbytes for sides in self.first for x in sides if x is not None)
        return sum(layer.nbytes for layer in self.layers) + sum(first)

    def of_texts(self, change) -> None:
        raise ValueError("texts of a cache of bits stay where they are: no beams")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.of_texts(None)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.of_texts(None)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.of_texts(None)
