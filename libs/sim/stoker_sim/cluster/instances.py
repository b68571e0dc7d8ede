"""One instance of a model in a simulated cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker_contracts.models import InstanceState

if TYPE_CHECKING:
    from stoker_policy import StartSeen
    from stoker_policy.facts import LoadView
    from stoker_sim.cluster.lines import Line
    from stoker_sim.cluster.nodes import Node
    from stoker_sim.cluster.requests import Request


class Instance:
    """starting → ready → stopping → gone (STOPPED).

    ready_s: when it is going to be, or was, ready.  kept: slots kept for requests that move here.
    leaving: takes no new request and stops once it has none.  takes_from: instances whose requests come here once it is ready.
    then: the line whose model starts on these devices once it is gone.
    load, seen: what its start was expected to bring, for the policy that said so, and what it did.
    """

    __slots__ = (
        "decided_s",
        "devices",
        "idle_since_s",
        "instance_id",
        "kept",
        "leaving",
        "line",
        "load",
        "node",
        "ready_s",
        "running",
        "seen",
        "state",
        "stop_asked_s",
        "stops",
        "takes_from",
        "then",
        "token_s",
    )

    def __init__(self, instance_id: str, line: Line, node: Node, devices: tuple[int, ...], now_s: float) -> None:
        self.instance_id, self.line, self.node, self.devices = instance_id, line, node, devices
        self.state = InstanceState.STARTING
        self.decided_s = self.ready_s = self.idle_since_s = now_s
        self.running: dict[int, Request] = {}
        self.kept = 0
        self.leaving = False
        self.stop_asked_s: float | None = None
        self.stops = 0
        self.takes_from: list[Instance] = []
        self.then: Line | None = None
        self.load: LoadView | None = None
        self.seen: StartSeen | None = None
        self.token_s = line.profile.decode_s_per_token / node.kind.devices.decode_ratio

    @property
    def room(self) -> int:
        """Requests that it would take now."""
        if self.leaving or self.state is not InstanceState.READY:
            return 0
        return self.line.spec.slots - len(self.running) - self.kept

    @property
    def idle(self) -> bool:
        return self.state is InstanceState.READY and not self.leaving and not self.running and not self.kept

    def prefill_s(self, tokens: int) -> float:
        return tokens / (self.line.profile.prefill_tokens_per_s * self.node.kind.devices.prefill_ratio)
