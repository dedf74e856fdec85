"""A cache of rounded coordinates, packed: what a plan of bits promises is what memory holds.

The interface is that of cache.py: `model(tokens, cache=cache)`. Everything lies in one flat tensor
of bytes, `data`. First the exact tokens, in bfloat16; then for every layer tiles of many tokens. In
a tile the coordinates of the same bits lie side by side, keys and then values, a row each; a row
of 3 bits is one of 2-bit fields followed by one of 1-bit fields:

    bits    fields          a tile of n tokens, n / 8 · bits bytes
    3       2, 1            [ tokens 0 … n−1, 2 bits each ][ the same, 1 bit each ]

Field s of byte j belongs to token s · m + j, where m is the number of such bytes: so unpacking is a
shift and a mask over whole rows, and the tokens come out in their order. A tile is unpacked while
it is attended to, in a workspace for one; no other copy of the past exists. The codes are never
turned back:

    q · k̂ = Σ (q U)_j Δ_j code_j + …    the rest is the same for all tokens: softmax ignores it
    Σ a v̂ = Σ_j (Σ a code_j − top_j) Δ_j u_j + μ     folded into W_o and a bias, as Σ a = 1

An exact token takes part as codes that are not whole: x / Δ + top.
"""
import math

import torch
from torch import Tensor

from cache import KVCache
from folding import Folded, chunks_of_both
from model import Model, stored_for_rows
from rounding import BITS, EXACT, Rounding, check_bits, to_code

