"""Each policy on a case made by hand, and all of them on the same requests."""

from __future__ import annotations

import pytest
from tests.unit.sim.clusters import DRAM_S, REMOTE_S, SSD_S, ask, profile, run, slow, world

from stoker_core.errors import InvalidProfile, InvalidWorkload
from stoker_sim.cluster import POLICIES, Setup, build
from stoker_sim.cluster.orders import Begin, End
from stoker_sim.cluster.paper import compare
from stoker_sim.cluster.paper import run as run_paper
from stoker_sim.dice import Dice
from stoker_sim.profiles import load_profile
from stoker_sim.workload import GSM8K_LIKE, Arrival, bursts_of_each, even


def bursty(seed: int = 1) -> list[Arrival]:
    of = profile()
    return list(
        bursts_of_each(
            Dice(seed),
            popularity=even(list(of.models_by_name)),
            lengths=GSM8K_LIKE,
            rate_per_s=0.5,
            cv=4.0,
            duration_s=400.0,
        )
    )


def test_random_downloads_every_start_and_cache_keeps_what_came() -> None:
    arrivals = [ask(0.0, "m-0"), ask(200.0, "m-0")]
    assert run("random", arrivals, profile(nodes=1)).reads == {"remote": 2}
    assert run("cache", arrivals, profile(nodes=1)).reads == {"ssd": 1, "dram": 1}


def test_random_takes_a_free_device_before_one_on_which_another_model_is_idle() -> None:
    for seed in range(8):
        of = world("random", seed=seed)
        of.run([ask(0.0, "m-0"), ask(20.0, "m-1")])
        assert of.lines["m-0"].instances


def test_serverlessllm_goes_where_the_model_lies() -> None:
    for model, node in (("m-0", "n-0"), ("m-1", "n-1")):
        of = world("serverlessllm")
        of.run([ask(0.0, model)])
        (instance,) = of.lines[model].instances.values()
        assert instance.node.name == node


def test_serverlessllm_counts_the_queue_before_the_bandwidth() -> None:
    # Two models wait for n-0's SSD already: for the third that would take 15 s, and a download 10 s.
    arrivals = [ask(0.0, "m-0"), ask(0.0, "m-2"), ask(0.0, "m-4")]
    measured = run("serverlessllm", arrivals, profile(models=6, devices=4))
    assert measured.reads == {"ssd": 2, "remote": 1}
    assert measured.startup_p99_s == REMOTE_S


def test_serverlessllm_moves_away_who_keeps_a_model_from_its_node() -> None:
    # m-0 in DRAM of both nodes runs on n-0 where m-2 lies: to move it is quicker than to download m-2 to n-1.
    of = world("serverlessllm", profile(devices=1))
    for node in ("n-0", "n-1"):
        of.carry_out(Begin(line=of.lines["m-0"], node=node, devices=(0,)))
    of.agenda.run_until(10.0)
    of.carry_out(End(instance=next(i for i in of.idle.values() if i.node.name == "n-1")))
    of.agenda.run_until(11.0)
    of._arrive(ask(11.0, "m-0", output=500), of.lines["m-0"])
    of._arrive(ask(11.0, "m-2"), of.lines["m-2"])
    of.agenda.run_until(31.0)
    assert of.meter.migrations == 1
    assert [i.node.name for i in of.lines["m-2"].instances.values()] == ["n-0"]


def test_shepherd_preempts_where_serverlessllm_moves_and_the_preempted_request_loses_no_token() -> None:
    arrivals = [ask(0.0, "m-0", output=300), ask(6.0, "m-2")]
    moved, preempted = run("serverlessllm", arrivals), run("shepherd", arrivals)
    assert (moved.preemptions, preempted.migrations) == (0, 0)
    assert preempted.preemptions == 1
    assert preempted.within_timeout == 1.0
    # m-2 takes n-0 at once; m-0's wait is that for its download to n-1.
    assert preempted.startup_p50_s == pytest.approx(SSD_S)
    assert preempted.startup_p99_s == pytest.approx(SSD_S + REMOTE_S)


def test_stoker_starts_where_the_model_lies_and_learns_what_that_takes() -> None:
    of = world("stoker", physics=slow(decision_s=0.01))
    of.run([ask(0.0, "m-1")])
    (instance,) = of.lines["m-1"].instances.values()
    assert instance.node.name == "n-1"
    assert instance.seen is not None
    assert instance.seen.load_s == SSD_S


def test_stoker_makes_room_by_stopping_what_is_idle() -> None:
    measured = run("stoker", [ask(0.0, "m-0"), ask(20.0, "m-2")], profile(nodes=1), physics=slow(decision_s=0.01))
    assert measured.starts == 2
    assert measured.within_timeout == 1.0


@pytest.mark.parametrize("policy", POLICIES)
def test_all_requests_end_and_the_same_seed_gives_the_same_figures(policy: str) -> None:
    arrivals = bursty()
    first = world(policy, seed=3).run(arrivals)
    assert first.requests == len(arrivals)
    assert first == world(policy, seed=3).run(arrivals)
    assert first.starts == sum(first.reads.values())


def test_the_papers_test_has_a_row_for_each_policy_and_workload() -> None:
    rows = list(run_paper(seed=1, requests=40, rates=(1.4,), models=("opt-6.7b", "opt-30b")))
    assert len(rows) == 2 * 2 * len(POLICIES)
    assert all(row.measured.requests == 40 for row in rows)
    compared = compare(rows)
    assert [(one.model, one.dataset) for one in compared] == [
        ("opt-6.7b", "gsm8k"),
        ("opt-6.7b", "sharegpt"),
        ("opt-30b", "gsm8k"),
        ("opt-30b", "sharegpt"),
    ]
    assert all(one.best_other_s > 0 for one in compared)
    published = {row.policy: row.published_mean_s for row in rows[: len(POLICIES)]}
    assert published == {"random": 12.1, "cache": 8.2, "shepherd": None, "serverlessllm": 0.8, "stoker": None}


def test_policies_and_loaders_that_there_are_not_are_named() -> None:
    with pytest.raises(InvalidWorkload, match=r"no policy 'best'.*shepherd"):
        build(load_profile("paper"), "best", seed=1)
    with pytest.raises(InvalidProfile, match="no loader 'tape'"):
        build(load_profile("paper"), "cache", seed=1, setup=Setup(loader="tape"))


def test_the_pool_is_faster_than_the_disk() -> None:
    assert run("serverlessllm", [ask(0.0, "m-0"), ask(100.0, "m-0")], keep_alive_s=10.0).startup_p50_s == DRAM_S
