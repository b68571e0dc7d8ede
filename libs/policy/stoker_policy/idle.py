"""How long a model that nobody asks stays, and when it should be at hand again: learned from its idle times.

Source: the hybrid histogram policy of Shahrad et al., "Serverless in the Wild: Characterizing and Optimizing the Serverless
Workload at a Large Cloud Provider", USENIX ATC 2020, section 4.2. What differs is said where it does.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from stoker_policy.facts import View

BINS_PER_OCTAVE = 8
RANGE_OCTAVES = 14
EDGES_S = (0.0, *(2.0 ** (i / BINS_PER_OCTAVE) for i in range(BINS_PER_OCTAVE * RANGE_OCTAVES + 1)))
"""Bin i is [EDGES_S[i], EDGES_S[i + 1]): first what is below a second, then bins of 9 % each up to 16,384 s (4.5 h).

The paper has 240 bins of a minute. Models are asked for seconds to hours apart and start in about a second, so a minute is far too
coarse for the busy ones and needlessly fine for the others. Bins as wide as the margin, relative to where they lie, cost the same
share of precision everywhere, and the spread of a pattern over them does not depend on how often it comes.
"""
BINS = len(EDGES_S) - 1

IDLES_MAX = 256
"""Idle times kept per model; the oldest gives way, so that a changed pattern is followed. The 99th percentile needs at least 100."""
MODELS_MAX = 16_384
"""Models kept; the one whose last idle time came longest ago gives way."""

HEAD, TAIL = 0.05, 0.99
MARGIN = 0.10
"""Head and tail percentile and the margin before and after them: the paper's own."""
SAMPLES_MIN = 10
"""With fewer in range the percentiles are hardly more than the least and the greatest."""
SPREAD_MIN = 1.0
"""Least coefficient of variation of the bins' counts: 1 is a pattern over half of the bins.

The paper takes 2 over its linear bins, where Poisson arrivals pass unless they are very rare. Over these bins Poisson arrivals have 1.2,
however rare, and should pass; what is spread evenly from seconds to hours has 0.
"""
PREWARM_MIN_S = 60.0
"""Who comes back earlier than this is not worth stopping and starting again. The paper's bins round less than a minute down to 0."""
LINGER_S = 10.0
"""What was learned keeps an instance for this long in any case. To stop and start again takes the device for seconds, too, and the
percentiles count idle times, not hours: with ten of them a second, 1 % left out would be a restart every ten seconds."""

FORECAST_SAMPLES = 16
FORECAST_SAMPLES_MIN = 4  # each took over 4.5 h: ten would take two days
FORECAST_MARGIN, FORECAST_MARGIN_MAX = 0.15, 0.5
"""±15 % is the paper's. Where the recent ones scatter more, their own scatter; beyond ±50 % it is no forecast."""
_SIGMA_OF_MAD = 1.4826  # of a normal distribution

KEEP_ALIVE_MAX_S = 3600.0
_IDLE_MS_MAX = 2**32 - 1  # 49 days: what the array holds


class Window(View, frozen=True):
    """When a model should be at hand, in seconds since its last request ended.

    From prewarm_s on its weights belong in DRAM (or an instance is started), for keep_alive_s from then. With prewarm_s 0 the
    instance stays until keep_alive_s; otherwise it stops after LINGER_S, and its device serves others until prewarm_s.
    basis: histogram | forecast | standard; option where the model says how long itself and nothing was learned for it.
    """

    prewarm_s: float
    keep_alive_s: float
    basis: str

    @property
    def end_s(self) -> float:
        return self.prewarm_s + self.keep_alive_s

    def warm(self, idle_s: float) -> bool:
        """Whether the weights belong in DRAM at least."""
        return self.prewarm_s <= idle_s <= self.end_s

    def stays(self, idle_s: float) -> bool:
        """Whether an idle instance stays, unless somebody else needs its device."""
        return self.warm(idle_s) or (self.prewarm_s > 0 and idle_s <= LINGER_S)


