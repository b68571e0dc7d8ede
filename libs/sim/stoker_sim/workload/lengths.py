"""How many tokens a request brings, and how many its answer has."""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Protocol

import msgspec

from stoker_core.errors import InvalidTrace, InvalidWorkload
from stoker_sim.dice import Dice
from stoker_sim.workload.draws import STANDARD, normal
from stoker_sim.workload.reading import Table

ROWS_MAX = 10_000_000
"""Of a file of lengths; each takes 8 bytes."""


class Lengths(Protocol):
    def draw(self, dice: Dice) -> tuple[int, int]:
        """Tokens of the prompt and of the answer, at least 1 each."""
        ...


class LogNormal(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts up to tokens_max whose logarithm is normal, cut off above tokens_max.

    mu, sigma: of the logarithm before the cut, so that beyond tokens_max they describe nothing that was seen.
    """

    mu: float
    sigma: float
    tokens_max: int

    def at(self, quantile: float) -> int:
        """The count below which this share of all lies. quantile: above 0, below 1."""
        kept = STANDARD.cdf((math.log(self.tokens_max + 0.5) - self.mu) / self.sigma)
        # A quantile next to 0 or 1 may round to it.
        within = min(max(quantile * kept, 1e-300), 1.0 - 1e-16)
        return min(max(round(math.exp(self.mu + self.sigma * STANDARD.inv_cdf(within))), 1), self.tokens_max)


class LogNormalLengths(msgspec.Struct, frozen=True, kw_only=True):
    """Both counts log-normal. correlation: of the normal variables that the two are made of."""

    prompt: LogNormal
    output: LogNormal
    correlation: float = 0.0

    def draw(self, dice: Dice) -> tuple[int, int]:
        first, second = normal(dice), normal(dice)
        second = self.correlation * first + math.sqrt(1.0 - self.correlation**2) * second
        return self.prompt.at(STANDARD.cdf(first)), self.output.at(STANDARD.cdf(second))


SHAREGPT_LIKE = LogNormalLengths(
    prompt=LogNormal(mu=10.7837, sigma=3.1923, tokens_max=8141),
    output=LogNormal(mu=9.6671, sigma=2.3523, tokens_max=1024),
    correlation=0.05,
)
"""Fitted by maximum likelihood to 30,731 lengths of ShareGPT conversations (num_prefill_tokens, num_decode_tokens), whose
longest are 8,141 and 1,024. Medians 1,630 and 417 (there 1,730 and 415), means 2,416 and 451 (2,340 and 439), 95 % below
7,102 and 953 (6,563 and 920). These are conversations with all that was said before, not single questions."""

GSM8K_LIKE = LogNormalLengths(
    prompt=LogNormal(mu=3.8884, sigma=0.3639, tokens_max=178),
    output=LogNormal(mu=4.0962, sigma=0.4655, tokens_max=278),
    correlation=0.53,
)
"""Fitted by maximum likelihood to questions and answers of the first 3,000 of GSM8K's training set, without the answers'
annotations in << >>. Tokens were counted as the pieces into which GPT-2's tokenizer, which OPT has too, cuts a text before it
merges bytes: a little too few, for it cuts rare words further. Medians 49 and 60 (there 49 and 61), means 52 and 67 (52 and 67), 95 % below 89 and
129 (91 and 129)."""


class FileLengths:
    """Pairs of a CSV file with columns num_prefill_tokens and num_decode_tokens, each as likely as any other."""

    def __init__(self, path: Path) -> None:
        """Reads all of it: 8 bytes for each row. Raises InvalidTrace."""
        self._prompts, self._outputs = array("I"), array("I")
        table = Table(path)
        names = ("num_prefill_tokens", "num_decode_tokens")
        prompt, output = table.places(names, others=("num_total_tokens", "pd_ratio"))
        for line, row in table:
            if len(self._prompts) == ROWS_MAX:
                raise InvalidTrace(str(path), f"has more than {ROWS_MAX:,} rows", line=line)
            self._prompts.append(table.tokens(line, names[0], row[prompt]))
            self._outputs.append(table.tokens(line, names[1], row[output]))
        if not self._prompts:
            raise InvalidTrace(str(path), "has no rows")

    def __len__(self) -> int:
        return len(self._prompts)

    def draw(self, dice: Dice) -> tuple[int, int]:
        row = dice.below(len(self._prompts))
        return self._prompts[row], self._outputs[row]


class Clipped:
    """Others' lengths, for models whose context is tokens_max: first the prompt gives way, then the answer."""

    def __init__(self, lengths: Lengths, tokens_max: int) -> None:
        if tokens_max < 2:
            raise InvalidWorkload(f"a context of {tokens_max} tokens has no room for a prompt and an answer")
        self._lengths, self._tokens_max = lengths, tokens_max

    def draw(self, dice: Dice) -> tuple[int, int]:
        prompt, output = self._lengths.draw(dice)
        output = min(output, self._tokens_max - 1)
        return min(prompt, self._tokens_max - output), output
