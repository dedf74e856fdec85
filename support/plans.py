"""Which plan of ranks a user asks for: --proj, --ranks and --budget, and the files of search.py.

A plan (2, L, K) gives every head its rank (projection.py). search.py writes the order of lowerings
that it found, as a "path": any prefix of it is a plan, for another budget. It also writes the hash
of the projections that it was found for: on others an order means little.
"""
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import Model
from projection import (
    LEVELS,
    SIDES,
    Projection,
    check_levels,
    check_ranks,
    plan_at,
    shape_of,
    uniform_ranks,
)
from support.cli import blame, fail, within
from support.files import read_json

PROJECTIONS = "projections.safetensors"


class RanksFile(NamedTuple):
    """What a file of search.py holds."""
    order: Tensor                       # (n,) places in the flattened (2, L, K)
    ranks: Tensor                       # (2, L, K), the plan that it was written for
    projections: str | None             # the hash of those that it is for; older files have none

    def fits(self, projection: Projection) -> bool:
        return self.projections in (None, projection.hash())


def read_ranks(path: Path, config) -> RanksFile:
    """A file of search.py. ValueError names the file."""
    said = read_json(path)
    try:
        if said["head_dim"] != config.head_dim:
            raise ValueError(f"head_dim {said['head_dim']}, but the model has {config.head_dim}")
        if said.get("levels", 8) != LEVELS:
            raise ValueError(f"{said['levels']} levels of rank, but there are {LEVELS}")
        order = order_of(said["path"], config)
        ranks = torch.tensor([said["keys"], said["values"]])
        check_ranks(ranks, *shape_of(config))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a plan of ranks for this model ({error})") from None
    return RanksFile(order, ranks, said.get("projections"))


def order_of(path: list, config) -> Tensor:
    """A file's path, entries [side, layer, head, KL after it], as an order (n,) for `plan_at`."""
    L, K, _ = shape_of(config)
    places = []
    try:
        for side, *place, _ in path:
            places.append(int(np.ravel_multi_index((SIDES.index(side), *place), (2, L, K))))
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a path of ranks for this model ({error})") from None
    return check_order(places, config)


def check_order(places, config) -> Tensor:
    """Places in (2, L, K) as an order (n,), whole or cut short. ValueError if it is none."""
    L, K, _ = shape_of(config)
    ok = isinstance(places, list) and all(type(place) is int for place in places)
    if not ok or not all(0 <= place < 2 * L * K for place in places):
        raise ValueError("an order for another model")
    order = torch.tensor(places, dtype=torch.long)
    if (order.bincount(minlength=1) >= LEVELS).any():
        raise ValueError("a path that takes a rank below the least level")
    return order


def trained_order(proj: Path, projection: Projection, config) -> Tensor | None:
    """The order in the train.json beside projections, if they were trained along one.

    A line says where it is that of others.
    """
    file = proj.parent / "train.json"
    said = read_json(file) if file.exists() else {}
    if said.get("order") is None:
        return None
    if said.get("projections") not in (None, projection.hash()):
        print(f"{file}: is of the training of other projections, and is not used", file=sys.stderr)
        return None
    try:
        return check_order(said["order"], config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def order_in(file: Path, projection: Projection, config) -> Tensor | None:
    """The order in `file`, if it is there and was found for these projections; a line says why not.
    """
    if not file.exists():
        return None
    found = read_ranks(file, config)
    if not found.fits(projection):
        print(f"{file}: was searched for other projections, and is not used", file=sys.stderr)
        return None
    if found.projections is None:
        print(f"{file}: {UNSAID}", file=sys.stderr)
    return found.order


def order_beside(proj: Path, projection: Projection, config) -> tuple[Path, Tensor | None]:
    """The order for projections in the file `proj`: that of search.py, else of their training."""
    where = proj.with_name("ranks.json")
    order = order_in(where, projection, config)
    if order is None:
        where = proj.with_name("train.json")
        order = trained_order(proj, projection, config)
    return where, order


UNSAID = "does not say for which projections; taken to be for these"


# ------------------------------------------------------------------------------
# From options to a plan

def plan_arguments(parser, lowest: float = 1 / LEVELS) -> None:
    add = parser.add_argument
    add("--proj", type=Path, help=f"projections [beside --ranks, else out/{PROJECTIONS}]")
    add("--ranks", type=Path, help="a file of search.py, such as out/ranks.json")
    add("--budget", type=within(lowest, 1.0), help="share of the cache to keep, by the order in "
        "--ranks, or beside --proj, or without one by uniform ranks [that of --ranks]")


def plans_for(args, model: Model, *budgets: float | None):
    """The projections asked for, and a plan for each of these budgets; None: that of --ranks.

    With neither --ranks nor --budget: identity, and full ranks. A line says where plans are from.
    """
    config = model.config
    if args.ranks is None and args.budget is None:
        if args.proj:
            fail("--proj: says nothing of ranks; add --budget or --ranks")
        return Projection.identity(config).to(model.device), *[uniform_ranks(1.0, config)
                                                               for _ in budgets]
    if args.ranks is not None:
        with blame("--ranks"):
            found = read_ranks(args.ranks, config)
    proj = args.proj or (args.ranks or Path("out", PROJECTIONS)).parent / PROJECTIONS
    with blame("--proj"):
        projection = Projection.load(proj)
        projection.check_fits(config)
    with blame("--ckpt"):
        check_levels(config.head_dim)
    said, own = "", None                                # own: the plan without a budget
    if args.ranks is not None:
        where = args.ranks
        if not found.fits(projection):
            fail(f"--ranks: {where}: was searched for other projections than {proj}")
        order, own = found.order, found.ranks
        said = f", which {UNSAID}" if found.projections is None else ""
    else:
        with blame("--proj"):
            where, order = order_beside(proj, projection, config)
    plans = []
    for budget in budgets:
        if budget is None:
            plans.append(own)
        elif order is None:
            plans.append(uniform_ranks(budget, config))
        else:
            try:
                plans.append(plan_at(order, config, budget))
            except ValueError as error:
                fail(f"{'--ranks' if args.ranks else '--budget'}: {where}: {error}")
    kind = "the same rank everywhere" if order is None else f"along the order in {where}{said}"
    print(f"Ranks: {kind}", file=sys.stderr)
    return projection.to(model.device), *plans
