"""The simulated cluster: what happens to instances and weights, while a policy decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from stoker_contracts.models import EngineKind, InstanceState, Tier
from stoker_core.errors import InvalidWorkload
from stoker_policy import EngineState, StartSeen
from stoker_sim.cluster.floor import Floor, Physics
from stoker_sim.cluster.instances import Instance
from stoker_sim.cluster.lines import Line
from stoker_sim.cluster.measure import Measured
from stoker_sim.cluster.nodes import Fetching, Load, Node
from stoker_sim.cluster.orders import Begin, End, Fetch, Move, Order, Policy
from stoker_sim.cluster.requests import Request
from stoker_sim.workload import Arrival


class World(Floor):
    """Runs arrivals to their end. Deterministic."""

    def __init__(
        self, nodes: Mapping[str, Node], lines: Mapping[str, Line], policy: Policy, physics: Physics | None = None
    ) -> None:
        super().__init__(nodes, lines, policy, physics)
        self._instances = 0
        self._asks = False

    def run(self, arrivals: Iterable[Arrival]) -> Measured:
        """All of them, in order of time. Raises InvalidWorkload for a model that there is not."""
        self.agenda.at(self.now_s, self._tick, None)
        for arrival in arrivals:
            line = self.lines.get(arrival.model)
            if line is None:
                raise InvalidWorkload(f"the profile has no model {arrival.model!r}")
            self.agenda.run_until(arrival.at_s)
            self._arrive(arrival, line)
        while self._open:
            self.agenda.step()
        return self._result()

    # Decisions

    def ask(self) -> None:
        """Have the policy decide, soon."""
        if not self._asks:
            self._asks = True
            self.agenda.at(self.now_s + self.physics.decision_s, self._decide, None)

    def _tick(self, _: None) -> None:
        self.agenda.at(self.now_s + self.physics.tick_s, self._tick, None)
        self.ask()

    def _decide(self, _: None) -> None:
        self._asks = False
        self.meter.decisions += 1
        for order in self.policy.decide(self):
            self.carry_out(order)

    def carry_out(self, order: Order) -> None:
        if isinstance(order, Begin):
            self._begin(order)
        elif isinstance(order, End):
            self._ask_to_end(order)
        elif isinstance(order, Move):
            self._move(order)
        elif isinstance(order, Fetch):
            node = self.nodes[order.node]
            self._fetching(
                (node, order.line, node.fetch(order.line, self.now_s, [self.nodes[g] for g in order.givers]))
            )
        else:
            for request in list(order.line.waiting):
                self._time_out((request, request.waits_since_s))

    # Instances

    def _begin(self, order: Begin) -> Instance:
        later_s = 0.0
        for evicted in order.evicts:
            self._evict(evicted)
            later_s = self.physics.stop_s
        self._instances += 1
        node = self.nodes[order.node]
        instance = Instance(f"i{self._instances:07}", order.line, node, order.devices, self.now_s)
        instance.load = order.load
        node.admit(instance)
        order.line.instances[instance.instance_id] = instance
        givers = tuple(self.nodes[name] for name in order.givers)
        self.agenda.at(self.now_s + later_s, self._load, (instance, givers))
        self.policy.changed(instance)
        return instance

    def _load(self, about: tuple[Instance, tuple[Node, ...]]) -> None:
        instance, givers = about
        now_s, node, line = self.now_s, instance.node, instance.line
        load = node.load(line, now_s, givers)
        engine_s = node.loader.engine_start_s
        instance.ready_s = load.loaded_s + engine_s
        self.meter.started(load.way.tier)
        instance.seen = StartSeen(
            node=node.name,
            model_id=line.spec.model_id,
            architecture=line.spec.architecture,
            engine_kind=EngineKind.VLLM,
            engine=EngineState.ZYGOTE,
            weight_bytes=line.spec.weight_bytes,
            source=load.way.tier,
            origin=load.way.origin,
            load_s=load.loaded_s - now_s,
            engine_s=engine_s,
            ranks=line.spec.tensor_parallel,
        )
        if load.way.tier is not Tier.DRAM and not load.way.joins_s:
            self.agenda.at(load.arrived_s, self._arrived_at, instance)
        self.agenda.at(instance.ready_s, self._ready, (instance, load))

    def _fetching(self, about: tuple[Node, Line, Fetching | None]) -> None:
        """Look at a fetch again when it should be done."""
        if about[2] is not None:
            self.agenda.at(about[2].until_s, self._fetched, about)

    def _fetched(self, about: tuple[Node, Line, Fetching]) -> None:
        node, line, fetching = about
        self._fetching((node, line, node.fetched(line, fetching, self.now_s)))

    def _arrived_at(self, instance: Instance) -> None:
        instance.node.arrived(instance.line, self.now_s)

    def _ready(self, about: tuple[Instance, Load]) -> None:
        instance, load = about
        if load.pinned:
            instance.node.loaded(instance.line)
        instance.state = InstanceState.READY
        instance.load = None
        for source in instance.takes_from:
            self._transfer(source, instance)
        instance.takes_from.clear()
        self.policy.ready(instance)
        self._refill(instance)

    def _ask_to_end(self, order: End) -> None:
        instance = order.instance
        if instance.state is not InstanceState.READY:
            return
        instance.stops += 1
        if order.only_if_idle and (instance.running or instance.kept):
            return
        self._told_to_leave(instance)
        if not instance.running and not instance.kept:
            self._stop(instance)

    def _told_to_leave(self, instance: Instance) -> None:
        instance.leaving = True
        instance.stop_asked_s = self.now_s
        self.idle.pop(instance.instance_id, None)
        self.policy.changed(instance)

    def _stop(self, instance: Instance) -> None:
        instance.state = InstanceState.STOPPING
        self.agenda.at(self.now_s + self.physics.stop_s, self._gone, instance)
        self.policy.changed(instance)

    def _gone(self, instance: Instance) -> None:
        instance.state = InstanceState.STOPPED
        instance.node.release(instance)
        del instance.line.instances[instance.instance_id]
        self.policy.gone(instance)
        line = instance.then
        if line is not None:
            line.coming -= 1
            if line.waiting:
                self._begin(Begin(line=line, node=instance.node.name, devices=instance.devices))
        self.ask()

    def _evict(self, instance: Instance) -> None:
        """At once: what it has in hand waits again, before all others."""
        assert instance.state is InstanceState.READY, "only what is ready can be evicted"
        self._told_to_leave(instance)
        for request in sorted(instance.running.values(), key=lambda r: -r.number):
            request.halt(self.now_s)
            self._leave(instance, request)
            request.preempted += 1
            self.meter.preemptions += 1
            self._wait(request, first=True)
        instance.state = InstanceState.STOPPED
        instance.node.release(instance)
        del instance.line.instances[instance.instance_id]
        self.policy.gone(instance)

    # Migration

    def _move(self, order: Move) -> None:
        source = order.instance
        if source.leaving or source.state is not InstanceState.READY:
            return
        self._told_to_leave(source)
        if order.then is not None:
            source.then = order.then
            order.then.coming += 1
        if order.to is not None:
            self._transfer(source, order.to)
        else:
            begun = self._begin(Begin(line=source.line, node=order.node, devices=order.devices))
            begun.takes_from.append(source)
        if not source.running:
            self._stop(source)

    def _transfer(self, source: Instance, to: Instance) -> None:
        """Send the tokens of all requests, one after the other; the source goes on meanwhile."""
        at_s = self.now_s
        for request in sorted(source.running.values(), key=lambda r: r.number):
            if to.room <= 0:
                return  # who finds no slot finishes where it is
            tokens = request.prompt_tokens + request.tokens_at(self.now_s)
            at_s += to.prefill_s(tokens)
            to.kept += 1
            self.idle.pop(to.instance_id, None)
            self.agenda.at(at_s, self._moved, (request, source, to, tokens, self.now_s))
        self.policy.changed(to)

    def _moved(self, about: tuple[Request, Instance, Instance, int, float]) -> None:
        """The destination has the KV cache of all tokens but those made meanwhile, and goes on after a pause."""
        request, source, to, tokens, since_s = about
        to.kept -= 1
        if request.instance is not source or request.tokens_at(self.now_s) >= request.output_tokens:
            self._refill(to)  # it finished, or is about to
            return
        if self.now_s <= request.decodes_s:  # not even prefilled: there is nothing to hand over yet
            missing = request.prompt_tokens + request.generated
        else:
            missing = request.prompt_tokens + request.tokens_at(self.now_s) - tokens
        request.halt(self.now_s)
        self._leave(source, request)
        pause_s = self.physics.handoff_s
        request.waited_s += pause_s + to.prefill_s(missing)
        self._work(to, request, pause_s=pause_s, missing_tokens=missing)
        self.meter.migrations += 1
        self.policy.moved(to.node.name, tokens, self.now_s + pause_s - since_s)
        self._refill(source)

    # The end

    def _result(self) -> Measured:
        assert not self.waiting, "somebody still waits"
        assert len(self.meter.startup_s) == self._arrived, "a request was lost"
        until_s = self.now_s
        seats = [seat for node in self.nodes.values() for seat in node.seats]
        busy_s = sum(seat.busy_s for seat in seats)
        return self.meter.result(busy_s=busy_s, devices=len(seats), until_s=until_s)
