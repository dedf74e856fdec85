"""The model is LLaMA and Mistral: it has the logits of Hugging Face's transformers."""
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CKPT, GOLDEN, relative
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from model import Rope, frequencies, generate, last_logits, linear, load, logits, pick
from support.checkpoint import read_config
from support.tokenizer import load_tokenizer

# ------------------------------------------------------------------------------
# Logits

@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_logits_are_those_of_transformers(name):
    golden = load_file(GOLDEN / name / "golden.safetensors")
    for dtype in (torch.float32, torch.float64):
        logits = load(GOLDEN / name, dtype=dtype)(golden["tokens"])
        if "kept" in golden:                                        # of a long text a few are kept
            logits = logits[:, golden["kept"]]
        assert relative(logits, golden["logits"]) < 1e-4


def test_bfloat16_logits_are_as_near_the_float32_model_as_those_of_transformers():
    """They round in other places, so the two differ by what each is off; root mean squares."""
    folder = GOLDEN / "llama_bfloat16"
    golden = load_file(folder / "golden.safetensors")
    logits, exact = (load(folder, dtype=dtype)(golden["tokens"])
                     for dtype in (torch.bfloat16, torch.float32))
    assert logits.dtype == torch.bfloat16
    ours, theirs = (x.float() - exact for x in (logits, golden["logits_low"]))
    assert ours.norm() < theirs.norm()
    assert (ours - theirs).norm() < 2e-2 * exact.norm()


def test_the_model_is_frozen_and_keeps_its_dtype():
    model = load(GOLDEN / "mistral_window", dtype=torch.bfloat16)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at Linux's mappings")
def test_weights_stay_views_of_the_mapped_file():
    """Loading in the file's own dtype copies nothing."""
    model = load(GOLDEN / "llama_bfloat16", dtype=torch.bfloat16)
    address = model.lm_head.weight.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(x, 16) for x in line.split()[0].split("-"))
        if low <= address < high:
            assert "model.safetensors" in line
            return
    raise AssertionError("the weights lie in no mapping")


def test_a_token_does_not_see_the_future(model, tokens):
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 96
    a, b = model(tokens), model(changed)
    assert relative(a[:, :10], b[:, :10]) < 1e-6
    assert relative(a[:, 10:], b[:, 10:]) > 1e-2


def test_a_sliding_window_hides_what_is_older():
    """Two layers of a window of 7 reach 12 tokens back."""
    model = load(GOLDEN / "mistral_window")
    tokens = torch.randint(3, 96, (1, 30))
    changed = tokens.clone()
    changed[0, 0] = 4 + (changed[0, 0] == 4)
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, 13:], b[:, 13:])
    assert not torch.equal(a[:, 12], b[:, 12])


def test_the_parts_make_the_whole(model, tokens):
    x = model.embed_tokens(tokens)
    cos_sin = model.rope.rows(0, tokens.shape[1], x.dtype, x.device)
    for i in range(model.config.num_hidden_layers):
        x = model.layer(i, x, cos_sin)
    assert torch.equal(x, model.hidden(tokens))
    assert torch.equal(linear(model.norm(x), model.lm_head), model(tokens))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])            # biases; norms of queries and keys
def test_hooks_are_shown_keys_before_rope_and_what_turns_them(kind, tokens):
    """Turned as complex numbers; a hook that does no more leaves the logits as they are."""
    model, keys = load(GOLDEN / kind), []

    def observe(i, q, k, v, turn):
        h = model.layers[i].input_layernorm(states[i])
        weights = model.layers[i].self_attn
        before = model.split_heads(linear(h, weights.k_proj))
        if weights.k_norm is not None:
            before = weights.k_norm(before)
        assert relative(k, before) < 1e-5
        assert relative(v, model.split_heads(linear(h, weights.v_proj))) < 1e-5
        for x, turned in ((k, turn(k)), (before[:, :, :1].expand_as(k), turn(before[:, :, :1]))):
            z = torch.complex(*x.double().chunk(2, dim=-1))
            angle = torch.arange(21)[:, None] * frequencies(model.config)
            z = z * torch.polar(torch.ones_like(angle), angle)
            assert relative(turned, torch.cat((z.real, z.imag), dim=-1)) < 1e-5
        keys.append(turn(k))

    def project(i, k, v, turn):
        assert torch.equal(turn(k), keys[i])
        return turn(k), v

    x, states = model.embed_tokens(tokens), []
    cos_sin = model.rope.rows(0, 21, x.dtype, x.device)
    for i in range(model.config.num_hidden_layers):
        states.append(x)
        x = model.layer(i, x, cos_sin)
    assert torch.equal(model(tokens, project=project, observe=observe), model(tokens))
    assert len(keys) == model.config.num_hidden_layers


