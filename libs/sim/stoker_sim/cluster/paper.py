"""The cluster test of ServerlessLLM, section 7.3, with every policy on the same requests.

Source: Fu et al., "ServerlessLLM: Low-Latency Serverless Inference for Large Language Models", OSDI 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import msgspec

from stoker_sim.cluster.build import POLICIES, Setup, build
from stoker_sim.cluster.measure import Measured
from stoker_sim.dice import Dice
from stoker_sim.profiles import Profile, load_profile
from stoker_sim.workload import GSM8K_LIKE, SHAREGPT_LIKE, Arrival, Clipped, Lengths, bursts_of_each, even

DATASETS: dict[str, Lengths] = {"gsm8k": GSM8K_LIKE, "sharegpt": SHAREGPT_LIKE}
RATES = (0.2, 0.8, 1.4)
"""Requests per second, to all models together."""
CV = 8.0
REQUESTS = 800
"""Of each row: enough that eight lie above its 99th percentile."""

PUBLISHED_MEAN_S: dict[tuple[str, str], dict[str, float]] = {
    ("opt-6.7b", "gsm8k"): {"random": 12.1, "cache": 8.2, "serverlessllm": 0.8},
    ("opt-13b", "gsm8k"): {"random": 142.8, "cache": 140.1, "serverlessllm": 0.9},
    ("opt-30b", "gsm8k"): {"random": 213.0, "cache": 199.0, "serverlessllm": 7.5},
    ("opt-6.7b", "sharegpt"): {"random": 27.6, "cache": 17.9, "serverlessllm": 0.8},
    ("opt-13b", "sharegpt"): {"random": 182.0, "cache": 162.0, "serverlessllm": 1.6},
    ("opt-30b", "sharegpt"): {"random": 260.0, "cache": 262.0, "serverlessllm": 89.8},
}
"""Mean startup latencies that the paper gives, of Ray Serve, Ray Serve with a cache, and ServerlessLLM."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one workload."""

    policy: str
    model: str
    dataset: str
    rate_per_s: float
    measured: Measured

    @property
    def workload(self) -> tuple[str, str, float]:
        return (self.model, self.dataset, self.rate_per_s)

    @property
    def published_mean_s(self) -> float | None:
        return PUBLISHED_MEAN_S.get((self.model, self.dataset), {}).get(self.policy)


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """Stoker's P99 startup latency beside the best other policy's, on one workload."""

    model: str
    dataset: str
    rate_per_s: float
    stoker_s: float
    best_other: str
    best_other_s: float

    @property
    def ratio(self) -> float:
        return self.stoker_s / self.best_other_s if self.best_other_s > 0 else 1.0


def run(
    *,
    seed: int,
    requests: int = REQUESTS,
    rates: Sequence[float] = RATES,
    models: Sequence[str] = (),
    policies: Sequence[str] = tuple(POLICIES),
    setup: Setup | None = None,
) -> Iterator[Row]:
    """Row by row. models: of which sizes; none: all. Raises InvalidWorkload."""
    profile = load_profile("paper")
    for kind in profile.models:
        if models and kind.name not in models:
            continue
        alone = msgspec.structs.replace(profile, models=(kind,))
        for dataset in DATASETS:
            for rate_per_s in rates:
                arrivals = list(islice(workload(alone, dataset, rate_per_s, seed), requests))
                for policy in policies:
                    world = build(alone, policy, seed=seed, setup=setup)
                    yield Row(
                        policy=policy,
                        model=kind.name,
                        dataset=dataset,
                        rate_per_s=rate_per_s,
                        measured=world.run(arrivals),
                    )


def workload(profile: Profile, dataset: str, rate_per_s: float, seed: int) -> Iterator[Arrival]:
    """Each model has bursts of its own, at the same share of the rate. At other rates the same bursts come faster."""
    kind = profile.models[0]
    return bursts_of_each(
        Dice(seed, f"paper/{kind.name}/{dataset}"),
        popularity=even(kind.names),
        lengths=Clipped(DATASETS[dataset], kind.context_tokens),
        rate_per_s=rate_per_s,
        cv=CV,
        duration_s=1e7,
    )


def compare(rows: Sequence[Row]) -> list[Compared]:
    """For each workload that Stoker and another policy had."""
    by_workload: dict[tuple[str, str, float], dict[str, float]] = {}
    for row in rows:
        by_workload.setdefault(row.workload, {})[row.policy] = row.measured.startup_p99_s
    compared = []
    for (model, dataset, rate_per_s), p99 in by_workload.items():
        others = {policy: seconds for policy, seconds in p99.items() if policy != "stoker"}
        if "stoker" not in p99 or not others:
            continue
        best = min(others, key=lambda policy: (others[policy], policy))
        compared.append(
            Compared(
                model=model,
                dataset=dataset,
                rate_per_s=rate_per_s,
                stoker_s=p99["stoker"],
                best_other=best,
                best_other_s=others[best],
            )
        )
    return compared
