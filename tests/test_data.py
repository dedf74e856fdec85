"""Data: text becomes ids once, every document begins with a beginning, nothing held out is seen."""
import io
import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CKPT, DEMO, ROOT

from support.checkpoint import read_config
from support.data import (
    begun,
    encode,
    even_windows,
    held_out_passages,
    jsonl_documents,
    load_data,
    python_documents,
    random_starts,
    random_windows,
    set_apart,
    text_for,
    text_pieces,
    windows,
)
from support.files import read_json, written_whole
from support.tokenizer import load_tokenizer


class Letters:
    """A tokenizer of characters."""

    def __init__(self, bos: int):
        self.bos = bos

    def bos_id(self) -> int:
        return self.bos

    def encode(self, texts, num_threads):
        return [[ord(letter) for letter in text] for text in texts]


# ------------------------------------------------------------------------------
# Windows

def test_a_window_holds_its_targets_one_token_on():
    tokens = np.arange(100)
    block = windows(tokens, torch.tensor([0, 17, 94]), 5)
    assert block.dtype == torch.int64
    assert block[:, 0].tolist() == [0, 17, 94]
    assert torch.equal(block[:, 1:], block[:, :-1] + 1)


def test_windows_that_begin_as_texts_do():
    """Their first token is the tokenizer's; parts of the ids have it too, and the ids stay."""
    tokens = np.arange(100, dtype=np.uint16)
    marked = begun(tokens, 7777)
    for ids in (marked, set_apart(marked, 5)[0], set_apart(marked, 5)[1]):
        block = even_windows(ids, 3, 4)
        assert block[:, 0].tolist() == [7777] * len(block) and len(block)
        assert torch.equal(block[:, 1:], even_windows(np.asarray(ids), 3, 4)[:, 1:])
    assert marked[0] == 0 and tokens[0] == 0 and block.dtype == torch.int64


def test_begin_asks_the_tokenizer(tmp_path, refusal):
    """The demo's texts begin with 1; a folder without a tokenizer, or a beginning, is refused."""
    args = SimpleNamespace(data=None, ckpt=DEMO, out=tmp_path, seq=8, begin=True)
    training, held_out = text_for(args, read_config(DEMO / "config.json"))
    assert training.beginning == held_out.beginning == load_tokenizer(DEMO).bos_id() == 1
    ids = tmp_path / "ids.npy"
    np.save(ids, np.full(900, 5, np.uint16))
    assert "--begin" in refusal("train", "--ckpt", CKPT, "--data", ids, "--begin", "--seq", 8,
                                "--whole", 2, "--out", tmp_path)


def test_random_windows_lie_anywhere_and_a_process_gets_its_share_of_the_same():
    tokens = np.arange(12)

    def draw(mine=slice(None)):
        generator = torch.Generator().manual_seed(3)
        return random_windows(tokens, 200, 5, generator, mine)

    block = draw()
    assert set(block[:, 0].tolist()) == set(range(7))
    assert torch.equal(draw(slice(50, 100)), block[50:100])


def test_windows_begin_anywhere_below_the_positions_and_near_0_more_often():
    """By the cube: half of them in the first eighth."""
    generator = torch.Generator().manual_seed(3)
    starts = random_starts(300, 5, 12, generator)
    assert starts.dtype == torch.int64
    assert set(starts.tolist()) == set(range(8))
    starts = random_starts(4000, 5, 8004, generator)
    for share, place in ((0.25, 125), (0.5, 1000), (0.75, 3375)):
        assert (starts < place).double().mean().item() == pytest.approx(share, abs=0.03)
    before = generator.get_state()
    for positions in (1, 5):                # where they do not fit nothing is drawn
        assert random_starts(4, 5, positions, generator).tolist() == [0] * 4
    assert torch.equal(generator.get_state(), before)


def test_even_windows_are_spread_over_all_of_the_text():
    tokens = np.arange(1000)
    block = even_windows(tokens, 4, 9)
    assert block[:, 0].tolist() == [0, 249, 498, 747]
    assert torch.equal(block, windows(tokens, block[:, 0], 9))
    assert even_windows(tokens, 10 ** 6, 9)[:, 0].tolist() == list(range(0, 999, 9))


def test_too_short_a_text_holds_no_window():
    assert even_windows(np.arange(65), 500, 64).shape == (1, 65)
    with pytest.raises(ValueError, match="too short, 64 .* 64"):
        even_windows(np.arange(64), 500, 64)


