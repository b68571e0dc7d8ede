"""Decisions as tables for people."""

from __future__ import annotations

import io

from msgspec.structs import replace
from rich.console import Console
from tests.support.databases import a_decision

from stoker_cli.answers import Decision, Decisions
from stoker_cli.why import rendered
from stoker_contracts.decisions import Outcome
from stoker_contracts.models import Tier

RECORD = a_decision()
DECISION = Decision(**{name: getattr(RECORD, name) for name in RECORD.__struct_fields__}, model="tiny")
OUTCOME = Outcome(queue_s=0.125, load_s=1.0, engine_s=1.375, total_s=2.5, source=Tier.REMOTE, origin="s3")


def text(*decisions: Decision) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=240, highlight=False).print(rendered(Decisions(decisions=list(decisions))))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_each_option_shows_its_estimate_by_part_and_which_one_was_chosen() -> None:
    head, columns, chosen, other, more, verdict, _ = text(DECISION)
    assert "tiny" in head
    assert "started instance-1: the least startup time" in head
    assert columns.split() == ["NODE", "DEVICES", "FROM", "HOW", "QUEUE", "ROOM", "LOAD", "ENGINE", "TOTAL", "STAGES"]
    words = [
        "→",
        "node-a",
        "0,1",
        "peer",
        "(node-b)",
        "free",
        "0.25",
        "s",
        "0.00",
        "s",
        "0.50",
        "s",
        "1.25",
        "s",
        "2.00",
        "s",
    ]
    assert chosen.split()[: len(words)] == words
    assert "±10%" in chosen
    assert "peer:node-b 0.50 s" in chosen
    assert other.split()[0] == "node-c"
    assert "10 more" in more
    assert "not known yet" in verdict


def test_what_happened_stands_below_with_how_far_the_prediction_was_off() -> None:
    lines = text(replace(DECISION, outcome=OUTCOME))
    [happened] = [line for line in lines if line.startswith("=")]
    assert happened.split()[1:6] == ["node-a", "0,1", "remote", "(s3)", "happened"]
    assert "  predicted 2.00 s, took 2.50 s: off by 20%, the load by 25%" in lines


def test_a_start_that_failed_says_why() -> None:
    lines = text(replace(DECISION, outcome=replace(OUTCOME, failure="engine [died]")))
    assert "  failed: engine [died]" in lines


def test_a_decision_without_options_shows_its_reason_alone() -> None:
    refused = replace(DECISION, options=(), chosen=None, instance_id="", weighed=0, reason="needs 9 bytes [of 8]")
    head, verdict, *_ = text(refused)
    assert head.endswith("started nothing: needs 9 bytes [of 8]")
    assert verdict.strip() == "nothing to measure"


def test_where_nothing_was_decided_it_says_so() -> None:
    assert text() == ["nothing was decided yet: no request has asked for it"]
