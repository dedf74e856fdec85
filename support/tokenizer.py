"""Tokenizers: a tokenizer.json by Hugging Face's library, a tokenizer.model by SentencePiece.

Both turn text into ids and back; `encode_prompt` and `show` are how prompts come in and text goes
out. Where a folder has both files the first counts, as in transformers: tokens that were added
later stand in it alone. What tokenizer_config.json and added_tokens.json say is read for both.
"""
import functools
import itertools
import re
import sys
from pathlib import Path

from support.files import read_json

SAMPLE = "The first 2 words,\n  def f(x): return [x]\n"     # what two files are compared by


def load_tokenizer(path: str | Path, vocab_size: int | None = None):
    """The tokenizer of a model folder; ValueError where none fits the vocabulary."""
    file, other = Path(path) / "tokenizer.json", Path(path) / "tokenizer.model"
    pieces = read_sentencepiece(other)
    if file.exists():
        tokenizer = JsonTokenizer(file)
        if pieces and tokenizer.encode(SAMPLE) != pieces.encode(SAMPLE):
            say_once(f"{other} makes other ids of a text than tokenizer.json beside it, which "
                     "counts, as in transformers")
    elif pieces:
        file, tokenizer = other, PieceTokenizer(other, pieces)
    else:
        fault = "not a SentencePiece model" if other.exists() else "no such file"
        raise ValueError(f"{other}: {fault}, and there is no tokenizer.json; train.py and "
                         "search.py take token ids too, --data tokens.bin")
    if vocab_size and tokenizer.get_piece_size() > vocab_size:
        raise ValueError(f"{file}: has more pieces than the model's vocabulary, {vocab_size}")
    return tokenizer


@functools.cache
def say_once(line: str) -> None:
    print(line, file=sys.stderr)


def read_sentencepiece(file: Path):
    """A SentencePieceProcessor, or None where the file is missing or something else."""
    from sentencepiece import SentencePieceProcessor
    try:
        proto = file.read_bytes()                       # it takes an empty one, and fails later
        return SentencePieceProcessor(model_proto=proto) if proto else None
    except (OSError, RuntimeError):
        return None


def added_tokens(folder: Path, config: dict) -> dict[str, dict]:
    """Tokens that a folder adds to those of its tokenizer's file: {text: {"id", "special", …}}."""
    file = folder / "added_tokens.json"
    added = {text: {"id": id} for text, id in (read_json(file) if file.exists() else {}).items()}
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{folder}: added_tokens_decoder in tokenizer_config.json is no object")
    for id, said in decoder.items():
        said = said if isinstance(said, dict) else {"content": said}
        text = said.get("content")
        text = text if isinstance(text, str) else ""
        added[text] = {**said, "id": int(id) if str(id).isdecimal() else id}
    for text, said in added.items():
        if not (isinstance(text, str) and text and type(said["id"]) is int and said["id"] >= 0):
            raise ValueError(f"{folder}: the added token {text!r} has the id {said['id']!r}")
    return added


def control_pieces(pieces) -> dict[str, dict]:
    """Of a SentencePiece model what it does not find in a text: <s>, </s>, <unk>, as added tokens.
    """
    return {pieces.id_to_piece(id): {"id": id, "special": True}
            for id in range(pieces.get_piece_size())
            if pieces.is_control(id) or pieces.is_unknown(id)}


def named_token(config: dict, name: str) -> str | None:
    """The text of bos_token or eos_token in a tokenizer_config.json."""
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def decoded(ids: list[int], spell: dict, decode) -> str:
    """Text of ids: of those that `spell` knows as it says, of runs of others by decode(run, at)."""
    text = ""
    for known, run in itertools.groupby(ids, spell.__contains__):
        run = list(run)
        text += "".join(map(spell.get, run)) if known else decode(run, text)
    return text


# A SentencePiece model's settings once more, behind it, without the space that begins a text: in
# its format what is said last counts.
NO_PREFIX = b"\x1a\x02\x18\x00"


