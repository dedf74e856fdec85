"""tokenizer.json: the ids of transformers, one beginning, text that streams whole, chats."""
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import CKPT, DEMO, ROOT, call
from safetensors.torch import load_file, save_file

from support.data import encode, load_data, text_pieces
from support.tokenizer import chat_prompt, encode_prompt, load_tokenizer, show, with_beginning

FOLDERS = sorted((ROOT / "tests" / "tokenizers").iterdir())         # llama3, qwen2, unigram


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request, tmp_path):
    """A copy of a folder with a tokenizer.json: byte-level BPE of LLaMA-3 or Qwen2, or Unigram."""
    return shutil.copytree(request.param, tmp_path / request.param.name)


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def golden(folder):
    """Lines of code, Chinese, emoji, control characters, or nothing; and transformers' ids."""
    said = json.loads((folder / "ids.json").read_text())
    return said["lines"], said["ids"]


def edit(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# ------------------------------------------------------------------------------
# Ids

def test_ids_are_those_of_transformers(tokenizer, golden):
    lines, expected = golden
    together = [with_beginning(tokenizer, ids) for ids in tokenizer.encode(lines, num_threads=2)]
    one_by_one = [with_beginning(tokenizer, tokenizer.encode(line)) for line in lines]
    assert together == one_by_one == expected


def test_a_document_begins_where_the_post_processor_says_so_and_once(tokenizer, folder):
    begins = folder.name != "qwen2"
    bos = tokenizer.bos_id()
    assert (bos >= 0) == begins
    ids = encode(tokenizer, ["ab", "cd"]).tolist()
    assert ids.count(bos) == 2 * begins
    assert (ids[0] == bos) == begins
    if begins:
        spelled = tokenizer.inner.id_to_token(bos) + "ab"
        assert encode_prompt(tokenizer, spelled) == encode_prompt(tokenizer, "ab")
        assert encode(tokenizer, [spelled, "cd"]).tolist() == ids


@pytest.mark.parametrize("said, begins", [
    ({"add_bos_token": True, "bos_token": "<|begin|>"}, True),
    ({"add_bos_token": True, "bos_token": {"content": "<|begin|>"}}, True),
    ({"bos_token": "<|begin|>"}, False),
    ({"add_bos_token": True, "bos_token": None}, False),
    ({"add_bos_token": True, "bos_token": "<|nowhere|>"}, False),
    (None, False),
])
def test_without_a_post_processor_the_configuration_decides(said, begins, tmp_path):
    shutil.copy(FOLDERS[1] / "tokenizer.json", tmp_path)
    if said is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id() == (tokenizer.inner.token_to_id("<|begin|>") if begins else -1)


def test_what_the_file_says_of_batches_is_not_for_texts(tmp_path):
    """Some files cut a text off at 512 tokens, or fill it up to them."""
    folder = shutil.copytree(FOLDERS[0], tmp_path / "llama3")
    tokenizer = load_tokenizer(folder)
    expected = tokenizer.encode(["a", "a b c d e f"])
    tokenizer.inner.enable_truncation(3)
    tokenizer.inner.enable_padding(length=9)
    tokenizer.inner.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode(["a", "a b c d e f"]) == expected


# ------------------------------------------------------------------------------
# Files

def test_a_text_in_pieces_is_the_whole_but_for_a_token_or_two_where_they_meet(
        tokenizer, golden, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(golden[0]), encoding="utf-8")
    pieces = list(text_pieces(text, characters=500))
    whole = tokenizer.encode("".join(pieces))
    assert len(pieces) > 4
    end = 0
    for piece in pieces:
        inner = tokenizer.encode(piece)[2:-2]
        starts = range(max(0, end - 4), end + 9)
        found = [start for start in starts if whole[start:start + len(inner)] == inner]
        assert found
        end = found[0] + len(inner)
    assert len(whole) - end <= 4


def test_a_file_is_tokenised_anew_for_another_tokenizer(tmp_path):
    ckpt = shutil.copytree(CKPT, tmp_path / "ckpt")
    edit(ckpt / "config.json", vocab_size=400)
    text = tmp_path / "text.txt"
    text.write_text("Some words, and some more of them. " * 30)

    def ids_by(name):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "tests" / "tokenizers" / name / file, ckpt)
        return np.concatenate(load_data(text, ckpt, 400, tmp_path / "out")).tolist()

    llama, qwen = ids_by("llama3"), ids_by("qwen2")
    assert llama == encode(load_tokenizer(FOLDERS[0]), [text.read_text()]).tolist()
    assert qwen == encode(load_tokenizer(FOLDERS[1]), [text.read_text()]).tolist()
    assert llama != qwen


