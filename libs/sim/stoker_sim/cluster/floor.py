"""Requests in a simulated cluster: they wait, run, and end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import msgspec

from stoker_contracts.models import InstanceState
from stoker_sim.cluster.agenda import Agenda
from stoker_sim.cluster.instances import Instance
from stoker_sim.cluster.lines import Line
from stoker_sim.cluster.measure import Meter
from stoker_sim.cluster.nodes import Node
from stoker_sim.cluster.orders import Policy
from stoker_sim.cluster.requests import Request
from stoker_sim.workload import Arrival


class Physics(msgspec.Struct, frozen=True, kw_only=True):
    """What profiles do not say, alike for all policies."""

    stop_s: float = 0.1  # assumed: from the order to stop until a device's memory is free
    handoff_s: float = (
        0.1  # a request's pause as it moves: 99 ms measured of vLLM on CPUs, beside the prefill of its last tokens
    )
    decision_s: float = 0.01  # assumed: from a change until the policy has answered it
    tick_s: float = 1.0  # so often it is asked in any case, as nodes report
    timeout_s: float = 300.0  # the longest that a request waits at a time


class Floor:
    """What happens to requests once there are instances; `World` is what makes those.

    A request that finds an instance with room takes it and nobody is asked. In an instance each request has a decode of its own
    speed: neither its neighbours in the batch nor other instances on the device slow it.
    waiting: lines in which somebody waits, in the order in which they came to.  idle: the longest idle first.
    """

    def __init__(
        self, nodes: Mapping[str, Node], lines: Mapping[str, Line], policy: Policy, physics: Physics | None = None
    ) -> None:
        self.nodes, self.lines, self.policy = nodes, lines, policy
        self.physics = physics or Physics()
        self.agenda = Agenda()
        self.meter = Meter()
        self.waiting: dict[str, Line] = {}
        self.idle: dict[str, Instance] = {}
        self._open = 0
        self._arrived = 0

    @property
    def now_s(self) -> float:
        return self.agenda.now_s

    @abstractmethod
    def ask(self) -> None:
        """Have the policy decide, soon."""

    @abstractmethod
    def _stop(self, instance: Instance) -> None:
        """Of one that has nothing in hand."""

    def _arrive(self, arrival: Arrival, line: Line) -> None:
        self._arrived += 1
        self._open += 1
        now_s = self.agenda.now_s
        request = Request(self._arrived, line, now_s, arrival.prompt_tokens, arrival.output_tokens)
        if not line.in_hand and line.idle_since_s is not None:
            self.policy.came_back(line, now_s - line.idle_since_s)
        line.in_hand += 1
        if not line.waiting:
            instance = line.with_room()
            if instance is not None:
                self._work(instance, request)
                return
        self._wait(request)

    def _wait(self, request: Request, *, first: bool = False) -> None:
        line = request.line
        if first:
            line.waiting.appendleft(request)
        else:
            line.waiting.append(request)
        self.waiting.setdefault(line.name, line)
        self.agenda.at(self.now_s + self.physics.timeout_s, self._time_out, (request, request.waits_since_s))
        self.policy.asked(line)
        self.ask()

    def _time_out(self, about: tuple[Request, float]) -> None:
        request, since_s = about
        if request.ended or request.instance is not None or request.waits_since_s != since_s:
            return
        request.line.waiting.remove(request)
        self._left(request.line)
        request.waited_s += self.now_s - since_s
        self._end(request, in_time=False)

    def _left(self, line: Line) -> None:
        """Somebody no longer waits there."""
        if not line.waiting:
            self.waiting.pop(line.name, None)
        self.policy.asked(line)

    def _end(self, request: Request, *, in_time: bool) -> None:
        assert not request.ended, f"request {request.number} ended twice"
        request.ended = True
        self._open -= 1
        line = request.line
        line.in_hand -= 1
        if not line.in_hand:
            line.idle_since_s = self.now_s
        self.meter.ended(request, in_time=in_time)

    def _work(
        self, instance: Instance, request: Request, *, pause_s: float = 0.0, missing_tokens: int | None = None
    ) -> None:
        """missing_tokens: whose KV cache has to be computed; None: all of them."""
        now_s = self.agenda.now_s
        if missing_tokens is None:
            request.waited_s += now_s - request.waits_since_s
            missing_tokens = request.prompt_tokens + request.generated
        if not instance.running:
            self.idle.pop(instance.instance_id, None)
            instance.node.occupy(instance, 1, now_s)
        instance.running[request.number] = request
        request.instance = instance
        prefill_s = instance.prefill_s(missing_tokens)
        request.run(now_s, pause_s=pause_s, prefill_s=prefill_s, token_s=instance.token_s)
        self.agenda.at(request.ends_s, self._finish, request)
        self.policy.changed(instance)

    def _finish(self, request: Request) -> None:
        instance = request.instance
        if instance is None or request.ends_s != self.agenda.now_s or request.ended:
            return  # it went on elsewhere
        request.generated = request.output_tokens
        self._leave(instance, request)
        self._end(request, in_time=True)
        self.policy.finished(request.line, request.output_tokens)
        self._refill(instance)

    def _leave(self, instance: Instance, request: Request) -> None:
        del instance.running[request.number]
        request.instance = None
        if not instance.running:
            instance.node.occupy(instance, -1, self.now_s)

    def _refill(self, instance: Instance) -> None:
        """It has room: for those who wait, or else to be idle, or to end."""
        line = instance.line
        while line.waiting and instance.room > 0:
            request = line.waiting.popleft()
            self._left(line)
            self._work(instance, request)
        if not instance.running:
            if instance.leaving:
                if not instance.kept and instance.state is InstanceState.READY:
                    self._stop(instance)
                return
            if instance.idle:
                instance.idle_since_s = self.now_s
                self.idle[instance.instance_id] = instance
            if self.waiting:
                self.ask()
        self.policy.changed(instance)
