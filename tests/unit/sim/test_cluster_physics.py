"""What simulated machines do, whoever decides."""

from __future__ import annotations

import pytest
from tests.unit.sim.clusters import DRAM_S, EXACT, GB, REMOTE_S, SSD_S, ask, profile, run, slow, world

from stoker_core.errors import InvalidWorkload
from stoker_sim.cluster.agenda import Agenda
from stoker_sim.cluster.measure import percentile
from stoker_sim.cluster.orders import Begin, End, Fetch, Move
from stoker_sim.cluster.shelves import Lane, Shelf, take
from stoker_sim.cluster.world import World


def load_s(of: World, model: str, node: str) -> float:
    """What a load decided now takes."""
    return of.nodes[node].expected_load_s(of.lines[model], of.now_s)


def start(of: World, model: str, node: str = "n-0", devices: tuple[int, ...] = (0,)) -> None:
    of.carry_out(Begin(line=of.lines[model], node=node, devices=devices))


def until(of: World, at_s: float) -> None:
    of.agenda.run_until(at_s)


# Time


def test_what_is_due_at_one_moment_happens_in_the_order_in_which_it_was_put() -> None:
    agenda, happened = Agenda(), []
    for name in ("first", "second"):
        agenda.at(1.0, happened.append, name)
    agenda.at(0.5, happened.append, "earlier")
    agenda.run_until(1.0)
    assert happened == ["earlier", "first", "second"]


def test_nothing_can_be_put_into_the_past() -> None:
    agenda = Agenda()
    agenda.run_until(2.0)
    with pytest.raises(AssertionError, match="was put for 1 s"):
        agenda.at(1.0, print, None)


# Links and tiers


def test_a_link_shared_by_two_loads_takes_twice_as_long() -> None:
    lane = Lane(1e9)
    assert take((lane,), 10e9, 1e9, 0.0) == (0.0, 10.0)
    assert take((lane,), 10e9, 1e9, 0.0) == (10.0, 20.0)


def test_two_models_from_one_ssd_come_one_after_the_other_and_two_ssds_do_not_wait_for_each_other() -> None:
    of = world("cache", profile(devices=4))
    assert load_s(of, "m-0", "n-0") == SSD_S
    start(of, "m-0", "n-0", (0,))
    start(of, "m-2", "n-0", (1,))
    start(of, "m-1", "n-1", (0,))
    until(of, 0.0)
    assert [i.ready_s for line in of.lines.values() for i in line.instances.values()] == [5.0, 5.0, 10.0]


def test_a_model_is_nearer_after_its_first_load_and_two_starts_of_it_share_one_read() -> None:
    of = world("cache", profile(devices=4))
    assert load_s(of, "m-1", "n-0") == REMOTE_S
    start(of, "m-1", "n-0", (0,))
    start(of, "m-1", "n-0", (1,))
    until(of, 0.0)
    assert {i.ready_s for i in of.lines["m-1"].instances.values()} == {10.0}
    until(of, 4.0)
    assert load_s(of, "m-1", "n-0") == pytest.approx(6.0)
    until(of, 10.0)
    assert load_s(of, "m-1", "n-0") == DRAM_S
    assert of.nodes["n-0"].holds("m-1") == (True, True)


def test_a_system_that_keeps_nothing_downloads_again() -> None:
    of = world("random")
    start(of, "m-0")
    until(of, 10.0)
    assert of.nodes["n-0"].holds("m-0") == (False, False)
    assert load_s(of, "m-0", "n-0") == REMOTE_S


def test_a_full_tier_gives_up_what_was_used_longest_ago_but_never_what_is_being_read() -> None:
    shelf = Shelf(20, eviction="lru", refetch_bytes_per_s=1.0)
    shelf.put("a", 10, 0.0)
    shelf.put("b", 10, 1.0)
    shelf.use("a", 2.0)
    assert shelf.put("c", 10, 3.0) == ("b",)
    shelf.pin("a")
    shelf.pin("c")
    assert shelf.put("d", 10, 4.0) is None
    assert "a" in shelf
    shelf.unpin("a")
    assert shelf.put("d", 10, 5.0) == ("a",)


