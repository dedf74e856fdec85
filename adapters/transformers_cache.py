"""The compressed cache in Hugging Face's transformers: for any model that it runs.

transformers hands the `update` of its cache every layer's new keys, after RoPE, and values, and
attends to what it gets back. So a cache may keep coordinates of both and give back k̂ and v̂
(projection.py), and the model never knows:

    from adapters.transformers_cache import MatryoshkaCache
    cache = MatryoshkaCache(model, "out/projections.safetensors", budget=0.5)
    model.generate(**inputs, cache=cache)

For a LLaMA, Mistral or Qwen the projections are those of train.py; for any model, also one that
model.py refuses, this file as a script is train.py around transformers' own model, and without
--steps it makes the start and the order alone:

    python adapters/transformers_cache.py DIR --data FILE --out out       # and with --steps 200

What is saved is memory that stays between steps (`MatryoshkaCache.nbytes`). Time is not: k̂ and v̂
of a layer exist at full width while it attends, one layer after the other, where cache.py attends
to the coordinates themselves. Keys come turned, so R_n m is taken from keys that the model's dtype
has rounded already; with biases of hundreds, as some Qwen have them, that costs bfloat16 its last
bits. Written for transformers 5.24.
"""
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from model import wide
from projection import Projection, check_levels, check_ranks, plan_at, shape_of, uniform_ranks
from search import Windows, find_order, find_start
from support import cli
from support.plans import order_beside

try:
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
except ImportError:
    cli.fail("transformers is not installed: pip install transformers==5.24.0")

KINDS = {"full_attention", "sliding_attention"}         # of layers, by transformers' names
CHANGING = {"dynamic", "longrope"}      # kinds of RoPE whose frequencies depend on a text's length


# ------------------------------------------------------------------------------
# What must be known of a model

class Shape(SimpleNamespace):
    """A model's config under the names that search.py and train.py read."""


def shape_in(config) -> Shape:
    """Of a config of transformers. ValueError for a model whose layers are not all of KINDS."""
    said = config.get_text_config(decoder=True)
    name, H = said.model_type, said.num_attention_heads
    layers = getattr(said, "layer_types", None) or ["full_attention"] * said.num_hidden_layers
    if unknown := set(layers) - KINDS:
        raise ValueError(f"{name}: has layers of {', '.join(sorted(unknown))}; the cache knows "
                         f"{' and '.join(sorted(KINDS))}")
    if getattr(said, "num_kv_shared_layers", 0):
        raise ValueError(f"{name}: some of its layers share keys and values, and have no cache")
    if getattr(said, "final_logit_softcapping", None):
        raise ValueError(f"{name}: it bends its logits (final_logit_softcapping)")
    return Shape(
        model_type=name, layer_types=layers, num_hidden_layers=said.num_hidden_layers,
        num_attention_heads=H,
        num_key_value_heads=getattr(said, "num_key_value_heads", None) or H,
        head_dim=getattr(said, "head_dim", None) or said.hidden_size // H,
        hidden_size=said.hidden_size, vocab_size=said.vocab_size,
        intermediate_size=getattr(said, "intermediate_size", 4 * said.hidden_size),
        max_position_embeddings=getattr(said, "max_position_embeddings", 8192),
        tie_word_embeddings=said.tie_word_embeddings)


