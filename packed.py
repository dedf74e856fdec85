"""A cache of rounded coordinates, packed: what a plan of bits promises is what memory holds.

The interface is that of cache.py: `model(tokens, cache=cache)`. Everything lies in one flat tensor
of bytes, `data`: first the exact tokens, in bfloat16, then the layers. A layer groups its
coordinates by their bits. A group lies in tiles of n tokens, one after the other, and in each every
coordinate, of keys and then of values, has a row of codes, n / 8 · bits bytes:

    bits    fields      a row
    3       2, 1        [ the upper two bits of tokens 0 … n−1 ][ the last bit of the same ]
    6       4, 2        [ the upper four ][ the last two ]
    others  all         [ the bits of tokens 0 … n−1 ]

Of m bytes of fields, field s of byte j belongs to token s · m + j: so unpacking is a shift and a
mask over whole rows, and the tokens come out in their order. A tile is unpacked while it is
attended to, in a workspace for one; no other copy of the past exists. Attention reads the codes:

    q · k̂ = Σ (q U)_j Δ_j code_j + q · μ − Σ (q U)_j Δ_j top_j
    Σ a v̂ = Σ_j (Σ a code_j − top_j) Δ_j u_j + μ            a: attention's weights, Σ a = 1

What follows the first sum of a score is the same for all tokens, and softmax does not see it. A
value's codes become coordinates v U again when they are summed, a single vector for each query;
W_o' = Uᵀ W_o takes them (folding.py). An exact token takes part as codes that are not whole,
x / Δ + top.
"""
import math

import torch
from torch import Tensor

from attention import SCORES, unseen_tokens
from cache import KVCache
from folding import Folded, Layout, fold_heads, heads_of
from model import Model
from projection import LEVELS
from rounding import BITS, EXACT, Rounding, check_bits, to_code

TILE = 2 ** 20          # numbers that are unpacked at a time, about
LEAST = 256             # tokens of a tile at least, however many numbers they are
FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}


