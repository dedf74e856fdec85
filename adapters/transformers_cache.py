"""The compressed cache in Hugging Face's transformers: for any model that it runs.

transformers hands the `update` of its cache every layer's new keys, after RoPE, and values, and
attends to what it gets back. So a cache may keep coordinates of both and return k̂ and v̂
(projection.py), and the model never knows:

    from adapters.transformers_cache import MatryoshkaCache
    cache = MatryoshkaCache(model, "out/projections.safetensors", budget=0.5)
    model.generate(**inputs, cache=cache)

For a LLaMA, Mistral or Qwen the projections are those of train.py. For any model, also one that
model.py refuses, this file calibrates transformers' own with train.py: without --steps the start
and the order alone (`find_start`, `find_order` in search.py), which `calibrate` gives in Python.

    python adapters/transformers_cache.py DIR --data FILE --out out       # and with --steps 200

What is saved is memory that stays between passes (`MatryoshkaCache.nbytes`). Time is not: k̂ and v̂
of a layer exist at full width while it attends, one layer after the other, where cache.py attends
to the coordinates themselves. Keys come turned and in the model's dtype: what rounding to bfloat16
took of keys with biases of hundreds, as some Qwen have them, no subtraction of R_n m gives back.

Written for transformers 5.24, whose argument is `cache`; before it was `past_key_values`.
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
from projection import (
    LEVELS,
    Projection,
    check_levels,
    check_ranks,
    plan_at,
    shape_of,
    uniform_ranks,
)
from search import Windows, find_order, find_start
from support import cli
from support.data import begun
from support.plans import order_beside

try:
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
except ImportError:
    cli.fail("transformers is not installed: pip install transformers==5.24.0")

LAYER_TYPES = {"full_attention", "sliding_attention"}   # that are known here, of transformers'
CHANGING = {"dynamic", "longrope"}      # types of RoPE whose frequencies depend on a text's length


# ------------------------------------------------------------------------------
# What must be known of a model

class Shape(SimpleNamespace):
    """A model's config under the names that search.py and train.py read."""