class PieceTokenizer:
    """A tokenizer.model and the tokens that other files add to it, which are cut out of a text.

    So are its control pieces, such as <s>, as in transformers.
    """

    def __init__(self, file: Path, pieces):
        from sentencepiece import SentencePieceProcessor
        config = file.with_name("tokenizer_config.json")
        config = read_json(config) if config.exists() else {}
        self.pieces = pieces
        self.added = control_pieces(pieces) | added_tokens(file.parent, config)
        inside = SentencePieceProcessor(model_proto=file.read_bytes() + NO_PREFIX)
        self.inside = inside                            # for what stands behind an added token
        self.has_prefix = pieces.encode("a") != inside.encode("a")
        self.legacy = config.get("legacy", "tokenizer_class" not in config)
        self.beginning = -1 if config.get("add_bos_token") is False else pieces.bos_id()
        longest_first = sorted(self.added.items(), key=lambda of: -len(of[0]))
        self.ids = [said["id"] for _, said in longest_first]
        ways = [(r"\s*" if said.get("lstrip") else "") + f"({re.escape(text)})"
                + (r"\s*" if said.get("rstrip") else "") for text, said in longest_first]
        self.pattern = re.compile("|".join(ways)) if ways else None
        size = pieces.get_piece_size()
        self.spelled = {said["id"]: "" if said.get("special") else text
                        for text, said in self.added.items() if said["id"] >= size}

    def bos_id(self) -> int:
        return self.beginning

    def get_piece_size(self) -> int:
        return max([self.pieces.get_piece_size(), *(id + 1 for id in self.spelled)])

    def encode(self, text: str | list[str], num_threads: int = 0):
        if isinstance(text, str):
            return self.encode([text])[0]
        try:
            has_added = [self.pattern is not None and bool(self.pattern.search(one))
                         for one in text]
            plain = [one for one, has in zip(text, has_added, strict=True) if not has]
            plain = iter(self.pieces.encode(plain, num_threads=num_threads or 1))
            return [self.encode_around(one) if has else next(plain)
                    for one, has in zip(text, has_added, strict=True)]
        except (TypeError, RuntimeError):               # half a character, as JSON can spell it
            raise ValueError("a text that is no Unicode") from None

    def encode_around(self, text: str) -> list[int]:
        """Ids of a text with added tokens in it, as transformers has them."""
        found = list(self.pattern.finditer(text))
        ends = [match.start() for match in found[1:]] + [len(text)]
        first = text[:found[0].start()]
        ids = self.pieces.encode(first) if first else []
        for match, end in zip(found, ends, strict=True):
            ids.append(self.ids[match.lastindex - 1])
            part = text[match.end():end]
            # A space begins each part where "legacy" says so; but there is one already.
            prefix = self.legacy and self.has_prefix and part and not part.startswith(" ")
            ids += self.inside.encode(" " + part if prefix else part)
        return ids

    def decode(self, ids: list[int]) -> str:
        size = self.pieces.get_piece_size()
        spell = {id: self.spelled.get(id, f"<{id}>") for id in ids if id >= size}
        return decoded(ids, spell,
                       lambda run, at: (self.inside if at else self.pieces).decode(run))


