"""The house: files in one order, each read in one sitting, and lines that do one thing."""
import ast
import io
import tokenize
from collections import Counter

import pytest
from conftest import ROOT

ORDER = (
    "common", "model", "data", "projection", "folding", "plans", "kernel", "attention", "cache",
    "distance", "evaluate", "order", "train", "search", "rounding", "packed", "bits", "generate",
)
LESSON = ("projection", "folding", "cache", "attention", "kernel", "order", "train", "search")
NAMES = [name for name in ORDER if (ROOT / f"{name}.py").exists()]


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def imported(name: str) -> set[str]:
    """The files of this project that a file imports, inside its functions too."""
    names = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & set(ORDER)


def test_every_file_at_the_top_has_its_place_in_the_order():
    found = {file.stem for file in ROOT.glob("*.py")}
    assert found == set(ORDER)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_only_from_files_above_it(name):
    assert imported(name) <= set(ORDER[:ORDER.index(name)])


@pytest.mark.parametrize("name", NAMES)
def test_no_script_loads_itself_a_second_time(name):
    """A script runs as __main__; whoever imported it by name would load its classes once more."""
    loaded, waiting = set(), imported(name)
    while waiting:
        loaded |= waiting
        waiting = set().union(*map(imported, waiting)) - loaded
    assert name not in loaded


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_in_one_sitting(name):
    """But for common.py, which no reader needs to read; model.py holds four architectures."""
    lines = source(name).splitlines()
    assert len(lines) <= {"train": 380, "model": 480, "common": 610}.get(name, 450)


@pytest.mark.parametrize("folder", [".", "tests"])
def test_no_line_is_wider_than_a_hundred_columns(folder):
    wide = []
    for file in sorted((ROOT / folder).glob("*.py")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > 100:
                wide.append(f"{file.name}:{number}")
    assert not wide


def test_the_lesson_has_at_most_2345_lines():
    assert sum(len(source(name).splitlines()) for name in LESSON) <= 2345


@pytest.mark.parametrize("name", LESSON)
def test_few_lines_of_the_lesson_are_dense(name):
    """Of a file's lines of code at most 8% hold twenty tokens or more."""
    tokens = tokens_by_line(source(name))
    dense = [number for number, count in sorted(tokens.items()) if count >= 20]
    share = len(dense) / len(tokens)
    assert share <= 0.08, f"{share:.1%} of {len(tokens)} lines: {dense}"


LAYOUT = {"COMMENT", "NEWLINE", "NL", "INDENT", "DEDENT", "ENDMARKER"}


def tokens_by_line(text: str) -> Counter:
    """How many tokens begin in a line, by its number. An f-string is one token in any Python."""
    counts, inside = Counter(), 0
    skipped = docstring_lines(text)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind, line = tokenize.tok_name[token.type], token.start[0]
        inside -= kind in ("FSTRING_END", "TSTRING_END")
        ends = kind in ("FSTRING_END", "TSTRING_END")
        if not inside and not ends and kind not in LAYOUT and line not in skipped:
            counts[line] += 1
        inside += kind in ("FSTRING_START", "TSTRING_START")
    return counts


def docstring_lines(text: str) -> set[int]:
    lines = set()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return lines