def shape_in(config) -> Shape:
    """Of a config of transformers. ValueError for layers without keys and values of their own, or
    of another type, and for logits that are capped.
    """
    said = config.get_text_config(decoder=True)
    name, H = said.model_type, said.num_attention_heads
    layers = getattr(said, "layer_types", None) or ["full_attention"] * said.num_hidden_layers
    if unknown := set(layers) - LAYER_TYPES:
        raise ValueError(f"{name}: has layers of {', '.join(sorted(unknown))}; the cache knows "
                         f"{' and '.join(sorted(LAYER_TYPES))}")
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
    """RoPE as the model's own code applies it: a row x becomes cos ⊙ x + sin ⊙ (x J).

    J pairs coordinates, with a sign: halves in most models, neighbours in others. Coordinates that
    are not turned have cos 1 and sin 0 (partial rotary). Layers of another type may have another
    theta (Gemma 3: `layer_type`). Some have no RoPE: `turned[i]` is then False, which `Adapted`
    finds out.
    """

    def __init__(self, model):
        base, self.config = model.base_model, shape_in(model.config)
        self.turned = [True] * self.config.num_hidden_layers
        self.embedding = getattr(base, "rotary_emb", None)
        self.apply = getattr(sys.modules[type(base).__module__], "apply_rotary_pos_emb", None)
        if self.embedding is None or self.apply is None:
            raise ValueError(f"{self.config.model_type}: its RoPE is not where others have it")
        types = getattr(self.embedding, "rope_type", "default")
        if changing := CHANGING & (set(types.values()) if isinstance(types, dict) else {types}):
            raise ValueError(f"{self.config.model_type}: RoPE of the type {', '.join(changing)} "
                             "changes its frequencies as a text grows, and cached keys not")
        parameters = inspect.signature(self.embedding.forward).parameters
        self.by_type = "layer_type" in parameters
        self.sources = self.signs = None                # J, from the first call of `cos_sin` on

    def __deepcopy__(self, _):
        return self                             # a copied model, or cache, has the same RoPE

    def layer_type(self, layer: int) -> str | None:
        """Layers of the same type have the same RoPE."""
        return self.config.layer_types[layer] if self.by_type else None

    def cos_sin(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, n, d) of positions (B, n), float32.

        The model's may lie in another order than its keys: what these are really multiplied by is
        read off at vectors of ones.
        """
        like = torch.empty(0, device=positions.device)              # for its dtype and device
        by_type = [self.layer_type(layer)] if self.by_type else []
        cos, sin = self.embedding(like, positions, *by_type)
        width, d = cos.shape[-1], self.config.head_dim
        if self.sources is None:
            self.find_pairs(width, d, cos.device)
        ones = torch.ones(*cos.shape[:2], width, device=cos.device)[:, None]
        back = -self.signs[:width].expand_as(ones)                  # back J = 1, as 1 J = signs
        found = (self.through(ones, cos, torch.zeros_like(sin)),
                 self.through(back, torch.zeros_like(cos), sin))
        unturned = *found[0].shape[:-1], d - width
        return tuple(torch.cat((x, x.new_full(unturned, fill)), dim=-1)
                     for x, fill in zip(found, (1.0, 0.0), strict=True))

    def through(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, 1, n, width) as the model's code turns a key."""
        return self.apply(x, x, cos, sin)[1]

    def find_pairs(self, width: int, d: int, device) -> None:
        """J, as each coordinate's source and sign."""
        eye = torch.eye(width, device=device)[None, None]
        ones = torch.ones(1, width, width, device=device)
        J = self.through(eye, torch.zeros_like(ones), ones)[0, 0]
        if not torch.equal(J @ J, -eye[0, 0]) or not torch.equal(J.abs().sum(0), ones[0, 0]):
            raise ValueError(f"{self.config.model_type}: its RoPE turns no pairs of coordinates")
        unturned = torch.arange(width, d, device=device)
        self.sources = torch.cat((J.abs().argmax(0), unturned))
        self.signs = torch.cat((J.sum(0), torch.zeros_like(unturned)))

    def swap(self, x: Tensor) -> Tensor:
        """x J"""
        return x[..., self.sources] * self.signs

    def turn(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = cos_sin
        return torch.addcmul(cos * x, sin, self.swap(x))

    def turn_back(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = cos_sin                  # cos² + sin² is 1, but where RoPE also scales (YaRN)
        return (cos * x - sin * self.swap(x)) / (cos * cos + sin * sin)


class Hooked(DynamicCache):
    """A cache that keeps nothing: hook(layer, k, v) gives what the layer attends to."""

    def __init__(self, config, hook):
        super().__init__(config=config)
        self.hook = hook

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args, **kwargs):
        return self.hook(layer_idx, k, v)


class Adapted:
    """model.Model's face on a model of transformers, for search.py, train.py and evaluate.py.

    The model is put into eval mode. ValueError where this description does not fit it: logits that
    are no product of states and lm_head, or keys that RoPE, turned back, does not make the same at
    every position.
    """

    def __init__(self, model):
        self.model = model.eval()
        self.rope = Rope(model)
        self.config, self.lm_head = self.rope.config, model.get_output_embeddings()
        if self.lm_head is None:
            raise ValueError(f"{self.config.model_type}: has no lm_head; AutoModelForCausalLM has")
        if len({x.device for x in model.parameters()}) > 1:
            raise ValueError(f"{self.config.model_type}: lies on several devices")
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
        """States are normed already: with a 1 for the bias, and times what logits are (Granite)."""
        if self.bias is not None:
            states = torch.cat((states, torch.ones_like(states[..., :1])), dim=-1)
        return states * self.scale

    def hidden(self, tokens: Tensor, project=None, observe=None, start=0, recompute=False):
        """Normed states (B, T, hidden). Hooks and start: model.Model.hidden; observe gets no q.

        `recompute` is ignored.
        """
        start = torch.as_tensor(start).view(-1, 1)
        positions = (start + torch.arange(tokens.shape[1])).to(tokens.device)
        cos_sin = {}                                    # by type of layer

        def hook(i: int, k: Tensor, v: Tensor):
            kind = self.rope.layer_type(i)
            if kind not in cos_sin:
                cos_sin[kind] = self.rope.cos_sin(i, positions)
            turn, unturned = self.turning(i, k, cos_sin[kind])
            wide_v = v.to(unturned.dtype)
            if observe is not None:
                observe(i, None, unturned, wide_v, turn)
                return k, v
            k_hat, v_hat = project(i, unturned, wide_v, turn)
            return k_hat.to(k.dtype), v_hat.to(v.dtype)

        return self.run(tokens, positions, hook if project or observe else None)

    def turning(self, i: int, k: Tensor, cos_sin):
        """Layer i's RoPE, a function, and k (B, K, T, d) before it, float32 or wider."""
        k = k.to(wide(k.dtype))
        if not self.rope.turned[i]:
            return (lambda x: x), k
        return (lambda x: self.rope.turn(x, cos_sin)), self.rope.turn_back(k, cos_sin)

    def run(self, tokens: Tensor, positions: Tensor, hook) -> Tensor:
        cache = None if hook is None else Hooked(self.model.config, hook)
        positions = positions.expand(len(tokens), -1)
        return self.model.base_model(tokens, position_ids=positions, cache=cache,
                                     use_cache=cache is not None).last_hidden_state

    @torch.no_grad()
    def check(self, n: int = 12) -> None:
        """Run a few tokens at two places: their keys before RoPE, and their logits, must agree."""
        name, (L, K, d) = self.config.model_type, shape_of(self.config)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(min(1000, self.config.vocab_size), (1, n), generator=generator)
        tokens = tokens.to(self.device)
        near = 0.05 if self.dtype.itemsize == 2 else 1e-3
        places = [(torch.arange(n, device=self.device) + at)[None] for at in (0, 77)]
        keys = []
        for place in places:
            keys.append(found := {})

            def hook(i, k, v, found=found):
                if k.shape != (1, K, n, d) or v.shape != k.shape:
                    raise ValueError(f"{name}: keys {list(k.shape)} and values {list(v.shape)} of "
                                     f"layer {i}; expected {[1, K, n, d]} for both")
                found[i] = k.to(wide(k.dtype))
                return k, v

            states = self.run(tokens, place, hook)
        if len(keys[0]) != L:
            raise ValueError(f"{name}: {len(keys[0])} of {L} layers have a cache")
        for i in range(L):
            as_it_is = [found[i] for found in keys]
            turned_back = [self.rope.turn_back(k, self.rope.cos_sin(i, place))
                           for k, place in zip(as_it_is, places, strict=True)]
            self.rope.turned[i] = far(*turned_back) < near
            if not self.rope.turned[i] and far(*as_it_is) > near:
                raise ValueError(f"{name}: how positions turn the keys of layer {i} is not known "
                                 "here")
        mine = self.norm(states).float() @ self.lm_head.weight.float().T
        theirs = self.model(tokens, position_ids=places[-1]).logits.float()
        self.scale = float((mine * theirs).sum() / mine.square().sum())
        if far(self.scale * mine, theirs) > near:
            raise ValueError(f"{name}: its logits are more than a product of states and lm_head")
        if abs(self.scale - 1) < near:
            self.scale = 1.0


def far(x: Tensor, y: Tensor) -> float:
    """How far x is from y, as a share of y."""
    return ((x - y).norm() / y.norm()).item()


def first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].split(". ")[0]


