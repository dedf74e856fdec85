"""Runs the commands in README.md's bash blocks, in a copy of the project, the long ones with small settings.

    python tests/check_readme.py
"""
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"train.py": "--steps 3 --batch 2 --seq 64 --runs 2", "search.py": "--batch 1 --seq 16 --runs 2",
         "tests/ablations.py": "--steps 3 --batch 2 --seq 64 --runs 2"}
ELSEWHERE = ("/path/to/", "$M", "python3 -m venv", "pytest", "memory_7b.py", "check_readme.py", "make_demo.py", "make_questions.py")   # other machines; the tests themselves; long


def main():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    commands = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    commands.insert(0, "python train.py")                                       # the end of the first one, which sets up
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out*", "__pycache__"))
        for command in commands:
            if not command or any(word in command for word in ELSEWHERE):
                print(f"not run  {command}")
                continue
            script = command.split()[1]
            began = time.time()
            done = subprocess.run(f"{sys.executable} {command.removeprefix('python ')} {SMALL.get(script, '')}", shell=True, cwd=copy,
                                  capture_output=True, text=True)
            failed += done.returncode != 0
            print(f"{'ok' if done.returncode == 0 else 'FAILED':7s}  {command}  ({time.time() - began:.0f} s)", flush=True)
            if done.returncode:
                print(done.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
