"""Writes demo/questions.jsonl: to which module does a name belong? Generated from Python itself, and checked against it.

A question is a module with a dot behind it; of the four choices one is a name that the module has, and the others are
names of other modules that it does not have. They exercise `python train.py --eval --tasks demo/questions.jsonl` on the
demo, and say nothing about larger models.

    python demo/make_questions.py
"""
import importlib
import json
import random
from pathlib import Path

MODULES = """ast asyncio base64 calendar collections configparser csv datetime decimal email fractions ftplib functools glob gzip
hashlib heapq html http inspect io itertools json locale logging math mimetypes multiprocessing operator os pathlib pickle
platform queue random re shutil signal socket sqlite3 ssl statistics string struct subprocess sys tarfile tempfile textwrap
threading time types typing unittest urllib.parse urllib.request uuid warnings weakref zipfile""".split()


def names(module: str) -> list[str]:
    """The public names of a module that are its own to know: functions, classes and constants, no modules."""
    found = importlib.import_module(module)
    return sorted(n for n in getattr(found, "__all__", dir(found))
                  if not n.startswith("_") and len(n) > 2 and type(getattr(found, n, found)) is not type(found))


def main():
    draw, questions = random.Random(0), []
    for module in MODULES:
        own = names(module)
        for name in draw.sample(own, min(4, len(own))):
            foreign = [n for m in draw.sample(MODULES, 12) for n in names(m) if not hasattr(importlib.import_module(module), n)]
            choices = [name, *draw.sample(sorted(set(foreign)), 3)]
            draw.shuffle(choices)
            questions.append({"context": f"{module}.", "choices": choices, "label": choices.index(name)})
    path = Path(__file__).resolve().parent / "questions.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in questions))
    print(f"{path.name}: {len(questions)} questions")


if __name__ == "__main__":
    main()