def test_passages_are_as_long_as_the_model_can_read_twice():
    tokens = np.arange(1000)
    for positions, n in ((4096, 64), (100, 50)):
        config = SimpleNamespace(max_position_embeddings=positions)
        passages = held_out_passages(SimpleNamespace(passages=5), tokens, config)
        assert passages.shape == (5, n)
        assert held_out_passages(SimpleNamespace(passages=0), tokens, config) is None


# ------------------------------------------------------------------------------
# Text becomes ids

def test_every_document_begins_with_the_beginning_of_sequence():
    assert encode(Letters(1), ["ab", "c"]).tolist() == [1, 97, 98, 1, 99]


def test_a_tokenizer_without_a_beginning_adds_none():
    assert encode(Letters(-1), ["ab", "c"]).tolist() == [97, 98, 99]


def test_a_text_in_pieces_is_one_document():
    assert encode(Letters(1), ["ab", "c"], one_document=True).tolist() == [1, 97, 98, 99]


def test_pieces_of_a_text_are_the_text_and_end_with_a_line(tmp_path):
    path = tmp_path / "text.txt"
    text = "one line\nanother, longer than a piece\n\nlast"
    path.write_text(text)
    pieces = list(text_pieces(path, characters=6))
    assert "".join(pieces) == text
    assert pieces[0] == "one line\n"


def test_a_text_is_tokenised_once_and_a_changed_one_again(tmp_path, demo):
    _, tokenizer = demo
    text, out = tmp_path / "text.txt", tmp_path / "out"
    made = out / "text.txt.bin"
    text.write_text("The first line.\n" * 3000 + "word " * 100000)

    def ids_of_text():
        return np.concatenate(load_data(text, DEMO, 4096, out))

    ids = ids_of_text()
    assert ids[0] == tokenizer.bos_id()
    assert (ids[1:] != tokenizer.bos_id()).all()
    assert tokenizer.decode(ids.tolist()).split() == text.read_text().split()
    first = made.stat().st_mtime_ns
    ids_of_text()
    assert made.stat().st_mtime_ns == first
    text.write_text("Another text.")
    assert len(ids_of_text()) == 1 + len(tokenizer.encode("Another text."))
    assert not list(out.glob("*.part"))


def test_lines_of_json_are_documents_and_empty_lines_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\n\n{"text": "c"}\n')
    assert encode(Letters(-1), jsonl_documents(path)).tolist() == [97, 98, 99]


BROKEN_LINES = ["{", "[]", '{"words": "x"}', '{"text": 3}', '{"text": "\\ud800"}']


@pytest.mark.parametrize("line", BROKEN_LINES)
def test_a_broken_line_of_jsonl_is_numbered(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        list(jsonl_documents(path))


# ------------------------------------------------------------------------------
# Ids as they are found

def test_a_file_of_tokens_is_mapped_and_its_last_tenth_held_out(tmp_path):
    ids = np.arange(1000) % 96
    ids.astype(np.uint16).tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", ids)
    for name in ("a.bin", "a.npy"):
        training, held_out = load_data(tmp_path / name, CKPT, 96)
        assert isinstance(training, np.memmap)
        assert np.array_equal(training, ids[:900])
        assert np.array_equal(held_out, ids[900:])


def test_a_large_vocabulary_takes_four_bytes_an_id(tmp_path):
    ids = np.arange(1000) * 69
    ids.astype(np.uint32).tofile(tmp_path / "a.bin")
    assert np.array_equal(load_data(tmp_path / "a.bin", CKPT, 70000)[1], ids[900:])


@pytest.mark.parametrize("dtype, vocab_size, words", [
    (np.uint32, 96, "is it uint32"),
    (np.int64, 96, "is it uint32"),
    (np.int64, 70000, "is it uint64"),
])
def test_ids_wider_than_their_vocabulary_asks_for_are_refused(dtype, vocab_size, words, tmp_path):
    """A .bin does not say how wide they are; read as narrower ones every second id is 0."""
    ids = 1 + np.arange(1000) % 95
    ids.astype(dtype).tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=f"a.bin: every second number is 0: {words}"):
        load_data(tmp_path / "a.bin", CKPT, vocab_size)
    (ids * (np.arange(1000) % 2)).astype(np.uint16).tofile(tmp_path / "a.bin")
    assert len(load_data(tmp_path / "a.bin", CKPT, 96)[0]) == 900       # 0 first and third is text


@pytest.mark.parametrize("magic", [20240520, 20240801])
def test_a_header_of_llm_c_is_no_text(magic, tmp_path):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, 500
    ids = np.arange(500).astype(np.uint16) % 96
    (tmp_path / "a.bin").write_bytes(header.tobytes() + ids.tobytes())
    with pytest.raises(ValueError, match="llm.c's header"):
        load_data(tmp_path / "a.bin", CKPT, 96)


