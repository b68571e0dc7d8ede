"""How far a prediction was off, from what is kept of it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from stoker_contracts.decisions import DecisionRecord, OptionRecord, Outcome, StartupPrediction
from stoker_contracts.models import Tier

RECORD = DecisionRecord(
    decision_id="d1",
    term=1,
    model_id="m1",
    instance_id="i1",
    options=(
        OptionRecord(
            node="n1",
            devices=(0,),
            source=Tier.SSD,
            origin="",
            how="stop",
            startup=StartupPrediction(queue_s=3.0, room_s=1.0, load_s=2.0, engine_s=1.0, total_s=6.0),
        ),
    ),
    weighed=1,
    reason="",
    chosen=0,
    outcome=Outcome(queue_s=1.0, load_s=5.0, engine_s=2.0, total_s=8.0),
)


def test_the_error_is_relative_to_what_happened() -> None:
    assert RECORD.error == pytest.approx(2 / 8)


def test_the_error_of_the_load_leaves_out_the_engine_and_the_room_and_counts_loads_ahead_that_outlast_it() -> None:
    assert RECORD.load_error == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    "changed",
    [
        {"outcome": None},
        {"outcome": Outcome(load_s=0.0, engine_s=0.0, total_s=4.0, failure="it died")},
        {"outcome": Outcome(load_s=0.0, engine_s=0.0, total_s=0.0)},
        {"chosen": None},
        {"chosen": 7},  # it was not among the best
    ],
    ids=["unknown", "failed", "no time", "no choice", "not kept"],
)
def test_without_a_prediction_and_a_start_that_succeeded_there_is_no_error(changed: dict[str, object]) -> None:
    record = replace(RECORD, **changed)
    assert (record.error, record.load_error) == (None, None)
