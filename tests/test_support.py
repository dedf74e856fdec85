"""What a training will take is said from its first steps."""
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from support.cli import run_script
from support.training import Forecast

CPU = torch.device("cpu")


@pytest.fixture
def forecast(monkeypatch, capsys):
    """`forecast(seconds of each step, **options)`: what is said on stderr."""
    def said(seconds, before=0, left=None, hooks=12, **options):
        defaults = {"steps": 400, "windows": 64, "batch": 8, "check_every": 100, "accumulate": 1}
        now = [1000.0]
        monkeypatch.setattr("time.time", lambda: now[0])
        monkeypatch.setattr("support.training.BEGAN", now[0] - before)
        args = SimpleNamespace(**{**defaults, **options})
        told = Forecast(args, CPU, left or args.steps, hooks)
        for length in seconds:
            now[0] += length
            told()
        return capsys.readouterr().err

    return said


def minutes(said: str) -> list[float]:
    """Of the run, and of what is not steps."""
    return [float(number) for number in re.findall(r"about ([\d.]+) minutes, ([\d.]+)", said)[0]]


def test_nothing_is_said_before_the_fourth_step_and_nothing_after_it(forecast):
    assert forecast([2, 2, 2]) == ""
    assert forecast([2] * 4) == forecast([2] * 50) != ""


def test_the_first_step_warms_up_and_does_not_count(forecast):
    assert "Measured: 2.00 s a step" in forecast([9, 1, 2, 3])


def test_the_steps_that_would_fit_in_20_minutes_do(forecast):
    fit = int(re.search(r"--steps (\d+) would fit in 20$", forecast([1] * 4)).group(1))
    assert minutes(forecast([1] * 4, steps=fit))[0] == pytest.approx(20, abs=0.1)
    assert minutes(forecast([1] * 4, steps=fit + 60))[0] > 20.9


def test_where_no_step_fits_the_report_is_said_to_be_long(forecast):
    said = forecast([60] * 4)
    assert "fewer --windows" in said
    assert minutes(said)[1] > 20
    assert "would fit" in forecast([60] * 4, windows=8)


def test_more_curves_more_windows_and_smaller_steps_take_longer_to_report(forecast):
    _, two = minutes(forecast([1] * 4))
    _, four = minutes(forecast([1] * 4, hooks=24))
    _, wide = minutes(forecast([1] * 4, windows=128))
    _, split = minutes(forecast([1] * 4, accumulate=4))
    assert four > 1.6 * two
    assert wide > 1.6 * two
    assert split == pytest.approx(two / 4, abs=0.06)


def test_a_resumed_run_takes_the_steps_that_are_left(forecast):
    whole, around = minutes(forecast([6] * 4))
    rest, same = minutes(forecast([6] * 4, left=100))
    assert same == around
    assert rest - around == pytest.approx((whole - around) / 4, abs=0.11)


def test_what_went_before_the_steps_counts(forecast):
    _, plain = minutes(forecast([1] * 4))
    _, later = minutes(forecast([1] * 4, before=120))
    assert later == pytest.approx(plain + 2, abs=0.11)


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt, 130, "Stopped"),
    (torch.OutOfMemoryError, 2, "--batch"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: …"), 2, "--batch"),
])
def test_a_run_that_is_stopped_or_too_large_ends_in_one_line(error, code, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        run_script(main)
    assert left.value.code == code
    line, = capsys.readouterr().err.splitlines()
    assert words in line


def test_closed_streams_are_no_traceback():
    made = subprocess.run(f"{sys.executable} generate.py --prompt - --tokens 3 <&- >&-", shell=True,
                          cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert made.returncode == 2
    assert made.stderr == "--prompt -: there is no standard input\n"
    made = subprocess.run(f"{sys.executable} model.py >&-", shell=True, cwd=ROOT,
                          stderr=subprocess.PIPE, text=True)
    assert made.returncode == 0 and "Traceback" not in made.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_takes_no_more_is_one_line():
    made = subprocess.run(f"{sys.executable} model.py > /dev/full", shell=True, cwd=ROOT,
                          capture_output=True, text=True)
    assert made.returncode == 2
    assert "No space left" in made.stderr.splitlines()[-1] and "Traceback" not in made.stderr


def test_an_output_that_lacks_a_character_gets_its_number():
    code = "from support.cli import run_script; run_script(lambda: print('\u2192 caf\u00e9'))"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert made.stdout.strip() == b"\\u2192 caf\xe9"


def test_a_reader_that_has_read_enough_is_no_error():
    reads = subprocess.run(f"{sys.executable} support/data.py | head -c 1", shell=True, cwd=ROOT,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert b"Traceback" not in reads.stderr
