"""Tokenizers: SentencePiece's own class for a tokenizer.model, one like it for a tokenizer.json.

Both turn text into ids and back; `encode_prompt` and `show` are how prompts come in and text goes
out.
"""
from pathlib import Path

from support.files import read_json


def load_tokenizer(path: str | Path, vocab_size: int | None = None):
    """The tokenizer of a model folder; ValueError where none fits the vocabulary."""
    file, other = Path(path) / "tokenizer.model", Path(path) / "tokenizer.json"
    tokenizer = read_sentencepiece(file)
    if tokenizer is None and other.exists():
        file, tokenizer = other, JsonTokenizer(other)
    if tokenizer is None:
        fault = "not a SentencePiece model" if file.exists() else "no such file"
        raise ValueError(f"{file}: {fault}, and there is no tokenizer.json; train.py and search.py "
                         "take token ids too, --data tokens.bin")
    if vocab_size and tokenizer.get_piece_size() > vocab_size:
        raise ValueError(f"{file}: has more pieces than the model's vocabulary, {vocab_size}")
    return tokenizer


def read_sentencepiece(file: Path):
    """A SentencePieceProcessor, or None where the file is missing or something else."""
    from sentencepiece import SentencePieceProcessor
    try:
        proto = file.read_bytes()                       # it takes an empty one, and fails later
        return SentencePieceProcessor(model_proto=proto) if proto else None
    except (OSError, RuntimeError):
        return None


class JsonTokenizer:
    """A tokenizer.json, read by Hugging Face's library; its methods are called as SentencePiece's.

    A text's beginning is what the file's post-processor, or add_bos_token in tokenizer_config.json,
    puts before it; `bos_id` is −1 where they put nothing, as for Qwen.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            from tokenizers import Tokenizer
            self.inner = Tokenizer.from_file(str(file))
        except ImportError:
            raise ValueError(f"{file}: first run pip install tokenizers, which reads it") from None
        except Exception as error:                      # the library has no class of its own
            raise ValueError(f"{file}: not a tokenizer, or a truncated one ({error})") from None
        self.inner.no_truncation()                      # what a file says of batches
        self.inner.no_padding()
        self.beginning = self.find_beginning(file.with_name("tokenizer_config.json"))

    def find_beginning(self, config: Path) -> int:
        processed, text = (self.ids(["a"], whole)[0] for whole in (True, False))
        if processed[:1] != text[:1]:
            return processed[0]
        said = read_json(config) if config.exists() else {}
        token = said.get("bos_token")
        name = token.get("content") if isinstance(token, dict) else token
        asked = said.get("add_bos_token") is True and isinstance(name, str)
        id = self.inner.token_to_id(name) if asked else None
        return -1 if id is None else id

    def ids(self, texts: list[str], processed: bool) -> list[list[int]]:
        """The library shares the texts among the cores."""
        try:
            found = self.inner.encode_batch_fast(texts, add_special_tokens=processed)
        except Exception as error:
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
        return self.inner.decode(ids)


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

    tokens = {}
    for name in ("bos_token", "eos_token"):
        token = said.get(name)
        tokens[name] = token.get("content") if isinstance(token, dict) else token or ""
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

