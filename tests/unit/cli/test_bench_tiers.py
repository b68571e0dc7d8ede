"""The parts of `stoker bench tiers` that need no processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker_cli.bench import make_checkpoint, tiers, tiers_fan, tiers_run
from stoker_cli.bench.tiers_figures import FANS, ORDER, WAYS, figures, table, unplanned, with_ratios
from stoker_core.errors import SetupFailed
from stoker_storeagent.adapters import pool

GB, FAN_GB = 1_000_000_000, 500_000_000


def test_without_a_choice_everything_is_measured() -> None:
    assert tiers.choose([]) == [*ORDER, *FANS]
    assert {*ORDER} == WAYS.keys()


def test_what_is_chosen_is_measured_in_the_order_of_the_first_round() -> None:
    assert tiers.choose(["loopback", "peer"]) == ["peer", "loopback"]
    assert tiers.choose(["fan"]) == [*FANS]


def test_a_way_that_there_is_not_is_refused() -> None:
    with pytest.raises(SetupFailed, match=r"--only rocket: there are s3, peer, .*, fan"):
        tiers.choose(["s3", "rocket"])


def test_memory_that_is_too_small_is_refused_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "available_bytes", lambda: 9 * GB)
    tiers.need_memory(1.0, 0.0)
    with pytest.raises(SetupFailed, match=r"11\.0 GB of memory are needed, 9\.0 GB are free"):
        tiers.need_memory(1.0, 0.5)


def test_the_slowest_stage_is_the_slowest_of_the_same_round() -> None:
    one = with_ratios({"s3_s": 2.2, "stepwise_s": 4.0, "fetch_s": 2.0, "write_s": 1.0, "dram_s": 0.1}, GB, 0)
    assert one["pipelined_over_slowest_stage"] == pytest.approx(1.1)
    assert one["stepwise_over_slowest_stage"] == 2.0
    other = with_ratios({"s3_s": 3.0, "fetch_s": 2.0, "write_s": 3.0, "dram_s": 0.1}, GB, 0)
    assert other["pipelined_over_slowest_stage"] == 1.0
    assert other["s3_over_fetch"] == 1.5


def test_a_peer_is_compared_with_loopback_by_speed() -> None:
    one = with_ratios({"peer_s": 2.0, "loopback_s": 1.5}, GB, 0)
    assert one["peer_over_loopback"] == 0.75
    assert one["peer_gb_per_s"] == 0.5


def test_a_fan_out_is_compared_with_one_receiver_by_time() -> None:
    one = with_ratios({"fan1_s": 2.0, "chain4_s": 2.5, "star4_s": 8.0}, GB, FAN_GB)
    assert one["chain4_over_1"] == 1.25
    assert one["star4_over_1"] == 4.0
    assert one["fan1_gb_per_s"] == 0.25
    assert "star2_over_1" not in one


def test_what_was_not_measured_has_no_figure() -> None:
    one = with_ratios({"s3_s": 1.0, "fetch_s": 0.5}, GB, 0)
    assert one.keys() == {"s3_s", "fetch_s", "s3_gb_per_s", "fetch_gb_per_s", "s3_over_fetch"}


def test_figures_are_medians_of_the_rounds_ratios() -> None:
    rounds = [
        with_ratios({"peer_s": peer, "loopback_s": loopback}, GB, 0)
        for peer, loopback in ((1.0, 1.0), (2.0, 8.0), (4.0, 8.0))
    ]
    # The ratio of the medians would be 8 ÷ 2.
    assert figures(rounds)["peer_over_loopback"] == 2.0
    assert figures(rounds)["peer_s"] == 2.0


def test_the_table_has_a_line_for_each_way_and_each_ratio() -> None:
    one = with_ratios({"peer_s": 2.0, "loopback_s": 1.5, "fan1_s": 1.0}, GB, FAN_GB)
    assert table([one]).row_count == 4


def test_every_ratio_has_its_line_in_the_table() -> None:
    everything = {f"{name}_s": 1.0 for name in (*WAYS, *FANS)}
    one = with_ratios(everything, GB, FAN_GB)
    ratios = [name for name in one if "_over_" in name]
    assert len(ratios) == 8
    assert table([one]).row_count == len(everything) + len(ratios)


def test_bytes_from_others_than_planned_are_told() -> None:
    assert unplanned({"chain4_as_planned": 1.0}) == []
    [line] = unplanned({"chain4_as_planned": 1.0, "star4_as_planned": 0.5})
    assert line.startswith("4 receivers in a star: 50%")


def test_every_way_that_has_a_process_of_its_own_is_a_way() -> None:
    assert frozenset().union(*tiers_run.ROLES_OF.values()) == WAYS.keys()


def test_pools_hold_the_model_they_are_measured_with(tmp_path: Path) -> None:
    checkpoint = make_checkpoint.make(tmp_path, 2_000_000, 21, pickles=False, progress=lambda line: None)
    assert tiers_run.pool_bytes(checkpoint) >= 16 * 2**20
    nodes = tiers_fan.FanOut(checkpoint, ["fan1", "chain2"], 1000).nodes
    assert [node.name for node in nodes] == ["fan-0", "fan-1", "fan-2"]
    assert all(node.settings["network_bytes_per_s"] == 1000 for node in nodes)
