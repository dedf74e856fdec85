"""Tokenizers of the kinds that folders hold as tokenizer.json: ids against transformers, and time.

They are made here with `tokenizers`, small, from mixed text: byte-level BPE as of GPT-2, LLaMA-3
and Qwen2 (each with its own way to split a text, and LLaMA-3's beginning of sequence), and Unigram.
For each: how many of the lines get the same ids as from transformers' fast tokenizer; how many
tokens a .txt has in pieces (support/data.py) and in one; and the speed on all cores.

    pip install transformers && python bench/tokenizer.py
"""
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import arguments
from support import cli
from support.data import encode, text_pieces
from support.tokenizer import load_tokenizer, with_beginning

WORDS = ("the", "function", "returns", "Größe", "naïve", "l'été", "don't", "WE'LL", "snake_case",
         "CamelCase", "x86_64", "3.14159", "1,000,000", "https://a.org/b?c=d#e", "user@example.com",
         "...", "—", "“quoted”", "(parens)", "50%", "C++", "a\tb", "  ", "Ω≈ç√", "Ελληνικά",
         "русский", "עברית", "العربية", "ไทย", "한국어", "日本語", "Việt", "e\u0301", "ﬁ", "①", "½")
CODE = ("def f(x, *args, **kwargs) -> dict[str, int]:", "    return {k: v for k, v in x.items()}",
        "\tif (a != b && c <= d) { x->y += 0x1F; }", "#include <stdio.h>", "<a href='#'>&nbsp;</a>",
        "SELECT * FROM t WHERE id = 42;  -- all", "x = np.zeros((3, 4))[..., None]", "    ", "}")
EMOJI = ("😀", "👍🏽", "👨‍👩‍👧‍👦", "🇫🇷", "❤️", "🏳️‍🌈", "☃", "🧑🏿‍🚀")
CONTROL = "\x00\x01\x07\x08\x0b\x0c\r\x1b\x1f\x7f\x85\xa0\xad\u200b\u200d\u2028\u202e\ufeff\ufffd"
SPECIAL = ("<|begin|>", "<|end|>", "<s>", "</s>", "<|endoftext|>")

SPLITS = {      # how each cuts a text into what BPE then works on
    "llama3": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
               r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "qwen2": (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
              r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
}
KINDS = ("gpt2", "llama3", "qwen2", "unigram")


def mixed_lines(count: int, seed: int = 0) -> list[str]:
    """Lines of words, code, Chinese, emoji, control characters, special tokens; some are empty."""
    chance = random.Random(seed)

    def chinese() -> str:
        return "".join(chr(chance.randrange(0x4E00, 0x4E60)) for _ in range(chance.randrange(1, 9)))

    def part() -> str:
        kind = chance.random()
        if kind < 0.55:
            return chance.choice(WORDS)
        if kind < 0.70:
            return chance.choice(CODE)
        if kind < 0.85:
            return chinese()
        if kind < 0.93:
            return chance.choice(EMOJI)
        return chance.choice(CONTROL) if kind < 0.98 else chance.choice(SPECIAL)

    lines = []
    for _ in range(count):
        between = chance.choice(("", " ", " ", " ", "  ", "\t"))
        lines.append(between.join(part() for _ in range(chance.randrange(0, 12))))
    return lines


def make_tokenizer(kind: str, folder: Path, vocab_size: int) -> None:
    """Write tokenizer.json of one of KINDS, and tokenizer_config.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = mixed_lines(2000, seed=1)
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        begin, end, unknown = "<s>", "</s>", "<unk>"
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=[unknown, begin, end], unk_token=unknown,
            show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        if kind in SPLITS:
            cut = pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated")
            split = pre_tokenizers.Sequence([cut, split])
        if kind == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = split
        tokenizer.decoder = decoders.ByteLevel()
        begin, end = "<|begin|>", "<|end|>"
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[begin, end], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(lines, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    if kind in ("llama3", "unigram"):
        id = tokenizer.token_to_id(begin)
        tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, id)])
        config["bos_token"] = begin
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def ids_of_transformers(folder: Path, lines: list[str]) -> list[list[int]]:
    """Where a line spells the beginning, transformers has it twice; here it is then once."""
    try:
        from transformers import AutoTokenizer  # nothing else here needs it
    except ImportError:
        cli.fail("bench/tokenizer.py: transformers is not installed; pip install transformers")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = [tokenizer(line)["input_ids"] for line in lines]
    twice = [tokenizer.bos_token_id] * 2
    return [ids[1:] if ids[:2] == twice else ids for ids in found]


def main():
    parser = arguments(__doc__)
    parser.add_argument("--lines", type=cli.within(1, 10 ** 6), default=2000, help="[2000]")
    args = parser.parse_args()
    lines = mixed_lines(args.lines)
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "text.txt"
        text.write_text("\n".join(lines * 20), newline="\n")
        whole = text.read_text()
        pieces = list(text_pieces(text))
        print(f"{len(lines):,} lines, {sum(map(len, lines)):,} characters; the .txt has "
              f"{len(whole):,} in {len(pieces)} pieces")
        for kind in KINDS:
            folder = Path(name) / kind
            make_tokenizer(kind, folder, 1000)
            tokenizer = load_tokenizer(folder)
            theirs = ids_of_transformers(folder, lines)
            ours = [with_beginning(tokenizer, ids) for ids in tokenizer.encode(lines)]
            same = sum(a == b for a, b in zip(ours, theirs, strict=True))
            began = time.perf_counter()
            in_pieces = encode(tokenizer, pieces, one_document=True)
            seconds = time.perf_counter() - began
            in_one = encode(tokenizer, [whole], one_document=True)
            print(f"{kind:8s} the same ids in {same:,} of {len(lines):,} lines; pieces "
                  f"{len(in_pieces):,} tokens, whole {len(in_one):,}; "
                  f"{len(in_pieces) / seconds:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    cli.run_script(main)