@pytest.mark.parametrize("kind", ["llama_gqa_tied_llama3", "mistral_window", "qwen3"])
def test_states_are_the_same_wherever_a_sequence_begins_and_its_keys_lie_there(kind, tokens):
    """All sequences from one start, or each from its own; also beyond the first table's end."""
    model = load(GOLDEN / kind, dtype=torch.float64)
    expected, found = model.hidden(tokens), {}

    def observe(i, q, k, v, turn):
        found[i] = k, turn(k)

    for start in (7, 600, torch.tensor([3, 0, 1500]), torch.tensor([0, 0, 0])):
        assert relative(model.hidden(tokens, observe=observe, start=start), expected) < 1e-12
        angle = torch.as_tensor(start).expand(3)[:, None, None, None] + torch.arange(21)[:, None]
        angle = angle * frequencies(model.config)
        for k, turned in found.values():
            z = torch.complex(*k.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
            assert relative(turned, torch.cat((z.real, z.imag), dim=-1)) < 1e-12


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])            # biases; norms of queries and keys
def test_states_wider_than_the_weights_are_those_of_widened_weights(kind):
    """And the weights stay as they are."""
    low = load(GOLDEN / kind, dtype=torch.bfloat16)
    x = torch.randn(2, 21, low.config.hidden_size)
    cos_sin = low.rope.rows(0, 21, x.dtype, x.device)
    got = [low.layer(i, x, cos_sin) for i in range(2)] + [linear(low.norm(x), low.lm_head)]
    assert low.dtype == torch.bfloat16
    wide = low.float()
    expected = [wide.layer(i, x, cos_sin) for i in range(2)] + [wide.lm_head(wide.norm(x))]
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert relative(a, b) < 1e-6


def test_logits_of_a_bfloat16_model_keep_float32_digits():
    x, W = torch.randn(5, 64).bfloat16(), torch.randn(20000, 64).bfloat16()
    assert relative(logits(x, W), x.double() @ W.double().T) < 1e-6


# ------------------------------------------------------------------------------
# RoPE

def test_the_table_of_rope_turns_pairs_by_position_times_frequency(model):
    """Coordinate j is the real part, and j + d/2 the imaginary part, of what is turned."""
    positions = torch.tensor([0, 1, 511, 512, 513, 1500])
    angle = positions[:, None].double() * frequencies(model.config)
    turn = torch.polar(torch.ones_like(angle), angle)
    rope = Rope(model.config)
    for position, expected in zip(positions.tolist(), turn, strict=True):
        cos, sin = rope.rows(position, 1, torch.float64, torch.device("cpu"))
        half = cos.shape[-1] // 2
        for table, part in ((cos, expected.real), (sin, expected.imag)):
            assert (table[0, half:] - part).abs().max() < 1e-12
        assert torch.equal(cos[:, :half], cos[:, half:])
        assert torch.equal(sin[:, :half], -sin[:, half:])


def test_the_table_of_rope_grows_and_its_rows_stay(model):
    rope = Rope(model.config)
    place = torch.float32, torch.device("cpu")
    before = rope.rows(0, 512, *place)
    beyond = rope.rows(500, 30, *place)
    after = rope.rows(0, 512, *place)
    for old, new, across in zip(before, after, beyond, strict=True):
        assert torch.equal(old, new)
        assert across.shape[0] == 30
        assert torch.equal(across[:12], old[500:])


# ------------------------------------------------------------------------------
# Text

def test_greedy_generation_follows_the_logits(model):
    prompt = [1, 5, 9]
    made = list(generate(model, prompt, 6))
    for i, token in enumerate(made):
        logits = model(torch.tensor([prompt + made[:i]]))
        assert logits[0, -1].argmax() == token


