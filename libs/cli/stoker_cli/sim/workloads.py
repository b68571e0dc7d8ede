"""Workloads by name, for the commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stoker_core.errors import InvalidWorkload

if TYPE_CHECKING:
    from stoker_sim.dice import Dice
    from stoker_sim.profiles import Profile
    from stoker_sim.workload import Arrival, Lengths

KINDS = ("gamma", "azure-shaped", "azure-llm:FILE", "azure-functions:FILE", "mooncake:FILE")


def arrivals(
    what: str,
    profile: Profile,
    dice: Dice,
    *,
    lengths: str,
    rate_per_s: float,
    cv: float,
    duration_s: float,
    exponent: float,
) -> Iterator[Arrival]:
    """what: one of KINDS. Raises InvalidWorkload; a trace, when it is read, InvalidTrace."""
    from stoker_sim import workload

    kind, _, file = what.partition(":")
    models = list(profile.models_by_name)
    context = min(model.context_tokens for model in profile.models)
    tokens = workload.Clipped(_lengths(lengths), context)
    popular = workload.zipf(workload.shuffled(models, dice.child("popularity")), exponent)
    match kind, bool(file):
        case "gamma", False:
            return workload.bursts_of_each(
                dice, popularity=popular, lengths=tokens, rate_per_s=rate_per_s, cv=cv, duration_s=duration_s
            )
        case "azure-shaped", False:
            count = round(rate_per_s * duration_s)
            return workload.azure_shaped(dice, models=models, arrivals=count, duration_s=duration_s, lengths=tokens)
        case "azure-llm", True:
            return workload.read_azure_llm(Path(file), dice=dice, popularity=popular)
        case "mooncake", True:
            return workload.read_mooncake(Path(file), dice=dice, popularity=popular)
        case "azure-functions", True:
            return workload.read_azure_functions(Path(file), dice=dice, models=models, lengths=tokens)
        case _:
            raise InvalidWorkload(f"there is no workload {what!r}, but {', '.join(KINDS)}")


def _lengths(name: str) -> Lengths:
    from stoker_sim.workload import GSM8K_LIKE, SHAREGPT_LIKE, FileLengths

    if name.endswith(".csv"):
        return FileLengths(Path(name))
    known: dict[str, Lengths] = {"gsm8k": GSM8K_LIKE, "sharegpt": SHAREGPT_LIKE}
    if name not in known:
        raise InvalidWorkload(f"there are no lengths {name!r}, but {', '.join(known)} and files that end in .csv")
    return known[name]
