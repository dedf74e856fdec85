"""Plans: read from files, refused where they are another model's, and found beside projections."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_projection, shape
from safetensors.torch import load_file

from projection import SIDES, Projection, plan_at, uniform_ranks
from support.plans import PROJECTIONS, order_of, plans_for, read_ranks, trained_order

PATH = [["keys", 0, 1, None], ["values", 1, 0, 0.2], ["values", 1, 0, 0.3]]     # one unmeasured
OTHER = [["values", 0, 0, 0.1], ["keys", 1, 1, 0.2], ["keys", 1, 0, 0.3]]
TRAINED = [4, 3, 2]             # the same as a train.json has it: places in the flat (2, 2, 2)


@pytest.fixture
def write_plan(model, tmp_path):
    """Writes ranks.json with PATH, and the full plan spelled out; some entries may be others."""
    L, K, d = shape(model)

    def write(folder=tmp_path, **entries):
        full = [[d] * K] * L
        plan = {"head_dim": d, "budget": 1.0, "keys": full, "values": full, "path": PATH}
        (folder / "ranks.json").write_text(json.dumps(plan | entries))
        return folder / "ranks.json"

    return write


def lowered(model, path):
    """The full plan, and then what the entries of a path take away."""
    L, K, d = shape(model)
    ranks = torch.full((2, L, K), d)
    for side, layer, head, _ in path:
        ranks[SIDES.index(side), layer, head] -= d // 8
    return ranks


def after(n, model):
    """The budget of n lowerings."""
    L, K, _ = shape(model)
    return 1 - n / (2 * L * K * 8)


# ------------------------------------------------------------------------------
# In files

def test_a_plan_is_the_longest_prefix_of_the_path_within_the_budget(model, write_plan):
    order = read_ranks(write_plan(), model.config).order
    for n, entries in ((0, 0), (0.5, 1), (1, 1), (1.01, 2), (3, 3)):
        ranks = plan_at(order, model.config, after(n, model))
        assert torch.equal(ranks, lowered(model, PATH[:entries]))


def test_a_file_has_the_plan_spelled_out_and_the_order_of_its_path(model, write_plan):
    L, K, d = shape(model)
    spelled = torch.randint(1, 9, (2, L, K)) * (d // 8)
    keys, values = spelled.tolist()
    found = read_ranks(write_plan(keys=keys, values=values, projections="a hash"), model.config)
    assert torch.equal(found.ranks, spelled)
    assert torch.equal(found.order, order_of(PATH, model.config))
    assert found.order.tolist() == [1, 6, 6]
    assert found.projections == "a hash"


def test_a_path_that_is_not_this_models_is_refused(model, write_plan):
    for broken in (
            {"head_dim": 24},
            {"levels": 4},
            {"path": [["keys", 99, 0, 0]]},
            {"path": [["keys", 0, -1, 0]]},
            {"path": [["neither", 0, 0, 0]]},
            {"path": [["keys", 0, 0]]},
            {"path": [["keys", 0, 0, 0]] * 8},
            {"path": None}):
        with pytest.raises(ValueError, match="ranks.json"):
            read_ranks(write_plan(**broken), model.config)


def test_a_plan_that_is_not_this_models_is_refused(model, write_plan):
    for keys in ([[16]], 3, "all", [["16", "16"]] * 2, [[16.5] * 2] * 2, {}):
        with pytest.raises(ValueError, match="ranks.json"):
            read_ranks(write_plan(keys=keys), model.config)


def test_a_file_fits_the_projections_whose_hash_it_holds_or_says_nothing(model, write_plan):
    mine, other = random_projection(model), random_projection(model)
    found = read_ranks(write_plan(projections=mine.hash()), model.config)
    assert found.fits(mine)
    assert not found.fits(other)
    older = read_ranks(write_plan(), model.config)
    assert older.projections is None
    assert older.fits(mine) and older.fits(other)


def test_a_file_fits_no_projections_with_another_mean_or_other_whole_tokens(model, write_plan):
    """Which cost what they cost about that mean, and behind those tokens."""
    p = random_projection(model, whole=4, mean=1.0)
    found = read_ranks(write_plan(projections=p.hash(), levels=8), model.config)
    assert found.fits(p)
    U = p.U_k, p.U_v, p.mean_v
    for mean_k, whole in ((p.mean_k, 3), (2 * p.mean_k, 4), (None, 0)):
        assert not found.fits(Projection(*U, mean_k, whole))
    without = read_ranks(write_plan(projections=Projection(*U).hash()), model.config)
    assert not without.fits(p)


def test_the_order_of_a_training_may_be_whole_or_cut_short_or_missing(model, tmp_path, capsys):
    """It is cut short where --ranks was the file of an interrupted search."""
    proj, file, p = tmp_path / PROJECTIONS, tmp_path / "train.json", random_projection(model)
    assert trained_order(proj, p, model.config) is None
    for said in ({}, {"order": None}):
        file.write_text(json.dumps(said))
        assert trained_order(proj, p, model.config) is None
    for places in (TRAINED, [6], [], list(range(8)) * 7):
        file.write_text(json.dumps({"order": places}))
        assert trained_order(proj, p, model.config).tolist() == places
    assert trained_order(proj, p, model.config).dtype == torch.int64
    file.write_text(json.dumps({"order": TRAINED, "projections": p.hash()}))
    assert trained_order(proj, p, model.config).tolist() == TRAINED
    assert trained_order(proj, random_projection(model), model.config) is None
    assert "other projections" in capsys.readouterr().err


def test_an_order_that_is_not_this_models_is_refused(model, tmp_path):
    for order in ([8], [-1], [0] * 8, [True], [1.0], "16", {"1": 1}):
        (tmp_path / "train.json").write_text(json.dumps({"order": order}))
        with pytest.raises(ValueError, match="train.json"):
            trained_order(tmp_path / PROJECTIONS, random_projection(model), model.config)


# ------------------------------------------------------------------------------
# From options

@pytest.fixture
def made(model, tmp_path, write_plan):
    """`made(name, ranks=hash, order=places)`: a folder with projections, and what it is told to
    hold beside them; ranks None: a file without a hash. Gives the folder and the projections."""
    def make(name="out", **beside):
        folder = tmp_path / name
        folder.mkdir()
        p = random_projection(model)
        p.save(folder / PROJECTIONS)
        if "ranks" in beside:
            hash = {"own": p.hash(), "other's": "0" * 64, None: None}[beside["ranks"]]
            write_plan(folder, **({"projections": hash} if hash else {}))
        if "order" in beside:
            (folder / "train.json").write_text(json.dumps({"order": beside["order"]}))
        return folder, p

    return make


@pytest.fixture
def asked(model, capsys):
    """`asked(budget, proj=, ranks=)`: the projections, the plan, and the lines on stderr."""
    def ask(budget, proj=None, ranks=None):
        capsys.readouterr()
        args = SimpleNamespace(proj=proj, ranks=ranks, budget=budget)
        p, plan = plans_for(args, model, budget)
        return p, plan, capsys.readouterr().err.splitlines()

    return ask


@pytest.fixture
def refused(model, capsys):
    """The one line with which a plan is refused."""
    def line_of(budget, proj=None, ranks=None):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            plans_for(SimpleNamespace(proj=proj, ranks=ranks, budget=budget), model, budget)
        assert left.value.code == 2
        line, = capsys.readouterr().err.splitlines()
        return line

    return line_of


def same(p, q) -> bool:
    return torch.equal(p.U_k, q.U_k) and torch.equal(p.U_v, q.U_v)


def test_without_options_the_cache_is_the_models_own(model, asked, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)                                     # where there is no out/
    p, ranks, lines = asked(None)
    d = model.config.head_dim
    assert (ranks == d).all()
    assert torch.equal(p.U_k, torch.eye(d).expand_as(p.U_k))
    assert lines == []


def test_a_budget_alone_follows_the_search_that_was_for_the_projections(
        model, made, asked, monkeypatch, tmp_path):
    """Those in out/, and before what a training says."""
    _, p = made("out", ranks="own", order=TRAINED)
    monkeypatch.chdir(tmp_path)
    found, ranks, lines = asked(after(2, model))
    assert same(found, p)
    assert torch.equal(ranks, lowered(model, PATH[:2]))
    assert lines == [f"Ranks: along the order in {Path('out', 'ranks.json')}"]


def test_a_search_for_other_projections_gives_way_to_the_order_of_the_training(model, made, asked):
    folder, p = made(ranks="other's", order=TRAINED)
    found, ranks, lines = asked(after(2, model), proj=folder / PROJECTIONS)
    assert same(found, p)
    assert torch.equal(ranks, lowered(model, OTHER[:2]))
    assert lines == [
        f"{folder / 'ranks.json'}: was searched for other projections, and is not used",
        f"Ranks: along the order in {folder / 'train.json'}"]


def test_a_search_for_other_projections_and_no_order_leave_uniform_ranks(model, made, asked):
    folder, _ = made(ranks="other's")
    _, ranks, lines = asked(0.3, proj=folder / PROJECTIONS)
    assert torch.equal(ranks, uniform_ranks(0.3, model.config))
    assert "is not used" in lines[0]
    assert lines[1:] == ["Ranks: the same rank everywhere"]


def test_without_a_search_the_order_is_that_of_the_training(model, made, asked):
    folder, _ = made(order=TRAINED)
    _, ranks, lines = asked(after(3, model), proj=folder / PROJECTIONS)
    assert torch.equal(ranks, lowered(model, OTHER))
    assert lines == [f"Ranks: along the order in {folder / 'train.json'}"]


@pytest.mark.parametrize("beside", [{}, {"order": None}])
def test_with_neither_every_rank_is_the_same(model, made, asked, beside):
    """A uniform training leaves a train.json without an order."""
    folder, _ = made(**beside)
    _, ranks, lines = asked(0.5, proj=folder / PROJECTIONS)
    assert torch.equal(ranks, uniform_ranks(0.5, model.config))
    assert lines == ["Ranks: the same rank everywhere"]


def test_a_search_that_does_not_say_for_which_projections_is_used_with_a_line(model, made, asked):
    folder, _ = made(ranks=None, order=TRAINED)
    file = folder / "ranks.json"
    unsaid = "does not say for which projections; taken to be for these"
    _, ranks, lines = asked(after(2, model), proj=folder / PROJECTIONS)
    assert torch.equal(ranks, lowered(model, PATH[:2]))
    assert lines == [f"{file}: {unsaid}", f"Ranks: along the order in {file}"]
    _, ranks, lines = asked(after(2, model), ranks=file)
    assert torch.equal(ranks, lowered(model, PATH[:2]))
    assert lines == [f"Ranks: along the order in {file}, which {unsaid}"]


def test_ranks_alone_take_the_projections_beside_them(
        model, made, asked, write_plan, monkeypatch, tmp_path):
    """Not those in out/; with a plan at a budget, or the one spelled out."""
    L, K, d = shape(model)
    made("out", ranks="own")
    folder, p = made("out_x", ranks="own")
    monkeypatch.chdir(tmp_path)
    file = Path("out_x", "ranks.json")
    found, ranks, lines = asked(after(3, model), ranks=file)
    assert same(found, p)
    assert torch.equal(ranks, lowered(model, PATH))
    assert lines == [f"Ranks: along the order in {file}"]
    write_plan(folder, projections=p.hash(), keys=[[d // 2] * K] * L)
    found, ranks, _ = asked(None, ranks=file)
    assert same(found, p)
    assert (ranks[0] == d // 2).all()
    assert (ranks[1] == d).all()


def test_ranks_for_other_projections_are_refused(made, refused):
    """Asked for by name they are not passed over."""
    folder, _ = made("a", ranks="own", order=TRAINED)
    other, _ = made("b", order=TRAINED)
    for budget in (None, 0.99):
        line = refused(budget, proj=other / PROJECTIONS, ranks=folder / "ranks.json")
        assert line.startswith(f"--ranks: {folder / 'ranks.json'}: ")
        assert str(other / PROJECTIONS) in line


def test_ranks_go_with_projections_elsewhere_that_they_fit(model, made, asked, tmp_path):
    folder, p = made(ranks="own")
    copy = tmp_path / "copy.safetensors"
    p.save(copy)
    (folder / PROJECTIONS).unlink()
    found, ranks, _ = asked(after(1, model), proj=copy, ranks=folder / "ranks.json")
    assert same(found, p)
    assert torch.equal(ranks, lowered(model, PATH[:1]))


def test_a_budget_below_the_end_of_the_path_is_refused(made, refused):
    """What is blamed is what was asked for: the file, or else the budget."""
    folder, _ = made(ranks="own")
    file = folder / "ranks.json"
    beside = folder / PROJECTIONS
    for option, options in (("--ranks", {"ranks": file}), ("--budget", {"proj": beside})):
        line = refused(0.5, **options)
        assert line.startswith(f"{option}: {file}: ")
        assert "ends at" in line


def test_several_budgets_get_a_plan_each(model, made, monkeypatch, tmp_path):
    """As the one that a cache begins with and the one that it shrinks to."""
    folder, _ = made(ranks="own")
    args = SimpleNamespace(proj=None, ranks=folder / "ranks.json", budget=None)
    _, own, first, last = plans_for(args, model, None, after(1, model), after(3, model))
    assert torch.equal(own, lowered(model, []))
    assert torch.equal(first, lowered(model, PATH[:1]))
    assert torch.equal(last, lowered(model, PATH))
    monkeypatch.chdir(tmp_path)
    _, *full = plans_for(SimpleNamespace(proj=None, ranks=None, budget=None), model, None, None)
    assert len(full) == 2
    assert all(torch.equal(plan, lowered(model, [])) for plan in full)


def test_files_that_are_not_what_they_should_be_are_named(made, refused, write_plan, tmp_path):
    folder, _ = made(order=[99])
    line = refused(0.5, proj=folder / PROJECTIONS)
    assert line.startswith("--proj: ") and "train.json" in line
    write_plan(folder, head_dim=3)
    line = refused(0.5, proj=folder / PROJECTIONS)
    assert line.startswith("--proj: ") and "ranks.json" in line
    line = refused(0.5, ranks=folder / "ranks.json")
    assert line.startswith("--ranks: ") and "ranks.json" in line
    line = refused(0.5, proj=tmp_path / "none.safetensors")
    assert line.startswith("--proj: ") and "none.safetensors" in line


# ------------------------------------------------------------------------------
# The rotations that come with the project

ROTATIONS = sorted((ROOT / "rotations").iterdir())


@pytest.mark.parametrize("folder", ROTATIONS, ids=[folder.name for folder in ROTATIONS])
def test_rotations_in_the_repository_are_orthogonal_and_go_with_their_order(folder):
    p = Projection.load(folder / PROJECTIONS)
    assert set(load_file(folder / PROJECTIONS)) == {"U_k", "U_v", "mean_v", "mean_k"}
    L, K, d = p.mean_v.shape
    for U in (p.U_k, p.U_v):
        assert (U.double().mT @ U.double() - torch.eye(d)).abs().max() < 1e-6
    config = SimpleNamespace(num_hidden_layers=L, num_key_value_heads=K, head_dim=d)
    found = read_ranks(folder / "ranks.json", config)
    assert found.projections == p.hash()
    assert (plan_at(found.order, config, 0.125) == d // 8).all()


def test_rotations_of_another_model_are_refused_in_one_line(refusal):
    folder = ROOT / "rotations" / "smollm2-135m"
    line = refusal("generate", "--proj", folder / PROJECTIONS, "--budget", 0.5)
    assert line == "--proj: projections of the shape (30, 3, 64), but the model has (6, 4, 64)"