# ------------------------------------------------------------------------------
# Passes with a cache are announced to it

def prepare(model) -> Rope:
    """Look at a model once, and have it announce its passes; its RoPE."""
    base = model.base_model
    if not hasattr(base, "matryoshka_rope"):
        in_training = model.training
        base.matryoshka_rope = Adapted(model).rope
        model.train(in_training)
        base.register_forward_pre_hook(announce, with_kwargs=True)
        base.register_forward_hook(announce_end, with_kwargs=True, always_call=True)
    return base.matryoshka_rope


def announce(base, args, kwargs) -> None:
    cache, given = cache_in(base, args, kwargs)
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if cache is None or tokens is None:
        return
    if cache.rope is not base.matryoshka_rope:
        raise ValueError("a cache that was made for another model")
    mask = given.get("attention_mask")
    is_padded = isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all()
    cache.before_pass(tokens.shape[1], given.get("position_ids"), mask if is_padded else None)


def announce_end(base, args, kwargs, output) -> None:
    cache, _ = cache_in(base, args, kwargs)
    if cache is not None:
        cache.tables = {}


def cache_in(base, args, kwargs):
    """The MatryoshkaCache that a pass is given, or None; and all that it is given, by name."""
    given = dict(zip(inspect.signature(base.forward).parameters, args, strict=False)) | kwargs
    cache = given.get("cache")
    cache = given.get("past_key_values") if cache is None else cache
    return cache if isinstance(cache, MatryoshkaCache) else None, given