def npy_bytes(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("length", [0, 5, 8, 9, 60, 127, 128, 1000])
def test_a_npy_that_is_cut_off_is_named(tmp_path, length):
    """The header takes 128 bytes; whatever numpy makes of half of one is one ValueError."""
    path = tmp_path / "cut.npy"
    path.write_bytes(npy_bytes(np.arange(900) % 96)[:length])
    with warnings.catch_warnings(), pytest.raises(ValueError, match="cut.npy"):
        warnings.simplefilter("error")
        load_data(path, CKPT, 96)


def test_a_npy_with_a_broken_header_is_named(tmp_path):
    path = tmp_path / "broken.npy"
    whole = npy_bytes(np.arange(900) % 96)
    for place in range(6, 80):
        path.write_bytes(whole[:place] + b"\xff{" + whole[place + 2:])
        with pytest.raises(ValueError, match="broken.npy"):
            load_data(path, CKPT, 96)


def test_the_note_of_a_tokenised_text_may_be_broken(tmp_path):
    """Then it is one line that names the note, or the text is tokenised again."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Some words. " * 50)
    ids = np.concatenate(load_data(text, DEMO, 4096, out))
    note = out / "text.txt.json"
    note.write_text(json.dumps({"source": 3}))
    assert np.array_equal(np.concatenate(load_data(text, DEMO, 4096, out)), ids)
    note.write_text("{")
    with pytest.raises(ValueError, match="text.txt.json"):
        load_data(text, DEMO, 4096, out)


# ------------------------------------------------------------------------------
# Python's own text

@pytest.fixture(scope="module")
def documents():
    return python_documents()


def test_python_text_is_split_by_name_and_nothing_held_out_is_trained_on(documents):
    training, held_out = documents
    share = sum(map(len, held_out)) / sum(map(len, training))
    assert 0.04 < share < 0.25
    known = {p for text in training for p in text.split("\n\n") if len(p) > 30}
    for text in held_out:
        assert known.isdisjoint(text.split("\n\n"))


def test_the_sources_of_python_come_on_top_on_the_same_side(documents):
    training, _ = documents
    with_sources, held_with_sources = python_documents(sources=True)
    assert set(training) <= set(with_sources)
    assert sum(map(len, with_sources)) > 3 * sum(map(len, training))
    assert set(training).isdisjoint(held_with_sources)


def test_validation_text_is_the_end_of_a_long_text_and_nothing_of_a_short_one():
    tokens = np.arange(101)
    rest, apart = set_apart(tokens, 10)
    assert rest.tolist() == list(range(91))
    assert apart.tolist() == list(range(91, 101))
    rest, apart = set_apart(tokens[:100], 10)
    assert len(rest) == 100
    assert not len(apart)


def test_files_that_windows_wrote_are_those_that_others_write(tmp_path):
    """A mark first, and \\r\\n behind every line."""
    lines = ["Some words, and some more.", "And a line."]
    text, documents = "\n".join(lines), "\n".join(json.dumps({"text": x}) for x in lines)
    for name, words in (("a.txt", text), ("a.jsonl", documents)):
        (tmp_path / name).write_bytes(words.encode())
        theirs = b"\xef\xbb\xbf" + words.replace("\n", "\r\n").encode()
        (tmp_path / f"win_{name}").write_bytes(theirs)
    assert list(text_pieces(tmp_path / "win_a.txt")) == list(text_pieces(tmp_path / "a.txt"))
    assert list(jsonl_documents(tmp_path / "win_a.jsonl")) == lines
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}\r\n")
    assert read_json(tmp_path / "a.json") == {}


def test_ids_that_were_cut_short_are_made_again(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The json module. " * 400)
    whole = [ids.copy() for ids in load_data(text, DEMO, 4096, tmp_path / "out")]
    with open(tmp_path / "out" / "text.txt.bin", "r+b") as file:
        file.truncate(400)
    again = load_data(text, DEMO, 4096, tmp_path / "out")
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))


def test_two_that_write_one_file_do_not_write_into_one_another(tmp_path):
    file = tmp_path / "a.bin"
    with written_whole(file) as ours:
        ours.write(b"ours")
        subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1])\n"
                        "from support.files import written_whole\n"
                        "with written_whole(sys.argv[2]) as f: f.write(b'theirs, which is longer')",
                        ROOT, file], check=True)
        assert file.read_bytes() == b"theirs, which is longer"
    assert file.read_bytes() == b"ours"
