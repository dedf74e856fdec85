"""Training: the right loss with the right gradient, only the projections learn, a stopped run goes on as if it had not."""
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conftest import GOLDEN, relative
from projection import Moments, Projection, Rotation, plan_on_path, uniform_ranks
from model import load_tokenizer, read_config
from train import (Distill, draw_ranks, encode, evaluate, jsonl_documents, load_data, logits, main, peak_memory,
                   python_documents, student_states, windows)

ROOT = GOLDEN.parent.parent
CKPT = GOLDEN / "mistral_sharded_head_dim"


def script(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def data(tmp_path):
    """Token ids of a second-order rule, so that there is something to predict."""
    ids = np.random.default_rng(0).integers(3, 96, 4000)
    ids[2:] = np.where(np.arange(3998) % 3, (ids[1:-1] * 5 + ids[:-2]) % 93 + 3, ids[2:])
    path = tmp_path / "tokens.npy"
    np.save(path, ids.astype(np.uint16))
    return path


# The loss

@pytest.mark.parametrize("c", [0.0, 0.75, 1.0])
def test_the_loss_and_its_gradient_are_those_of_the_definition(model, c, monkeypatch):
    monkeypatch.setattr("train.CHUNK", 7)                     # several chunks, the last one not full
    model = model.double()
    teacher, student = torch.randn(2, 3, 11, 32, dtype=torch.float64)
    targets = torch.randint(0, 96, (3, 11))
    weights = torch.randn(3, dtype=torch.float64)

    student.requires_grad_()
    loss, kl = Distill.apply(student, teacher, model, targets, c)
    (loss * weights).sum().backward()

    other = student.detach().clone().requires_grad_()
    log_p, log_q = (model.lm_head(x).log_softmax(-1) for x in (teacher, other))
    expected_kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean(1)
    ce = F.cross_entropy(log_q.transpose(1, 2), targets, reduction="none").mean(1)
    (((1 - c) * expected_kl + c * ce) * weights).sum().backward()
    assert relative(kl, expected_kl) < 1e-12
    assert relative(loss, (1 - c) * expected_kl + c * ce) < 1e-12
    assert relative(student.grad, other.grad) < 1e-12


def test_logits_of_a_bfloat16_model_keep_float32_digits():
    x, W = torch.randn(5, 64).bfloat16(), torch.randn(20000, 64).bfloat16()
    assert relative(logits(x, W), x.double() @ W.double().T) < 1e-6


def test_only_the_projections_get_gradients(model, tokens):
    rotation = Rotation(random_start(model))
    ranks = draw_ranks("levels", len(tokens), model.config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        teacher = model.norm(model.hidden(tokens))
    student = model.norm(model.hidden(tokens, rotation().at(ranks)))
    Distill.apply(student, teacher, model, tokens, 0.0)[0].sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rotation.parameters())


def random_start(model) -> Projection:
    moments = Moments(model.config)
    model.hidden(torch.randint(3, 96, (8, 40)), observe=moments)
    return moments.aware([layer.self_attn.o_proj.weight for layer in model.layers])


def test_text_can_be_generated_before_training(model, tokens):
    """Generation runs in inference mode, whose tensors no gradient may meet; the table of RoPE is shared."""
    from model import generate
    list(generate(model, tokens[0, :1].tolist(), 21))
    rotation = Rotation(random_start(model))
    ranks = draw_ranks("levels", 3, model.config, torch.Generator().manual_seed(0))
    student_states(model, tokens, rotation().at(ranks), False).sum().backward()
    assert rotation.A_k.grad.isfinite().all()


def test_a_full_rank_student_has_no_loss(model, tokens):
    full = uniform_ranks(1.0, model.config)[:, :, None].expand(-1, -1, len(tokens), -1)
    x = model.norm(model.hidden(tokens))
    student = model.norm(model.hidden(tokens, Rotation(random_start(model))().at(full)))
    assert Distill.apply(student, x, model, tokens, 0.0)[1].abs().max() < 1e-6


# The ranks

def test_levels_differ_by_one_step_at_most_and_reach_every_budget(model):
    d = model.config.head_dim
    ranks = draw_ranks("levels", 4096, model.config, torch.Generator().manual_seed(0)) * 8 // d
    low, high = ranks.amin((0, 1, 3)), ranks.amax((0, 1, 3))
    assert (high - low <= 2).all() and low.min() == 1 and high.max() == 8
    mean = ranks.float().mean((0, 1, 3)) / 8
    assert mean.min() < 0.3 and mean.max() > 0.85
    independent = draw_ranks("independent", 4096, model.config, torch.Generator().manual_seed(0)) * 8 // d
    share = torch.bincount(independent.flatten(), minlength=9)[1:] / independent.numel()
    assert (share - 1 / 8).abs().max() < 0.01


def test_ranks_along_a_path_are_its_plans_and_at_most_a_step_off(model):
    L, K, d = model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim
    generator = torch.Generator().manual_seed(0)
    path = torch.cat([torch.randperm(2 * L * K, generator=generator) for _ in range(7)])
    ranks = draw_ranks("levels", 512, model.config, generator, path)
    plans = torch.stack([plan_on_path(path[:n], model.config, 1 - n / (16 * L * K)) for n in range(len(path) + 1)])
    off = (ranks.transpose(0, 2).transpose(1, 2)[:, None] - plans).abs().amax((2, 3, 4))           # (sequence, plan)
    assert off.amin(1).max() <= d // 8
    share = ranks.float().mean((0, 1, 3)) / d
    assert share.min() < 0.25 and share.max() > 0.9
    assert draw_ranks("levels", 512, model.config, generator, path[:5]).min() >= d - 6 * d // 8       # a path cut short


# The report

def test_the_report_is_that_of_whole_logits(model):
    tokens = np.random.default_rng(0).integers(3, 96, 5 * 31 + 1)
    p = random_start(model)
    project = p.at(uniform_ranks(0.375, model.config))
    base, results = evaluate(model, tokens, {"x": project}, B=2, T=30, limit=5)
    block = windows(tokens, torch.arange(5) * 31, 30)
    log_p, log_q = (model.double()(block[:, :-1], project=f).log_softmax(-1) for f in (None, project))
    y = block[:, 1:]
    assert results["x"]["kl"] == pytest.approx(F.kl_div(log_q, log_p, log_target=True, reduction="sum").item() / 150, rel=1e-4)
    for log, got in ((log_p, base), (log_q, results["x"])):
        assert got["perplexity"] == pytest.approx(F.nll_loss(log.flatten(0, 1), y.flatten()).exp().item(), rel=1e-4)
        assert got["accuracy"] == pytest.approx((log.argmax(-1) == y).double().mean().item())


# The run

def run_train(data, out, *more):
    return script("train.py", "--ckpt", CKPT, "--data", data, "--seq", 32, "--batch", 8, "--out", out, *more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ids = np.random.default_rng(1).integers(3, 96, 4000).astype(np.uint16)
    np.save(folder / "tokens.npy", ids)
    done = run_train(folder / "tokens.npy", folder / "out", "--steps", 150)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_the_files_that_others_rely_on(trained):
    L, K, d = 2, 2, 16
    tensors = load_file(trained / "out" / "projections.safetensors")
    shapes = {"U_k": (L, K, d, d), "U_v": (L, K, d, d), "mean_v": (L, K, d)}
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == \
           {prefix + n: (s, torch.float32) for prefix in ("", "pca_") for n, s in shapes.items()}
    for name in ("U_k", "U_v", "pca_U_k", "pca_U_v"):
        U = tensors[name].double()
        assert (U.mT @ U - torch.eye(d)).abs().max() < 1e-5
    report = json.loads((trained / "out" / "train.json").read_text())
    assert len(report["loss"]) == 150 and report["config"]["steps"] == 150
    assert [row["budget"] for row in report["budgets"]] == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25]
    assert set(report["base"]) == {"perplexity", "accuracy"}
    for row in report["budgets"]:
        assert set(row["pca"]) == set(row["trained"]) == {"kl", "perplexity", "accuracy"}
    assert report["budgets"][0]["trained"]["kl"] < 1e-6
    assert (trained / "out" / "train.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in (trained / "out").iterdir()) == \
        ["best.safetensors", "projections.safetensors", "train.json", "train.png"]


def test_training_beats_pca_at_every_budget(trained):
    for row in json.loads((trained / "out" / "train.json").read_text())["budgets"][1:]:
        assert row["trained"]["kl"] < row["pca"]["kl"]


def test_the_report_can_be_made_again(trained):
    before = json.loads((trained / "out" / "train.json").read_text())
    done = run_train(trained / "tokens.npy", trained / "out", "--eval")
    assert done.returncode == 0, done.stderr
    assert json.loads((trained / "out" / "train.json").read_text()) == before


def test_a_resumed_run_ends_where_the_undisturbed_one_does(trained, tmp_path):
    """Stopped by the interrupt of a Ctrl-C two steps after the state was saved, then resumed."""
    code = ("import sys, train; plain = train.Run.save_sometimes\n"
            "def stop(run, step):\n    if step == 23: run.save(step)\n    if step == 25: raise KeyboardInterrupt\n"
            "train.Run.save_sometimes = stop\nsys.argv = ['train.py'] + sys.argv[1:]\ntrain.main()")
    arguments = ["--ckpt", CKPT, "--data", trained / "tokens.npy", "--seq", 32, "--batch", 8, "--steps", 150, "--out", tmp_path]
    stopped = script("-c", code, *arguments)
    assert stopped.returncode == 130 and "--resume goes on from step 23" in stopped.stderr and "Traceback" not in stopped.stderr
    assert not (tmp_path / "projections.safetensors").exists()
    changed = script("train.py", *arguments, "--resume", "--lr", 0.5)
    assert changed.returncode == 2 and "--lr" in changed.stderr
    done = script("train.py", *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    once, twice = (load_file(out / "projections.safetensors") for out in (trained / "out", tmp_path))
    for name in once:
        assert (once[name] - twice[name]).abs().max() < 1e-6
    a, b = (json.loads((out / "train.json").read_text())["loss"] for out in (trained / "out", tmp_path))
    assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize("dtype, bound", [("float64", 1e-8), ("float32", 1e-4)])
def test_two_processes_are_one_with_twice_the_batch(trained, tmp_path, dtype, bound):
    arguments = ["train.py", "--ckpt", CKPT, "--data", trained / "tokens.npy", "--seq", 32, "--steps", 10, "--dtype", dtype]
    one = script(*arguments, "--batch", 8, "--out", tmp_path / "one")
    two = script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments, "--batch", 4, "--out", tmp_path / "two")
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    a, b = (load_file(tmp_path / name / "projections.safetensors") for name in ("one", "two"))
    for name in ("U_k", "U_v", "pca_U_k"):
        for r in range(2, 16, 2):
            P, Q = (x[name][..., :r].double() @ x[name][..., :r].double().mT for x in (a, b))
            assert (P - Q).abs().max() < bound
    assert json.loads((tmp_path / "two" / "train.json").read_text())["loss"] == \
        pytest.approx(json.loads((tmp_path / "one" / "train.json").read_text())["loss"], rel=1e-3)


def test_recomputed_layers_give_the_same_gradients(model, tokens):
    start = random_start(model)
    ranks = draw_ranks("levels", len(tokens), model.config, torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        rotation = Rotation(start)
        student_states(model, tokens, rotation().at(ranks), recompute).square().sum().backward()
        gradients.append([p.grad for p in rotation.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_killed_at_any_moment_a_run_goes_on_and_its_files_load(trained, tmp_path):
    """KILLS=20 in the environment kills that often."""
    arguments = ["train.py", "--ckpt", CKPT, "--data", trained / "tokens.npy", "--seq", 32, "--batch", 8, "--steps", 150,
                 "--out", tmp_path, "--save-every", 0]
    wait, files = np.random.default_rng(), lambda: sorted(tmp_path.glob("*.safetensors"))
    for _ in range(int(os.environ.get("KILLS", 2))):
        resume = ["--resume"] * (tmp_path / "train.state.safetensors").exists()
        run = subprocess.Popen([sys.executable, *map(str, arguments + resume)], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if wait.random() < 0.5:                                   # half of the kills once steps are being made
            while run.poll() is None and not files():
                time.sleep(0.02)
        time.sleep(wait.uniform(0, 3))
        run.kill()
        run.wait()
        for file in files():
            load_file(file)
        for file in tmp_path.glob("*.json"):
            json.loads(file.read_text())
    resume = ["--resume"] * (tmp_path / "train.state.safetensors").exists()
    done = script(*arguments, *resume)
    assert done.returncode == 0, done.stderr
    once, twice = (load_file(out / "projections.safetensors") for out in (trained / "out", tmp_path))
    assert all((once[name] - twice[name]).abs().max() < 1e-6 for name in once)


def test_memory_grows_with_what_is_kept():
    c = read_config(ROOT / "demo" / "config.json")
    need = lambda *arguments: sum(peak_memory(c, *arguments).values())
    assert need(8, 256, torch.float32, True) < need(8, 256, torch.float32, False) < need(16, 256, torch.float32, False)
    assert need(8, 256, torch.bfloat16, False) < need(8, 256, torch.float32, False)


def test_a_full_disk_costs_nothing_that_was_saved(trained, tmp_path, monkeypatch, capsys):
    """The disk is full from the third write of the state on."""
    (tmp_path / "projections.safetensors").write_bytes(b"of an earlier run")
    writes, plain = [], os.fsync

    def full(file):
        writes.append(file)
        if len(writes) > 6:
            raise OSError(28, "No space left on device")
        plain(file)
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, ["--ckpt", CKPT, "--data", trained / "tokens.npy", "--seq", 32, "--steps", 20,
                                                             "--out", tmp_path, "--save-every", 0])])
    with pytest.raises(SystemExit) as left:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and "--out" in lines[-1] and "No space" in lines[-1]
    assert (tmp_path / "projections.safetensors").read_bytes() == b"of an earlier run"
    load_file(tmp_path / "train.state.safetensors")
    assert not list(tmp_path.glob("*.part"))


# Text becomes token ids once

def test_a_text_is_tokenised_once_and_a_changed_one_again(tmp_path):
    text, demo = tmp_path / "text.txt", ROOT / "demo"
    text.write_text("The first line.\n" * 3000 + "word " * 100000)
    tokenizer = load_tokenizer(demo)
    train, held = load_data(text, demo, 4096, tmp_path / "out")
    ids, made = np.concatenate((train, held)), tmp_path / "out" / "text.txt.bin"
    assert ids[0] == tokenizer.bos_id() and (ids[1:] != tokenizer.bos_id()).all()
    assert tokenizer.decode(ids.tolist()).split() == text.read_text().split()
    first = made.stat().st_mtime_ns
    load_data(text, demo, 4096, tmp_path / "out")
    assert made.stat().st_mtime_ns == first
    text.write_text("Another text.")
    assert len(np.concatenate(load_data(text, demo, 4096, tmp_path / "out"))) == 1 + len(tokenizer.encode("Another text."))
    assert not list((tmp_path / "out").glob("*.part"))


def test_accumulated_batches_are_one_large_batch(model):
    """Gradients of the mean objective: two batches of 4 against one of 8, same sequences and ranks."""
    start, g = random_start(model), torch.Generator().manual_seed(0)
    tokens, ranks = torch.randint(3, 96, (8, 20)), draw_ranks("levels", 8, model.config, g)

    def gradient(parts):
        rotation = Rotation(start)
        for rows in torch.arange(8).split(8 // parts):
            x = tokens[rows]
            student = model.norm(model.hidden(x, rotation().at(ranks[:, :, rows])))
            teacher = model.norm(model.hidden(x))
            (torch.log(Distill.apply(student, teacher, model, x, 0.0)[0] + 1e-3).mean() / parts).backward()
        return rotation.A_k.grad
    assert relative(gradient(2), gradient(1)) < 1e-4


def test_a_loss_that_is_not_a_number_stops_the_run_and_costs_nothing(trained, tmp_path):
    kept = (trained / "out" / "projections.safetensors").read_bytes()
    (tmp_path / "projections.safetensors").write_bytes(kept)
    code = ("import sys, train, torch; train.Distill.apply = lambda s, *_: (s.sum((1, 2)) * torch.nan,) * 2\n"
            "sys.argv = ['train.py'] + sys.argv[1:]\ntrain.main()")
    done = script("-c", code, "--ckpt", CKPT, "--data", trained / "tokens.npy", "--seq", 32, "--out", tmp_path)
    assert done.returncode == 2 and "not a number" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "projections.safetensors").read_bytes() == kept


# The text

def test_python_text_is_split_by_name_and_nothing_held_out_is_trained_on():
    train, held = python_documents()
    with_sources, held_with_sources = python_documents(sources=True)
    assert 0.04 < sum(map(len, held)) / sum(map(len, train)) < 0.25
    known = {p for text in train for p in text.split("\n\n") if len(p) > 30}
    assert not any(p in known for text in held for p in text.split("\n\n"))
    assert set(train) <= set(with_sources) and sum(map(len, with_sources)) > 3 * sum(map(len, train))


def test_a_file_of_tokens_is_mapped_and_its_last_tenth_held_out(tmp_path):
    ids = np.arange(1000) % 96
    ids.astype(np.uint16).tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", ids)
    for name in ("a.bin", "a.npy"):
        train, held = load_data(tmp_path / name, CKPT, 96)
        assert isinstance(train, np.memmap)
        assert (train == ids[:900]).all() and (held == ids[900:]).all()
    ids.astype(np.uint32).tofile(tmp_path / "b.bin")
    assert (load_data(tmp_path / "b.bin", CKPT, 70000)[1] == ids[900:]).all()


def test_every_document_begins_with_the_beginning_of_sequence():
    class Letters:
        bos_id = staticmethod(lambda: 1)
        encode = staticmethod(lambda texts, num_threads: [[ord(c) for c in text] for text in texts])
    assert encode(Letters, ["ab", "c"]).tolist() == [1, 97, 98, 1, 99]


# Errors of the user: exit code 2 and one line that names the culprit

def test_wrong_input_is_named_in_one_line(tmp_path, trained, monkeypatch, capsys):
    good = trained / "tokens.npy"
    np.save(tmp_path / "beyond.npy", np.full(5000, 96))
    np.save(tmp_path / "floats.npy", np.zeros(5000))
    np.save(tmp_path / "short.npy", np.full(30, 5))
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "image.png").write_bytes(b"x")
    (tmp_path / "fake.npy").write_bytes(b"not an array")
    (tmp_path / "file").write_text("")
    cases = [
        (["--ckpt", tmp_path / "nowhere", "--data", good], ["--ckpt", "nowhere"]),
        (["--data", tmp_path / "none.txt"], ["--data", "none.txt"]),
        (["--data", tmp_path / "text.txt"], ["--data", "tokenizer.model"]),
        (["--data", tmp_path / "beyond.npy"], ["--data", "beyond.npy", "96", "vocabulary"]),
        (["--data", tmp_path / "floats.npy"], ["--data", "floats.npy", "shape"]),
        (["--data", tmp_path / "short.npy"], ["--data", "short.npy", "too short"]),
        (["--data", tmp_path / "odd.bin"], ["--data", "odd.bin"]),
        (["--data", tmp_path / "empty.bin"], ["--data", "empty.bin", "too short"]),
        (["--data", tmp_path / "fake.npy"], ["--data", "fake.npy"]),
        (["--data", tmp_path / "image.png"], ["--data", "image.png"]),
        (["--data", tmp_path], ["--data", tmp_path.name]),
        ([], ["--data", "tokenizer.model"]),
        (["--data", good, "--steps", 0], ["--steps", "0"]),
        (["--data", good, "--ranks", tmp_path / "none.json"], ["--ranks", "none.json"]),
        (["--data", good, "--ranks", tmp_path / "file"], ["--ranks", "file", "JSON"]),
        (["--data", good, "--ranks", tmp_path / "file", "--recipe", "paper"], ["--ranks", "paper"]),
        (["--data", good, "--steps", -3], ["--steps", "-3"]),
        (["--data", good, "--steps", "many"], ["--steps", "many"]),
        (["--data", good, "--batch", 0], ["--batch"]),
        (["--data", good, "--lr", "nan"], ["--lr", "nan"]),
        (["--data", good, "--ce", 1.5], ["--ce", "1.5"]),
        (["--data", good, "--device", "tpu9"], ["--device", "tpu9"]),
        (["--data", good, "--device", "cuda:7"], ["--device", "cuda:7"]),
        (["--data", good, "--device", "meta"], ["--device", "meta"]),
        (["--data", good, "--tasks", tmp_path / "none.jsonl"], ["--tasks", "--eval"]),
        (["--data", good, "--eval", "--tasks", tmp_path / "none.jsonl"], ["--tasks", "none.jsonl"]),
        (["--data", good, "--eval", "--tasks", tmp_path / "text.txt"], ["--tasks", "text.txt", "line 1"]),
        (["--data", good, "--seq", 1000000, "--batch", 100000], ["--batch", "--seq", "GB"]),
        (["--data", good, "--dtype", "int3"], ["--dtype", "int3"]),
        (["--data", good, "--out", tmp_path / "file"], ["--out", "file"]),
        (["--data", good, "--out", tmp_path / "file" / "below"], ["--out", "file"]),
        (["--data", good, "--resume"], ["--resume", "no such file"]),
        (["--data", good, "--eval"], ["--eval", "projections.safetensors"]),
        (["--data", good, "--wrong"], ["--wrong"]),
    ]
    for arguments, culprits in cases:
        arguments = ["--ckpt", CKPT, "--out", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        lines = capsys.readouterr().err.strip().splitlines()
        assert left.value.code == 2 and len(lines) == 1, (arguments, left.value.code, lines)
        assert all(c in lines[0] for c in culprits), (arguments, lines)


def test_a_broken_line_of_jsonl_is_numbered(tmp_path):
    class Letters:
        bos_id = staticmethod(lambda: -1)
        encode = staticmethod(lambda texts, num_threads: [[ord(c) for c in text] for text in texts])
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\n\n{"text": "c"}\n')
    assert encode(Letters, jsonl_documents(path)).tolist() == [97, 98, 99]
    for line in ("{", '{"words": "x"}', "[]", '{"text": 3}'):
        path.write_text('{"text": "ab"}\n' + line + "\n")
        with pytest.raises(ValueError, match="line 2"):
            encode(Letters, jsonl_documents(path))