class Rope:
    """RoPE as the model's own code applies it: x, a row, becomes cos ⊙ x + sin ⊙ (x J).

    J pairs coordinates, with a sign: halves in most models, neighbours in others. Coordinates that
    are not turned have cos 1 and sin 0 (partial rotary). Layers of another type have another theta
    (Gemma 3), or no RoPE at all: `turned` says so, by layer, when `Adapted` has looked.
    """

    def __init__(self, model):
        base, self.config = model.base_model, shape_in(model.config)
        self.turned = [True] * self.config.num_hidden_layers
        self.embedding = getattr(base, "rotary_emb", None)
        self.apply = getattr(sys.modules[type(base).__module__], "apply_rotary_pos_emb", None)
        if self.embedding is None or self.apply is None:
            raise ValueError(f"{self.config.model_type}: its RoPE is not where others have it")
        kinds = getattr(self.embedding, "rope_type", "default")
        if changing := CHANGING & (set(kinds.values()) if isinstance(kinds, dict) else {kinds}):
            raise ValueError(f"{self.config.model_type}: RoPE of the kind {', '.join(changing)} "
                             "turns keys that are cached otherwise than those to come")
        parameters = inspect.signature(self.embedding.forward).parameters
        self.by_type = "layer_type" in parameters
        self.sources = self.signs = None

    def kind(self, layer: int) -> str | None:
        """Layers of one kind have the same RoPE."""
        return self.config.layer_types[layer] if self.by_type else None

    def rows(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, n, d) of positions (B, n), float32."""
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        cos, sin = self.embedding(like, positions, *([self.kind(layer)] if self.by_type else []))
        width, d = cos.shape[-1], self.config.head_dim
        if self.sources is None:
            self.find_pairs(width, d, cos.device)
        one = torch.ones(*cos.shape[:2], width, device=cos.device)[:, None]
        before = -self.swap(torch.ones(d, device=cos.device))[:width].expand_as(one)
        cos_of_all = self.through(one, cos, torch.zeros_like(sin))
        sin_of_all = self.through(before, torch.zeros_like(cos), sin)       # (before J) = 1
        rest = *cos_of_all.shape[:-1], d - width
        return (torch.cat((cos_of_all, cos_of_all.new_ones(rest)), dim=-1),
                torch.cat((sin_of_all, sin_of_all.new_zeros(rest)), dim=-1))

    def through(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.apply(x, x, cos, sin)[1]

    def find_pairs(self, width: int, d: int, device) -> None:
        """J as each coordinate's source and sign."""
        eye = torch.eye(width, device=device)[None, None]
        flat = torch.ones(1, width, width, device=device)
        J = self.through(eye, torch.zeros_like(flat), flat)[0, 0]
        signs, sources = J.sum(0), J.abs().argmax(0)
        if not torch.equal(J.abs().sum(0), torch.ones_like(signs)):
            raise ValueError(f"{self.config.model_type}: its RoPE turns no pairs of coordinates")
        rest = torch.arange(width, d, device=device)
        self.sources = torch.cat((sources, rest))
        self.signs = torch.cat((signs, torch.zeros_like(rest)))

    def swap(self, x: Tensor) -> Tensor:
        """x J"""
        return x[..., self.sources] * self.signs

    def turn(self, x: Tensor, rows) -> Tensor:
        cos, sin = rows
        return torch.addcmul(cos * x, sin, self.swap(x))

    def turn_back(self, x: Tensor, rows) -> Tensor:
        cos, sin = rows                     # whose squares' sum is 1, but where RoPE scales (YaRN)
        return (cos * x - sin * self.swap(x)) / (cos * cos + sin * sin)


# ------------------------------------------------------------------------------
# The cache

class Side:
    """Keys or values of a layer at their heads' ranks r: from states to coordinates and back."""

    def __init__(self, U: Tensor, ranks: Tensor):
        self.is_full = bool((ranks == U.shape[-1]).all())               # then states are stored
        self.U = [U_h[:, :r].contiguous() for U_h, r in zip(U, ranks.tolist(), strict=True)]

    def down(self, x: Tensor) -> Tensor:
        """x (B, K, T, d) becomes its coordinates (B, 1, T, Σ r)."""
        return torch.cat([x[:, h] @ U for h, U in enumerate(self.U)], dim=-1)[:, None]

    def up(self, c: Tensor, rest: Tensor) -> Tensor:
        """Coordinates (B, 1, n, Σ r) become x P + rest, (B, K, n, d).

        rest (K, B or 1, n or 1, d); where it has all of B and n the sum takes its place.
        """
        B, _, n, _ = c.shape
        sums = rest.expand(-1, B, n, -1).contiguous()
        parts = c.to(sums.dtype).flatten(0, 2).split([U.shape[1] for U in self.U], dim=-1)
        for x, part, U in zip(sums.flatten(1, 2), parts, self.U, strict=True):
            x.addmm_(part, U.T)
        return sums.transpose(0, 1)


