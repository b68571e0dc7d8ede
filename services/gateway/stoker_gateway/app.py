"""Composition root of the gateway."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from stoker_bus.events import EventPublisher
from stoker_bus.nats import NatsBus
from stoker_bus.port import Bus, Message
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import SILENCE_LIMIT_S, StoreStatus, WorkerStatus
from stoker_contracts.inference import ACK_INTERVAL_S
from stoker_core.clock import Clock, SystemClock
from stoker_core.ids import Ids, RandomIds
from stoker_core.runner import Part, every, run_parts
from stoker_db.pg import PgDatabase
from stoker_db.ports import Database
from stoker_gateway.accuracy import Accuracies
from stoker_gateway.catalogue import Catalogue
from stoker_gateway.demand import DemandBook
from stoker_gateway.generation import Generations
from stoker_gateway.intake import Intake
from stoker_gateway.link import Link
from stoker_gateway.metrics import Metrics
from stoker_gateway.newest import Newest
from stoker_gateway.placing import Placing
from stoker_gateway.prepare import Preparer
from stoker_gateway.queues import Dispatcher, Queues
from stoker_gateway.routes import Routes
from stoker_gateway.salt import cache_salt
from stoker_gateway.settings import GatewaySettings
from stoker_gateway.streams import Streams
from stoker_gateway.texts import TokenizerCache
from stoker_gateway.web.admin import AdminRoutes
from stoker_gateway.web.decisions import DecisionRoutes
from stoker_gateway.web.drain import DrainRoutes
from stoker_gateway.web.middleware import add_headers, observing
from stoker_gateway.web.probes import ProbeRoutes
from stoker_gateway.web.server import HttpServer
from stoker_gateway.web.v1 import OpenAiRoutes

TENANT = "default"


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Connect, serve, and drain once `stop` is set."""
    clock, ids = SystemClock(), RandomIds()
    gateway_id = ids.new("gw")
    bus = await NatsBus.connect(settings.nats_url, name=f"gateway {gateway_id}")
    try:
        database = await PgDatabase.connect(settings.postgres_url)
        try:
            gateway = Gateway(settings, bus, database, clock, ids, gateway_id=gateway_id)
            await gateway.start()
            try:
                await run_parts(gateway.parts(), stop, drain_s=settings.drain_s)
            finally:
                gateway.close()
        finally:
            await database.close()
    finally:
        await bus.close()


class Gateway:
    """One gateway's parts, wired. `start`, run `parts`, `close`."""

    def __init__(
        self, settings: GatewaySettings, bus: Bus, database: Database, clock: Clock, ids: Ids, *, gateway_id: str
    ) -> None:
        self._settings, self._bus, self._clock = settings, bus, clock
        self._gateway_id = gateway_id
        self._metrics = Metrics()
        self._routes = Routes()
        self._stores: Newest[StoreStatus] = Newest()
        self._dispatcher = Dispatcher(Queues(), self._routes)
        self._streams = Streams(bus, gateway_id, self._dispatcher, clock)
        self._link = Link(bus, clock)
        self._demand = DemandBook(gateway_id, self._dispatcher.queues, _jitter)
        self._events = EventPublisher(bus, service="gateway", name=gateway_id, boot_id=gateway_id, clock=clock, ids=ids)
        home = settings.home / "gateways" / (str(settings.port) if settings.port else gateway_id)
        self._texts = TokenizerCache(database.models, home / "models", models_max=settings.tokenizers_max)
        self._catalogue = Catalogue(database.models, self._texts, self._dispatcher)
        self._intake = Intake(settings.streams_max)
        self._threads = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenize")
        self._placing = Placing(
            bus,
            gateway_id,
            self._dispatcher,
            self._streams,
            clock,
            cache_salt=cache_salt(settings.cluster_secret, TENANT),
            generate_timeout_s=settings.generate_timeout_s,
            stream_buffer_tokens_max=settings.stream_buffer_tokens_max,
            on_cold=lambda model: self._metrics.cold_starts.labels(model).inc(),
        )
        self._server = HttpServer(self._http(database, ids), settings.host, settings.port)

    @property
    def port(self) -> int:
        return self._server.port

    async def start(self) -> None:
        """Subscribe and listen. Raises PortTaken, BusError."""
        await self._texts.start()
        await self._bus.subscribe(subjects.STATUS_WORKER_ALL, self._on_worker)
        await self._bus.subscribe(subjects.STATUS_STORE_ALL, self._on_store)
        await self._bus.subscribe(subjects.gateway_frames(self._gateway_id), self._streams.on_frames, pending_max=65536)
        await self._server.start()

    def parts(self) -> list[Part]:
        async def models() -> None:
            await every(self._settings.model_refresh_s, self._catalogue.refresh, self._clock, name="models")

        async def acks() -> None:
            await every(ACK_INTERVAL_S, self._streams.ack, self._clock, name="acks")

        async def silence() -> None:
            await every(ACK_INTERVAL_S, self._judge, self._clock, name="silence")

        return [
            Part("http", self._server.run, stop_intake=self._intake.stop, drain=self._intake.drained),
            Part("models", models),
            Part("preload", self._catalogue.preload),
            Part("acks", acks),
            Part("silence", silence),
            Part("demand", lambda: self._placing.tell_demand(self._demand)),
            self._events.part(),
        ]

    def close(self) -> None:
        self._texts.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _http(self, database: Database, ids: Ids) -> web.Application:
        app = web.Application(
            client_max_size=self._settings.body_bytes_max,
            middlewares=[observing(self._clock, ids, self._metrics)],
        )
        app.on_response_prepare.append(add_headers)
        v1 = OpenAiRoutes(
            catalogue=self._catalogue,
            preparer=Preparer(self._texts, self._threads),
            generations=Generations(self._placing, self._streams),
            intake=self._intake,
            clock=self._clock,
            client_stall_s=self._settings.client_stall_s,
        )
        admin = AdminRoutes(
            bus=self._bus,
            database=database,
            catalogue=self._catalogue,
            live=self._routes,
            stores=self._stores,
            events=self._events,
            register_timeout_s=self._settings.register_timeout_s,
        )
        drain = DrainRoutes(self._bus, database, self._routes)
        decisions = DecisionRoutes(database.decisions, self._catalogue)
        probes = ProbeRoutes(
            self._bus,
            self._catalogue,
            self._intake,
            self._dispatcher.queues,
            self._metrics,
            Accuracies(database.decisions, self._clock),
        )
        for part in (v1, admin, drain, decisions, probes):
            app.add_routes(part.routes())
        return app

    async def _on_worker(self, message: Message) -> None:
        status: WorkerStatus = decode(WorkerStatus, message.data)
        change = self._routes.on_status(status, self._clock.monotonic_s())
        for instance_id, why in change.lost.items():
            self._streams.lose(instance_id, why)
        for model_id in change.models:
            self._dispatcher.wake(model_id)

    async def _on_store(self, message: Message) -> None:
        self._stores.offer(decode(StoreStatus, message.data), self._clock.monotonic_s())

    async def _judge(self) -> None:
        now_s, up_since_s = self._clock.monotonic_s(), self._link.up_since_s()
        self._streams.judge(self._link)
        self._dispatcher.reopen(now_s)
        self._routes.drop_silent(now_s, link_up_since_s=up_since_s)
        self._stores.drop_silent(now_s, limit_s=SILENCE_LIMIT_S, link_up_since_s=up_since_s)


def _jitter() -> float:
    return int.from_bytes(os.urandom(2), "big") / 0x10000
