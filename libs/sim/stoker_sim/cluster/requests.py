"""One request on its way through a simulated cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stoker_sim.cluster.instances import Instance
    from stoker_sim.cluster.lines import Line


class Request:
    """Waits in its model's line, then runs on an instance, until its last token or its time-out.

    waited_s: without an instance that works on it, so far: before it began, while it was preempted, and while it moved.
    waits_since_s: since when it waits now.  generated: tokens of output as of decodes_s, from which on it makes one each
    token_s.  ends_s: when it is going to have all; what was planned for another moment no longer holds.
    """

    __slots__ = (
        "arrived_s",
        "decodes_s",
        "ended",
        "ends_s",
        "first_token_s",
        "generated",
        "instance",
        "line",
        "number",
        "output_tokens",
        "preempted",
        "prompt_tokens",
        "token_s",
        "waited_s",
        "waits_since_s",
    )

    def __init__(self, number: int, line: Line, arrived_s: float, prompt_tokens: int, output_tokens: int) -> None:
        self.number, self.line, self.arrived_s = number, line, arrived_s
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.waited_s, self.waits_since_s = 0.0, arrived_s
        self.generated, self.decodes_s, self.ends_s, self.token_s = 0, 0.0, -1.0, 0.0
        self.first_token_s = -1.0  # since its arrival; -1: not yet
        self.instance: Instance | None = None
        self.preempted = 0
        self.ended = False

    def tokens_at(self, now_s: float) -> int:
        """Of output, while it runs."""
        if now_s < self.decodes_s:
            return self.generated
        made = 1 + int((now_s - self.decodes_s) / self.token_s + 1e-9)
        return min(self.output_tokens, self.generated + made)

    def run(self, now_s: float, *, pause_s: float, prefill_s: float, token_s: float) -> None:
        """Go on from what was generated: after a pause its KV cache is computed, then tokens come.

        The prefill gives the first token of those that are missing.
        """
        assert self.generated < self.output_tokens, f"request {self.number} is complete"
        self.token_s = token_s
        self.decodes_s = now_s + pause_s + prefill_s
        if self.first_token_s < 0:
            self.first_token_s = self.decodes_s - self.arrived_s
        self.ends_s = self.decodes_s + (self.output_tokens - self.generated - 1) * token_s

    def halt(self, now_s: float) -> None:
        """It keeps what it has, and nobody works on it from now on."""
        if now_s < self.decodes_s and self.generated == 0:
            self.first_token_s = -1.0
        self.generated = self.tokens_at(now_s)
        self.instance, self.ends_s = None, -1.0
        self.waits_since_s = now_s
