"""A cache of rounded coordinates, packed: what a plan of bits promises is what memory holds.

The interface is that of cache.py: `model(tokens, cache=cache)`. All codes lie in one flat tensor of
bytes, `data`: the layers one after the other, each its keys, then its values. Beside it lie, in the
model's dtype and however long the text, coordinates of the whole first tokens and of the two newest
groups: a group becomes codes when it is complete; and the table `turns`, d numbers for each
position, one for all layers and texts. A code lies in one field or two:

    bits        1    2    3      4    6      8
    fields      1    2    2, 1   4    4, 2   8          the upper one first

The fields of the same width form a section, which lies in tiles of t tokens, from token `whole` on.
In a tile each field has a row of s = t / 8 · width bytes, and byte j holds it of tokens j, s + j,
2s + j, …, from its lowest bits on, counted from the tile's first. So a shift of the row for each
token of a byte, and a mask, unpack a field with its tokens in order. Then the fields of a code are
joined, and the rows brought into the order of the coordinates. A tile is unpacked while it is
attended to, in a workspace for one; no other copy of codes exists. Attention reads codes:

    q · k̂ = Σ (q U)_j Δ_j code_j + q · R_n m − Σ (q U)_j Δ_j top_j
    Σ α v̂ = Σ_j (Σ α code_j − top_j) Δ_j u_j + μ        α: attention's weights, Σ α = 1; u_j: U's
                                                        columns

q · R_n m comes as it does for ranks (cache.py). The last sum of a score is the same for all tokens,
and softmax does not see it. A value's codes become coordinates v U again when they are summed, a
single vector for each query; W_o' = Uᵀ W_o takes them (`fold`). A token that is not rounded takes
part as codes that are no whole numbers, x / Δ + top: the first tokens, and a query's own group.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bits.rounding import GROUP, Rounding, check_bits, to_code
from cache import Folded, by_pairs, check_room, fold, in_pieces, mean_scores, turn_table
from model import Model
from projection import LEVELS

UNPACKED = 2 ** 21      # numbers that are unpacked at a time, about
LEAST = 256             # tokens that a tile may have, however many numbers they are
LONG = 1024             # tokens from which on a tile has a multiple of 64: eight bytes are shifted
WIDTHS = 1, 2, 4, 8
# Kinds of fields: the width, the bits of the whole code, and how many of these lie below the field.
FIELDS = (1, 1, 0), (1, 3, 0), (2, 2, 0), (2, 3, 1), (2, 6, 0), (4, 4, 0), (4, 6, 2), (8, 8, 0)


class PackedCache:
    """Keys and values of `batch` sequences, up to max_len tokens, at a plan of bits (2, L, K, 8).

    `data` holds all codes, uint8. `first` (L, 2, K·batch, d, whole) are the first tokens, `newest`
    (L, 2, K·batch, d, 64) those of the group that is not complete and of the one before it: token t
    in place t % 64. `length` may be set back as far as they go, or to 0. A pass that broke off
    cannot be repeated.
    """

    def __init__(self, rounding: Rounding, bits: Tensor, batch: int, max_len: int,
                 dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        check_bits(bits, rounding.p)
        if bits.ndim != 4:
            raise ValueError(f"bits of shape {list(bits.shape)}; a cache has one plan, (2, L, K, "
                             f"{LEVELS})")
        bits = bits.cpu().long()
        if batch < 1 or max_len < 1:
            raise ValueError(f"batch {batch}, max_len {max_len}: both must be at least 1")
        self.dtype = dtype
        self.wide = torch.promote_types(dtype, torch.float32)       # attention's
        self.rounding = rounding.to(device, self.wide)
        self.projection = self.rounding.p
        self.bits, self.batch, self.max_len = bits, batch, max_len
        self._length = self.kept_from = 0       # tokens, and the first of those held as they are
        L, K, d = rounding.p.mean_v.shape
        self.shape = K, batch, d
        self.whole = rounding.p.whole
        self.turns = None                       # as in KVCache

        most = max(LEAST, UNPACKED // (K * batch * d))                  # tokens
        tiles = math.ceil(max_len / most)
        tokens = math.ceil(max_len / tiles)
        multiple = 64 if tokens >= LONG else 8                      # of a word's bits, or a byte's
        self.tile = math.ceil(tokens / multiple) * multiple
        of_token = batch * d // LEVELS * int(bits.sum())            # bits
        size = tiles * self.tile * of_token // 8
        self.data = torch.zeros(size, dtype=torch.uint8, device=device)
        self.device = self.data.device
        unrounded = {"dtype": dtype, "device": device}
        self.first = torch.zeros(L, 2, K * batch, d, self.whole, **unrounded)
        self.newest = torch.zeros(L, 2, K * batch, d, 2 * GROUP, **unrounded)

        self.layers = []
        rest = self.data
        for i in range(L):
            layer = PackedLayer(bits[:, i], batch, d, tiles, self.tile, rest)
            self.layers.append(layer)
            rest = rest[layer.size:]
        self.grids = [self.grid(i) for i in range(L)]
        self.by_mean = [by_pairs(m) for m in self.projection.mean_k]
        self.folded = [None] * L
        # For one tile: its fields, its codes, and these as numbers that can be multiplied.
        fields = max(side.rows for layer in self.layers for side in layer.sides)
        word = word_of(self.tile)
        words = self.tile // word.itemsize
        self.unpacked = torch.empty(fields, words, dtype=word, device=device)
        self.unpacked[0] = 0
        self.ordered = torch.empty(K * batch * d, words, dtype=word, device=device)
        self.workspace = torch.empty(K * batch * d, self.tile, dtype=self.wide, device=device)

    def grid(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Δ, top and what `attend` takes off, 0 for keys and μ U for values, of layer i.

        (2, K, 1, 1, d) each.
        """
        r, p = self.rounding, self.projection
        centre = p.mean_v[i][:, None] @ p.U_v[i]                    # (K, 1, d)
        both = []
        for side, left in enumerate((torch.zeros_like(centre), centre)):
            both.append(torch.stack((*r.grid(side, i, self.bits[side, i]), left)))
        return torch.stack(both, dim=1)[:, :, :, None].unbind()

    # --------------------------------------------------------------------------
    # What a pass calls

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, n: int) -> None:
        """Rewind: what follows token n − 1 is forgotten. ValueError where n's group is codes alone.

        Set ahead, a cache holds whatever numbers lie there (benchmarks).
        """
        if not 0 <= n <= self.max_len:
            raise ValueError(f"length {n} of a cache for 0 to {self.max_len} tokens")
        if 0 < n < self.kept_from:
            raise ValueError(f"length {n}: some before {self.kept_from} are codes alone; a cache "
                             f"of bits with {self.length} goes back to {self.kept_from}, or to 0")
        self._length = n
        self.kept_from = max(self.kept_from, (n // GROUP - 1) * GROUP) if n else 0

    def before_pass(self, model: Model, B: int, T: int) -> None:
        """ValueError unless the cache suits the model and has room for T more tokens."""
        check_room(self, model, B, T)
        if self.turns is None:
            self.turns = turn_table(model.config, self.max_len).to(self.device, self.wide)

    def after_pass(self, T: int) -> None:
        self.length += T

    def fold(self, i: int, weights) -> Folded:
        """The weights of layer i: values come out as v U, all d coordinates of them."""
        if self.folded[i] is None:
            K, _, d = self.shape
            heads = torch.arange(K).repeat(2, 1)
            p = self.projection
            self.folded[i] = fold(weights, heads, torch.full((K,), d), p.U_v[i], p.mean_v[i],
                                  p.mean_k[i])
        return self.folded[i]

    def output(self, i: int, a: Tensor) -> Tensor:
        """What layer i's attention adds to the states, (B, T, hidden), from what `attend` gave."""
        return F.linear(a, self.folded[i].W_o, self.folded[i].bias)

    def attend(self, i: int, qk: Tensor, v: Tensor, window=None) -> Tensor:
        """Append T tokens to layer i; each attends to the last `window` up to itself, or all.

        qk (B, K, G + 1, T, d): q and k − m after RoPE; v (B, T, K·d), times U; as W_qkv' makes
        them. Returns (B, T, H·d), for `output`.
        """
        K, B, d = self.shape
        T = qk.shape[3]
        step, _, centre = self.grids[i]
        qk = qk.transpose(0, 1).to(self.wide)                       # (K, B, G + 1, T, d)
        raw = qk[:, :, :-1]
        by_U = torch.bmm(qk.flatten(1, 3), self.rounding.U[0][i]).view(qk.shape)
        scale = d ** -0.5 * step[0]
        q = by_U[:, :, :-1] * scale[:, None]
        v = v.to(self.wide).view(B, T, K, d)
        v = v.permute(2, 0, 1, 3)                                   # (K, B, T, d)
        new = torch.stack((by_U[:, :, -1], v)) - centre           # (2, K, B, T, d)
        unrounded = self.append(i, new.mT.flatten(1, 2))
        unrounded = self.as_codes(i, torch.cat((self.first[i], unrounded), dim=-1))
        added = mean_scores(raw * d ** -0.5, self.by_mean[i], self.turns[:, :self.length + T])

        if T == 1 and not window:                                   # it sees all
            return self.attend_piece(i, q, added, unrounded, None, 0, self.length)
        first = max(0, self.length + 1 - window) if window else 0   # no new token sees earlier ones
        begin = self.length
        outputs = []
        for part, some, unseen in in_pieces(q, added, 0, self.length + T, window):
            outputs.append(self.attend_piece(i, part, some, unrounded, unseen, first, begin))
            begin += part.shape[3]
        return torch.cat(outputs, dim=1)

    # --------------------------------------------------------------------------
    # Writing

    def append(self, i: int, new: Tensor) -> Tensor:
        """Keep coordinates (2, K·B, d, T) of T more tokens: codes of groups that are now complete.

        Returns those tokens and what their first group held before, (2, K·B, d, tokens).
        """
        newest = self.newest[i].unflatten(-1, (2, GROUP))           # even groups, odd ones
        held = self.length % GROUP
        begin = self.length - held                                  # of that group
        before = newest[..., begin // GROUP % 2, :held]
        tokens = torch.cat((before, new.to(self.dtype)), dim=-1)
        end = begin + tokens.shape[-1]
        for start in range(max(begin, (end // GROUP - 1) * GROUP), end, GROUP):
            group = tokens[..., start - begin:][..., :GROUP]
            newest[..., start // GROUP % 2, :group.shape[-1]] = group
        complete = tokens.shape[-1] // GROUP * GROUP
        first = max(0, min(self.whole - begin, complete))           # whole ones among them
        self.first[i][..., begin:begin + first] = tokens[..., :first]
        if complete > first:
            step, top, _ = self.grids[i]
            K, B, _ = self.shape
            x = tokens[..., first:complete].to(self.wide).unflatten(1, (K, B))
            codes = to_code(x.mT, step, top).mT
            self.layers[i].write(codes.flatten(0, 3), begin + first - self.whole)
        return tokens

    # --------------------------------------------------------------------------
    # Reading

    def attend_piece(self, i: int, q: Tensor, added: Tensor, unrounded: Tensor,
                     unseen: Tensor | None, first: int, begin: int) -> Tensor:
        """Attention of queries (K, B, G, T, d), the tokens from `begin` on: (B, T, H·d).

        Queries are times U, and hold Δ and 1/√d. added (K, B, G, T, all tokens): q · R_n m / √d.
        unrounded: first tokens, then what `append` returned, in units of codes. unseen (T, all
        tokens): which ones they do not see; none sees those before `first`.
        """
        K, B, G, T, d = q.shape
        end = begin + T
        groups = list(self.groups_of(begin, end))
        tiles = list(self.tiles_of(first, (end - 1) // GROUP * GROUP))      # before the last group
        keys, values = unrounded[:, :, None]                        # (K·B, 1, d, tokens)
        q = q.flatten(2, 3).flatten(0, 1)                           # (K·B, G·T, d)
        added = added[..., :end].flatten(0, 1)                      # (K·B, G, T, end)
        scores = torch.zeros_like(added).flatten(1, 2)
        for tokens, n in tiles:
            codes = unrounded[0] if n is None else self.codes(i, 0, n)
            scores[..., tokens] = q @ codes[..., :tokens.stop - tokens.start]
        scores += added.flatten(1, 2)
        q, by_token = (x.unflatten(1, (G, T)) for x in (q, scores))         # views
        for rows, tokens, own in groups:
            of_own = q[:, :, rows] @ keys[..., own]
            by_token[:, :, rows, tokens] = of_own.add_(added[:, :, rows, tokens])
        if unseen is not None:
            by_token.masked_fill_(unseen[:, :end], -math.inf)
        weights = scores.softmax(-1)

        a = torch.empty_like(q)
        by_token = weights.unflatten(1, (G, T))
        for rows, tokens, own in groups:
            of_own = by_token[:, :, rows, tokens]
            a[:, :, rows] = of_own @ values[..., own].mT
            of_own.zero_()                      # or the tiles, which may hold them, add them again
        a = a.flatten(1, 2)
        for tokens, n in tiles:
            codes = unrounded[1] if n is None else self.codes(i, 1, n)
            a.baddbmm_(weights[..., tokens], codes[..., :tokens.stop - tokens.start].mT)
        step, top, centre = (x[1] for x in self.grids[i])           # (K, 1, 1, d)
        a = a.view(K, B, G * T, d)
        a = (a - top) * step + centre                               # of codes, then of v U
        a = a.view(K, B, G, T, d).permute(1, 3, 0, 2, 4)
        return a.flatten(2).to(self.dtype)

    def groups_of(self, begin: int, end: int):
        """The groups with queries of tokens from `begin` to `end`, three slices for each:

        its queries, its tokens up to the last of them, and where these are among unrounded ones.
        """
        shift = self.length - self.length % GROUP - self.whole
        for start in range(begin - begin % GROUP, end, GROUP):
            stop = min(start + GROUP, end)
            rows = slice(max(start, begin) - begin, stop - begin)
            yield rows, slice(start, stop), slice(start - shift, stop - shift)

    def tiles_of(self, first: int, end: int):
        """Of each tile with tokens from `first` to `end`: these, and its number.

        First tokens go before, with None for a number.
        """
        if first < self.whole and end:
            yield slice(0, min(self.whole, end)), None
        for n, start in enumerate(range(self.whole, end, self.tile)):
            stop = min(start + self.tile, end)
            if stop > first:
                yield slice(start, stop), n

    def codes(self, i: int, side: int, n: int) -> Tensor:
        """The codes of a tile's keys or values, (K·B, d, tokens of a tile)."""
        K, B, d = self.shape
        self.layers[i].sides[side].read(n, self.unpacked, self.ordered)
        codes = self.workspace.copy_(self.ordered.view(torch.uint8))
        return codes.view(K * B, d, -1)

    def as_codes(self, i: int, x: Tensor) -> Tensor:
        """Coordinates (2, K·B, d, T) in units of codes, but not rounded."""
        K, B, _ = self.shape
        step, top, _ = (of_side.mT for of_side in self.grids[i])    # (2, K, 1, d, 1)
        x = x.to(self.wide).unflatten(1, (K, B))
        return (x / step + top).flatten(1, 2)


class PackedLayer:
    """The tiles of a layer's keys and values: the first `size` bytes of `data`. bits (2, K, 8)."""

    def __init__(self, bits: Tensor, batch: int, d: int, tiles: int, tile: int, data: Tensor):
        self.made_of = bits, batch, d, tiles, tile, data
        self.tile, self.data = tile, data
        bits = bits.repeat_interleave(d // LEVELS, -1)              # (2, K, d)
        bits = bits[:, :, None].repeat(1, 1, batch, 1).flatten(1)   # (2, K·B·d)
        sides, fields = [], []
        self.size = 0
        for side, of_side in enumerate(bits):
            laid_out, table, self.size = lay_out(of_side, tiles, tile, data, self.size)
            table[0] += side * bits.shape[1]
            sides.append(laid_out)
            fields.append(table)
        self.sides = tuple(sides)
        # Of every field: which coordinate's it is, of keys and then of values; where its row begins
        # in the first tile, and how far it is to the next tile's, in bytes; its width; and how many
        # of the code's bits lie below it. 18 bytes a field, whatever max_len.
        fields = torch.cat(fields, dim=1).to(data.device)
        coordinate, first, stride, width, below = fields[:, :, None]
        self.coordinate = coordinate[:, 0].int()
        self.first, self.stride = first.clone(), stride.int()
        self.width, self.below = width.to(torch.uint8), below.to(torch.uint8)

    def __reduce__(self):
        """A copy is made anew: its sections are views of its own `data`."""
        return PackedLayer, self.made_of

    def write(self, codes: Tensor, start: int) -> None:
        """Codes (2·K·B·d, T), whole numbers, of the tokens from `whole` + start on."""
        apart = self.tile // 8                                      # no two share a byte
        mask = (1 << self.width.int()) - 1
        for begin in range(0, codes.shape[1], apart):
            part = codes[:, begin:begin + apart].int()[self.coordinate]     # (fields, t)
            token = torch.arange(part.shape[1], device=self.data.device) + start + begin
            n = token // self.tile
            inside = token % self.tile
            m = apart * self.width.int()                            # bytes of a row
            shift = inside // m * self.width
            place = self.first + n * self.stride + inside % m
            field = (part >> self.below) & mask
            others = self.data[place].int() & ~(mask << shift)
            self.data[place] = (others | field << shift).to(torch.uint8)


class Section(NamedTuple):
    """The fields of a width, of keys or of values."""
    words: Tensor                       # (tiles, fields, 1, words of a row)
    shifts: Tensor                      # (tokens that share a byte, 1)
    mask: Tensor                        # for all bytes of a word
    rows: slice                         # where they are unpacked to


class Joint(NamedTuple):
    """The codes that have two fields, of keys or of values: where these are unpacked to."""
    upper: slice
    lower: slice
    width: int                          # of the lower one


class PackedSide(NamedTuple):
    """The tiles of a layer's keys, or values."""
    sections: list[Section]
    joints: list[Joint]
    source: Tensor                      # (K·B·d,): where each coordinate's code is unpacked to
    rows: int                           # that are unpacked; row 0 is zero, for 0 bits

    def read(self, n: int, unpacked: Tensor, codes: Tensor) -> None:
        """Fill `codes` (K·B·d, words) with those in tile n, a byte each, zero at 0 bits.

        unpacked (rows or more, words) is overwritten, but for its first row, which is zero.
        """
        for section in self.sections:
            packed = section.words[n]                               # (fields, 1, words of a row)
            fields = unpacked[section.rows].view(len(packed), len(section.shifts), -1)
            torch.bitwise_right_shift(packed, section.shifts, out=fields)
            fields &= section.mask              # what came from the next byte goes
        for joint in self.joints:
            code = unpacked[joint.upper]
            code <<= joint.width
            code |= unpacked[joint.lower]
        torch.index_select(unpacked, 0, self.source, out=codes)


def word_of(tile: int) -> torch.dtype:
    """What is shifted at a time: eight bytes, where every row of a tile is a multiple of that."""
    return torch.int64 if tile % 64 == 0 else torch.uint8


def lay_out(bits: Tensor, tiles: int, tile: int, data: Tensor, begin: int):
    """Place coordinates with bits (K·B·d,) in `data`, from byte `begin` on.

    Returns the PackedSide, a table (5, fields) for PackedLayer.write, and the first byte behind.
    """
    coordinate, width, below = fields_of(bits)
    row = 1 + torch.arange(len(width))
    bits_of_code = bits[coordinate]
    is_upper = below + width == bits_of_code        # or the code's only one
    source = torch.zeros_like(bits)
    source[coordinate[is_upper]] = row[is_upper]

    joints = []
    for _, b, below_it in FIELDS:
        split = bits_of_code == b
        if below_it and split.any():                # the upper of two fields
            upper, lower = row[split & is_upper], row[split & ~is_upper]
            joints.append(Joint(span(upper), span(lower), below_it))

    word = word_of(tile)
    sections = []
    first, stride = torch.zeros_like(width), torch.zeros_like(width)
    for w in WIDTHS:
        mine = width == w
        count = int(mine.sum())
        if not count:
            continue
        row_bytes = tile * w // 8
        stride[mine] = count * row_bytes
        first[mine] = begin + row_bytes * torch.arange(count)
        end = begin + tiles * count * row_bytes
        words = data[begin:end].view(word).view(tiles, count, 1, -1)
        shifts = torch.arange(0, 8, w, dtype=word, device=data.device)[:, None]
        mask = torch.full((word.itemsize,), 2 ** w - 1, dtype=torch.uint8, device=data.device)
        sections.append(Section(words, shifts, mask.view(word), span(row[mine])))
        begin = end
    side = PackedSide(sections, joints, source.int().to(data.device), 1 + len(width))
    return side, torch.stack((coordinate, first, stride, width, below)), begin


def fields_of(bits: Tensor) -> Tensor:
    """Of codes with bits (n,): each field's coordinate, width, and bits below it, (3, fields).

    By width, then by bits: so the fields of a section, and those of a joint, follow one another.
    """
    fields = []
    for width, b, below in FIELDS:
        coordinate = (bits == b).nonzero()[:, 0]
        alike = [torch.full_like(coordinate, x) for x in (width, below)]
        fields.append(torch.stack((coordinate, *alike)))
    return torch.cat(fields, dim=1)


def span(rows: Tensor) -> slice:
    """Rows that follow one another, as a slice."""
    return slice(int(rows[0]), int(rows[-1]) + 1)
