"""Which plan of ranks a user asks for: --proj, --ranks and --budget.

A plan (2, L, K) gives every head its rank (projection.py). search.py writes files that hold one and
the order of lowerings that led to it and beyond: any prefix of that is a plan too, for another
budget. Without such a file a budget means the same rank everywhere.
"""
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import common
from model import Model
from projection import LEVELS, SIDES, Projection, check_ranks, plan_at, shape_of, uniform_ranks


def plan_arguments(parser, lowest: float = 0.125) -> None:
    add = parser.add_argument
    add("--proj", type=Path, default=Path("out/projections.safetensors"),
        help="projections, for --ranks and --budget [out/projections.safetensors]")
    add("--ranks", type=Path, help="a file of search.py, such as out/ranks.json")
    add("--budget", type=common.within(lowest, 1.0),
        help="share of the cache to keep: a prefix of --ranks, or without it uniform ranks")


def plan_for(args, model: Model) -> tuple[Projection, Tensor]:
    """The projections and the plan asked for; by default identity and full ranks."""
    ranks = uniform_ranks(args.budget or 1.0, model.config)
    if args.ranks is None and args.budget is None:
        return Projection.identity(model.config).to(model.device), ranks
    with common.blame("--proj"):
        projection = Projection.load(args.proj)
        projection.check_fits(model.config)
    if args.ranks is not None:
        with common.blame("--ranks"):
            _, ranks = read_plan(args.ranks, model.config, args.budget)
    return projection.to(model.device), ranks


def order_of(path: list, config) -> Tensor:
    """A file's path, entries [side, layer, head, KL after it], as an order (n,) for `plan_at`."""
    L, K, _ = shape_of(config)
    places = []
    try:
        for side, *place, _ in path:
            places.append(np.ravel_multi_index((SIDES.index(side), *place), (2, L, K)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a path of ranks for this model ({error})") from None
    order = torch.tensor(places, dtype=torch.long)
    if (order.bincount(minlength=1) >= LEVELS).any():
        raise ValueError("a path that takes a rank below an eighth of head_dim")
    return order


def read_plan(path: Path, config, budget=None) -> tuple[Tensor, Tensor]:
    """The order of lowerings (n,) in a file of the search, and a plan (2, L, K).

    The plan is the largest one of the order within `budget`; without one, that which the file was
    written for. ValueError names the file.
    """
    plan = common.read_json(path)
    try:
        if plan["head_dim"] != config.head_dim:
            raise ValueError(f"head_dim {plan['head_dim']}, but the model has {config.head_dim}")
        order = order_of(plan["path"], config)
        if budget is None:
            ranks = torch.tensor([plan["keys"], plan["values"]])
        else:
            ranks = plan_at(order, config, budget)
        check_ranks(ranks, *shape_of(config))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a plan of ranks for this model ({error})") from None
    return order, ranks