class PackedCache:
    """Keys and values of `batch` sequences, up to max_len tokens, at a plan of bits (2, L, K, 8).

    `data` is the one tensor, uint8; `length` the number of tokens in it.
    """

    def __init__(
        self,
        rounding: Rounding,
        bits: Tensor,
        batch: int,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        check_bits(bits, rounding.p)
        if batch < 1 or max_len < 1:
            raise ValueError(f"batch {batch}, max_len {max_len}: both must be at least 1")
        self.dtype = dtype
        self.wide = torch.promote_types(dtype, torch.float32)       # attention's
        self.rounding = rounding.to(device, self.wide)
        self.projection = self.rounding.p
        self.bits, self.batch, self.max_len = bits, batch, max_len
        self.length = 0
        L, K, d = rounding.p.mean_v.shape
        self.shape = K, batch, d

        most = max(LEAST, TILE // (K * batch * d))                  # tokens
        tiles = math.ceil(max_len / most)
        self.tile = math.ceil(max_len / tiles / 8) * 8
        exact_shape = L, 2, K * batch, d, EXACT
        exact_bytes = 2 * math.prod(exact_shape)
        of_token = batch * d // LEVELS * int(bits.sum())            # bits
        packed_bytes = tiles * self.tile * of_token // 8
        size = exact_bytes + packed_bytes
        self.data = torch.zeros(size, dtype=torch.uint8, device=device)
        self.device = self.data.device
        exact = self.data[:exact_bytes].view(torch.bfloat16)
        self.exact = exact.view(exact_shape)

        self.layers = []
        rest = self.data[exact_bytes:]
        for i in range(L):
            layer = PackedLayer(bits[:, i], batch, d, tiles, self.tile, rest)
            self.layers.append(layer)
            rest = rest[layer.size:]
        self.grids = [self.grid(i) for i in range(L)]
        self.folded = [None] * L
        self.workspace = torch.empty(K * batch * d, self.tile, dtype=self.wide, device=device)

    def grid(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Δ, top and μ U of the keys and the values of layer i, (2, K, 1, d) each."""
        r = self.rounding
        both = []
        for side in (0, 1):
            step, top = r.grid(side, i, self.bits[side, i])
            centre = r.mean[side][i][:, None] @ r.U[side][i]
            both.append(torch.stack((step, top, centre)))
        return torch.stack(both, dim=1).unbind()

    # --------------------------------------------------------------------------
    # What a pass calls

    check_room = KVCache.check_room

    def begin(self, model: Model, B: int, T: int) -> tuple[Tensor, Tensor]:
        """RoPE's cosines and sines of T more tokens. ValueError unless they fit."""
        self.check_room(model, B, T)
        return model.rope.rows(self.length, T, self.dtype, self.device)

    def advance(self, T: int) -> None:
        self.length += T

    def fold(self, i: int, weights) -> Folded:
        """The weights of layer i: all of v U comes out, and W_o' takes as much."""
        if self.folded[i] is None:
            K, _, d = self.shape
            layout = Layout(
                head_order=torch.arange(K).repeat(2, 1),
                ranks=torch.full((K,), d),
                U=self.rounding.U[1][i],
                means=self.rounding.mean[1][i],
            )
            heads = heads_of(weights, K, d)
            self.folded[i] = fold_heads(heads, layout, layout.U, layout.means)
        return self.folded[i]

    def attend(self, i: int, qk: Tensor, v: Tensor, window=None) -> Tensor:
        """Append T tokens to layer i; each attends to the last `window` up to itself, or all.

        qk (B, K, G + 1, T, d): queries and keys after RoPE; v (B, T, K·d), turned. Returns
        (B, T, H·d), for W_o'.
        """
        K, B, d = self.shape
        T = qk.shape[3]
        step, _, centre = self.grids[i]
        qk = qk.transpose(0, 1).to(self.wide)                       # (K, B, G + 1, T, d)
        turned = torch.bmm(qk.flatten(1, 3), self.rounding.U[0][i])
        turned = turned.view(qk.shape)
        q = turned[:, :, :-1] * step[0][:, None, None]
        v = v.to(self.wide).view(B, T, K, d)
        v = v.permute(2, 0, 1, 3)                                   # (K, B, T, d)
        new = torch.stack((turned[:, :, -1], v))
        self.append(i, new - centre[:, :, None])

        end = self.length + T
        if T == 1 and not window:                                   # it sees all
            return self.attend_piece(i, q, None, 0, end)
        first = max(0, self.length + 1 - window) if window else 0   # no new token sees earlier ones
        unseen = unseen_tokens(0, end, T, window, self.device)
        scores_of_one = q[:, :, :, 0, 0].numel() * end
        size = max(1, SCORES // scores_of_one)
        outputs = []
        for part, unseen_part in zip(q.split(size, 3), unseen.split(size), strict=True):
            outputs.append(self.attend_piece(i, part, unseen_part, first, end))
        return torch.cat(outputs, dim=1)

    # --------------------------------------------------------------------------
    # Writing

    def append(self, i: int, new: Tensor) -> None:
        """Write coordinates (2, K, B, T, d): the first tokens exactly, the others as codes."""
        T = new.shape[3]
        exact = min(T, max(0, EXACT - self.length))
        if exact:
            rows = new[:, :, :, :exact].flatten(1, 2)
            self.exact[i][..., self.length:self.length + exact] = rows.mT
        if exact < T:
            step, top, _ = (x[:, :, None] for x in self.grids[i])
            codes = to_code(new[:, :, :, exact:], step, top)
            codes = codes.mT.flatten(0, 3)                          # (2·K·B·d, T)
            self.layers[i].write(codes, self.length + exact - EXACT)

    # --------------------------------------------------------------------------
    # Reading

    def attend_piece(
        self,
        i: int,
        q: Tensor,
        unseen: Tensor | None,
        first: int,
        end: int,
    ) -> Tensor:
        """Attention of queries (K, B, G, T, d) to tokens from `first` to `end`: (B, T, H·d).

        unseen (T, end): which tokens a query does not see, if any.
        """
        K, B, G, T, d = q.shape
        tiles = list(self.tiles_of(end, first))
        q = q.flatten(2, 3).flatten(0, 1)                           # (K·B, G·T, d)
        scores = q.new_zeros(K * B, G * T, end)
        for tokens, n in tiles:
            scores[..., tokens] = q @ self.codes(i, 0, tokens, n)
        scores *= d ** -0.5
        if unseen is not None:
            by_token = scores.unflatten(1, (G, T))
            by_token.masked_fill_(unseen, -math.inf)
        weights = scores.softmax(-1)

        a = torch.zeros_like(q)
        for tokens, n in tiles:
            a += weights[..., tokens] @ self.codes(i, 1, tokens, n).mT
        step, top, centre = (x[1][:, None] for x in self.grids[i])  # (K, 1, 1, d)
        a = a.view(K, B, G * T, d)
        a = (a - top) * step + centre                               # of codes, then of v U
        a = a.view(K, B, G, T, d).permute(1, 3, 0, 2, 4)
        return a.flatten(2).to(self.dtype)

    def tiles_of(self, end: int, first: int):
        """Which tokens a tile holds, and its number, of those with tokens from `first` to `end`."""
        if first < EXACT:
            yield slice(0, min(EXACT, end)), None                   # the exact ones
        for n, start in enumerate(range(EXACT, end, self.tile)):
            stop = min(start + self.tile, end)
            if stop > first:
                yield slice(start, stop), n

    def codes(self, i: int, side: int, tokens: slice, n: int | None) -> Tensor:
        """The codes of a tile's keys or values, (K·B, d, tokens)."""
        K, B, d = self.shape
        if n is not None:
            codes = self.workspace.copy_(self.layers[i].read(side, n))
            codes = codes.view(K * B, d, -1)
        else:
            x = self.exact[i, side].to(self.wide).view(K, B, d, EXACT)
            step, top, _ = (x[side].mT[:, None] for x in self.grids[i])
            codes = (x / step + top).flatten(0, 1)
        return codes[..., :tokens.stop - tokens.start]


class PackedLayer:
    """The tiles of a layer: rows of codes of 2·K·B·d coordinates, those of the same bits together.

    bits (2, K, 8); of `data`, what is not taken yet, the layer takes `size` bytes.
    """

    def __init__(self, bits: Tensor, batch: int, d: int, tiles: int, tile: int, data: Tensor):
        self.tile, self.data = tile, data
        self.shifts, self.masks = {}, {}
        for w in (1, 2, 4, 8):
            shifts = torch.arange(0, 8, w, dtype=torch.uint8, device=data.device)
            self.shifts[w] = shifts[:, None]
            self.masks[w] = torch.tensor(2 ** w - 1, dtype=torch.uint8, device=data.device)
        bits = bits.repeat_interleave(d // LEVELS, -1)              # (2, K, d)
        bits = bits[:, :, None].repeat(1, 1, batch, 1).flatten(1)   # of rows
        self.groups = []                # rows of the same bits: (bits, rows of keys, their bytes)
        found = ([], [])                # rows of keys, of values, as the groups have them
        fields = []
        self.size = 0
        for b in BITS[1:]:
            keys, values = ((of_side == b).nonzero()[:, 0] for of_side in bits)
            count = len(keys) + len(values)
            if not count:
                continue
            row_bytes = tile * b // 8
            end = self.size + tiles * count * row_bytes
            packed = data[self.size:end].view(tiles, count, row_bytes)
            self.groups.append((b, len(keys), packed))
            found[0].append(keys)
            found[1].append(values)
            rows = torch.cat((keys, values + bits.shape[1]))
            fields += fields_of(rows, b, tile, self.size)
            self.size = end
        self.find_sources(found, bits.shape[1])
        # Of every field of a token: its row, its first byte, those to the next tile, its width, and
        # how many of the row's bits lie below it.
        columns = torch.cat(fields, dim=1) if fields else torch.zeros(5, 0, dtype=torch.long)
        columns = columns[:, :, None].to(data.device)
        self.row, self.first, self.stride, self.width, self.below = columns

    def find_sources(self, found: tuple, rows: int) -> None:
        """For `read`: where each row lies among those unpacked, of which the last is zero."""
        self.sources, self.unpacked = [], []
        for of_side in found:
            places = torch.cat([torch.zeros(0, dtype=torch.long), *of_side])
            source = torch.full((rows,), len(places))
            source[places] = torch.arange(len(places))
            self.sources.append(source.to(self.data.device))
            self.unpacked.append(len(places) + 1)

    def write(self, codes: Tensor, start: int) -> None:
        """Codes (2·K·B·d, T) of the tokens from `start` on: whole numbers."""
        apart = self.tile // 8                                      # no two share a byte
        mask = (1 << self.width) - 1
        for begin in range(0, codes.shape[1], apart):
            part = codes[:, begin:begin + apart].long()[self.row[:, 0]]         # (fields, t)
            token = torch.arange(part.shape[1], device=self.data.device) + start + begin
            n = token // self.tile
            inside = token % self.tile
            m = apart * self.width                                  # bytes of a row of fields
            shift = inside // m * self.width
            place = self.first + n * self.stride + inside % m
            field = (part >> self.below) & mask
            others = self.data[place].long() & ~(mask << shift)
            self.data[place] = (others | field << shift).to(torch.uint8)

    def read(self, side: int, n: int) -> Tensor:
        """The codes of a side's K·B·d rows in tile n: (rows, tile) uint8, zero at 0 bits."""
        unpacked = self.data.new_empty(self.unpacked[side], self.tile)
        unpacked[-1] = 0
        first = 0
        for b, keys, packed in self.groups:
            part = packed[n, keys:] if side else packed[n, :keys]
            last = first + len(part)
            self.unpack(part, b, unpacked[first:last])
            first = last
        return unpacked.index_select(0, self.sources[side])

    def unpack(self, packed: Tensor, bits: int, out: Tensor) -> None:
        """Rows of bytes to rows of codes (rows, tile)."""
        begin = 0
        for w in FIELDS[bits]:
            m = self.tile * w // 8
            part = packed[:, None, begin:begin + m]
            fields = torch.bitwise_right_shift(part, self.shifts[w])
            if begin == 0:
                fields = torch.bitwise_and(fields, self.masks[w], out=out.view(len(out), 8 // w, m))
            else:
                fields &= self.masks[w]
                out <<= w
                out |= fields.flatten(1)
            begin += m


def fields_of(rows: Tensor, bits: int, tile: int, begin: int) -> list[Tensor]:
    """For `write`: a table (5, rows) for each field of rows that begin at byte `begin`."""
    row_bytes = tile * bits // 8
    first = begin + torch.arange(len(rows)) * row_bytes
    below, tables = bits, []
    for w in FIELDS[bits]:
        below -= w
        alike = [torch.full_like(rows, x) for x in (len(rows) * row_bytes, w, below)]
        tables.append(torch.stack((rows, first, *alike)))
        first = first + tile * w // 8
    return tables