TILE = 2 ** 20          # numbers that are unpacked at a time, about, but of
LEAST = 256             # tokens at least
FIELDS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
SCORES = 2 ** 24        # scores computed at a time


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

        most = max(LEAST, TILE // (K * batch * d))                    # tokens
        tiles = math.ceil(max_len / most)
        self.tile = math.ceil(max_len / tiles / 8) * 8
        exact = 2 * L * K * batch * d * EXACT
        by_coordinate = bits.repeat_interleave(d // bits.shape[-1], -1)         # (2, L, K, d)
        packed = tiles * self.tile // 8 * batch * int(by_coordinate.sum())
        self.data = torch.zeros(2 * exact + packed, dtype=torch.uint8, device=device)
        self.device = self.data.device
        self.exact = self.data[:2 * exact].view(torch.bfloat16).view(L, 2, K * batch, d, EXACT)

        self.layers = []
        begin = 2 * exact
        for i in range(L):
            layer = PackedLayer(by_coordinate[:, i], batch, tiles, self.tile, self.data[begin:])
            self.layers.append(layer)
            begin += layer.size
        self.step, self.top, self.centre = [], [], []               # of each layer, (2, K, 1, d)
        for i in range(L):
            grids = [self.rounding.grid(side, i, bits[side, i]) for side in (0, 1)]
            step, top = (torch.stack(of_sides) for of_sides in zip(*grids, strict=True))
            turned = [self.rounding.mean[side][i][:, None] @ self.rounding.U[side][i]
                      for side in (0, 1)]
            self.step.append(step)
            self.top.append(top)
            self.centre.append(torch.stack(turned))
        self.folded = [None] * L
        self.workspace = torch.empty(K * batch * d, self.tile, dtype=self.wide, device=device)

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
        """The weights of layer i: values come out turned, v U, and W_o' takes sums of codes."""
        if self.folded[i] is None:
            self.folded[i] = self.fold_layer(i, weights)
        return self.folded[i]

    def fold_layer(self, i: int, weights) -> Folded:
        K, _, d = self.shape
        U = self.rounding.U[1][i]                                   # (K, d, d)
        mean = self.rounding.mean[1][i][:, None]                    # (K, 1, d)
        step, top = self.step[i][1], self.top[i][1]                 # (K, 1, d)
        q, k, v, o = weights.q_proj, weights.k_proj, weights.v_proj, weights.o_proj
        W_v = v.weight.to(U).unflatten(0, (K, d))                   # (K, d, hidden)
        W_v = (U.mT @ W_v).flatten(0, 1).to(v.weight)
        W_qkv = torch.cat((*chunks_of_both(q.weight, k.weight, K), W_v))
        b_qkv = None
        if q.bias is not None:
            b_v = v.bias.to(U).view(K, 1, d) @ U
            b_qkv = torch.cat((*chunks_of_both(q.bias, k.bias, K), b_v.flatten().to(v.bias)))

        back = step.mT * U.mT                                       # (K, d, d): Δ_j u_j
        left_out = mean - top @ back                                # (K, 1, d)
        W_o = o.weight.to(U).unflatten(1, (K, -1, d))               # (hidden, K, G, d)
        bias = torch.einsum("hkgd,kd->h", W_o, left_out[:, 0])
        W_o = torch.einsum("hkgd,kcd->hkgc", W_o, back).flatten(1)
        W_o = stored_for_rows(W_o.to(o.weight))
        return Folded(stored_for_rows(W_qkv), b_qkv, W_o, bias.to(W_o))

    def attend(self, i: int, qk: Tensor, v: Tensor, window=None) -> Tensor:
        """Append T tokens to layer i; each attends to the last `window` up to itself, or all.

        qk (B, K, G + 1, T, d): queries and keys after RoPE; v (B, T, K·d), turned. Returns
        (B, T, H·d), for W_o'.
        """
        K, B, d = self.shape
        T = qk.shape[3]
        U = self.rounding.U[0][i]
        qk = qk.transpose(0, 1).to(self.wide)                       # (K, B, G + 1, T, d)
        qk = torch.bmm(qk.flatten(1, 3), U).view(qk.shape)
        q = qk[:, :, :-1] * self.step[i][0][:, None, None]
        v = v.to(self.wide).view(B, T, K, d).permute(2, 0, 1, 3)    # (K, B, T, d)
        new = torch.stack((qk[:, :, -1], v))
        self.append(i, new - self.centre[i][:, :, None])

        end = self.length + T
        token = torch.arange(end, device=self.device)
        now = token[-T:, None]
        unseen = (token > now) | (token <= now - (window or end))
        if T == 1 and not window:
            unseen = torch.zeros(1, 0)                              # a new token sees all
        first = max(0, self.length + 1 - window) if window else 0   # no new token sees earlier ones
        size = max(1, SCORES // (q[:, :, :, 0, 0].numel() * end))
        pieces = zip(q.split(size, 3), unseen.split(size), strict=True)
        outputs = [self.attend_piece(i, part, some, first, end) for part, some in pieces]
        return torch.cat(outputs, dim=1).to(self.dtype)

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
            step, top = self.step[i][:, :, None], self.top[i][:, :, None]
            codes = to_code(new[:, :, :, exact:], step, top).mT     # (2, K, B, d, T)
            self.layers[i].write(codes.flatten(0, 3), self.length + exact - EXACT)

    # --------------------------------------------------------------------------
    # Reading

    def attend_piece(self, i: int, q: Tensor, unseen: Tensor, first: int, end: int) -> Tensor:
        """Attention of queries (K, B, G, T, d) to tokens from `first` to `end`: (B, T, K·G·d).

        unseen (T, end): which tokens a query does not see; empty where it sees all.
        """
        K, B, G, T, d = q.shape
        q = q.flatten(2, 3).flatten(0, 1)                           # (K·B, G·T, d)
        tiles = list(self.tiles_of(end, first))
        scores = q.new_full((K * B, G * T, end), -math.inf if first else 0)
        for tokens, n in tiles:
            codes = self.codes(i, 0, n)[..., :tokens.stop - tokens.start]
            scores[..., tokens] = q @ codes
        scores *= d ** -0.5
        if unseen.numel():
            scores.unflatten(1, (G, T)).masked_fill_(unseen, -math.inf)
        weights = scores.softmax(-1)
        a = torch.zeros_like(q)
        for tokens, n in tiles:
            codes = self.codes(i, 1, n)[..., :tokens.stop - tokens.start]
            a += weights[..., tokens] @ codes.mT
        return a.view(K, B, G, T, d).permute(1, 3, 0, 2, 4).flatten(2)

    def tiles_of(self, end: int, first: int):
        """Which tokens a tile holds, and its number, of those with tokens from `first` to `end`."""
        if first < EXACT:
            yield slice(0, min(EXACT, end)), None                   # the exact ones
        for n, start in enumerate(range(EXACT, end, self.tile)):
            stop = min(start + self.tile, end)
            if stop > first:
                yield slice(start, stop), n

    def codes(self, i: int, side: int, n: int | None) -> Tensor:
        """The codes of a tile's keys or values, (K·B, d, tokens)."""
        K, B, d = self.shape
        if n is not None:
            codes = self.workspace.copy_(self.layers[i].read(side, n))
            return codes.view(K * B, d, -1)
        x = self.exact[i, side].to(self.wide).view(K, B, d, EXACT)
        step, top = self.step[i][side].mT[:, None], self.top[i][side].mT[:, None]
        return (x / step + top).flatten(0, 1)


class PackedLayer:
    """The tiles of a layer: rows of codes of 2·K·B·d coordinates, those of the same bits together.

    bits (2, K, d); of `data`, what is not taken yet, the layer takes `size` bytes.
    """

    def __init__(self, bits: Tensor, batch: int, tiles: int, tile: int, data: Tensor):
        self.tile, self.data = tile, data
        self.shifts, self.masks = {}, {}
        for w in (1, 2, 4, 8):
            shifts = torch.arange(0, 8, w, dtype=torch.uint8, device=data.device)
            self.shifts[w] = shifts[:, None]
            self.masks[w] = torch.tensor(2 ** w - 1, dtype=torch.uint8, device=data.device)
        _, K, d = bits.shape
        bits = bits[:, :, None].expand(2, K, batch, d)
        bits = bits.reshape(2, -1)                                  # of rows
        self.groups = []                # rows of the same bits: (bits, rows of keys, their bytes)
        found = ([], [])                # rows of keys, of values, as the groups have them
        fields = []
        self.size = 0
        for b in BITS[1:]:
            keys, values = ((of_side == b).nonzero()[:, 0] for of_side in bits)
            count = len(keys) + len(values)
            if not count:
                continue
            wide = tile * b // 8                                    # bytes of a row in a tile
            end = self.size + tiles * count * wide
            packed = data[self.size:end].view(tiles, count, wide)
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
    wide = tile * bits // 8
    first = begin + torch.arange(len(rows)) * wide
    below, tables = bits, []
    for w in FIELDS[bits]:
        below -= w
        columns = [rows, first, *(torch.full_like(rows, x) for x in (len(rows) * wide, w, below))]
        tables.append(torch.stack(columns))
        first = first + tile * w // 8
    return tables
