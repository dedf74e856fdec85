"""Bits in transformers: a MatryoshkaCache that stores codes in place of coordinates.

    from adapters.transformers_bits import BitsCache
    cache = BitsCache(model, "out/bits.json", budget=0.125)
    model.generate(**inputs, cache=cache)

bits.json is what bits.train made of the same weights (bits/rounding.py says how a coordinate
becomes a code). A pass gets x̂ of the groups of 32 tokens that were complete before it, and all
that came since unrounded. So a prefill attends to unrounded keys and values, as in the quantised
caches of transformers; a token of generate to what bits/packed.py would give it. Codes lie in tiles
of 256 tokens, each packed as there.
"""
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adapters.transformers_cache import DynamicCache, MatryoshkaCache
from bits import Bits, load_bits
from bits.packed import PackedLayer, word_of
from bits.rounding import GROUP, to_code
from model import wide
from projection import LEVELS

TILE = 256              # tokens


class CodesLayer(CacheLayerMixin):
    """Of a layer the codes of all complete groups, and the newest coordinates as they are.

    Coordinates x are (2, K, B, tokens, d), of keys and of values; bits (2, K, 8), step and top
    (2, K, 1, 1, d). `newest` are those of token `kept_from` on: the group that is not complete, and
    at most one complete one before it, which is there as codes too, so that `crop` can go back.
    """
    is_sliding = False
    is_croppable = True

    def __init__(self, bits: Tensor, step: Tensor, top: Tensor):
        super().__init__()
        self.bits, self.step, self.top = bits, step, top
        self.reset()

    def reset(self) -> None:
        self.packed = self.newest = None
        self.tiles = self.length = self.kept_from = 0
        self.is_initialized = False

    def lazy_initialization(self, x: Tensor, _=None) -> None:
        self.newest = x[..., :0, :]
        self.is_initialized = True

    def update(self, x: Tensor) -> Tensor:
        """Store coordinates of new tokens; returns those of all, as the pass with these sees them.
        """
        if not self.is_initialized:
            self.lazy_initialization(x)
        coded = self.length // GROUP * GROUP            # tokens of groups that are complete
        codes = self.decoded(x.shape[2], coded)         # before this pass adds its own
        held = torch.cat((self.newest, x), dim=-2)
        since = held[..., coded - self.kept_from:, :]
        complete = since.shape[-2] // GROUP * GROUP
        if complete:
            self.write(since[..., :complete, :], coded)
        self.length += x.shape[-2]
        kept_from = max(self.kept_from, (self.length // GROUP - 1) * GROUP)
        self.newest = held[..., kept_from - self.kept_from:, :].clone()
        self.kept_from = kept_from
        return torch.cat((codes, since.to(codes.dtype)), dim=-2)

    def write(self, x: Tensor, begin: int) -> None:
        """Codes of whole groups of tokens, from `begin` on, in place of any that a crop left."""
        end = begin + x.shape[-2]
        if end > self.tiles * TILE:
            self.grow(x.shape[2], -(-end // TILE))
        codes = to_code(x.to(self.step.dtype), self.step, self.top)
        self.packed.write(codes.mT.flatten(0, 3), begin)            # (2·K·B·d, tokens)

    def grow(self, B: int, tiles: int) -> None:
        """Room for so many tiles of B texts; those that are there are copied."""
        d, before = self.step.shape[-1], self.packed
        size = B * d // LEVELS * int(self.bits.sum()) * tiles * TILE // 8
        with torch.inference_mode(False):               # what comes may be of another mode
            data = torch.zeros(size, dtype=torch.uint8, device=self.step.device)
            self.packed = PackedLayer(self.bits, B, d, tiles, TILE, data)
            for new, old in zip(self.packed.sides, before.sides if before else (), strict=False):
                for section, its in zip(new.sections, old.sections, strict=True):
                    section.words[:self.tiles] = its.words
        self.tiles = tiles

    def decoded(self, B: int, n: int) -> Tensor:
        """x̂ (2, K, B, n, d) of the first n tokens, in the dtype of the steps."""
        K, d = self.step.shape[1], self.step.shape[-1]
        codes = self.step.new_empty(2, K, B, n, d)
        word, device = word_of(TILE), self.step.device
        words = TILE // word.itemsize                               # of a row of codes
        for side in (0, 1) if n else ():
            packed = self.packed.sides[side]
            fields = torch.zeros(packed.rows, words, dtype=word, device=device)
            found = torch.empty(K * B * d, words, dtype=word, device=device)
            for number, begin in enumerate(range(0, n, TILE)):
                packed.read(number, fields, found)
                of_tile = found.view(torch.uint8).view(K, B, d, TILE)[..., :n - begin]
                codes[side, :, :, begin:begin + TILE] = of_tile.mT
        return (codes - self.top) * self.step

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.newest, self.packed and self.packed.data)
                   if x is not None)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1                                                   # none

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −tokens_to_remove tokens, as DynamicLayer does."""
        if not self.is_initialized:
            return
        n = self.length + tokens_to_remove
        if tokens_to_remove > 0 or n < self.kept_from:
            raise ValueError(f"crop({tokens_to_remove}) of {self.length} tokens: those before "
                             f"{self.kept_from} are codes alone")
        self.newest = self.newest[..., :n - self.kept_from, :].clone()
        self.length = n


class BitsCache(MatryoshkaCache):
    """A cache of transformers that keeps codes: a plan of bits for `model`, at a budget.

    What may be done with it is what MatryoshkaCache allows, but for beams. bits: a Bits or its
    file, bits.json; budget: the share of 16 bits a number. First tokens are whole, and at most 63
    newest are kept as they are; all count in `nbytes`, tiles in full (beside them each layer has
    tables of some KB, which do not grow). Sliding layers keep all
    tokens. ValueError for a model that does not fit, and for a crop into what is codes alone.
    """

    def __init__(self, model, bits: Bits | str | Path, budget: float):
        DynamicCache.__init__(self, config=model.config)            # there are no sides of ranks
        config = self.watch(model)
        bits = bits if isinstance(bits, Bits) else load_bits(bits)
        bits.rounding.p.check_fits(config)
        rounding = bits.rounding.to(model.device, wide(model.dtype))
        p = rounding.p
        self.whole, self.mean_k, self.mean_v = p.whole, p.mean_k, p.mean_v
        self.U = torch.stack((p.U_k, p.U_v), dim=1)[:, :, :, None]      # (L, 2, K, 1, d, d)
        plan = bits.plan(budget)                                        # (2, L, K, 8)
        self.layers = []                                                # in place of transformers'
        for i in range(config.num_hidden_layers):
            grids = [rounding.grid(side, i, plan[side, i]) for side in (0, 1)]
            step, top = (torch.stack(both)[:, :, None] for both in zip(*grids, strict=True))
            self.layers.append(CodesLayer(plan[:, i], step, top))

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args, **kwargs):
        """As MatryoshkaCache.update."""
        self.check_announced()
        i, (B, _, T, _) = layer_idx, k.shape
        turned = self.turned_mean(i, 0, self.layers[i].length + T, B)       # (K, B, n, d)
        mean = self.mean_v[i][:, None, None]
        x = torch.stack((k.transpose(0, 1).to(turned.dtype) - turned[:, :, -T:],
                         v.transpose(0, 1).to(turned.dtype) - mean)) @ self.U[i]
        keys, values = self.layers[i].update(x.to(k.dtype)) @ self.U[i].mT
        k_hat, v_hat = ((x_hat + rest).transpose(0, 1).to(k.dtype)
                        for x_hat, rest in ((keys, turned), (values, mean)))
        return self.with_whole(i, 0, k_hat, k, 0), self.with_whole(i, 1, v_hat, v, 0)

    @property
    def nbytes(self) -> int:
        first = (x.nbytes for sides in self.first for x in sides if x is not None)
        return sum(layer.nbytes for layer in self.layers) + sum(first)

    def no_beams(self, *_) -> None:
        raise ValueError("the texts of a cache of bits stay where they are: no beams")

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    reorder_cache = batch_repeat_interleave = batch_select_indices = no_beams