def test_eviction_by_worth_is_that_of_the_policy() -> None:
    shelf = Shelf(30, eviction="worth", refetch_bytes_per_s=1.0)
    shelf.put("long_unused", 10, 0.0)
    shelf.put("just_used", 20, 999.0)
    assert shelf.put("new", 10, 1000.0) == ("long_unused",)


def test_a_node_whose_memory_is_full_keeps_on_its_ssd_what_it_gives_up() -> None:
    of = world("cache", profile(devices=4, dram_gb=25))
    for number, model in enumerate(("m-0", "m-2", "m-1")):
        start(of, model, "n-0", (number,))
        until(of, 30.0 * (number + 1))
    assert of.nodes["n-0"].holds("m-0") == (False, True)
    assert of.nodes["n-0"].holds("m-1") == (True, True)


def test_no_device_can_be_given_away_twice() -> None:
    of = world("cache")
    start(of, "m-0")
    with pytest.raises(AssertionError, match="over-committed"):
        start(of, "m-1")


# Requests


def test_a_request_waits_for_the_load_then_its_prompt_is_read_and_its_tokens_come() -> None:
    measured = run("serverlessllm", [ask(0.0, "m-0", prompt=100, output=11)])
    assert measured.startup_p50_s == SSD_S
    assert measured.ttft_p50_s == pytest.approx(SSD_S + 0.1)
    assert measured.simulated_s == pytest.approx(SSD_S + 0.1 + 10 * 0.1)
    assert measured.reads == {"ssd": 1}


def test_a_warm_request_waits_for_nothing() -> None:
    measured = run("serverlessllm", [ask(0.0, "m-0"), ask(20.0, "m-0")])
    assert (measured.starts, measured.startup_p50_s) == (1, 0.0)


def test_who_waits_too_long_leaves_once_and_the_others_are_served() -> None:
    arrivals = [ask(0.0, "m-0", output=2000), ask(0.0, "m-1", output=2000), ask(1.0, "m-2"), ask(150.0, "m-3")]
    measured = run("serverlessllm", arrivals, physics=slow(timeout_s=100.0))
    assert measured.requests == 4
    assert measured.within_timeout == 0.75
    assert measured.startup_p99_s == 100.0


def test_an_instance_serves_as_many_requests_at_once_as_it_has_slots() -> None:
    measured = run("serverlessllm", [ask(0.0, "m-0"), ask(0.0, "m-0"), ask(0.0, "m-0")], profile(nodes=1, slots=2))
    assert measured.starts == 1
    assert measured.startup_p50_s == SSD_S
    assert measured.startup_p99_s == pytest.approx(SSD_S + 0.1 + 9 * 0.1)


def test_an_idle_instance_ends_after_its_keep_alive_and_its_device_is_free_once_it_stopped() -> None:
    of = world("serverlessllm", keep_alive_s=10.0, physics=slow(stop_s=2.0))
    of.run([ask(0.0, "m-0")])
    idle_since_s = of.now_s
    until(of, idle_since_s + 10.0)
    assert of.lines["m-0"].instances
    until(of, idle_since_s + 13.5)
    assert not of.lines["m-0"].instances
    assert all(seat.free_bytes == 16 * GB for node in of.nodes.values() for seat in node.seats)


def test_an_order_to_stop_only_what_is_idle_leaves_what_got_a_request_meanwhile() -> None:
    of = world("cache")
    start(of, "m-0")
    until(of, SSD_S)
    (instance,) = of.lines["m-0"].instances.values()
    of._arrive(ask(SSD_S, "m-0"), of.lines["m-0"])
    of.carry_out(End(instance=instance))
    assert not instance.leaving
    of.carry_out(End(instance=instance, only_if_idle=False))
    assert instance.leaving
    until(of, SSD_S + 5.0)
    assert of.meter.timed_out == 0
    assert not of.lines["m-0"].instances


