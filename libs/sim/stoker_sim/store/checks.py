"""What must hold of a node's tiers: at every step, and once nothing moves any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker_sim.store.flaws import Flaws

if TYPE_CHECKING:
    from stoker_sim.store.agent import Agent


def check_always(agent: Agent, flaws: Flaws) -> None:
    """Called very often: what is said of a flaw is put together only if it is one."""
    name, memory, residents, ledger = agent.node.name, agent.memory, agent.dram.residents, agent.ssd.ledger
    taken = residents.chunks_total - residents.chunks_free
    if residents.chunks_free < 0:
        flaws.add(f"{name}: residents have more chunks than the pool")
    if len(memory.allocated) > taken:
        flaws.add(f"{name}: {memory.allocated} are allocated, and {taken} accounted for")
    left = dict(agent.adoption.left())
    owned: set[int] = set()
    for resident, chunks in [
        *((resident, load.filling.chunks) for resident, load in agent.dram.loads.items()),
        *left.items(),
    ]:
        if not owned.isdisjoint(chunks):
            flaws.add(f"{name}: {resident.model_id} has one of {chunks}, and so has another")
        if not memory.allocated.issuperset(chunks):
            flaws.add(f"{name}: of {chunks}, which {resident.model_id} has, some are free")
        owned.update(chunks)
    if not agent.stop.is_set():  # one that stops closes all loads; whoever reads on is in the table
        for resident in residents.all:
            if resident.leases and resident not in agent.dram.loads and resident not in left:
                flaws.add(f"{name}: {resident.model_id} was freed while it is held")
    if ledger.used_bytes > max(ledger.capacity_bytes, agent.excess_bytes):
        flaws.add(f"{name}: the SSD tier uses {ledger.used_bytes} of {ledger.capacity_bytes} bytes")
    agent.excess_bytes = min(agent.excess_bytes, ledger.used_bytes)


def check_resting(agent: Agent, flaws: Flaws) -> None:
    """No instance starts, nothing is wanted, no fault happens: all that was taken was given back."""
    node, memory, residents, ledger = agent.node, agent.memory, agent.dram.residents, agent.ssd.ledger
    name = node.name
    taken = residents.chunks_total - residents.chunks_free
    flaws.require(len(memory.allocated) == taken, f"{name}: {len(memory.allocated)} chunks are allocated, not {taken}")
    flaws.require(not agent.adoption.left(), f"{name}: what an earlier agent left is kept for nobody")
    for resident in residents.all:
        flaws.require(not resident.leases, f"{name}: {dict(resident.holders)} hold {resident.model_id}")
        lost = memory.lost and resident not in agent.dram.loads
        flaws.require(lost or resident.complete, f"{name}: {resident.model_id} is neither complete nor on its way")
        flaws.require(not resident.busy, f"{name}: {resident.model_id} is busy")
    for shelf in list(ledger):
        flaws.require(
            not shelf.reserved_bytes, f"{name}: {shelf.reserved_bytes} bytes are reserved for {shelf.model_id}"
        )
        flaws.require(not ledger.pins(shelf.model_id), f"{name}: {shelf.model_id} is pinned")
        flaws.require(ledger.claim(shelf.model_id), f"{name}: {shelf.model_id} is claimed")
        ledger.settle(shelf.model_id)
    flaws.require(not agent.prefetcher.waiting, f"{name}: prefetches wait")
    unknown = set(node.disk.chunks) - set(ledger.chunks) - node.disk.stuck
    flaws.require(not unknown, f"{name}: chunks lie on the disk and are nobody's: {sorted(unknown)}")
    flaws.require(not node.disk.writers, f"{name}: parts are open: {sorted(node.disk.writers)}")


def check_empty(agent: Agent, flaws: Flaws) -> None:
    """Every model was deleted."""
    name, memory, disk = agent.node.name, agent.memory, agent.node.disk
    flaws.require(
        memory.allocated == memory.lost, f"{name}: {memory.allocated} are allocated and {memory.lost} are lost"
    )
    flaws.require(
        not list(agent.ssd.ledger), f"{name}: the SSD tier still has {[s.model_id for s in agent.ssd.ledger]}"
    )
    flaws.require(not agent.ssd.ledger.used_bytes, f"{name}: {agent.ssd.ledger.used_bytes} bytes of the SSD are used")
    flaws.require(not set(disk.chunks) - disk.stuck, f"{name}: chunks are left on the disk")
    flaws.require(not disk.folders, f"{name}: folders are left on the disk: {sorted(disk.folders)}")
    flaws.require(not disk.parts, f"{name}: parts are left on the disk: {sorted(disk.parts)}")
