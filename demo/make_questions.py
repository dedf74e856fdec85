"""Writes demo/questions.jsonl: to which module does a name belong?

A question is a module with a dot behind it; of the four choices one is a name that the module has,
and the others are names of other modules that it does not have. All come from Python itself, and
are checked against it. They exercise `python evaluate.py --tasks demo/questions.jsonl` on the demo,
and say nothing about larger models.

    python demo/make_questions.py
"""
import importlib
import json
import random
from pathlib import Path

MODULES = """
ast asyncio base64 calendar collections configparser csv datetime decimal email fractions ftplib
functools glob gzip hashlib heapq html http inspect io itertools json locale logging math
mimetypes multiprocessing operator os pathlib pickle platform queue random re shutil signal
socket sqlite3 ssl statistics string struct subprocess sys tarfile tempfile textwrap threading
time types typing unittest urllib.parse urllib.request uuid warnings weakref zipfile
""".split()


def names(module: str) -> list[str]:
    """The public names of a module: functions, classes and constants, no modules."""
    found = importlib.import_module(module)
    module_type = type(found)
    public = []
    for name in getattr(found, "__all__", dir(found)):
        kind = type(getattr(found, name, found))
        if len(name) > 2 and not name.startswith("_") and kind is not module_type:
            public.append(name)
    return sorted(public)


def main():
    draw, questions = random.Random(0), []
    for module in MODULES:
        own = names(module)
        for name in draw.sample(own, min(4, len(own))):
            others = {n for m in draw.sample(MODULES, 12) for n in names(m)}
            foreign = [n for n in others if not hasattr(importlib.import_module(module), n)]
            choices = [name, *draw.sample(sorted(foreign), 3)]
            draw.shuffle(choices)
            label = choices.index(name)
            questions.append({"context": f"{module}.", "choices": choices, "label": label})
    path = Path(__file__).resolve().parent / "questions.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in questions))
    print(f"{path.name}: {len(questions)} questions")


if __name__ == "__main__":
    main()