def test_the_share_of_time_in_which_devices_worked_is_measured() -> None:
    measured = run("serverlessllm", [ask(0.0, "m-0", prompt=100, output=50)])
    worked_s = 0.1 + 49 * 0.1
    assert measured.gpu_utilisation == pytest.approx(worked_s / (2 * (SSD_S + worked_s)))


def test_a_model_that_the_profile_lacks_is_named() -> None:
    with pytest.raises(InvalidWorkload, match="no model 'x'"):
        run("cache", [ask(0.0, "x")])


# Migration


def moving(output: int = 100) -> World:
    """m-0 runs on n-0 since 5.0 s; its prompt of 1,000 tokens is read at 6.0."""
    of = world("cache")
    start(of, "m-0", "n-0")
    until(of, SSD_S)
    of._arrive(ask(SSD_S, "m-0", prompt=1000, output=output), of.lines["m-0"])
    return of


def test_a_migration_leaves_tokens_intact_and_the_source_goes_on_meanwhile() -> None:
    of = moving(output=1000)
    until(of, 8.0)
    (source,) = of.lines["m-0"].instances.values()
    (request,) = source.running.values()
    of.carry_out(Move(instance=source, node="n-1", devices=(0,)))
    # From 18.0 on 1,121 tokens are read at the destination, until 19.121; 11 more come meanwhile and are read in the pause.
    until(of, 19.12)
    assert request.instance is source
    until(of, 19.13)
    assert request.instance is not None
    assert request.instance.node.name == "n-1"
    assert request.generated == 132
    assert request.waited_s == pytest.approx(EXACT.handoff_s + 0.011)
    until(of, 200.0)
    assert request.ended
    assert request.generated == 1000
    assert of.meter.migrations == 1


def test_the_device_of_what_moved_is_free_and_the_model_it_was_freed_for_starts_there() -> None:
    of = moving(output=1000)
    (source,) = of.lines["m-0"].instances.values()
    of._arrive(ask(SSD_S, "m-2"), of.lines["m-2"])
    of.carry_out(Move(instance=source, node="n-1", devices=(0,), then=of.lines["m-2"]))
    until(of, 30.0)
    assert [i.node.name for i in of.lines["m-2"].instances.values()] == ["n-0"]


def test_who_finishes_before_it_could_move_just_ends() -> None:
    of = moving(output=10)
    until(of, 6.5)
    (source,) = of.lines["m-0"].instances.values()
    of.carry_out(Move(instance=source, node="n-1", devices=(0,)))
    until(of, 60.0)
    assert of.meter.migrations == 0
    assert len(of.meter.startup_s) == 1
    assert [i.node.name for i in of.lines["m-0"].instances.values()] == ["n-1"]


def test_percentiles_are_of_nearest_rank() -> None:
    values = [float(v) for v in range(1, 101)]
    assert [percentile(values, p) for p in (50, 95, 99, 100)] == [50.0, 95.0, 99.0, 100.0]
    assert percentile([7.0], 50) == 7.0


def test_what_is_fetched_ahead_gives_way_to_starts_and_takes_that_much_longer() -> None:
    of = world("cache", profile(devices=4))
    of.carry_out(Fetch(line=of.lines["m-1"], node="n-0"))  # 10 s over the network
    start(of, "m-3", "n-0")
    until(of, 10.0)
    (instance,) = of.lines["m-3"].instances.values()
    assert instance.ready_s == REMOTE_S
    until(of, 19.9)
    assert of.nodes["n-0"].holds("m-1") == (False, False)
    until(of, 20.1)
    assert of.nodes["n-0"].holds("m-1") == (True, True)


def test_nothing_is_given_up_for_what_is_fetched_ahead() -> None:
    of = world("cache", profile(devices=4, dram_gb=15))
    start(of, "m-0", "n-0")
    until(of, 10.0)
    of.carry_out(Fetch(line=of.lines["m-2"], node="n-0"))
    until(of, 30.0)
    assert of.nodes["n-0"].holds("m-0") == (True, True)
    assert of.nodes["n-0"].holds("m-2") == (False, True)