def test_a_tokenizer_json_goes_first_where_a_folder_has_both(tmp_path, capsys):
    """As in transformers 5.24; where their ids differ a line says so."""
    folder = shutil.copytree(FOLDERS[0], tmp_path / "llama3")
    theirs = load_tokenizer(folder).encode("ab cd")
    (folder / "tokenizer.model").write_bytes(b"bytes of something else")
    assert load_tokenizer(folder).encode("ab cd") == theirs
    assert not capsys.readouterr().err
    shutil.copy(DEMO / "tokenizer.model", folder)
    assert load_tokenizer(folder).encode("ab cd") == theirs != load_tokenizer(DEMO).encode("ab cd")
    line, = capsys.readouterr().err.splitlines()
    assert "tokenizer.model makes other ids" in line and "tokenizer.json" in line


# ------------------------------------------------------------------------------
# What other files of a folder add to a tokenizer.model

TURN = "<|turn|>"
SPECIAL = {str(id): {"content": text, "special": True}
           for id, text in enumerate(("<unk>", "<s>", "</s>"))}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": True}
# Ids that transformers 5.24 has for the demo's tokenizer.model (4,096 pieces, no space before a
# text) in a folder as LLaMA's and Yi's are laid out, with TURN as token 4,096.
IDS = {
    "The json module": [557, 1143, 3764, 648],
    "a <|turn|> b": [4006, 4001, 4096, 293],
    "<|turn|>b": [4096, 4025],
    "a<|turn|> b </s> c<s>": [4006, 4096, 293, 4001, 2, 280, 1],
    "x\n\ny <unk> z": [4033, 13, 13, 4027, 4001, 0, 1209],
}


def demo_folder(path, **files):
    """The demo's tokenizer.model and these files, by their name without .json."""
    path.mkdir(exist_ok=True)
    shutil.copy(DEMO / "tokenizer.model", path)
    for name, said in files.items():
        (path / f"{name}.json").write_text(json.dumps(said))
    return path


def config_of(*, turn=None, **settings):
    added = SPECIAL | {"4096": {"content": TURN, **(turn or {})}}
    return LLAMA | {"added_tokens_decoder": added} | settings


def test_added_tokens_have_the_ids_of_transformers(tmp_path):
    for name, config in (("llama", config_of()), ("yi", config_of(add_bos_token=False))):
        tokenizer = load_tokenizer(demo_folder(tmp_path / name, tokenizer_config=config))
        assert tokenizer.encode(list(IDS), num_threads=2) == list(IDS.values())
        assert [tokenizer.encode(line) for line in IDS] == list(IDS.values())
        assert tokenizer.get_piece_size() == 4097
        begins = [1] if name == "llama" else []
        assert encode_prompt(tokenizer, TURN) == begins + [4096]
        assert encode(tokenizer, ["The json module", TURN]).tolist() == [
            *begins, *IDS["The json module"], *begins, 4096]


def test_a_token_of_added_tokens_json_is_one_too(tmp_path):
    tokenizer = load_tokenizer(demo_folder(tmp_path / "a", added_tokens={TURN: 4096}))
    assert tokenizer.encode("a <|turn|> b") == IDS["a <|turn|> b"]
    assert tokenizer.decode(tokenizer.encode("a <|turn|> b")) == "a <|turn|> b"
    assert tokenizer.bos_id() == 1