class MatryoshkaCache(DynamicCache):
    """A cache of transformers 5.x that keeps coordinates: of each head of model as many as a plan.

    model: of AutoModelForCausalLM; the cache watches its passes, from which it learns where texts
    begin. projections: a Projection or its file. ranks: a plan (2, L, K); else that of `budget`
    along the order beside the file, uniform without one. Of each layer keys and values are
    (B, 1, n, Σ r); those of a side whose heads are all at rank d stay (B, K, n, d). `first` holds
    the first tokens of each text, whole. `crop`, `reset`, beams, sliding windows and left-padded
    batches with position_ids (as `generate` makes them) work as in DynamicCache. ValueError for a
    model or plan that does not fit, for padding without position_ids, and for positions that do
    not count up from each text's first token.
    """

    def __init__(self, model, projections: Projection | str | Path, budget: float | None = None,
                 ranks: Tensor | None = None):
        super().__init__(config=model.config)
        config = self.watch(model)
        check_levels(config.head_dim)
        if isinstance(projections, Projection):
            p, order = projections, None
        else:
            p = Projection.load(projections)
            _, order = order_beside(Path(projections), p, config)
        p.check_fits(config)
        if (ranks is None) == (budget is None):
            raise ValueError("either ranks or a budget says what is kept")
        if ranks is None:
            ranks = uniform_ranks(budget, config) if order is None else plan_at(order, config,
                                                                                budget)
        check_ranks(ranks, *shape_of(config))
        self.projection = p = p.to(model.device, wide(model.dtype))
        self.sides = [[Side(U[i], ranks[side, i]) for side, U in enumerate((p.U_k, p.U_v))]
                      for i in range(config.num_hidden_layers)]
        self.cut_off = [torch.stack([m - m @ U @ U.T for m, U in zip(means, of[1].U, strict=True)])
                        for means, of in zip(p.mean_v, self.sides, strict=True)]   # μ (I − P)

    def watch(self, model) -> Shape:
        """See passes of this model from now on; its shape."""
        self.rope = rope_of(model)
        self.first = [[None, None] for _ in self.rope.turned]   # (B, K, whole, d) each
        self.start = self.base = None       # column and position of texts' first tokens, (B, 1)
        self.tables = {}                    # of a pass: cos and sin, for all layers
        return self.rope.config

    @property
    def nbytes(self) -> int:
        """Bytes that stay between passes: coordinates, and first tokens."""
        kept = [x for layer in self.layers if layer.is_initialized for x in (layer.keys,
                                                                             layer.values)]
        return sum(x.nbytes for x in kept + [x for sides in self.first for x in sides
                                             if x is not None])

    # --------------------------------------------------------------------------
    # Where texts begin

    def before_pass(self, B: int, T: int, positions: Tensor | None, is_padded: bool) -> None:
        """Learn from a pass's position_ids (B, T) where texts begin.

        Pads repeat the first position, so the last token that has it is the first of the text.
        """
        n = self.get_seq_length()
        if positions is None:
            if is_padded:
                raise ValueError("a batch with padding needs position_ids, as `generate` makes "
                                 "them from the mask: they say where each text begins")
            begin = n if self.base is None or n == 0 else self.base[:1] + n - self.start[:1]
            positions = begin + torch.arange(T, device=self.projection.mean_v.device)[None]
        if positions.ndim != 2:
            raise ValueError(f"positions of shape {list(positions.shape)}; expected (batch, T)")
        if n == 0:
            self.base, self.start = positions[:, :1].clone(), torch.full_like(positions[:, :1], -1)
        rows = max(len(positions), len(self.start))
        self.start = self.start.clamp(max=n - 1) + (positions == self.base).sum(1, keepdim=True)
        if (self.positions(n, n + T) != positions).any():
            raise ValueError("position_ids must count up from each text's first token, and be the "
                             "first one's for padding, which is on the left")
        alike = rows > 1 and all((x == x[:1]).all() for x in (self.start, self.base))
        if alike:
            self.start, self.base = self.start[:1], self.base[:1]
        begins = self.start[:, 0].tolist()
        self.texts = [(slice(None) if len(begins) == 1 else slice(b, b + 1), begin)
                      for b, begin in enumerate(begins)]
        self.tables = {}

    def positions(self, begin: int, end: int) -> Tensor:
        """Of columns begin … end − 1: (B, n), or (1, n) where texts begin together."""
        columns = torch.arange(begin, end, device=self.start.device)
        return (columns - self.start).clamp(min=0) + self.base

    def rows(self, layer: int, begin: int, end: int):
        """cos and sin of columns begin … end − 1, made once a pass for all layers of a kind."""
        key = self.rope.kind(layer), begin
        if key not in self.tables:
            self.tables[key] = self.rope.rows(layer, self.positions(begin, end))
        return self.tables[key]

    # --------------------------------------------------------------------------
    # What a layer calls

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args, **kwargs):
        """Store keys, after RoPE, and values (B, K, T, d); returns k̂ and v̂ of all that is seen."""
        i, T, p = layer_idx, k.shape[2], self.projection
        if self.start is None:
            raise ValueError("a cache that was made for another model")
        n, begin = self.layers[i].get_mask_sizes(T)             # columns seen, from `begin` on
        keys, values = self.sides[i]
        k_hat, v_hat = k, v
        if not keys.is_full:
            turned = self.turned_mean(i, begin, n)
            centred = k.to(turned.dtype) - turned[:, :, -T:].transpose(0, 1)
            k_hat = keys.down(centred).to(k.dtype)
        if not values.is_full:
            v_hat = values.down(v.to(p.mean_v.dtype)).to(v.dtype)
        k_hat, v_hat = super().update(k_hat, v_hat, i)
        self.give_back(i)
        if not keys.is_full:
            k_hat = self.with_whole(i, 0, keys.up(k_hat, turned).to(k.dtype), k, begin)
        if not values.is_full:
            v_hat = values.up(v_hat, self.cut_off[i][:, None, None]).to(v.dtype)
            v_hat = self.with_whole(i, 1, v_hat, v, begin)
        return k_hat, v_hat

    def turned_mean(self, i: int, begin: int, n: int) -> Tensor:
        """R_n m of layer i at columns begin … begin + n − 1, a tensor of its own; zeros without m.

        (K, B or 1, n, d)
        """
        p = self.projection
        if p.mean_k is None:
            return torch.zeros_like(p.mean_v[i])[:, None, None].repeat(1, 1, n, 1)
        m = p.mean_k[i][:, None, None]                          # (K, 1, 1, d)
        if not self.rope.turned[i]:
            return m.repeat(1, 1, n, 1)
        return self.rope.turn(m, [x.transpose(0, 1) for x in self.rows(i, begin, begin + n)])

    def with_whole(self, i: int, side: int, x_hat: Tensor, x: Tensor, begin: int) -> Tensor:
        """Keep those of x (B, K, T, d) that are first tokens; x̂ with all of these in it."""
        w = self.projection.whole
        end = begin + x_hat.shape[2]
        new = end - x.shape[2]                                  # the first new column
        if self.first[i][side] is None:
            self.first[i][side] = x.new_zeros(*x.shape[:2], w, x.shape[3])
        first = self.first[i][side]
        for texts, at in self.texts:
            a, b = max(at, new), min(at + w, end)
            if a < b:
                first[texts, :, a - at:b - at] = x[texts, :, a - new:b - new]
            a = max(at, begin)
            if a < b:
                x_hat[texts, :, a - begin:b - begin] = first[texts, :, a - at:b - at]
        return x_hat

    def give_back(self, i: int) -> None:
        """Of a sliding layer transformers keeps a view, and with it all that it is a view of."""
        layer = self.layers[i]
        for name in ("keys", "values"):
            kept = getattr(layer, name)
            if kept.untyped_storage().nbytes() > kept.nbytes:
                setattr(layer, name, kept.clone())

    # --------------------------------------------------------------------------
    # Batches that change

    def of_texts(self, change) -> None:
        """`change` the tensors of texts that do not lie in transformers' layers."""
        self.first = [[x if x is None else change(x) for x in sides] for sides in self.first]
        if self.start is not None and len(self.start) > 1:
            self.start, self.base = change(self.start), change(self.base)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.of_texts(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.of_texts(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.of_texts(lambda x: x[indices])

    def reset(self) -> None:
        super().reset()
        self.first = [[None, None] for _ in self.first]
        self.start = self.base = None


def rope_of(model) -> Rope:
    """A model's RoPE, looked at once; from then on passes with a MatryoshkaCache are watched."""
    if not hasattr(model, "matryoshka_rope"):
        model.matryoshka_rope = Adapted(model).rope
        model.base_model.register_forward_pre_hook(before_pass, with_kwargs=True)
        model.base_model.register_forward_hook(after_pass, with_kwargs=True)
    return model.matryoshka_rope


def cache_in(kwargs: dict):
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    return cache if isinstance(cache, MatryoshkaCache) else None


def before_pass(base, args, kwargs) -> None:
    if (cache := cache_in(kwargs)) is not None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        mask = kwargs.get("attention_mask")
        is_padded = isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all()
        cache.before_pass(*tokens.shape[:2], kwargs.get("position_ids"), is_padded)


def after_pass(base, args, kwargs, output) -> None:
    if (cache := cache_in(kwargs)) is not None:
        cache.tables = {}


# ------------------------------------------------------------------------------
# Calibration: the model of transformers, as search.py, train.py and evaluate.py take one

class Hooked(DynamicCache):
    """A cache that keeps nothing: hook(layer, k, v) gives what the layer attends to."""

    def __init__(self, config, hook):
        super().__init__(config=config)
        self.hook = hook

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args, **kwargs):
        return self.hook(layer_idx, k, v)


class Adapted:
    """model.Model's face on a model of transformers; its weights are frozen.

    ValueError where it would be another model: logits that are no product of states and lm_head, or
    keys that RoPE, turned back, does not make the same at every position.
    """

    def __init__(self, model):
        self.model = model.eval().requires_grad_(False)
        self.rope = Rope(model)
        self.config, self.lm_head = self.rope.config, model.get_output_embeddings()
        self.bias = getattr(self.lm_head, "bias", None)
        if self.bias is not None:           # of Phi: the weight of one more state, which is 1
            W = torch.cat((self.lm_head.weight, self.bias[:, None]), dim=1)
            self.lm_head = SimpleNamespace(weight=W)
        self.device, self.dtype, self.parameters = model.device, model.dtype, model.parameters
        self.scale = 1.0
        try:
            self.check()
        except (RuntimeError, TypeError, IndexError) as error:
            raise ValueError(f"{self.config.model_type}: does not run as other models do "
                             f"({first_sentence(error)})") from None

    def norm(self, states: Tensor) -> Tensor:
        """States come normed; some models (Granite) scale their logits."""
        if self.bias is not None:
            states = torch.cat((states, torch.ones_like(states[..., :1])), dim=-1)
        return states * self.scale

    def hidden(self, tokens: Tensor, project=None, observe=None, start=0, recompute=False):
        """Normed states (B, T, hidden); see model.Model.hidden. Nothing is recomputed."""
        B, T = tokens.shape
        start = torch.as_tensor(start).view(-1, 1)
        positions = (start + torch.arange(T)).to(tokens.device)
        tables = {}

        def hook(i: int, k: Tensor, v: Tensor):
            if self.rope.kind(i) not in tables:
                tables[self.rope.kind(i)] = self.rope.rows(i, positions)
            rows = tables[self.rope.kind(i)]
            turn, before = self.turning(i, rows, k)
            if observe is not None:
                observe(i, None, before, v, turn)
                return k, v
            k_hat, v_hat = project(i, before, v.to(before.dtype), turn)
            return k_hat.to(k.dtype), v_hat.to(v.dtype)

        return self.run(tokens, positions, hook if project or observe else None)

    def turning(self, i: int, rows, k: Tensor):
        """`turn`, and k before it, float32 or wider."""
        k = k.to(wide(k.dtype))
        if not self.rope.turned[i]:
            return (lambda x: x), k
        return (lambda x: self.rope.turn(x, rows)), self.rope.turn_back(k, rows)

    def run(self, tokens: Tensor, positions: Tensor, hook) -> Tensor:
        cache = None if hook is None else Hooked(self.model.config, hook)
        positions = positions.expand(len(tokens), -1)
        return self.model.base_model(tokens, position_ids=positions, cache=cache,
                                     use_cache=cache is not None).last_hidden_state

    @torch.no_grad()
    def check(self, n: int = 12) -> None:
        """Run a few tokens at two places, and see that all is where it should be."""
        name, (L, K, d) = self.config.model_type, shape_of(self.config)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(min(1000, self.config.vocab_size), (1, n), generator=generator)
        tokens = tokens.to(self.device)
        near = 0.05 if self.dtype.itemsize == 2 else 1e-3
        keys, places = [{}, {}], [torch.arange(n, device=self.device) + at for at in (0, 77)]
        for found, place in zip(keys, places, strict=True):
            def hook(i, k, v, found=found):
                if k.shape != (1, K, n, d) or v.shape != k.shape:
                    raise ValueError(f"{name}: keys {list(k.shape)} and values {list(v.shape)} of "
                                     f"layer {i}; expected {[1, K, n, d]} for both")
                found[i] = k.to(wide(k.dtype))
                return k, v
            states = self.run(tokens, place[None], hook)
        if len(keys[0]) != L:
            raise ValueError(f"{name}: {len(keys[0])} of {L} layers have a cache")
        for i in range(L):
            rows = [self.rope.rows(i, place[None]) for place in places]
            back = [self.rope.turn_back(found[i], row) for found, row in zip(keys, rows,
                                                                            strict=True)]
            as_is = [found[i] for found in keys]
            if far(*back) > near:
                if far(*as_is) > near:
                    raise ValueError(f"{name}: how positions turn the keys of layer {i} is not "
                                     "known here")
                self.rope.turned[i] = False
        mine = self.norm(states).float() @ self.lm_head.weight.float().T
        theirs = self.model(tokens, position_ids=places[1][None]).logits.float()
        self.scale = float((mine * theirs).sum() / mine.square().sum())
        if far(self.scale * mine, theirs) > near:
            raise ValueError(f"{name}: its logits are more than a product of states and lm_head")
        if abs(self.scale - 1) < near:
            self.scale = 1.0


def far(x: Tensor, y: Tensor) -> float:
    """How far x is from y, as a share of y."""
    return float((x - y).norm() / y.norm())


def calibrate(model, tokens, whole: int = 4, windows: int = 64, batch: int = 4, seq: int = 256,
              positions: int = 0, seed: int = 0) -> tuple[Projection, Tensor]:
    """The start and the order of search.py's two sweeps, for any model of transformers.

    tokens (n,): a numpy row of ids; positions: windows lie anywhere below [8,192, or what the model
    was made for].
    """
    adapted = Adapted(model)
    positions = positions or min(8192, adapted.config.max_position_embeddings)
    windows = Windows(tokens, windows, batch, seq, positions, seed)
    projection = find_start(adapted, windows, whole)
    projection.positions = positions
    return projection, find_order(adapted, projection, windows)


# ------------------------------------------------------------------------------
# The script

def read_config(file: Path) -> Shape:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        config = AutoConfig.from_pretrained(file.parent)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: {first_sentence(error)}") from None
    return shape_in(config)


def first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].split(". ")[0]


def load(folder: Path, device, dtype: torch.dtype) -> Adapted:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder}: {first_sentence(error)}") from None
    return Adapted(model.to(device))


def main():
    sys.argv[1:1] = ["--steps", "0"]                    # unless it is said later
    if len(sys.argv) > 3 and not sys.argv[3].startswith("-"):
        sys.argv.insert(3, "--ckpt")
    train.main(__doc__, read_config, load)


if __name__ == "__main__":
    cli.run_script(main)