# ------------------------------------------------------------------------------
# The cache

class Side:
    """Keys or values of a layer at their heads' ranks r: from states to coordinates and back.

    U (K, d, d), ranks (K,).
    """

    def __init__(self, U: Tensor, ranks: Tensor):
        self.is_full = bool((ranks == U.shape[-1]).all())           # then states are stored
        self.U = [U_h[:, :r].clone() for U_h, r in zip(U, ranks.tolist(), strict=True)]

    def down(self, x: Tensor) -> Tensor:
        """x (B, K, T, d) becomes its coordinates (B, 1, T, Σ r)."""
        return torch.cat([x[:, h] @ U for h, U in enumerate(self.U)], dim=-1)[:, None]

    def up(self, c: Tensor, rest: Tensor) -> Tensor:
        """Coordinates c (B, 1, n, Σ r) become c U_rᵀ + rest: (B, K, n, d), heads first in memory.

        rest (K, B, n, d) is overwritten.
        """
        parts = c.to(rest.dtype).flatten(0, 2).split([U.shape[1] for U in self.U], dim=-1)
        for h, (part, U) in enumerate(zip(parts, self.U, strict=True)):
            rest[h].flatten(0, 1).addmm_(part, U.T)
        return rest.transpose(0, 1)


class MatryoshkaCache(DynamicCache):
    """A cache of transformers that keeps of each head as many coordinates as a plan says.

    model: of AutoModelForCausalLM. Its first cache has it run a few tokens (`Adapted`), and from
    then on it announces its passes, from which a cache learns where texts begin. projections: a
    Projection or its file. ranks: a plan (2, L, K); or budget: the plan along the order beside the
    file, uniform ranks where there is none.

    Of each layer, keys and values are (B, 1, n, Σ r); those of a side whose heads are all at rank
    d stay states, (B, K, n, d). `first`: the first tokens of each text, whole. `crop`, `reset`,
    beams, sliding windows and left-padded batches with position_ids (as `generate` makes them) work
    as in DynamicCache. ValueError for a model or plan that does not fit, for padding without
    position_ids, and for positions that do not count up from each text's first token.
    """

    def __init__(self, model, projections: Projection | str | Path, budget: float | None = None,
                 ranks: Tensor | None = None):
        super().__init__(config=model.config)
        if (ranks is None) == (budget is None):
            raise ValueError("either ranks or a budget says what is kept")
        if budget is not None and not 1 / LEVELS <= budget <= 1:
            raise ValueError(f"a budget of {budget}: it is a share, from {1 / LEVELS} to 1")
        config = self.watch(model)
        check_levels(config.head_dim)
        is_file, order = not isinstance(projections, Projection), None
        p = Projection.load(projections) if is_file else projections
        p.check_fits(config)
        if is_file:
            _, order = order_beside(Path(projections), p, config)
        if ranks is None and order is None:
            ranks = uniform_ranks(budget, config)
        elif ranks is None:
            ranks = plan_at(order, config, budget)
        check_ranks(ranks, *shape_of(config))
        if ranks.ndim != 3:
            raise ValueError(f"ranks of shape {list(ranks.shape)}; a cache has one plan, (2, L, K)")
        p = p.to(model.device, wide(model.dtype))
        self.whole, self.mean_k = p.whole, p.mean_k
        self.sides = [[Side(U[i], ranks[side, i]) for side, U in enumerate((p.U_k, p.U_v))]
                      for i in range(config.num_hidden_layers)]
        self.added = []                         # μ (I − P) of each layer's values, (K, d)
        for means, (_, values) in zip(p.mean_v, self.sides, strict=True):
            self.added.append(torch.stack([m - m @ U @ U.T
                                           for m, U in zip(means, values.U, strict=True)]))

    def watch(self, model) -> Shape:
        """Have `model` announce its passes; its shape."""
        self.rope = prepare(model)
        self.forget_texts()
        return self.rope.config

    def forget_texts(self) -> None:
        # A column is a place in the cache, padding included.
        self.start = self.base = None   # (B or 1, 1): column and position of texts' first tokens
        self.texts = []                 # (rows of the batch, column of their first token)
        self.first = [[None, None] for _ in self.rope.turned]   # by layer and side: then
                                                                # (B, K, whole, d)
        self.tables = {}                # of a pass: cos and sin

    @property
    def nbytes(self) -> int:
        """Bytes that stay between passes: coordinates, states of full sides, and first tokens."""
        kept = [x for sides in self.first for x in sides if x is not None]
        for layer in self.layers:
            if layer.is_initialized:
                kept += layer.keys, layer.values
        return sum(x.nbytes for x in kept)

    # --------------------------------------------------------------------------
    # Where texts begin

    def before_pass(self, T: int, positions: Tensor | None, mask: Tensor | None) -> None:
        """Learn where texts begin from the position_ids (B, T) of a pass with T tokens.

        `generate` gives all pads the position 0, that of the text's first token: so this is the
        last column that has it. mask: (B, n + T) where there are pads.
        """
        n = self.get_seq_length()
        self.tables = {}                                # of a pass that broke off
        if positions is None:
            if mask is not None:
                raise ValueError("a batch with padding needs position_ids, as `generate` makes "
                                 "them from the mask: they say where each text begins")
            positions = torch.arange(n, n + T, device=self.rope.signs.device)[None]
        if positions.ndim != 2:
            raise ValueError(f"positions of shape {list(positions.shape)}; expected (batch, T)")
        if n == 0:
            base, start = positions[:, :1], torch.full_like(positions[:, :1], -1)
        else:                                           # a crop may have cut into the padding
            base, start = self.base, self.start.clamp(max=n - 1)
        start = start + (positions == base).sum(1, keepdim=True)
        base = base.expand_as(start)
        columns = torch.arange(n, n + T, device=start.device)
        fit = ((columns - start).clamp(min=0) + base == positions).all()
        if mask is not None:                            # where it shows a text's first token
            begins = mask.long().argmax(1, keepdim=True)
            fit &= ((begins == start) | ~mask.any(1, keepdim=True)).all()
        if not fit:
            raise ValueError("position_ids must count up from each text's first token, and be the "
                             "first one's for padding, which is on the left")
        if all((x == x[:1]).all() for x in (start, base)):
            start, base = start[:1], base[:1]           # one row stands for all texts
        self.start, self.base = start, base
        begins = start[:, 0].tolist()
        self.texts = [(slice(None) if len(begins) == 1 else slice(row, row + 1), begin)
                      for row, begin in enumerate(begins)]

    def columns_at(self, begin: int, end: int) -> Tensor:
        """Positions of columns begin … end − 1, (B, n), or (1, n) where texts begin together."""
        columns = torch.arange(begin, end, device=self.start.device)
        return (columns - self.start).clamp(min=0) + self.base

    def cos_sin(self, layer: int, begin: int, end: int):
        """Of columns begin … end − 1; made once a pass for all layers of a type."""
        key = self.rope.layer_type(layer), begin        # `end` is the same for all
        if key not in self.tables:
            self.tables[key] = self.rope.cos_sin(layer, self.columns_at(begin, end))
        return self.tables[key]

    # --------------------------------------------------------------------------
    # What a layer calls

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args, **kwargs):
        """Store keys, after RoPE, and values (B, K, T, d).

        Returns k̂ and v̂ (B, K, n, d) of the n columns that the layer sees, the new ones included.
        """
        self.check_announced()
        i, (B, _, T, _) = layer_idx, k.shape
        n, begin = self.layers[i].get_mask_sizes(T)     # columns seen, from `begin` on
        keys, values = self.sides[i]
        kept_k, kept_v = k, v
        if not keys.is_full:
            turned = self.turned_mean(i, begin, n, B)   # R_n m (K, B, n, d)
            centred = k.to(turned.dtype) - turned[:, :, -T:].transpose(0, 1)
            kept_k = keys.down(centred).to(k.dtype)
        if not values.is_full:
            kept_v = values.down(v.to(self.added[i].dtype)).to(v.dtype)
        k_hat, v_hat = super().update(kept_k, kept_v, i)
        self.drop_storage(i)
        if not keys.is_full:
            k_hat = self.with_whole(i, 0, keys.up(k_hat, turned).to(k.dtype), k, begin)
        if not values.is_full:
            added = self.added[i][:, None, None].repeat(1, B, n, 1)
            v_hat = self.with_whole(i, 1, values.up(v_hat, added).to(v.dtype), v, begin)
        return k_hat, v_hat

    def check_announced(self) -> None:
        if self.start is None:
            raise ValueError("a cache that was made for another model")

    def turned_mean(self, i: int, begin: int, n: int, B: int) -> Tensor:
        """R_n m of layer i at n columns from `begin` on: (K, B, n, d), new; zeros without an m."""
        if self.mean_k is None:
            K, d = self.added[i].shape
            return self.added[i].new_zeros(K, B, n, d)
        m = self.mean_k[i][:, None, None]                           # (K, 1, 1, d)
        if not self.rope.turned[i]:
            return m.repeat(1, B, n, 1)
        cos_sin = [x.transpose(0, 1) for x in self.cos_sin(i, begin, begin + n)]
        return self.rope.turn(m, cos_sin).expand(-1, B, -1, -1).contiguous()

    def with_whole(self, i: int, side: int, x_hat: Tensor, x: Tensor, begin: int) -> Tensor:
        """Store those of the new x (B, K, T, d) that are first tokens in `first`.

        Overwrites all first tokens in x̂ (B, K, n, d), of columns from `begin` on; returns it.
        """
        w = self.whole
        end = begin + x_hat.shape[2]
        new = end - x.shape[2]                                      # the first new column
        if self.first[i][side] is None:
            with torch.inference_mode(False):           # what comes may be of another mode
                self.first[i][side] = x.new_zeros(*x.shape[:2], w, x.shape[3])
        first = self.first[i][side]
        for rows, at in self.texts:                                 # first tokens: at … at + w − 1
            a, stop = max(at, new), min(at + w, end)
            if a < stop:
                first[rows, :, a - at:stop - at] = x[rows, :, a - new:stop - new]
            a = max(at, begin)
            if a < stop:
                x_hat[rows, :, a - begin:stop - begin] = first[rows, :, a - at:stop - at]
        return x_hat

    def drop_storage(self, i: int) -> None:
        """Where transformers keeps a view (sliding, crop), free all else of what it is a view of.
        """
        layer = self.layers[i]
        for name in ("keys", "values"):
            kept = getattr(layer, name)
            if layer.is_initialized and kept.untyped_storage().nbytes() > kept.nbytes:
                setattr(layer, name, kept.clone())

    # --------------------------------------------------------------------------
    # What changes a batch

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        for i in range(len(self.layers)):
            self.drop_storage(i)

    def reset(self) -> None:
        super().reset()
        self.forget_texts()

    def of_texts(self, change) -> None:
        """`change` the batch of all that does not lie in transformers' layers."""
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