def test_control_pieces_are_found_in_a_text_whatever_other_files_say(tmp_path):
    """Ids of transformers 5.24, of folders with and without a tokenizer_config.json."""
    for name, files in (("alone", {}), ("named", {"tokenizer_config": LLAMA})):
        tokenizer = load_tokenizer(demo_folder(tmp_path / name, **files))
        assert tokenizer.encode("</s><s>") == [2, 1]
        assert tokenizer.encode("a </s> b") == [4006, 4001, 2, 293]
        assert tokenizer.encode("x<unk>y") == [4033, 0, 4027]
        assert tokenizer.get_piece_size() == 4096


def test_a_special_token_is_not_shown_and_may_take_spaces_along(tmp_path):
    turn = {"special": True, "lstrip": True, "rstrip": True}
    config = config_of(turn=turn)
    tokenizer = load_tokenizer(demo_folder(tmp_path / "a", tokenizer_config=config))
    assert tokenizer.encode("a <|turn|> b") == [4006, 4096, 4025]
    assert tokenizer.decode([4006, 4096, 4025]) == "ab"


def test_an_added_token_may_be_white_space_or_end_with_it(tmp_path):
    added = {"4096": {"content": "\n", "lstrip": True}, "4097": {"content": "<x> ", "rstrip": True}}
    folder = demo_folder(tmp_path / "a", tokenizer_config={"added_tokens_decoder": added})
    tokenizer = load_tokenizer(folder)
    a, b = tokenizer.encode("a")[0], tokenizer.inside.encode("b")[0]
    assert tokenizer.encode("a  \nb<x>   b") == [a, 4096, b, 4097, b]
    with pytest.raises(ValueError, match="Unicode"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="Unicode"):
        load_tokenizer(DEMO).encode("a\ud800")


def test_the_space_that_begins_a_text_stands_behind_a_token_where_legacy_says_so(tmp_path):
    """As in transformers 5.24 for a LLaMA's folder, where SentencePiece puts a space first."""
    from sentencepiece import SentencePieceTrainer
    (tmp_path / "text").write_text("the cat sat on a mat b b b the cats\n" * 50)
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False)
    plain = load_tokenizer(tmp_path)
    first, other = plain.encode("b"), plain.inside.encode("b")
    assert first != other
    added = {str(plain.get_piece_size()): {"content": TURN}}
    turn = plain.get_piece_size()
    for legacy in (False, True):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(LLAMA | {"legacy": legacy, "added_tokens_decoder": added}))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.encode("b<|turn|>b") == [*first, turn, *(first if legacy else other)]
        assert tokenizer.encode("<|turn|> b") == [turn, *first]
        assert tokenizer.decode(tokenizer.encode("the cat<|turn|> sat")) == "the cat<|turn|> sat"


@pytest.mark.parametrize("files, words", [
    ({"added_tokens": {TURN: "many"}}, "<|turn|> many"),
    ({"added_tokens": {"": 4096}}, "added token 4096"),
    ({"tokenizer_config": {"added_tokens_decoder": {"-1": {"content": TURN}}}}, "<|turn|> -1"),
    ({"tokenizer_config": {"added_tokens_decoder": {"4096": {}}}}, "added token 4096"),
    ({"tokenizer_config": {"added_tokens_decoder": {"4096": {"content": [1]}}}}, "added token"),
    ({"tokenizer_config": {"added_tokens_decoder": [TURN]}}, "added_tokens_decoder"),
])
def test_an_added_token_without_text_or_id_is_one_line(files, words, tmp_path):
    with pytest.raises(ValueError) as error:
        load_tokenizer(demo_folder(tmp_path / "a", **files))
    assert all(word in str(error.value) for word in words.split())