def test_generation_ends_with_the_end_of_the_sequence(model):
    endless = dataclasses.replace(model.config, eos_token_id=())
    model.config = endless
    made = list(generate(model, [1, 5, 9], 8))
    assert len(made) == 8
    model.config = dataclasses.replace(endless, eos_token_id=(95_000, made[-1]))
    assert list(generate(model, [1, 5, 9], 8)) == made[:made.index(made[-1])]


def test_a_low_temperature_is_greedy_and_a_high_one_is_not():
    logits = torch.tensor([[1.0, 3.0, 2.0]]).repeat(200, 1)
    assert (pick(logits, 0.0) == 1).all()
    assert (pick(logits, 1e-6) == 1).all()
    assert len(pick(logits, 100.0).unique()) == 3


def near_ties(model, dtype):
    """A model whose 5,000 logits lie so close that a dozen tie, and states; in 2 bytes."""
    torch.manual_seed(0)
    model = model.to(dtype)
    width = model.config.hidden_size
    noise = 8 * torch.finfo(dtype).eps * torch.randn(5000, width)
    rows = 2 * torch.randn(width) + noise
    model.lm_head.weight = torch.nn.Parameter(rows.to(dtype), requires_grad=False)
    return model, torch.randn(40, width).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_likeliest_token_is_that_of_exact_logits_where_rounded_ones_tie(model, dtype):
    model, x = near_ties(model, dtype)
    normed = model.norm(x)
    exact = normed.double() @ model.lm_head.weight.double().T
    rounded = linear(normed, model.lm_head)
    largest = rounded == rounded.amax(-1, keepdim=True)
    assert (largest.sum(-1) > 1).any()
    assert (rounded.argmax(-1) != exact.argmax(-1)).any()
    scores = last_logits(model, x)
    assert scores.dtype == torch.float32
    assert torch.equal(scores.argmax(-1), exact.argmax(-1))
    assert relative(scores, exact) < 2 * torch.finfo(dtype).eps
    best = exact.topk(3).indices
    assert relative(scores.gather(1, best), exact.gather(1, best)) < 1e-6


def test_logits_of_the_last_token_widen_no_copy_of_the_head(model):
    class Largest(TorchDispatchMode):
        """The most numbers of a float32 tensor that an operation makes."""
        numbers = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            made = operation(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
                self.numbers = max(self.numbers, made.numel())
            return made

    model, x = near_ties(model, torch.bfloat16)
    with Largest() as largest:
        last_logits(model, x[:1])
    assert 5000 <= largest.numbers < model.lm_head.weight.numel() / 2


# ------------------------------------------------------------------------------
# Folders as they are found

@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(CKPT, tmp_path / "ckpt")


def edit(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_other_files_of_the_folder_are_not_read(folder):
    """Mistral's consolidated.safetensors holds the weights again, under other names."""
    save_file({"tok_embeddings.weight": torch.zeros(3)}, folder / "consolidated.safetensors")
    (folder / "model.safetensors.bin").write_bytes(b"not for us")
    golden = load_file(folder / "golden.safetensors")
    assert relative(load(folder)(golden["tokens"]), golden["logits"]) < 1e-4


def test_old_and_new_names_of_settings_say_the_same(folder):
    config = folder / "config.json"
    edit(config, rope_parameters=None, rope_theta=5e5, rope_scaling=None, torch_dtype="float32")
    assert read_config(config).rope_theta == 5e5
    edit(config, rope_parameters={"rope_theta": 7e5, "rope_type": "default"}, rope_theta=None)
    assert read_config(config).rope_theta == 7e5
    edit(config, rope_parameters=None, rope_theta=None)
    assert read_config(config).rope_theta == 10000


@pytest.mark.parametrize("given, ends", [([2, 3], (2, 3)), ([], ()), (None, ())])
def test_there_may_be_one_end_of_sequence_or_several_or_none(folder, given, ends):
    edit(folder / "config.json", eos_token_id=given)
    assert read_config(folder / "config.json").eos_token_id == ends


def test_ends_of_sequence_come_from_both_files(folder):
    """LLaMA-3 Instruct names the end of a text in one, and that of an answer in the other."""
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [7, 8, 9]}))
    assert read_config(folder / "config.json").eos_token_id == (2, 7, 8, 9)
    generation.write_text("{")
    with pytest.raises(ValueError, match="generation_config.json"):
        read_config(folder / "config.json")


