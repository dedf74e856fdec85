"""Text of two kinds to train a real model's rotations on, and news that nothing is trained on.

    python bench/mixed_text.py ../text      # writes mixed, again and news.jsonl there

mixed.jsonl takes turns between Python's own documentation (its training part, support/data.py)
and articles of the English Wikipedia (CC BY-SA 3.0), as many characters of both; its last tenth is
held out. again.jsonl is the same, but for what is held out, with every fourth passage said again
later on: a cache learns to look up what it has read where the text asks it to. news.jsonl are 300
reports of the Australian Broadcasting Corporation, the Lee corpus.
Wikipedia and news are test data of the package gensim, fetched with pip; hashes are checked.
"""
import bz2
import json
import random
import re
import sys
import tempfile
import zipfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import arguments, check_hash, pip
from support import cli, files
from support.data import python_documents

PACKAGE = "gensim==4.4.0"
WHEEL = ("--only-binary", ":all:", "--python-version", "3.11",
         "--platform", "manylinux_2_28_x86_64")     # it is read, not run: the same one everywhere
FOLDER = "gensim/test/test_data/"
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NEWS = "lee_background.cor"
SHA256 = {
    WIKIPEDIA: "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    NEWS: "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
}


def fetch() -> dict[str, bytes]:
    """The two files, by name; fails unless they are those that are known."""
    print(f"Fetching {PACKAGE} (28 MB) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", *WHEEL, "--dest", folder, PACKAGE)
        wheel, = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            found = {name: archive.read(FOLDER + name) for name in SHA256}
    for name, content in found.items():
        check_hash(name, content, SHA256[name])
    return found


def articles(xml: bytes):
    """Wikipedia's articles as plain text."""
    for element in ElementTree.fromstring(xml).iter():
        if element.tag.endswith("}text") and element.text:
            text = plain(element.text)
            if len(text) > 1000:                        # others are redirections
                yield text


def plain(wikitext: str) -> str:
    """The prose of an article, more or less: no templates, tables, references, files or links."""
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>", "", wikitext,
                  flags=re.DOTALL)
    for opened, closed in (("{{", "}}"), ("{|", "|}")):
        innermost = re.compile(f"{re.escape(opened)}(?:(?!{re.escape(opened)}).)*?"
                               f"{re.escape(closed)}", re.DOTALL)
        found = 1
        while found:
            text, found = innermost.subn("", text)
    text = re.sub(r"\[\[(?:File|Image|Category):(?:\[\[.*?\]\]|.)*?\]\]", "", text,
                  flags=re.DOTALL)
    text = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]]*)\]\]", r"\1", text)       # a link's words
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>]*>|'{2,}", "", text)
    text = re.split(r"\n==\s*(?:See also|References|External links|Notes|Further reading)", text)[0]
    text = re.sub(r"={2,} *(.*?) *={2,}", r"\1", text)                  # headings
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def take_turns(first: list[str], second: list[str]) -> list[str]:
    """Documents of both in random order, as many characters of one as of the other."""
    rng = random.Random(0)
    both = [rng.sample(texts, len(texts)) for texts in (first, second)]
    least = min(sum(map(len, texts)) for texts in both)
    mixed = []
    for texts in both:
        characters = 0
        for text in texts:
            if characters > least:
                break
            characters += len(text)
            mixed.append(text)
    return rng.sample(mixed, len(mixed))


def with_passages_again(texts: list[str]) -> list[str]:
    """After a passage of 500 to 4,000 characters now and then it or one of the two before it.

    The last texts, 15% of the characters, are left alone, and with them what will be held out.
    """
    rng = random.Random(0)
    characters, most = 0, 0.85 * sum(map(len, texts))
    said = []
    for text in texts:
        characters += len(text)
        if characters > most:
            said.append(text)
            continue
        passages, parts = [], []
        while text:
            n = int(500 * 8 ** rng.random())
            passages.append(text[:n])
            parts.append(text[:n])
            text = text[n:]
            if rng.random() < 0.25:
                parts.append(rng.choice(passages[-3:]))
        said.append("".join(parts))
    return said


def write(path: Path, texts: list[str]) -> None:
    with files.written_whole(path) as file:
        for text in texts:
            file.write((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())
    print(f"{path}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")


def main():
    parser = arguments(__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    files.check_folder(args.out)
    found = fetch()
    wikipedia = list(articles(bz2.decompress(found[WIKIPEDIA])))
    documentation, _ = python_documents()
    args.out.mkdir(parents=True, exist_ok=True)
    with cli.blame("out"):
        mixed = take_turns(list(documentation), wikipedia)
        write(args.out / "mixed.jsonl", mixed)
        write(args.out / "again.jsonl", with_passages_again(mixed))
        write(args.out / "news.jsonl", found[NEWS].decode().splitlines())


if __name__ == "__main__":
    main()