def test_a_tokenizer_json_takes_added_tokens_too_and_no_beginning_where_none_is_asked(tmp_path):
    folder = shutil.copytree(FOLDERS[0], tmp_path / "llama3")
    tokenizer = load_tokenizer(folder)
    size, bos = tokenizer.get_piece_size(), tokenizer.bos_id()
    assert bos >= 0
    edit(folder / "tokenizer_config.json", add_bos_token=False)
    (folder / "added_tokens.json").write_text(json.dumps({TURN: size}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id() == -1
    assert tokenizer.encode("ab<|turn|>")[-1] == size
    assert size + 1 == tokenizer.get_piece_size()
    (folder / "added_tokens.json").write_text(json.dumps({TURN: size + 7}))
    with pytest.raises(ValueError, match="is .* there, and"):
        load_tokenizer(folder)


def test_ids_that_no_file_spells_show_as_a_mark(tmp_path, tokenizer, capsys):
    """A model may have more rows than its tokenizer has pieces."""
    for some in (load_tokenizer(DEMO), tokenizer):
        size, ids = some.get_piece_size(), some.encode("ab cd")
        assert some.decode([*ids, size, size + 1]) == f"ab cd<{size}><{size + 1}>"
        show(some, ids, [size, *ids, size + 1])
        assert capsys.readouterr().out.startswith(f"ab cd<{size}>")


# ------------------------------------------------------------------------------
# Text

def test_streaming_never_prints_half_a_character(tokenizer, golden, capsys):
    printed = []

    def checked(tokens):
        for token in tokens:
            printed.append(capsys.readouterr().out)
            assert "\ufffd" not in printed[-1]
            yield token

    prompt = encode_prompt(tokenizer, "a")
    for line in golden[0]:
        if "\ufffd" not in line:
            ids = tokenizer.encode(line)
            show(tokenizer, prompt, checked(ids))
            printed.append(capsys.readouterr().out)
            assert "".join(printed) == tokenizer.decode(prompt + ids) + "\n"
            printed.clear()


def test_an_unfinished_character_is_printed_at_the_end(capsys):
    tokenizer = load_tokenizer(FOLDERS[0])
    ids = tokenizer.encode("a👍")[:-1]
    show(tokenizer, ids[:1], ids[1:])
    assert capsys.readouterr().out == "a\ufffd\n"


# ------------------------------------------------------------------------------
# Chats

CHATML = """\
{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
{{ bos_token }}<|im_start|>system
Be brief.<|im_end|>
    {% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
PUT = """\
<s><|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
What is {a} <list>?</s>
<|im_start|>assistant
"""
OTHER = "{{ messages[0]['content'] }}"


def test_a_turn_is_put_as_the_folders_template_says(tmp_path):
    """Wherever it stands; blocks leave no lines or spaces, as with transformers."""
    several = [{"name": "tool_use", "template": OTHER}, 3, {"name": "default", "template": CHATML}]
    bos, eos = "<s>", "</s>"
    for template, bos_token, eos_token in (
            (CHATML, bos, eos), (CHATML, {"content": bos}, {"content": eos}), (several, bos, eos)):
        said = {"chat_template": template, "bos_token": bos_token, "eos_token": eos_token}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
        assert chat_prompt(tmp_path, "What is {a} <list>?") == PUT
    edit(tmp_path / "tokenizer_config.json", chat_template=OTHER)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert chat_prompt(tmp_path, "What is {a} <list>?") == PUT


def test_tokens_that_a_folder_does_not_name_are_put_as_nothing(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("[{{ bos_token }}" + OTHER + "{{ eos_token }}]")
    for said in (None, {"bos_token": None}, {"eos_token": None}):
        if said is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
        assert chat_prompt(tmp_path, "hello") == "[hello]"


def test_a_folder_without_a_template_is_named(tmp_path):
    for said in (None, {}, {"chat_template": 3},
                 {"chat_template": [{"name": "tool_use", "template": OTHER}]}):
        if said is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
        with pytest.raises(ValueError, match=f"{tmp_path}: neither chat_template.jinja nor"):
            chat_prompt(tmp_path, "hello")


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('no such turn') }}", "no such turn"),
    ("{% if %}", "Expected an expression"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ bos_token + 3 }}", "str"),
])
def test_a_template_that_fails_is_named_with_its_reason(tmp_path, template, words):
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"{tmp_path}: its chat template fails .*{words}"):
        chat_prompt(tmp_path, "hello")


# ------------------------------------------------------------------------------
# What is wrong

@pytest.fixture
def ckpt(tmp_path):
    """CKPT, whose vocabulary is 96, with a tokenizer.json of 400."""
    made = shutil.copytree(CKPT, tmp_path / "ckpt")
    shutil.copy(FOLDERS[0] / "tokenizer.json", made)
    return made


def test_a_broken_tokenizer_is_named_in_one_line(ckpt, refusal):
    file = ckpt / "tokenizer.json"
    whole = file.read_bytes()
    broken = [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"null"]
    broken += [whole[:length] for length in range(1, len(whole), 611)]
    for text in broken:
        file.write_bytes(text)
        with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
            load_tokenizer(ckpt)
    for name in ("generate", "model"):
        line = refusal(name, "--ckpt", ckpt)
        assert "--ckpt" in line
        assert "tokenizer.json" in line


def test_a_vocabulary_beyond_the_models_is_refused(ckpt, refusal, tmp_path):
    for name in ("generate", "model"):
        line = refusal(name, "--ckpt", ckpt)
        assert "tokenizer.json" in line
        assert "vocabulary, 96" in line
    (tmp_path / "text.txt").write_text("Ünïcödé words 👍 " * 900)
    line = refusal("train", "--ckpt", ckpt, "--data", tmp_path / "text.txt", "--out", tmp_path,
                   "--seq", 64)
    assert "--data" in line
    assert "vocabulary of 96" in line


def test_where_the_library_is_missing_the_line_says_what_to_install(ckpt, refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in refusal("generate", "--ckpt", ckpt)


def test_a_text_that_a_tokenizer_cannot_spell_is_one_line(ckpt, refusal, tmp_path):
    """A Unigram made without an unknown piece."""
    edit(ckpt / "config.json", vocab_size=400)
    shutil.copy(FOLDERS[2] / "tokenizer.json", ckpt)
    said = json.loads((ckpt / "tokenizer.json").read_text())
    said["model"]["unk_id"] = None
    (ckpt / "tokenizer.json").write_text(json.dumps(said))
    text = tmp_path / "text.txt"
    text.write_text("words 龘 " * 900)
    line = refusal("support.data", "--ckpt", ckpt, "--data", text, "--out", tmp_path)
    assert "tokenizer.json" in line


def test_a_folder_without_any_end_of_sequence_speaks_to_the_last_token(tmp_path, capsys):
    folder = speaking(tmp_path, eos_token_id=None)
    call("generate", "--ckpt", folder, "--prompt", "words", "--tokens", 12)
    assert "decode 10 at" in capsys.readouterr().err


def test_a_prompt_that_is_not_text_is_refused(tmp_path, refusal):
    """What is left of bytes that are no UTF-8 on a command line."""
    line = refusal("generate", "--ckpt", speaking(tmp_path), "--prompt", "caf\udce9")
    assert "--prompt" in line


def speaking(tmp_path, **settings):
    """A random model of Qwen2's kind with a vocabulary for its tokenizer.json."""
    folder = shutil.copytree(ROOT / "tests" / "golden" / "qwen2_tied", tmp_path / "speaking")
    edit(folder / "config.json", vocab_size=400, **settings)
    (folder / "generation_config.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.randn(400, 32)
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(FOLDERS[1] / "tokenizer.json", folder)
    return folder