def unless_left(error: BaseException) -> None:
    """Raise what is no error. A panic of the library, which is Rust, is none of Python's either."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error


class JsonTokenizer:
    """A tokenizer.json, read by Hugging Face's library; its methods are called as SentencePiece's.

    A text's beginning is what the file's post-processor puts before it; add_bos_token in
    tokenizer_config.json goes before. `bos_id` is −1 where nothing is put, as for Qwen.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            from tokenizers import Tokenizer
            self.inner = Tokenizer.from_file(str(file))
        except ImportError:
            raise ValueError(f"{file}: first run pip install tokenizers, which reads it") from None
        except BaseException as error:                  # the library has no class of its own
            unless_left(error)
            raise ValueError(f"{file}: not a tokenizer, or a truncated one ({error})") from None
        self.inner.no_truncation()                      # what a file says of batches
        self.inner.no_padding()
        config = file.with_name("tokenizer_config.json")
        config = read_json(config) if config.exists() else {}
        self.add(added_tokens(file.parent, config))
        self.beginning = self.find_beginning(config)

    def add(self, added: dict[str, dict]) -> None:
        """Give the library the tokens of other files that it has not, in the order of their ids."""
        from tokenizers import AddedToken
        for text, said in sorted(added.items(), key=lambda of: of[1]["id"]):
            if self.inner.token_to_id(text) is None:
                flags = {flag: said[flag] for flag in ("lstrip", "rstrip", "normalized", "special")
                         if isinstance(said.get(flag), bool)}
                self.inner.add_tokens([AddedToken(text, **flags)])
            if (id := self.inner.token_to_id(text)) != said["id"]:
                raise ValueError(f"{self.file}: {text!r} is {id} there, and {said['id']} in "
                                 "tokenizer_config.json or added_tokens.json")

    def find_beginning(self, config: dict) -> int:
        asked, name = config.get("add_bos_token"), named_token(config, "bos_token")
        processed, text = (self.ids(["a"], whole)[0] for whole in (True, False))
        if asked is not False and processed[:1] != text[:1]:
            return processed[0]
        id = self.inner.token_to_id(name) if asked is True and name else None
        return -1 if id is None else id

    def ids(self, texts: list[str], processed: bool) -> list[list[int]]:
        """The library shares the texts among the cores."""
        try:
            found = self.inner.encode_batch_fast(texts, add_special_tokens=processed)
        except BaseException as error:
            unless_left(error)
            raise ValueError(f"{self.file}: {error}") from None
        return [encoding.ids for encoding in found]

    def bos_id(self) -> int:
        return self.beginning

    def get_piece_size(self) -> int:
        return 1 + max(self.inner.get_vocab().values(), default=-1)

    def encode(self, text: str | list[str], num_threads: int = 0):
        is_one = isinstance(text, str)
        found = self.ids([text] if is_one else text, processed=False)
        return found[0] if is_one else found

    def decode(self, ids: list[int]) -> str:
        unknown = {id: f"<{id}>" for id in set(ids) if self.inner.id_to_token(id) is None}
        return decoded(ids, unknown, lambda run, _: self.inner.decode(run))


# ------------------------------------------------------------------------------
# Text in and out

def with_beginning(tokenizer, ids: list[int]) -> list[int]:
    """The ids of a text, the beginning of sequence first: once, also where the text spells it."""
    bos = tokenizer.bos_id()
    return ids if bos < 0 or ids[:1] == [bos] else [bos, *ids]


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Token ids of a prompt, the beginning of sequence first. ValueError if there are none."""
    ids = with_beginning(tokenizer, tokenizer.encode(text))
    if not ids:
        raise ValueError("nothing to continue, and the tokenizer has no beginning of sequence")
    return ids


def chat_prompt(folder: Path, text: str, tokenizer=None) -> str:
    """A user's turn as the folder's chat template writes it, the answer to follow.

    The template is in chat_template.jinja or tokenizer_config.json. ValueError without one. With a
    tokenizer that has a beginning of sequence it is left out: `encode_prompt` puts its id there.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    config, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    said = read_json(config) if config.exists() else {}
    template = file.read_text(encoding="utf-8") if file.exists() else said.get("chat_template")
    if isinstance(template, list):                      # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ValueError(f"{folder}: neither chat_template.jinja nor a chat_template in "
                         "tokenizer_config.json")

    def refuse(message: str):
        raise TemplateError(message)

    tokens = {name: named_token(said, name) or "" for name in ("bos_token", "eos_token")}
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    jinja.globals["raise_exception"] = refuse
    turns = [{"role": "user", "content": text}]
    try:
        written = jinja.from_string(template).render(
            messages=turns, add_generation_prompt=True, **tokens)
    except Exception as error:                          # a template may raise what Python does
        raise ValueError(f"{folder}: its chat template fails ({error})") from None
    has_beginning = tokenizer is not None and tokenizer.bos_id() >= 0
    return written.removeprefix(tokens["bos_token"]) if has_beginning else written


def show(tokenizer, prompt: list[int], new_tokens) -> list[int]:
    """Print the prompt, then each new token's text as it comes. Returns the new tokens."""
    tokens = list(prompt)
    shown = tokenizer.decode(tokens)
    print(shown, end="", flush=True)
    for token in new_tokens:
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):     # half a character, spelled in bytes: wait for the rest
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(tokenizer.decode(tokens)[len(shown):])
    return tokens[len(prompt):]

