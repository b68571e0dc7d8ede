"""How many instances of a model the requests in hand justify.

Source: the Knative Pod Autoscaler, knative.dev/docs/serving/autoscaling/kpa-specific: a target of concurrent requests per
instance, a stable window, a panic window at twice the target, limits on the rate of change. What differs is said where it does.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise

from stoker_policy.facts import View
from stoker_policy.loads import Load

STABLE_MS = 60_000
PANIC_MS = 6_000
PANIC_THRESHOLD = 2.0
"""In hand, as a multiple of what the ready instances should have."""
TARGET_SHARE = 0.7
"""Of an instance's slots: what is left takes what comes while another one starts."""
UP_RATE_MAX, DOWN_RATE_MAX = 2.0, 2.0
"""At most doubled and at most halved at a time. Knative grows up to a thousandfold: its instances do not each hold a GPU."""
DOWN_SLACK = 0.1
"""In instances: one more is kept if the load comes this close to needing it, lest chance in the arrivals starts it again at once."""
_EPSILON = 1e-9  # a load of exactly n targets is n instances, however it was rounded


class Limits(View, frozen=True):
    """What a model's options say. target_concurrency: requests in hand per instance; 0: 0.7 × slots.

    Raises ValueError unless 0 <= min_replicas <= max_replicas, 1 <= max_replicas and 0 <= target_concurrency < ∞.
    """

    min_replicas: int = 0
    max_replicas: int = 1
    target_concurrency: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.min_replicas <= self.max_replicas and self.max_replicas >= 1):
            raise ValueError(f"min_replicas {self.min_replicas}, max_replicas {self.max_replicas}")
        if not 0 <= self.target_concurrency < math.inf:
            raise ValueError(f"target_concurrency {self.target_concurrency}")

    def target(self, slots: int) -> float:
        """At least 1: less would hold two instances for one request after the other. At most the slots: more are not admitted."""
        return min(max(1.0, self.target_concurrency or TARGET_SHARE * slots), max(1, slots))


class Replicas(View, frozen=True):
    """count: instances wanted, those that start included.  panic: a burst holds it up.  reason: for people.

    0 says that no load justifies any; whether the last one stays for a while is its keep-alive's matter.
    """

    count: int
    panic: bool
    reason: str


def wanted(limits: Limits, samples: Iterable[Load], *, ready: int, slots: int) -> Replicas:
    """Instances for this load, within [min_replicas, max_replicas]; more load never gives fewer.

    samples: back to 66 s, in any order; they need not be evenly spaced.  ready: instances that take requests now.
    slots: requests that one instance takes at once.

    - The average of 60 s decides, within half and twice of what is ready. Panic: somewhen in the last 60 s the average of 6 s
      was twice what the instances of that time should have; since then only increases count.
    - Nothing in hand for all of 60 s is 0 at once. While the samples do not go back that far nothing is stopped (a new
      leader has none; Knative holds what runs by starting in panic).
    - Where none is ready, what is in hand now decides at once: as many as it fills; none if nobody waits, since a
      restart for an average would undo what the keep-alive did. So it does where somebody waits beside ready ones.
    """
    history = sorted(samples, key=lambda s: (s.age_ms, -s.concurrency, -s.ready))
    target = limits.target(slots)
    now = history[0].concurrency if history else 0
    if not history:
        return _within(limits, ready, panic=False, reason="nothing known of its load: as many as are ready")
    if ready == 0 and now == 0:
        return _within(limits, 0, panic=False, reason="none ready, nothing in hand")
    curve = _Curve(history)
    if curve.oldest_ms >= STABLE_MS and curve.mean(0, STABLE_MS) == 0 and now == 0:
        return _within(limits, 0, panic=False, reason="nothing in hand for 60 s")

    stable = curve.mean(0, STABLE_MS)
    count, why = _stable(stable / target, ready), f"{stable:.3g} in hand over 60 s at {target:.3g} each"
    burst = _burst(history, curve, ready, target)
    if burst > count:
        count, why = burst, f"a burst: up to {curve.peak} in hand at {target:.3g} each"
    # A gateway's word of its queue is up to 2 s old: what has just become ready may have taken all of it by now.
    waits = all(load.queued and load.ready for load in history[:2])
    if (ready == 0 or waits) and count < (at_once := math.ceil(now / max(1, slots))):
        count, why = at_once, f"somebody waits: {now} in hand for {slots} slots each"
    if curve.oldest_ms < STABLE_MS and count < ready:
        count, why = ready, f"its load is known for {curve.oldest_ms / 1000:.3g} s only: none is stopped yet"
    return _within(limits, count, panic=burst > 0, reason=why)


def _stable(share: float, ready: int) -> int:
    """share: instances that the average fills, in parts."""
    count = _instances(share)
    if count < ready:
        count = min(ready, _instances(share + DOWN_SLACK))
    return min(max(count, math.floor(ready / DOWN_RATE_MAX)), _up(ready))


def _burst(history: Sequence[Load], curve: _Curve, ready: int, target: float) -> int:
    """The most that a panic window justified since the earliest crossing of the last stable window; 0 without a crossing.

    The state of a panic is read from the samples alone, so a leader has nothing else to keep. Knative compares after rounding
    up, by which one request above the target of one instance would be a panic; here the threshold is of the load itself.
    """
    if curve.peak < PANIC_THRESHOLD * target:
        return 0
    most, panic = 0, False
    moments = {(0, ready), *((s.age_ms, s.ready) for s in history if s.age_ms <= STABLE_MS)}
    for age_ms, ready_then in sorted(moments, key=lambda m: (-m[0], m[1])):  # oldest first, ties by the fewer
        share = curve.mean(age_ms, age_ms + PANIC_MS) / target
        panic = panic or share >= PANIC_THRESHOLD * max(1, ready_then) - _EPSILON
        if panic:
            most = max(most, min(_instances(share), _up(ready_then)))
    return most


class _Curve:
    """Load over age. Each sample holds until the next newer one, the newest until now."""

    def __init__(self, history: Sequence[Load]) -> None:
        """history: newest first, not empty."""
        self._ages_ms = [0, *(s.age_ms for s in history)]
        self._values = [s.concurrency for s in history]
        self._areas = [0]  # request · ms from the age of the same index until now: integers, so exact
        for (newer_ms, older_ms), value in zip(pairwise(self._ages_ms), self._values, strict=True):
            self._areas.append(self._areas[-1] + (older_ms - newer_ms) * value)
        self.oldest_ms = self._ages_ms[-1]
        self.peak = max(self._values)

    def mean(self, from_ms: int, until_ms: int) -> float:
        """Between two ages, the first the smaller; of what is known of that time, and of nothing known the oldest sample."""
        until_ms = min(until_ms, self.oldest_ms)
        if until_ms <= from_ms:
            return self._values[-1]
        return (self._area(until_ms) - self._area(from_ms)) / (until_ms - from_ms)

    def _area(self, age_ms: int) -> int:
        index = bisect_left(self._ages_ms, age_ms)
        if index == 0:
            return 0
        return self._areas[index] - (self._ages_ms[index] - age_ms) * self._values[index - 1]


def _instances(share: float) -> int:
    return math.ceil(share - _EPSILON)


def _up(ready: int) -> int:
    return math.ceil(max(1, ready) * UP_RATE_MAX)


def _within(limits: Limits, count: int, *, panic: bool, reason: str) -> Replicas:
    bounded = min(max(count, limits.min_replicas), limits.max_replicas)
    if bounded != count:
        reason = f"{reason}: {count}, limited to {bounded}"
    return Replicas(count=bounded, panic=panic, reason=reason)
