"""What is expected of starts, from what was seen of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.support.fake_worker import GIB, model_spec

from stoker_contracts.models import EngineKind, ModelSpec, Tier
from stoker_policy.estimate import Absurd, EngineState, Estimates, Guess, Priors, StartFacts, StartSeen, Startup
from stoker_policy.startup import pipeline

many = settings(max_examples=100, deadline=None)
GB = 1_000_000_000
SMALL = model_spec("small", weight_bytes=GB // 4)
LARGE = model_spec("large", weight_bytes=4 * GB)


def start_seen(model: ModelSpec = LARGE, source: Tier = Tier.SSD, load_s: float = 2.0, **fields: object) -> StartSeen:
    values: dict[str, object] = {
        "node": "n1",
        "model_id": model.model_id,
        "architecture": model.architecture,
        "engine_kind": model.engine,
        "engine": EngineState.ZYGOTE,
        "weight_bytes": model.weight_bytes,
        "origin": "",
        "engine_s": 1.2,
    }
    return StartSeen(source=source, load_s=load_s, **(values | fields))  # type: ignore[arg-type]


def facts(model: ModelSpec = LARGE, node: str = "n1", **fields: object) -> StartFacts:
    return StartFacts(node=node, model=model, **({"engine": EngineState.ZYGOTE} | fields))  # type: ignore[arg-type]


def learned(*starts: StartSeen) -> Estimates:
    estimates = Estimates()
    for seen in starts:
        estimates.observe_start(seen)
    return estimates


# Nothing seen yet


def test_the_nearer_the_tier_the_sooner_the_start() -> None:
    estimates = Estimates()
    whole = LARGE.weight_bytes
    ways = [facts(dram_bytes=whole), facts(ssd_bytes=whole), facts(peer="n2"), facts()]
    seconds = [estimates.startup(way).total_s for way in ways]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 4


def test_an_engine_starts_sooner_asleep_than_from_a_zygote_and_from_there_sooner_than_cold() -> None:
    for model in (LARGE, replace(LARGE, engine=EngineKind.SIM)):
        states = (EngineState.ASLEEP, EngineState.ZYGOTE, EngineState.COLD)
        seconds = [Estimates().engine_start("n1", model, state).value for state in states]
        assert seconds == sorted(seconds)


def test_priors_may_be_those_of_other_hardware() -> None:
    fast = Estimates(Priors(ssd_bytes_per_s=12e9))
    assert fast.bandwidth("n1", Tier.SSD).value == pytest.approx(12e9)
    assert fast.bandwidth("n1", Tier.SSD).samples == 0


def test_a_start_is_less_certain_before_any_was_seen() -> None:
    whole = facts(ssd_bytes=LARGE.weight_bytes)
    assert learned(*[start_seen()] * 4).startup(whole).spread < Estimates().startup(whole).spread / 2


# Starts seen


@pytest.mark.parametrize(
    ("source", "origin", "load_s", "way"),
    [
        (Tier.DRAM, "", 0.5, {"dram_bytes": LARGE.weight_bytes}),
        (Tier.SSD, "", 1.3, {"ssd_bytes": LARGE.weight_bytes}),
        (Tier.PEER, "n2", 2.2, {"peer": "n2"}),
        (Tier.REMOTE, "file", 5.0, {}),
    ],
)
def test_after_two_like_it_a_start_is_expected_to_take_as_long(
    source: Tier, origin: str, load_s: float, way: dict[str, object]
) -> None:
    seen = start_seen(source=source, origin=origin, load_s=load_s)
    expected = learned(seen, seen).startup(facts(**way))
    assert expected.load_s == pytest.approx(load_s, rel=0.1)
    assert expected.engine_s == pytest.approx(1.2, rel=0.05)
    assert expected.total_s == pytest.approx(load_s + 1.2, rel=0.1)


def test_the_fixed_cost_of_a_load_is_told_from_its_bytes() -> None:
    def from_memory(model: ModelSpec) -> StartSeen:
        return start_seen(model, Tier.DRAM, 0.1 + model.weight_bytes / 4e9)

    sizes = [model_spec(f"m{size}", weight_bytes=size * GB // 4) for size in (1, 2, 4, 8)]
    estimates = learned(*[from_memory(model) for model in sizes * 3])
    for gigabytes in (0.05, 0.5, 16):
        other = model_spec("other", weight_bytes=int(gigabytes * GB))
        expected = estimates.startup(facts(other, dram_bytes=other.weight_bytes))
        assert expected.load_s == pytest.approx(0.1 + gigabytes / 4, rel=0.15)


def test_what_small_models_taught_holds_for_large_ones() -> None:
    small = [start_seen(SMALL, Tier.SSD, 0.03 + 0.25 / 1.2)] * 3
    assert learned(*small).startup(facts(ssd_bytes=4 * GB)).load_s == pytest.approx(4 / 1.2, rel=0.15)


def test_kinds_of_engines_take_weights_at_their_own_speed() -> None:
    reads_only = replace(LARGE, model_id="sim", engine=EngineKind.SIM)
    estimates = learned(*[start_seen(LARGE, Tier.DRAM, 2.0), start_seen(reads_only, Tier.DRAM, 0.1)] * 3)
    assert estimates.startup(facts(LARGE, dram_bytes=4 * GB)).load_s == pytest.approx(2.0, rel=0.1)
    assert estimates.startup(facts(reads_only, dram_bytes=4 * GB)).load_s == pytest.approx(0.1, rel=0.3)


def test_a_slow_node_is_told_from_a_fast_one() -> None:
    estimates = learned(*[start_seen(node="slow", load_s=8.0), start_seen(node="fast", load_s=1.0)] * 4)
    other = model_spec("other", weight_bytes=4 * GB)
    for node, load_s in (("slow", 8.0), ("fast", 1.0)):
        assert estimates.startup(facts(other, node, ssd_bytes=4 * GB)).load_s == pytest.approx(load_s, rel=0.2)


def test_a_new_node_is_expected_to_be_like_the_others() -> None:
    estimates = learned(*[start_seen(node=f"n{i % 4}", load_s=8.0) for i in range(12)])
    assert estimates.startup(facts(node="new", ssd_bytes=4 * GB)).load_s == pytest.approx(8.0, rel=0.2)


def test_one_start_that_took_a_hundred_times_as_long_changes_little() -> None:
    usual = [start_seen(load_s=2.0 + i / 100, engine_s=1.2 + i / 100) for i in range(6)]
    whole = facts(ssd_bytes=4 * GB)
    before = learned(*usual).startup(whole).total_s
    after = learned(*usual, start_seen(load_s=200.0, engine_s=120.0)).startup(whole).total_s
    assert after == pytest.approx(before, rel=0.1)


def test_a_disk_that_became_slow_is_noticed() -> None:
    estimates = learned(*[start_seen(load_s=2.0)] * 40, *[start_seen(load_s=10.0)] * 16)
    assert estimates.startup(facts(ssd_bytes=4 * GB)).load_s == pytest.approx(10.0, rel=0.1)


def test_an_engine_start_is_that_of_the_model_before_that_of_its_architecture() -> None:
    huge_cache = model_spec("huge-cache", kv_cache_bytes=8 * GIB)
    estimates = learned(*[start_seen(SMALL, engine_s=1.0), start_seen(huge_cache, engine_s=9.0)] * 5)
    assert estimates.engine_start("n1", SMALL, EngineState.ZYGOTE).value == pytest.approx(1.0, rel=0.15)
    assert estimates.engine_start("n2", huge_cache, EngineState.ZYGOTE).value == pytest.approx(9.0, rel=0.3)
    assert estimates.engine_start("n1", huge_cache, EngineState.COLD).value == pytest.approx(Priors().vllm_cold_s)


def test_a_load_that_was_mostly_here_says_nothing_of_where_the_rest_came_from() -> None:
    little = [start_seen(source=Tier.REMOTE, origin="s3", load_s=0.1, source_bytes=GB // 10)] * 5
    assert learned(*little).bandwidth("n1", Tier.REMOTE, "s3") == Estimates().bandwidth("n1", Tier.REMOTE, "s3")


def test_a_start_from_a_tier_of_a_newer_version_still_tells_of_its_engine() -> None:
    estimates = learned(*[start_seen(source=Tier.UNKNOWN, engine_s=5.0)] * 3)
    assert estimates.engine_start("n1", LARGE, EngineState.ZYGOTE).value == pytest.approx(5.0, rel=0.1)


def test_a_start_that_was_not_measured_says_nothing() -> None:
    assert len(learned(start_seen(load_s=0.0, engine_s=0.0))) == 0


def test_what_came_fast_from_afar_went_fast_into_the_engine() -> None:
    fast = [start_seen(source=Tier.SSD, load_s=0.4)] * 4  # 10 GB/s, where memory is assumed to give 4
    assert learned(*fast).startup(facts(dram_bytes=4 * GB)).load_s <= 0.6


# Agents' own averages


def test_an_agents_average_stands_in_until_starts_were_seen() -> None:
    estimates = Estimates()
    estimates.observe_tier("n1", Tier.SSD, 8e9)
    first = estimates.bandwidth("n1", Tier.SSD).value
    assert 4e9 < first < 8e9
    for _ in range(6):
        estimates.observe_start(start_seen(load_s=4.0))
    assert estimates.bandwidth("n1", Tier.SSD).value == pytest.approx(1e9, rel=0.25)
    assert estimates.bandwidth("n2", Tier.SSD).value < first


def test_an_agent_that_repeats_itself_is_not_believed_more() -> None:
    once, often = Estimates(), Estimates()
    once.observe_tier("n1", Tier.SSD, 8e9)
    for _ in range(50):
        often.observe_tier("n1", Tier.SSD, 8e9)
        often.observe_tier("n1", Tier.SSD, 0.0)  # it knows nothing: it has just started
    assert often.bandwidth("n1", Tier.SSD) == once.bandwidth("n1", Tier.SSD)


def test_each_link_has_its_own_bandwidth() -> None:
    estimates = Estimates()
    estimates.observe_link("n1", "near", 3e9)
    estimates.observe_link("n1", "far", 0.1e9)
    near, far = (estimates.startup(facts(peer=peer)).load_s for peer in ("near", "far"))
    assert near * 5 < far


# By part


def test_stages_run_side_by_side_and_the_slowest_counts() -> None:
    expected = Estimates().startup(facts(dram_bytes=1 * GB, ssd_bytes=1 * GB, peer="n2"))
    assert [stage.name for stage in expected.stages] == ["peer:n2", "ssd", "engine"]
    assert [stage.size_bytes for stage in expected.stages] == [2 * GB, 3 * GB, 4 * GB]
    assert expected.load_s == max(stage.seconds for stage in expected.stages)
    assert Estimates().startup(facts()).stages[0].name == "remote"
    assert [s.name for s in Estimates().startup(facts(dram_bytes=9 * GB)).stages] == ["engine"]


def test_loads_ahead_pass_while_room_is_made() -> None:
    def total_s(queue_bytes: int, room_s: float) -> float:
        way = facts(ssd_bytes=4 * GB, queue_bytes=queue_bytes, room_s=room_s)
        return Estimates().startup(way).total_s

    alone = total_s(0, 0)
    waits = total_s(20 * GB, 0)
    assert waits - alone == pytest.approx(20 / 2, rel=0.1)
    assert total_s(20 * GB, 3) == waits
    assert total_s(0, 30) == pytest.approx(alone + 30)


def test_ranks_take_their_shares_at_the_same_time() -> None:
    one, four = (Estimates().startup(facts(dram_bytes=4 * GB, ranks=ranks)) for ranks in (1, 4))
    assert four.load_s < one.load_s / 2


def test_the_spread_of_the_total_is_that_of_its_parts_together() -> None:
    sure, unsure = Guess(value=1e9, spread=0.01), Guess(value=1e9, spread=0.5)
    long_load = facts(ssd_bytes=4 * GB)  # 4 s, and 1 s of engine

    def spread(ssd: Guess, engine_spread: float) -> float:
        engine = Guess(value=1.0, spread=engine_spread)
        return pipeline(long_load, rest=sure, ssd=ssd, dram=Guess(value=9e9, spread=0.5), engine=engine).spread

    assert spread(unsure, 0.0) == pytest.approx(0.5 * 4 / 5)
    assert spread(unsure, 0.5) == pytest.approx(0.5 * math.hypot(4, 1) / 5)
    assert spread(sure, 0.0) < 0.01


# Properties

rates = st.floats(1e7, 1e11)
guesses = st.builds(Guess, value=rates, spread=st.floats(0, 2))
sizes = st.integers(0, 5 * GB)
starts = st.builds(
    start_seen,
    model=st.sampled_from((SMALL, LARGE, replace(SMALL, model_id="sim", engine=EngineKind.SIM))),
    source=st.sampled_from((Tier.REMOTE, Tier.PEER, Tier.SSD, Tier.DRAM, Tier.UNKNOWN)),
    load_s=st.floats(0.01, 100),
    node=st.sampled_from(("n1", "n2")),
    origin=st.sampled_from(("", "file", "n2")),
    engine_s=st.floats(0, 100),
    ranks=st.sampled_from((1, 2)),
)
ways = st.builds(
    facts,
    model=st.sampled_from((SMALL, LARGE)),
    dram_bytes=sizes,
    ssd_bytes=sizes,
    peer=st.sampled_from(("", "n2")),
    queue_bytes=sizes,
    room_s=st.floats(0, 10),
    ranks=st.sampled_from((1, 2, 4)),
)


def not_longer(sooner: Startup, later: Startup) -> bool:
    return sooner.total_s <= later.total_s * (1 + 1e-9)


@many
@given(st.lists(starts, max_size=20), ways, sizes, sizes, st.floats(0, 10))
def test_more_in_memory_less_ahead_and_less_room_to_make_never_take_longer(
    seen: list[StartSeen], way: StartFacts, more_bytes: int, ahead_bytes: int, room_s: float
) -> None:
    estimates = learned(*seen)
    expected = estimates.startup(way)
    fetched_less = replace(way, dram_bytes=way.dram_bytes + more_bytes)
    from_memory = replace(fetched_less, ssd_bytes=max(0, way.ssd_bytes - more_bytes))
    assert not_longer(estimates.startup(fetched_less), expected)
    assert not_longer(estimates.startup(from_memory), expected)
    assert not_longer(expected, estimates.startup(replace(way, queue_bytes=way.queue_bytes + ahead_bytes)))
    assert not_longer(expected, estimates.startup(replace(way, room_s=way.room_s + room_s)))


@many
@given(guesses, guesses, guesses, ways, sizes)
def test_more_on_a_disk_that_is_no_slower_than_what_it_spares_never_takes_longer(
    rest: Guess, ssd: Guess, dram: Guess, way: StartFacts, more_bytes: int
) -> None:
    ssd = replace(ssd, value=max(ssd.value, rest.value))
    engine = Guess(value=1.0, spread=0.1)
    more = replace(way, ssd_bytes=way.ssd_bytes + more_bytes)
    assert not_longer(pipeline(more, rest, ssd, dram, engine), pipeline(way, rest, ssd, dram, engine))


@many
@given(guesses, guesses, guesses, ways, st.integers(0, 3), st.floats(1, 10))
def test_a_faster_tier_or_engine_never_makes_a_start_longer(
    rest: Guess, ssd: Guess, dram: Guess, way: StartFacts, which: int, factor: float
) -> None:
    parts = [rest, ssd, dram, Guess(value=1.0, spread=0.1)]
    faster = list(parts)
    value = parts[which].value
    faster[which] = replace(parts[which], value=value / factor if which == 3 else value * factor)
    assert not_longer(pipeline(way, *faster), pipeline(way, *parts))


@many
@given(st.lists(starts, max_size=20), ways)
def test_the_same_observations_give_the_same_answers_and_asking_changes_nothing(
    seen: list[StartSeen], way: StartFacts
) -> None:
    silent, asked = Estimates(), Estimates()
    for start in seen:
        silent.observe_start(start)
        asked.startup(way)
        asked.observe_start(start)
        asked.bandwidth("n1", Tier.SSD)
    assert silent.startup(way) == asked.startup(way) == silent.startup(way)


@many
@given(st.lists(starts, max_size=20), ways)
def test_every_part_of_an_estimate_is_a_finite_duration(seen: list[StartSeen], way: StartFacts) -> None:
    expected = learned(*seen).startup(way)
    for value in (expected.queue_s, expected.room_s, expected.load_s, expected.engine_s, expected.spread):
        assert math.isfinite(value)
        assert value >= 0


def test_what_is_remembered_is_bounded() -> None:
    estimates = Estimates(keys_max=20)
    for i in range(300):
        model = model_spec(f"m{i}")
        source = (Tier.DRAM, Tier.SSD, Tier.PEER, Tier.REMOTE)[i % 4]
        estimates.observe_start(start_seen(model, source, 1.0, node=f"n{i}", origin=f"o{i}"))
        estimates.observe_tier(f"n{i}", Tier.SSD, 1e9 + i)
        estimates.observe_link(f"n{i}", "n0", 1e9 + i)
        estimates.observe_migration(f"n{i}", 100, 1.0)
        estimates.observe_output(f"m{i}", 100)
        estimates.startup(facts(model, f"n{i}"))
    assert len(estimates) <= 7 * 20
    # What was seen of all nodes together is still known.
    assert estimates.bandwidth("new", Tier.SSD).value == pytest.approx(1.2e9, rel=0.2)


# Nonsense

Observe = Callable[[Estimates], None]
nonsense: dict[str, Observe] = {
    "negative load": lambda e: e.observe_start(start_seen(load_s=-1.0)),
    "endless load": lambda e: e.observe_start(start_seen(load_s=math.inf)),
    "load that is no number": lambda e: e.observe_start(start_seen(load_s=math.nan)),
    "load of a week": lambda e: e.observe_start(start_seen(load_s=7 * 86400.0)),
    "no bytes": lambda e: e.observe_start(start_seen(weight_bytes=0)),
    "negative bytes": lambda e: e.observe_start(start_seen(weight_bytes=-GB)),
    "more from its source than there is": lambda e: e.observe_start(start_seen(source_bytes=5 * GB)),
    "faster than memory can be": lambda e: e.observe_start(start_seen(weight_bytes=100_000 * GB, load_s=0.1)),
    "negative engine": lambda e: e.observe_start(start_seen(engine_s=-0.1)),
    "engine that is no number": lambda e: e.observe_start(start_seen(engine_s=math.nan)),
    "no ranks": lambda e: e.observe_start(start_seen(ranks=0)),
    "negative tier": lambda e: e.observe_tier("n1", Tier.SSD, -1.0),
    "absurd tier": lambda e: e.observe_tier("n1", Tier.SSD, 1e15),
    "tier that is no number": lambda e: e.observe_tier("n1", Tier.SSD, math.nan),
    "endless link": lambda e: e.observe_link("n1", "n2", math.inf),
    "negative tokens": lambda e: e.observe_migration("n1", -1, 1.0),
    "negative migration": lambda e: e.observe_migration("n1", 10, -1.0),
    "negative output": lambda e: e.observe_output("large", -1),
    "endless output": lambda e: e.observe_output("large", 1 << 40),
}


@pytest.mark.parametrize("observe", nonsense.values(), ids=nonsense)
def test_nonsense_is_refused_and_changes_nothing(observe: Observe) -> None:
    def answers(estimates: Estimates) -> list[object]:
        return [
            len(estimates),
            estimates.startup(facts(ssd_bytes=2 * GB, peer="n2")),
            estimates.migration("n1", 100),
            estimates.remaining_tokens("large", 10),
        ]

    estimates = learned(start_seen(), start_seen(source=Tier.PEER, origin="n2", load_s=3.0))
    estimates.observe_migration("n1", 100, 1.0)
    estimates.observe_output("large", 100)
    before = answers(estimates)
    with pytest.raises(Absurd):
        observe(estimates)
    assert answers(estimates) == before


# Migrations and outputs


def test_a_migration_takes_longer_the_more_tokens_there_are() -> None:
    estimates = Estimates()
    assert estimates.migration("n1", 1000).value == pytest.approx(10.1)
    for tokens in (100, 400, 1600, 3200) * 2:
        estimates.observe_migration("n1", tokens, 0.002 * tokens + 0.5)
    assert estimates.migration("n1", 1000).value == pytest.approx(2.5, rel=0.25)
    assert estimates.migration("n1", 0).value == pytest.approx(0.5, rel=0.3)
    assert estimates.migration("n1", 1000).value < estimates.migration("new", 1000).value < 10.1


def test_an_output_has_left_what_others_as_long_had() -> None:
    estimates = Estimates()
    assert estimates.remaining_tokens("a", 1000).value == pytest.approx(200)
    for _ in range(20):
        estimates.observe_output("short", 20)
        estimates.observe_output("long", 1000)
    assert estimates.remaining_tokens("short", 0).value == pytest.approx(20, rel=0.2)
    assert estimates.remaining_tokens("long", 0).value == pytest.approx(1000, rel=0.2)
    assert estimates.remaining_tokens("long", 900).value == pytest.approx(100, rel=0.2)
    assert 20 < estimates.remaining_tokens("new", 0).value < 1000
    assert estimates.remaining_tokens("short", 500).value > 100  # longer than any of its own: like those of others
