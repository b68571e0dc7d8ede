"""The composition root: the one place where the storage agent's concrete parts are chosen."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from stoker_bus.events import EventPublisher
from stoker_bus.nats import NatsBus
from stoker_bus.port import Bus
from stoker_checkpoint.pool import Pool
from stoker_contracts import subjects
from stoker_contracts.control import STATUS_INTERVAL_S
from stoker_core.clock import Clock, SystemClock
from stoker_core.ids import Ids, RandomIds
from stoker_core.runner import Part, every, run_parts
from stoker_db.pg import PgDatabase
from stoker_db.ports import Database, LoadObservation
from stoker_storeagent.adapters.catalogue import DatabaseCatalogue
from stoker_storeagent.adapters.pool import open_pool, pool_part
from stoker_storeagent.adapters.ssd import SsdDirectory
from stoker_storeagent.dram import DramTier
from stoker_storeagent.filler import Filler
from stoker_storeagent.handlers import Handlers
from stoker_storeagent.leases import LeaseServer, close, listen
from stoker_storeagent.loops import FLUSH_S, PRUNE_S, RECONCILE_S, Keeper, Reporter
from stoker_storeagent.plans import Plans
from stoker_storeagent.register import Registrar
from stoker_storeagent.rings import Rings
from stoker_storeagent.settings import StoreagentSettings
from stoker_storeagent.sources import Sources
from stoker_storeagent.tier import SsdTier

REGISTER_CONCURRENCY = 2
POSTGRES_POOL = 4


async def serve(settings: StoreagentSettings, stop: asyncio.Event) -> None:
    """Run until `stop`. Raises InvalidSettings, NativeUnavailable, Disconnected, StorageFailed."""
    bus = await NatsBus.connect(settings.nats_url, name=f"storeagent {settings.node}")
    # Not awaited: what is on the SSD is leased whether or not the database is there.
    database = PgDatabase(settings.postgres_url, pool_size=POSTGRES_POOL)
    try:
        # First, because it shows whether this node has a storage agent already: then nothing of it may be touched.
        listener = listen(settings.socket_path)
        try:
            pool = await asyncio.to_thread(open_pool, settings)
        except BaseException:
            close(listener)
            raise
        try:
            parts = await assemble(settings, listener, bus, database, pool, SystemClock(), RandomIds())
            await run_parts(parts, stop, drain_s=settings.drain_s)
        finally:  # the last: by now nothing reads into it any more
            await asyncio.to_thread(pool.close)
    finally:
        await bus.close()
        await database.close()


async def assemble(
    settings: StoreagentSettings,
    listener: socket.socket,
    bus: Bus,
    database: Database,
    pool: Pool,
    clock: Clock,
    ids: Ids,
) -> Sequence[Part]:
    """Open the tiers and return what runs; it closes the listener, as does a failure here.

    Raises InvalidSettings, StorageFailed.
    """
    node, boot_id = settings.node, ids.new("boot")
    report_now, reconcile_now, flush_now = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def held_changed() -> None:
        report_now.set()
        reconcile_now.set()

    try:
        sources, rings = Sources(settings.allowed_root_paths), Rings(pool, settings.ring_slots)
        events = EventPublisher(bus, service="storeagent", name=node, boot_id=boot_id, clock=clock, ids=ids)
        ssd = SsdDirectory(settings.ssd_path, ids)
        filler = Filler(ssd, sources, copies_at_once=settings.copies_at_once, chunk_bytes=settings.copy_chunk_bytes)
        ssd_tier = SsdTier(
            ssd,
            filler,
            DatabaseCatalogue(database),
            events,
            clock,
            capacity_bytes=settings.ssd_capacity_bytes,
            changed=held_changed,
            gone=lambda model_id: tiers.forget(model_id),
        )
        tiers = DramTier(
            pool, ssd_tier, Plans(ssd), rings, events, clock, wait_s=settings.pool_wait_s, changed=held_changed
        )
        await ssd_tier.open()
    except BaseException:
        close(listener)
        raise
    keeper = Keeper(database, tiers, node=node, keep_s=settings.metric_keep_s)
    reporter = Reporter(bus, tiers, node=node, boot_id=boot_id)

    def observed(observation: LoadObservation) -> None:
        keeper.observe(observation)
        flush_now.set()

    server = LeaseServer(
        tiers,
        listener,
        node=node,
        leases_max=settings.leases_max,
        observe=observed,
        changed=report_now.set,
    )
    handlers = Handlers(bus, Registrar(database.models, sources, events, ids))

    async def answer_registrations() -> None:
        subscription = await bus.subscribe(
            subjects.store_register(node), handlers.register, concurrency=REGISTER_CONCURRENCY
        )
        try:
            await asyncio.Event().wait()
        finally:
            await subscription.stop()

    return [
        events.part(),
        ssd_tier.part(),
        tiers.part(),
        pool_part(pool, settings.ssd_path, probe=settings.reader == "auto"),
        server.part(),
        Part("register", answer_registrations),
        Part("status", lambda: every(STATUS_INTERVAL_S, reporter.report, clock, name="status", wake=report_now)),
        Part("reconcile", lambda: every(RECONCILE_S, keeper.reconcile, clock, name="reconcile", wake=reconcile_now)),
        Part(
            "observations",
            lambda: every(FLUSH_S, keeper.flush, clock, name="observations", wake=flush_now),
            drain=keeper.flush,
        ),
        Part("samples", lambda: every(settings.metric_sample_s, keeper.sample, clock, name="samples")),
        Part("prune", lambda: every(PRUNE_S, keeper.prune, clock, name="prune")),
    ]