def test_the_one_matrix_of_a_tied_model_has_either_name_or_both(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama32", tmp_path / "ckpt")
    tensors = load_file(folder / "model.safetensors")
    expected = load(folder)(torch.arange(3, 40)[None])
    matrix = tensors.pop("model.embed_tokens.weight")
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        stored = tensors | {name: matrix.clone() for name in names}
        save_file(stored, folder / "model.safetensors")
        model = load(folder)
        assert model.lm_head.weight is model.embed_tokens.weight
        assert torch.equal(model(torch.arange(3, 40)[None]), expected)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.embed_tokens.weight is missing"):
        load(folder)


def test_a_head_of_its_own_is_used_where_a_model_is_called_tied(tmp_path, capsys):
    """As by transformers 5.24: lm_head.weight in the file counts, whatever config.json says."""
    folder = shutil.copytree(GOLDEN / "llama32", tmp_path / "ckpt")
    tensors = load_file(folder / "model.safetensors")
    tied, x = load(folder), torch.arange(3, 40)[None]
    assert not capsys.readouterr().err
    head = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    model = load(folder)
    line, = capsys.readouterr().err.splitlines()
    assert "lm_head.weight is not the embedding" in line and "both are used" in line
    expected = tied.norm(tied.hidden(x)) @ head.T
    assert relative(model(x), expected) < 1e-5
    assert not any(p.requires_grad for p in model.parameters())
    save_file(tensors | {"lm_head.weight": head[:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight has the shape"):
        load(folder)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "int64", "float8_e4m3fn", "complex64"])
def test_weights_that_are_no_plain_numbers_are_refused_by_dtype_and_name(dtype, tmp_path):
    """Read as if they were floats they are another model."""
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        folder = shutil.copytree(GOLDEN / "llama32", tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name].to(getattr(torch, dtype))
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"{name} is in {dtype}; only float64"):
            load(folder)


def test_float64_weights_load(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama32", tmp_path / "ckpt")
    x, expected = torch.arange(3, 40)[None], load(folder)(torch.arange(3, 40)[None])
    tensors = {n: t.double() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load(folder)(x), expected)


@pytest.mark.parametrize("kind, absent, setting, value", [
    ("mistral_window", "sliding_window", "sliding_window", 4096),
    ("mistral_window", "num_key_value_heads", "num_key_value_heads", 8),
    ("mistral_window", "max_position_embeddings", "max_position_embeddings", 131072),
    ("qwen2", "num_key_value_heads", "num_key_value_heads", 32),
    ("qwen3", "head_dim", "head_dim", 128),
    ("llama_mha", "num_key_value_heads", "num_key_value_heads", 4),
])
def test_what_a_config_does_not_say_is_what_transformers_takes_it_for(
        kind, absent, setting, value, tmp_path):
    """transformers 5.24's defaults differ between the architectures."""
    config = shutil.copytree(GOLDEN / kind, tmp_path / kind) / "config.json"
    said = json.loads(config.read_text())
    said.pop(absent, None)
    said["num_attention_heads"] = {8: 8, 32: 32}.get(value, said["num_attention_heads"])
    config.write_text(json.dumps(said))
    assert getattr(read_config(config), setting) == value


def test_of_two_settings_the_one_counts_that_counts_in_transformers(tmp_path):
    """rope_scaling before rope_parameters; layers that are all full before a sliding window."""
    config = shutil.copytree(GOLDEN / "mistral_window", tmp_path / "m") / "config.json"
    assert read_config(config).sliding_window is not None
    edit(config, layer_types=["full_attention", "full_attention"])
    assert read_config(config).sliding_window is None
    edit(config, rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="linear"):
        read_config(config)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_of_any_dtype_load_into_any(stored, folder):
    """Whatever config.json says of it, or not."""
    config = folder / "config.json"
    settings = json.loads(config.read_text())
    settings.pop("dtype")
    config.write_text(json.dumps(settings))
    for shard in folder.glob("model-*.safetensors"):
        save_file({n: t.to(stored) for n, t in load_file(shard).items()}, shard)
    golden = load_file(folder / "golden.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        logits = load(folder, dtype=dtype)(golden["tokens"])
        assert logits.dtype == dtype
        assert relative(logits, golden["logits"]) < 1e-1


def test_qwen_has_no_window_unless_it_is_switched_on(tmp_path):
    folder = shutil.copytree(GOLDEN / "qwen2", tmp_path / "qwen2")
    config = folder / "config.json"
    assert json.loads(config.read_text())["sliding_window"] == 8
    assert read_config(config).sliding_window is None
    edit(config, use_sliding_window=True)
    with pytest.raises(ValueError, match="use_sliding_window"):
        read_config(config)


@pytest.mark.parametrize("settings, culprit", [
    ({"model_type": "qwen3_moe"}, "qwen3_moe"),
    ({"model_type": "qwen2"}, "q_proj.bias"),
    ({"model_type": 7}, "7"),
    ({"model_type": None, "architectures": [3]}, "3"),
    ({"model_type": None, "architectures": {"llama": 1}}, "config.json"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor"),
    ({"rope_parameters": {"rope_theta": "far"}}, "far"),
    ({"rope_scaling": [8]}, "rope_scaling"),
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised by awq"),
    ({"quantization_config": {"load_in_8bit": True}}, "quantised by some way"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"layer_types": 3}, "layer_types"),
    ({"num_key_value_heads": 3}, "3 key-value heads"),
    ({"num_key_value_heads": [2]}, "config.json"),
    ({"num_attention_heads": 0, "head_dim": None}, "config.json"),
    ({"hidden_size": float("inf")}, "config.json"),
    ({"vocab_size": -96}, "vocab_size"),
    ({"sliding_window": 0}, "sliding_window"),
    ({"rms_norm_eps": -1}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta"),
    ({"head_dim": 8}, "shape"),
    ({"num_hidden_layers": 0}, "positive"),
    ({"max_position_embeddings": -1}, "max_position_embeddings"),
])
def test_a_config_that_is_not_supported_is_refused_by_name(folder, settings, culprit):
    edit(folder / "config.json", **settings)
    with pytest.raises(ValueError, match=culprit):
        load(folder)


def test_a_broken_shard_is_named(folder):
    shard = folder / "model-00002-of-00004.safetensors"
    whole = shard.read_bytes()
    for broken in (whole[:-100], whole[:20], b"", b"\xff" * 300):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=shard.name):
            load(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        load(folder)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(folder):
    shard = folder / "model-00002-of-00004.safetensors"
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != name}, shard)
    with pytest.raises(ValueError, match=name):
        load(folder)
    save_file(tensors | {name: torch.zeros(3, 5)}, shard)
    with pytest.raises(ValueError, match=rf"{name}.*shape"):
        load(folder)


def test_a_single_file_counts_where_there_is_an_index_of_shards_too(folder):
    """As in transformers 5.24."""
    model = load(folder)
    tensors = {name if name.startswith("lm_head.") else f"model.{name}": torch.zeros_like(p)
               for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    assert not any(p.any() for p in load(folder).parameters())


@pytest.mark.parametrize("weight_map", [None, [1], {"lm_head.weight": 3}])
def test_an_index_that_names_no_files_is_refused(folder, weight_map):
    edit(folder / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(ValueError, match="model.safetensors.index.json: no weight_map"):
        load(folder)


def test_a_folder_without_a_config_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    for text in ("{", "[]", "3", "\xff"):
        (folder / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="config.json.*JSON"):
            load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json"):
        load(folder)


def test_a_bias_betrays_another_architecture(tmp_path):
    folder = shutil.copytree(GOLDEN / "mistral_window", tmp_path / "ckpt")
    tensors = load_file(folder / "model.safetensors")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    save_file(tensors | bias, folder / "model.safetensors")
    with pytest.raises(ValueError, match="q_proj.bias"):
        load(folder)


def test_a_tokenizer_of_another_kind_is_said_to_be_one(folder):
    with pytest.raises(ValueError, match="tokenizer.model: no such file, and.* no tokenizer.json"):
        load_tokenizer(folder)
    for other in (b"", b"bytes of something else"):
        (folder / "tokenizer.model").write_bytes(other)
        with pytest.raises(ValueError, match="not a SentencePiece model"):
            load_tokenizer(folder)
