"""Which plan options ask for; and what a training will take, said from its first steps."""
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import random_projection, shape

from projection import Projection, uniform_ranks
from support.plans import PROJECTIONS, plan_for
from support.training import Forecast

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------
# Plans

VALUES_FIRST = 9 / 16       # budget where an order that lowers all values first has done so


def write_ranks(file, model, projection=None, rounds=7) -> None:
    """A file of search.py that lowers values first, for these projections, or says not for which.

    Its own plan is the full one. rounds: eighths that each rank loses, of the values and of the
    keys.
    """
    L, K, d = shape(model)
    path = [[side, layer, head, 0.1] for side in ("values", "keys") for _ in range(rounds)
            for layer in range(L) for head in range(K)]
    full = [[d] * K] * L
    said = {"head_dim": d, "keys": full, "values": full, "path": path}
    if projection is not None:
        said["projections"] = projection.hash()
    file.write_text(json.dumps(said))


@pytest.fixture
def planned(model, tmp_path):
    """`planned(**options)`: the projections and the plan for a budget; they lie in tmp_path."""
    made = random_projection(model)
    made.save(tmp_path / PROJECTIONS)

    def asked(**options):
        return plan_for(SimpleNamespace(**{"proj": None, "ranks": None, "budget": None} | options),
                        model)

    asked.projection = made
    return asked


def test_without_options_the_plan_is_the_full_one_of_nothing_turned(planned, model):
    projection, plan = planned()
    assert projection.hash() == Projection.identity(model.config).hash()
    assert torch.equal(plan(None), uniform_ranks(1.0, model.config))


def test_a_file_of_ranks_finds_the_projections_beside_it(planned, model, tmp_path, capsys):
    write_ranks(tmp_path / "some.json", model, planned.projection)
    projection, plan = planned(ranks=tmp_path / "some.json")
    assert projection.hash() == planned.projection.hash()
    assert torch.equal(plan(None), uniform_ranks(1.0, model.config))
    keys, values = plan(VALUES_FIRST)
    assert (keys == 16).all()
    assert (values == 2).all()
    assert capsys.readouterr().err == f"Ranks: along the order in {tmp_path / 'some.json'}\n"


def test_ranks_of_other_projections_are_refused(planned, model, tmp_path, capsys):
    write_ranks(tmp_path / "some.json", model, random_projection(model))
    with pytest.raises(SystemExit) as left:
        planned(ranks=tmp_path / "some.json", proj=tmp_path / PROJECTIONS)
    assert left.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("--ranks: ")
    assert "some.json: was searched for other projections" in line


def test_ranks_that_name_no_projections_are_taken_with_a_line(planned, model, tmp_path, capsys):
    write_ranks(tmp_path / "some.json", model)
    _, plan = planned(ranks=tmp_path / "some.json")
    assert (plan(VALUES_FIRST)[0] == 16).all()
    line, where = capsys.readouterr().err.splitlines()
    assert "some.json: does not say for which projections" in line
    assert where.startswith("Ranks: along the order in ")


@pytest.mark.parametrize("beside, where, said", [
    ("nothing", None, 0), ("train.json", "train.json", 0), ("own", "ranks.json", 0),
    ("nameless", "ranks.json", 1), ("other", "train.json", 1)])
def test_a_budget_alone_goes_along_the_order_beside_the_projections(
        planned, model, tmp_path, capsys, beside, where, said):
    """That of a search goes before that of the training, if it was for these projections."""
    places = 2 * shape(model)[0] * shape(model)[1]
    if beside != "nothing":                             # keys first
        (tmp_path / "train.json").write_text(json.dumps({"order": sorted([*range(places)] * 7)}))
    if beside in ("own", "nameless", "other"):
        hashed = {"own": planned.projection, "other": random_projection(model), "nameless": None}
        write_ranks(tmp_path / "ranks.json", model, hashed[beside])
    _, plan = planned(proj=tmp_path / PROJECTIONS, budget=VALUES_FIRST)
    keys, values = plan(VALUES_FIRST)
    expected = {"ranks.json": (16, 2), "train.json": (2, 16), None: (8, 8)}[where]
    assert (keys == expected[0]).all()
    assert (values == expected[1]).all()
    *lines, last = capsys.readouterr().err.splitlines()
    assert last == ("Ranks: the same rank everywhere" if where is None else
                    f"Ranks: along the order in {tmp_path / where}")
    assert len(lines) == said


# ------------------------------------------------------------------------------
# Time


@pytest.fixture
def forecast(monkeypatch, capsys):
    """`forecast(seconds of each step, **options)`: what is said on stderr."""
    def said(seconds, before=0, left=None, **options):
        defaults = {"steps": 400, "windows": 64, "batch": 8, "check_every": 100, "accumulate": 1,
                    "uniform": True}
        now = [1000.0]
        monkeypatch.setattr("time.time", lambda: now[0])
        monkeypatch.setattr("support.training.BEGAN", now[0] - before)
        args = SimpleNamespace(**{**defaults, **options})
        told = Forecast(args, CPU, left or args.steps)
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
    _, four = minutes(forecast([1] * 4, uniform=False))
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
