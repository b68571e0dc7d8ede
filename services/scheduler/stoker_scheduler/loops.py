"""What a leader does again and again: ping its lock, tell its term, read models, decide, reconcile."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from stoker_bus.events import EventPublisher
from stoker_bus.port import Bus, Subscription, ask
from stoker_contracts import subjects
from stoker_contracts.control import AnnounceTerm, Failed, TermReply
from stoker_contracts.events import NODE_QUARANTINED, NODE_SILENT
from stoker_contracts.models import InstanceState
from stoker_core.clock import Clock
from stoker_core.errors import BusError, InvalidMessage, LeadershipLost, StaleTerm
from stoker_core.ids import Ids
from stoker_core.logging import get_logger
from stoker_core.runner import Part, every
from stoker_db.ports import Database, InstanceRow, Leadership
from stoker_policy import Command, Migrate, Prepare, Reject, Start, Stop, decide
from stoker_scheduler.drain import Drains
from stoker_scheduler.explain import Explanations
from stoker_scheduler.handlers import Handlers, Wakes
from stoker_scheduler.order_kinds import PrepareOrder, StartOrder, StopOrder
from stoker_scheduler.orders import Orders
from stoker_scheduler.prefetch import Prefetches
from stoker_scheduler.reconcile import reconcile
from stoker_scheduler.records import Tracked
from stoker_scheduler.settings import SchedulerSettings
from stoker_scheduler.silence import Silence
from stoker_scheduler.state import State
from stoker_scheduler.view import Mirror

log = get_logger("leader")

ANNOUNCE_TIMEOUT_S = 1.0
PRUNE_S = 600.0
DRAIN_INTERVAL_S = 0.25
EXPLAIN_INTERVAL_S = 1.0
ANNOUNCEMENTS_AT_ONCE = 16


class Leader:
    """The scheduler while it leads `term`. Every loop is one method, so that tests call them one by one."""

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        term: int,
        leader_id: str,
        bus: Bus,
        database: Database,
        leadership: Leadership,
        events: EventPublisher,
        clock: Clock,
        ids: Ids,
    ) -> None:
        self._settings, self._leader_id = settings, leader_id
        self._bus, self._database, self._leadership = bus, database, leadership
        self._events, self._clock, self._ids = events, clock, ids
        self.wakes = Wakes()
        self.state = State(term=term, led_s=clock.monotonic_s())
        self.mirror = Mirror(self.state, prepare_again_s=settings.prepare_again_s)
        self.handlers = Handlers(self.state, clock, self.wakes)
        self._silence = Silence(
            limit_s=settings.silence_limit_s,
            majority_limit_s=settings.majority_silence_limit_s,
            led_s=clock.monotonic_s(),
        )
        self._announcing = asyncio.Semaphore(ANNOUNCEMENTS_AT_ONCE)
        self._rejected: dict[str, str] = {}
        self._majority_silent = False
        self._absurd: set[str] = set()
        self._closing = False
        self._linked_s = clock.monotonic_s()
        self._subscriptions: list[Subscription] = []
        self.orders = Orders(
            self.state,
            bus,
            database.instances,
            events,
            clock,
            self.wakes.reconcile,
            at_once=settings.commands_at_once,
            timeout_s=settings.command_timeout_s,
            start_budget_s=settings.start_budget_s,
        )
        self.prefetches = Prefetches(
            self.state, self.orders, clock, self.refresh_models, live_s=settings.silence_limit_s
        )

        self.drains = Drains(
            self.state, database.nodes, self.orders, events, clock, stop=self._stop, wake=self.wakes.drain
        )
        self.explanations = Explanations(database.decisions, events, clock, ids, term=term, wake=self.wakes.explain)

    async def begin(self) -> None:
        """Read what Postgres knows, then listen. Raises DatabaseUnavailable, Disconnected."""
        models = await self._database.models.all()
        nodes = await self._database.nodes.all()
        rows = await self._database.instances.live()
        self.state.load(models, nodes, rows)
        await self.drains.begin()
        self._subscriptions = await self.handlers.subscribe(self._bus)
        self._subscriptions.append(await self.prefetches.subscribe(self._bus))
        self._subscriptions.append(await self.drains.subscribe(self._bus))
        log.info("leading", term=self.state.term, models=len(models), nodes=len(nodes), instances=len(rows))

    async def end(self) -> None:
        """Listen no more."""
        for subscription in self._subscriptions:
            await subscription.stop()

    def parts(self) -> list[Part]:
        s, clock, wakes = self._settings, self._clock, self.wakes
        return [
            Part("orders", self.orders.run, stop_intake=self._close, drain=self.orders.drain),
            Part("authority", lambda: every(s.check_interval_s, self.check, clock, name="authority")),
            Part(
                "announce",
                lambda: every(s.announce_interval_s, self.announce, clock, name="announce", wake=wakes.announce),
            ),
            Part(
                "models",
                lambda: every(s.models_interval_s, self.refresh_models, clock, name="models", wake=wakes.models),
            ),
            Part(
                "reconcile",
                lambda: every(s.reconcile_interval_s, self.reconcile, clock, name="reconcile", wake=wakes.reconcile),
            ),
            Part("drain", lambda: every(DRAIN_INTERVAL_S, self.drains.turn, clock, name="drain", wake=wakes.drain)),
            Part(
                "explain",
                lambda: every(EXPLAIN_INTERVAL_S, self.explanations.write, clock, name="explain", wake=wakes.explain),
                drain=self.explanations.drain,
            ),
            Part("prune", lambda: every(PRUNE_S, self.prune, clock, name="prune")),
            Part("decide", lambda: every(s.decide_interval_s, self.decide, clock, name="decide", wake=wakes.decide)),
        ]

    async def check(self) -> None:
        """Raises LeadershipLost when the lock is gone, a worker has seen a higher term, or the bus is away for too long."""
        now_s = self._clock.monotonic_s()
        if self._bus.connected:
            self._linked_s = now_s
        if now_s - self._linked_s > self._settings.link_limit_s:
            raise LeadershipLost(f"no link to the message bus for {self._settings.link_limit_s:g} s")
        if self.state.superseded_by is not None:
            raise LeadershipLost(f"term {self.state.term} is superseded by {self.state.superseded_by}")
        await self._leadership.check()

    async def prune(self) -> None:
        """Forget instances that ended long ago, and decisions as old."""
        keep_s = self._settings.history_s
        instances = await self._database.instances.prune(keep_s=keep_s)
        decisions = await self._database.decisions.prune(keep_s=keep_s)
        if instances or decisions:
            log.info("pruned", instances=instances, decisions=decisions)

    async def announce(self) -> None:
        """Tell the term to nodes that have not answered it. Raises a group of StaleTerm, BusLost."""
        async with asyncio.TaskGroup() as group:
            for node in self.state.unannounced():
                group.create_task(self._announce(node))

    async def refresh_models(self) -> None:
        if self.state.set_models(await self._database.models.all()):
            self.wakes.decide.set()

    async def reconcile(self) -> None:
        if await reconcile(self.state, self._database.instances, self._became):
            self.wakes.decide.set()

    async def decide(self) -> None:
        """One decision: its reservations hold from here on, its commands are carried out beside."""
        if self._closing or self.state.superseded_by is not None:
            return
        now_s = self._clock.monotonic_s()
        self.state.expire(now_s)
        self._watch(now_s)
        decided = decide(self.mirror.refresh(now_s))
        for stop in decided.stops:
            self._give(stop, now_s)
        rejected: dict[str, str] = {}
        for decision in decided.placements:
            instance_id = ""
            for command in decision.commands:
                if isinstance(command, Reject):
                    rejected[command.model_id] = command.reason
                instance_id = self._give(command, now_s) or instance_id
            self.explanations.decided(decision, self.state.models[decision.model_id].name, instance_id=instance_id)
        for prepare in decided.prepares:
            self._give(prepare, now_s)
        self._rejected = rejected

    def _give(self, command: Command, now_s: float) -> str:
        """Have a command carried out. Returns the id of the instance that it starts, else ''."""
        if self.orders.full:
            log.warning("orders_full")
            return ""
        match command:
            case Start():
                return self._start(command, now_s)
            case Stop():
                self._stop(command, now_s)
            case Prepare():
                self._prepare(command, now_s)
            case Reject(model_id=model_id, reason=reason) if self._rejected.get(model_id) != reason:
                log.warning("demand_rejected", model_id=model_id, reason=reason)
            case Migrate():
                raise AssertionError("nothing is moved unless the cluster says so")
        return ""

    def _close(self) -> None:
        self._closing = self.prefetches.closing = self.drains.closing = True

    def _became(self, tracked: Tracked, before: InstanceState) -> None:
        self.explanations.became(tracked, before, self.state.nodes.get(tracked.row.node))

    def _start(self, command: Start, now_s: float) -> str:
        state = self.state
        row = InstanceRow(
            instance_id=self._ids.new("i"),
            model_id=command.model_id,
            node=command.node,
            boot_id=state.nodes[command.node].boot_id,
            devices=command.devices,
            desired=InstanceState.READY,
            actual=InstanceState.STARTING,
            term=state.term,
            reason=command.reason,
        )
        demanded_s = state.demands.first_seen_s(command.model_id)
        model = state.models[command.model_id]
        state.reserve(
            row,
            now_s + self._settings.start_budget_s,
            decided_s=now_s,
            load=command.load,
            engine=self.mirror.engine_state(command.node, model),
        )
        self.orders.give(StartOrder(row, model, now_s, now_s if demanded_s is None else demanded_s))
        log.info(
            "decided",
            command="start",
            instance=row.instance_id,
            model_id=row.model_id,
            node=row.node,
            devices=row.devices,
            reason=row.reason,
        )
        return row.instance_id

    def _stop(self, command: Stop, now_s: float) -> None:
        tracked = self.state.instances[command.instance_id]
        # What was found on a node is adopted before it is commanded, so that no two writes of its row cross.
        if not tracked.written or self.orders.in_hand(command.instance_id):
            return
        self.state.stop_asked(command.instance_id, now_s)
        row = tracked.row
        wanted = replace(row, desired=InstanceState.STOPPED, term=self.state.term, reason=command.reason)
        self.orders.give(StopOrder(wanted, command.only_if_idle))
        log.info(
            "decided",
            command="stop",
            instance=row.instance_id,
            model_id=row.model_id,
            node=row.node,
            reason=command.reason,
        )

    def _prepare(self, command: Prepare, now_s: float) -> None:
        node = self.state.nodes[command.node]
        self.state.prepare_asked(node.name, command.architecture, now_s)
        self.orders.give(PrepareOrder(node.name, node.boot_id, self.state.models[command.model_id]))
        log.info("decided", command="prepare", node=node.name, architecture=command.architecture)

    def _watch(self, now_s: float) -> None:
        """Notice nodes that fell silent, and such that report nonsense."""
        nodes = self.state.nodes.values()
        bus = self._bus
        for node in self._silence.check(nodes, now_s, connected=bus.connected, reconnects=bus.reconnects):
            self.state.fell_silent(node.name)
            log.warning("node_silent", node=node.name, boot_id=node.boot_id)
            self._events.emit(NODE_SILENT, node.name, boot_id=node.boot_id, limit_s=self._settings.silence_limit_s)
        absurd = {node.name: node.absurd for node in nodes if node.absurd}
        for name in sorted(absurd.keys() - self._absurd):
            log.warning("node_quarantined", node=name, reason=absurd[name])
            self._events.emit(NODE_QUARANTINED, name, reason=absurd[name])
        self._absurd = set(absurd)
        if self._silence.majority != self._majority_silent:
            self._majority_silent = self._silence.majority
            log.warning("majority_silent" if self._majority_silent else "majority_speaks", nodes=len(nodes))

    async def _announce(self, node: str) -> None:
        async with self._announcing:
            message = AnnounceTerm(term=self.state.term, leader_id=self._leader_id)
            try:
                reply: TermReply = await ask(
                    self._bus, subjects.worker_term(node), message, TermReply, timeout_s=ANNOUNCE_TIMEOUT_S
                )
            except BusError as error:
                if not error.retryable:
                    raise
                log.debug("term_unanswered", node=node, code=error.code)
                return
            except InvalidMessage as error:
                log.warning("term_misunderstood", node=node, reason=error.message)
                return
        if not isinstance(reply, Failed):
            self.handlers.heard(reply)
        elif reply.code == StaleTerm.code:
            raise StaleTerm(self.state.term)
        else:
            log.warning("term_refused", node=node, code=reply.code, reason=reply.message)
