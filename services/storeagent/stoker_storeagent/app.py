"""The composition root: the one place where the storage agent's concrete parts are chosen."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack

from stoker_bus.events import EventPublisher
from stoker_bus.nats import NatsBus
from stoker_bus.port import Bus
from stoker_contracts.control import STATUS_INTERVAL_S
from stoker_core.clock import Clock, SystemClock
from stoker_core.ids import Ids, RandomIds, jitter
from stoker_core.runner import Part, every, run_parts
from stoker_core.unix import close
from stoker_db.pg import PgDatabase
from stoker_db.ports import Database, LoadObservation
from stoker_storeagent.adapters.catalogue import DatabaseCatalogue
from stoker_storeagent.adapters.digests import DigestThreads
from stoker_storeagent.adapters.memory import PoolMemory
from stoker_storeagent.adapters.pool import OpenPool, open_pool, pool_part
from stoker_storeagent.adapters.ssd import SsdDirectory
from stoker_storeagent.adoption import Adoption, Notes
from stoker_storeagent.giving import Giving
from stoker_storeagent.handlers import Handlers
from stoker_storeagent.keep import PoolKeep
from stoker_storeagent.known import Known
from stoker_storeagent.leases import LeaseServer, listen
from stoker_storeagent.loops import FLUSH_S, PRUNE_S, RECONCILE_S, Keeper, Reporter
from stoker_storeagent.origins import OriginFinder
from stoker_storeagent.orphans import Orphans
from stoker_storeagent.peers.client import PeerClient
from stoker_storeagent.peers.none import NoPeers
from stoker_storeagent.peers.server import PeerServer
from stoker_storeagent.pool_tier import PoolTier
from stoker_storeagent.ports import Events, Peers
from stoker_storeagent.prefetch import Prefetcher
from stoker_storeagent.register import Registrar
from stoker_storeagent.rings import Rings
from stoker_storeagent.scrub import Scrub
from stoker_storeagent.settings import StoreagentSettings
from stoker_storeagent.sources import Sources
from stoker_storeagent.sources.capped import Capped
from stoker_storeagent.sources.directory import DirectorySource
from stoker_storeagent.sources.s3 import S3Settings, S3Source
from stoker_storeagent.ssd_tier import SsdTier
from stoker_storeagent.throttle import Throttle
from stoker_storeagent.tiers import NodeTiers

POSTGRES_POOL = 4
KEEPER_S = 5.0
"""How long a start waits for a worker that is there and does not say what it keeps."""


async def serve(settings: StoreagentSettings, stop: asyncio.Event) -> None:
    """Run until `stop`. Raises InvalidSettings, NativeUnavailable, Disconnected, StorageFailed."""
    clock, ids = SystemClock(), RandomIds()
    bus = await NatsBus.connect(settings.nats_url, name=f"storeagent {settings.node}")
    # Not awaited: what is on the SSD is leased whether or not the database is there.
    database = PgDatabase(settings.postgres_url, pool_size=POSTGRES_POOL)
    try:
        # First, because it shows whether this node has a storage agent already: then nothing of it may be touched.
        listener = listen(settings.socket_path)
        boot_id = ids.new("boot")
        keep = PoolKeep(settings.keeper_path, boot_id=boot_id, clock=clock, jitter=jitter)
        try:
            opened = await open_pool(settings, keep, timeout_s=KEEPER_S)
        except BaseException:
            keep.close()
            close(listener)
            raise
        try:
            async with AsyncExitStack() as stack:
                parts = await assemble(settings, listener, bus, database, opened, keep, clock, ids, boot_id, stack)
                await run_parts(parts, stop, drain_s=settings.drain_s)
        finally:  # the last: by now nothing reads into it any more
            await asyncio.to_thread(opened.close)
    finally:
        await bus.close()
        await database.close()


async def assemble(
    settings: StoreagentSettings,
    listener: socket.socket,
    bus: Bus,
    database: Database,
    opened: OpenPool,
    keep: PoolKeep,
    clock: Clock,
    ids: Ids,
    boot_id: str,
    stack: AsyncExitStack,
) -> Sequence[Part]:
    """Open the tiers and return what runs; it closes the listener, as does a failure here.

    stack: gets what has to be closed after that.
    Raises InvalidSettings, StorageFailed, PortTaken.
    """
    node, pool = settings.node, opened.pool
    report_now, reconcile_now, flush_now = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def held_changed() -> None:
        report_now.set()
        reconcile_now.set()

    try:
        events = EventPublisher(bus, service="storeagent", name=node, boot_id=boot_id, clock=clock, ids=ids)
        limit_in, limit_out = (Throttle(settings.network_bytes_per_s, clock) for _ in range(2))
        sources = _sources(settings, limit_in, stack)
        disk = SsdDirectory(settings.ssd_path, ids, threads=settings.ssd_threads)
        stack.push_async_callback(asyncio.to_thread, disk.close)
        digests = DigestThreads()
        stack.push_async_callback(asyncio.to_thread, digests.close)
        known = Known(DatabaseCatalogue(database, sources), disk)
        peers = _peers(settings, bus, database, events, limit_in, clock)
        ssd = SsdTier(
            disk,
            known,
            OriginFinder(node, sources.of, peers, clock, jitter),
            events,
            clock,
            digests.of,
            capacity_bytes=settings.ssd_capacity_bytes,
            fetches_at_once=settings.fetches_at_once,
            changed=held_changed,
        )
        memory, notes = PoolMemory(pool), Notes(opened.table, pool.native.chunks_total)
        dram = PoolTier(memory, ssd, events, clock, wait_s=settings.pool_wait_s, changed=held_changed, noted=notes.note)
        tiers = NodeTiers(dram, ssd, Rings(pool, settings.ring_slots), clock)
        await ssd.open()
        orphans = Orphans(opened.records, opened.loading)
        adoption = Adoption(dram, memory, disk, known, clock)
        adoption.adopt(opened.records, orphans)
        notes.of(dram, adoption)
        notes.note()
        giving = Giving(dram, disk, ssd.ledger, node=node)
        server = _server(settings, giving, limit_out, clock)
    except BaseException:
        close(listener)
        raise
    keeper = Keeper(database, tiers, node=node, keep_s=settings.metric_keep_s)
    reporter = Reporter(bus, tiers, node=node, boot_id=boot_id, address=lambda: server.address if server else "")
    prefetcher = Prefetcher(tiers, events, clock)

    def observed(observation: LoadObservation) -> None:
        keeper.observe(observation)
        flush_now.set()

    leases = LeaseServer(
        tiers,
        listener,
        node=node,
        leases_max=settings.leases_max,
        observe=observed,
        changed=report_now.set,
    )
    registrar = Registrar(database.models, sources, events, ids)
    handlers = Handlers(bus, registrar, prefetcher, tiers, giving, node=node)

    async def answer_orders() -> None:
        async with AsyncExitStack() as subscriptions:
            await handlers.subscribed(subscriptions)
            await asyncio.Event().wait()

    return [
        events.part(),
        dram.part(),
        *([peers.part()] if isinstance(peers, PeerClient) else []),
        *([server.part()] if server else []),
        prefetcher.part(),
        pool_part(pool, settings.ssd_path, probe=settings.reader == "auto"),
        keep.part((pool.native.fileno(), opened.table.fileno()), orphans, adoption.released),
        Scrub(ssd.ledger, disk, events, Throttle(settings.scrub_bytes_per_s, clock), clock).part(),
        leases.part(),
        Part("orders", answer_orders),
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


def _sources(settings: StoreagentSettings, limit: Throttle, stack: AsyncExitStack) -> Sources:
    s3 = S3Source(
        S3Settings(
            endpoint_url=settings.s3_endpoint_url,
            region=settings.s3_region,
            anonymous=settings.s3_anonymous,
            connections=settings.fetches_at_once * 2,
        )
    )
    stack.push_async_callback(s3.close)
    directories = DirectorySource(settings.allowed_root_paths)
    return Sources({"file": Capped(directories, limit), "s3": Capped(s3, limit)})


def _peers(
    settings: StoreagentSettings, bus: Bus, database: Database, events: Events, limit: Throttle, clock: Clock
) -> Peers:
    if not settings.cluster_token:
        return NoPeers()

    async def placements(model_id: str) -> list[str]:
        return sorted({placement.node for placement in await database.tiers.placements(model_id)})

    return PeerClient(
        bus, placements, events, node=settings.node, token=settings.cluster_token, throttle=limit, clock=clock
    )


def _server(settings: StoreagentSettings, giving: Giving, limit: Throttle, clock: Clock) -> PeerServer | None:
    """Listening, so that its address is known. Without a token nobody is served."""
    if not settings.cluster_token:
        return None
    server = PeerServer(
        giving,
        node=settings.node,
        token=settings.cluster_token,
        host=settings.peer_host,
        port=settings.peer_port,
        advertise=settings.peer_advertise,
        throttle=limit,
        clock=clock,
        connections_max=settings.peers_max,
    )
    server.listen()
    giving.address, giving.serving = server.address, lambda: server.serving
    return server