class IdleTimes:
    """The idle times of models, as they came: equal observations give equal windows. At most MODELS_MAX models.

    An idle time is from the end of a model's last request to the arrival of its next, while no other was in hand anywhere.
    """

    def __init__(self, *, keep_alive_max_s: float = KEEP_ALIVE_MAX_S) -> None:
        self._keep_alive_max_s = keep_alive_max_s
        self._histories: dict[str, _History] = {}  # by when the last idle time came, oldest first

    def observe(self, model_id: str, idle_s: float) -> None:
        """Raises ValueError for a time that is negative or not finite, and learns nothing from it."""
        if not (math.isfinite(idle_s) and idle_s >= 0):
            raise ValueError(f"idle time of {model_id} is {idle_s} s")
        history = self._histories.pop(model_id, None) or _History()
        history.add(min(round(idle_s * 1000), _IDLE_MS_MAX))
        self._put(model_id, history)

    def window(self, model_id: str, default_keep_alive_s: float) -> Window:
        """The standard keep-alive while too little is known or no pattern shows. No keep-alive is above the bound."""
        history = self._histories.get(model_id)
        window = history.window() if history else None
        if window is None:
            window = Window(prewarm_s=0.0, keep_alive_s=default_keep_alive_s, basis="standard")
        keep_alive_s = min(window.keep_alive_s, self._keep_alive_max_s)
        if keep_alive_s == window.keep_alive_s:
            return window
        return Window(prewarm_s=window.prewarm_s, keep_alive_s=keep_alive_s, basis=window.basis)

    def forget(self, model_id: str) -> None:
        """The model was deleted."""
        self._histories.pop(model_id, None)

    def dump(self, model_ids: Iterable[str] | None = None) -> dict[str, list[int]]:
        """Model → its idle times in milliseconds, oldest first; of all models or those named, in the order `load` wants.

        It says nothing of bins, so that another version may choose others.
        """
        chosen = self._histories.keys() if model_ids is None else self._histories.keys() & set(model_ids)
        return {m: history.idle_ms.tolist() for m, history in self._histories.items() if m in chosen}

    def load(self, dumped: Mapping[str, Sequence[int]]) -> None:
        """Take these models as they were dumped, in place of what is known of them.

        Raises ValueError if something is not a duration in milliseconds, and takes nothing.
        """
        histories: dict[str, _History] = {}
        for model_id, idles in dumped.items():
            histories[model_id] = history = _History()
            for idle_ms in idles:
                if type(idle_ms) is not int or not 0 <= idle_ms <= _IDLE_MS_MAX:
                    raise ValueError(f"idle time of {model_id} is {idle_ms!r} ms")
                history.add(idle_ms)
        for model_id, history in histories.items():
            self._histories.pop(model_id, None)
            self._put(model_id, history)

    def _put(self, model_id: str, history: _History) -> None:
        self._histories[model_id] = history
        if len(self._histories) > MODELS_MAX:
            del self._histories[next(iter(self._histories))]


class _History:
    """One model's newest idle times, their histogram, and what follows from it until the next one comes."""

    __slots__ = ("_counts", "_known", "_window", "idle_ms")

    def __init__(self) -> None:
        self.idle_ms = array("I")  # oldest first
        self._counts = array("H", bytes(2 * (BINS + 1)))  # the last one is what is out of range
        self._window: Window | None = None
        self._known = False

    def add(self, idle_ms: int) -> None:
        self.idle_ms.append(idle_ms)
        self._counts[_bin(idle_ms)] += 1
        if len(self.idle_ms) > IDLES_MAX:
            self._counts[_bin(self.idle_ms.pop(0))] -= 1
        self._known = False

    def window(self) -> Window | None:
        """None: the standard one."""
        if not self._known:
            self._window, self._known = self._decide(), True
        return self._window

    def _decide(self) -> Window | None:
        total, beyond = len(self.idle_ms), self._counts[BINS]
        if 2 * beyond > total:
            return forecast([ms / 1000 for ms in self.idle_ms[-FORECAST_SAMPLES:]])
        if total - beyond < SAMPLES_MIN or spread(self._counts[:BINS]) < SPREAD_MIN:
            return None
        head_s, tail_s = self._percentiles(total - beyond)
        return _learned(head_s * (1 - MARGIN), tail_s * (1 + MARGIN), "histogram")

    def _percentiles(self, within: int) -> tuple[float, float]:
        """The lower edge of the head's bin and the upper edge of the tail's: rounded outwards, as in the paper."""
        head, tail, below = -1, 0, 0
        for index in range(BINS):
            below += self._counts[index]
            if head < 0 and below >= HEAD * within:
                head = index
            if below >= TAIL * within:
                tail = index
                break
        return EDGES_S[head], EDGES_S[tail + 1]


def spread(counts: Sequence[int]) -> float:
    """Coefficient of variation of the bins' counts in the long run; 0 for an even spread, and if too few came to tell.

    The paper's plain coefficient is high for few observations whatever their pattern: ten in ten of a hundred bins give 3. So the
    sum of the bins' squared shares is estimated without that bias, from the pairs that fell into one bin. The counts are integers
    and few: the sums are exact, and nothing needs Welford's method.
    Source: Simpson, "Measurement of Diversity", Nature 163, 1949.
    """
    total = sum(counts)
    if total < 2:
        return 0.0
    pairs = sum(count * (count - 1) for count in counts)
    return math.sqrt(max(0.0, len(counts) * pairs / (total * (total - 1)) - 1))


def forecast(recent_s: Sequence[float]) -> Window | None:
    """Around the median of the recent idle times; None if they are too few or scatter too much.

    The paper fits ARIMA, since these models come so rarely that the cost does not matter. What comes hours apart shows either one
    period or none: the median finds the period, survives a missed or doubled one, and can be explained; the scatter around it
    (median absolute deviation) says whether there is one.
    """
    if len(recent_s) < FORECAST_SAMPLES_MIN:
        return None
    expected_s = median(recent_s)
    if expected_s <= 0:
        return None
    scatter = _SIGMA_OF_MAD * median(abs(s - expected_s) for s in recent_s) / expected_s
    margin = max(FORECAST_MARGIN, scatter)
    if margin > FORECAST_MARGIN_MAX:
        return None
    return _learned(expected_s * (1 - margin), expected_s * (1 + margin), "forecast")


def _learned(start_s: float, end_s: float, basis: str) -> Window:
    if start_s < PREWARM_MIN_S:
        return Window(prewarm_s=0.0, keep_alive_s=max(end_s, LINGER_S), basis=basis)
    return Window(prewarm_s=start_s, keep_alive_s=end_s - start_s, basis=basis)


def _bin(idle_ms: int) -> int:
    """Index of its bin; BINS if it is out of range."""
    return bisect_right(EDGES_S, idle_ms / 1000) - 1
