"""Single things that happened to simulated storage agents, told step by step."""

import pytest

from stoker_contracts.control import PrefetchModel
from stoker_contracts.models import Tier
from stoker_sim.quiet import quiet
from stoker_sim.store.instance import Instance
from stoker_sim.store.node import Shape
from stoker_sim.store.world import World

ROOMY = 1_000_000


@pytest.fixture(autouse=True)
def _no_logs() -> None:
    quiet()


def world_of(*pools: int, fetches_at_once: int = 4) -> World:
    world = World(1, [Shape(chunks, ROOMY, 2 * ROOMY, fetches_at_once, 30.0, 0) for chunks in pools])
    world.run_for(1.0)
    return world


def deploy(world: World, shards: int) -> str:
    """Of exactly so many shards: makes models until one is."""
    while True:
        contents = world.library.make(shards)
        if len(contents.shards) == shards:
            world.run(world.registry.deploy(contents))
            return contents.model_id


def start(world: World, model_id: str, node: int = 0, *, within_s: float = 60.0) -> Instance:
    instance = world.lease(world.nodes[node], model_id)
    world.run_until(lambda: instance.outcome is not None, within_s, "the instance ends")
    assert instance.outcome == ""
    return instance


def test_a_model_that_many_ask_for_at_once_is_fetched_once() -> None:
    world = world_of(6)
    model_id = deploy(world, 5)
    instances = [world.lease(world.nodes[0], model_id) for _ in range(6)]
    world.run_for(60.0)
    assert [instance.outcome for instance in instances] == [""] * 6
    assert world.source.read_bytes["n0", model_id] == world.library.by_id[model_id].spec.weight_bytes
    world.close()


def test_of_nodes_that_want_a_model_at_once_most_take_it_from_one_another() -> None:
    world = world_of(6, 6, 6)
    model_id = deploy(world, 5)
    start(world, model_id, 0)
    instances = [world.lease(node, model_id) for node in world.nodes]
    world.run_for(60.0)
    assert [instance.outcome for instance in instances] == [""] * 3
    assert {node for node, _ in world.source.read_bytes} == {"n0"}
    world.close()


@pytest.mark.parametrize("position", range(5))
def test_a_chunk_that_rotted_is_fetched_anew_also_for_a_window_that_other_chunks_are_waiting_for(position: int) -> None:
    world = world_of(4, fetches_at_once=1)
    model_id = deploy(world, 6)
    start(world, model_id)
    [node] = world.nodes
    world.run_for(5.0)
    digests = world.agents["n0"].ssd.ledger.shelf(model_id).digests  # type: ignore[union-attr]
    del node.disk.chunks[digests[5]]
    world.agents["n0"].ssd.ledger.lose(digests[5])
    node.disk.chunks[digests[position]] = b"\0" * len(node.disk.chunks[digests[position]])
    start(world, model_id)
    world.close()


def test_an_instance_that_outlives_an_agent_which_stops_in_order_is_known_to_the_next_one() -> None:
    world = world_of(4)
    first, second, third = deploy(world, 3), deploy(world, 4), deploy(world, 1)
    [node] = world.nodes
    slow = world.lease(node, first)
    slow.lingers_s = 25.0
    world.run_for(5.0)
    world.source.away = True
    cut = world.lease(node, third)  # is still on its way when the agent stops
    world.run_for(0.5)
    world.stop(node)
    world.run_until(lambda: node.agent is None, 20.0, "the agent stops")
    world.source.away = False
    world.start(node)
    world.run_for(1.0)
    other = world.lease(node, second)
    world.run_for(10.0)
    assert (slow.outcome, cut.outcome, other.outcome) == (None, "load_cancelled", None)
    world.run_for(60.0)
    assert (slow.outcome, other.outcome) == ("", "")
    world.close()


def test_what_was_prefetched_to_the_disk_is_not_fetched_again() -> None:
    world = world_of(6)
    model_id = deploy(world, 3)
    world.prefetch(world.nodes[0], PrefetchModel(model_id=model_id, tier=Tier.SSD, term=1))
    world.run_for(10.0)
    fetched = world.source.read_bytes["n0", model_id]
    start(world, model_id)
    assert world.source.read_bytes["n0", model_id] == fetched == world.library.by_id[model_id].spec.weight_bytes
    world.close()