# ------------------------------------------------------------------------------
# Calibration

def calibrate(model, tokens, whole: int = 4, windows: int = 64, batch: int = 4, seq: int = 256,
              positions: int = 0, beginning: int | None = None, seed: int = 0):
    """The start, a Projection, and the order (n,), of search.py's sweeps through `model`.

    tokens (n,): a numpy row of ids. windows: how many, of seq tokens; each begins with the token
    `beginning`, if there is one, and lies anywhere below `positions`, 0 being the least of 8,192
    and what the model was made for. The weights are frozen.
    """
    adapted = Adapted(model.requires_grad_(False))
    positions = positions or min(8192, adapted.config.max_position_embeddings)
    if beginning is not None:
        tokens = begun(tokens, beginning)
    drawn = Windows(tokens, windows, batch, seq, positions, seed)
    projection = find_start(adapted, drawn, whole)
    projection.positions = positions
    return projection, find_order(adapted, projection, drawn)


# ------------------------------------------------------------------------------
# The script: train.py, with a model of transformers

def read_config(file: Path) -> Shape:
    """Of the model in the folder of this config.json. ValueError names the file."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        config = AutoConfig.from_pretrained(file.parent)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: {first_sentence(error)}") from None
    return shape_in(config)


def load(folder: Path, device, dtype: torch.dtype) -> Adapted:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder}: {first_sentence(error)}") from None
    return Adapted(model.to(device).requires_grad_(False))


def main():
    given = sys.argv[1:]
    if given and not given[0].startswith("-"):
        given.insert(0, "--ckpt")
    sys.argv[1:] = ["--steps", "0", *given]             # what is said last counts
    train.main(__doc__, read_config, load)


if __name__ == "__main__":
    cli.run_script(main)
