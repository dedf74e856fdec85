"""Runs the commands of README.md, bits/README.md and docs/ in a copy of the project.

What stands in a ```bash block and begins with `python` is run, in the order of the page, the long
ones with small settings; what needs another machine, a model that is not here, or an hour is said
to be "not run". Exit code 1 if a command fails.

    python bench/check_readme.py                    # README.md, bits/README.md and docs/*.md
    python bench/check_readme.py docs/results.md    # these pages alone
"""
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.tools import arguments
from support import cli

# Added to a command, by its script or module; where an option is given twice, the last one counts.
SMALL = {
    "train.py": "--steps 3 --batch 2 --seq 64 --windows 2 --sweep-windows 2",
    "search.py": "--batch 1 --seq 16 --windows 2 --sweep-windows 2",
    "evaluate.py": "--batch 2 --seq 64 --windows 2 --passages 2",
    "bits.train": "--steps 3 --batch 2 --seq 64 --windows 2 --passages 2",
    "bench/ablations.py": "--steps 3 --batch 2 --seq 64 --windows 2",
    "bench/training.py": "--steps 3 --batch 2 --seq 64",
    "bench/cache.py": "--rounds 1 --tokens 512",
    "bench/equal_bytes.py": "--windows 2 --passages 2",
    "bench/generate.py": "--rounds 1",
    "bench/kernel.py": "--capability 80",
    "bench/laptop.py": "--steps 8 --batch 4 --seq 16",
    "bench/precision.py": "--batch 2 --seq 64 --windows 2 --sweep-windows 2",
    "bench/recall.py": "--passages 2",
    "bench/resident_memory.py": "--tokens 4096",
    "bench/rounding.py": "--seq 256 --windows 2 --runs 1",
}
QUESTIONS = 8           # that are left of demo/questions.jsonl

PLACEHOLDERS = r"/path/to/|\$|[ =][A-Z]{2,}\b"            # a model, a file, the name of one
ELSEWHERE = (r"-m (venv|pip|pytest)|--resume|--exact|make_demo|make_questions|check_readme|"
             r"smollm2|mixed_text|bench/real\.py")


def commands_in(page: Path) -> list[str]:
    """The commands of a page's bash blocks: comments cut off, chains taken apart."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    commands = []
    for block in blocks:
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            line = re.split(r"(?:^|\s)#", line)[0]
            commands += [command.strip() for command in line.split("&&")]
    return [command for command in commands if command]


def script_of(command: str) -> str:
    """bench/cache.py of `python bench/cache.py …`, bits.train of `python -m bits.train …`."""
    words = command.split()
    return words[2] if words[1] == "-m" else words[1]


def is_run(command: str) -> bool:
    bare = re.sub(r'"[^"]*"', "", command)              # prompts may hold anything
    if not command.startswith("python ") or '"..."' in command:
        return False
    if re.search(PLACEHOLDERS, bare) or re.search(ELSEWHERE, bare):
        return False
    script = script_of(command)
    if script == "bench/memory.py":
        return "--table" in command
    needs = script in ("bench/generate.py", "bench/tokenizer.py")
    return not needs or importlib.util.find_spec("transformers") is not None


def run(command: str, folder: Path) -> bool:
    """Run it with small settings and say how it went."""
    small = SMALL.get(script_of(command), "")
    if "--steps 0" in command:                          # smaller than small
        small = small.replace("--steps 3 ", "")
    line = command.replace("python", f'"{sys.executable}"', 1)
    began = time.time()
    done = subprocess.run(f"{line} {small}", shell=True, cwd=folder, capture_output=True, text=True)
    seconds = time.time() - began
    word = "FAILED" if done.returncode else "ok"
    print(f"  {word:7s}  {command}  ({seconds:.0f} s)", flush=True)
    if done.returncode:
        print(done.stderr)
    return done.returncode == 0


def copy_project(folder: Path) -> None:
    """All but what was made, and only a few questions."""
    made = shutil.ignore_patterns(".*", "out*", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=made)
    file = folder / "demo" / "questions.jsonl"
    questions = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(questions[:QUESTIONS]), encoding="utf-8")


def main():
    parser = arguments(__doc__)
    pages = [ROOT / "README.md", ROOT / "bits" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    parser.add_argument("pages", type=Path, nargs="*", default=pages,
                        help="[README.md bits/README.md docs/*.md]")
    args = parser.parse_args()
    with cli.blame("pages"):
        commands = {page: commands_in(page) for page in args.pages}
    went = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "project"
        copy_project(folder)
        for page, of_page in commands.items():
            print(page.relative_to(ROOT) if page.is_relative_to(ROOT) else page, flush=True)
            for command in of_page:
                if command in went:
                    print(f"  above    {command}", flush=True)
                elif is_run(command):
                    went[command] = run(command, folder)
                else:
                    print(f"  not run  {command}", flush=True)
    failed = list(went.values()).count(False)
    print(f"\n{failed} of {len(went)} commands failed")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
