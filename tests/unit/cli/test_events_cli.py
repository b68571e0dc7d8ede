from __future__ import annotations

import io

import pytest
from rich.console import Console

from stoker_cli.events import line, start_of, subject_of
from stoker_contracts import subjects
from stoker_contracts.events import CloudEvent
from stoker_core.errors import InvalidSettings


@pytest.mark.parametrize(
    ("wanted", "subject"),
    [
        ("", subjects.EVENTS_ALL),
        (">", subjects.EVENTS_ALL),
        ("instance", subjects.event("instance", ">")),
        ("instance.*", subjects.event("instance", "*")),
        ("*.failed", subjects.event("*", "failed")),
    ],
)
def test_filters_become_subjects(wanted: str, subject: str) -> None:
    assert subject_of(wanted) == subject


@pytest.mark.parametrize("wanted", [".", "instance.", ".failed", "a b", "a..b", "in*"])
def test_what_is_no_filter_is_refused(wanted: str) -> None:
    with pytest.raises(InvalidSettings, match="--filter"):
        subject_of(wanted)


@pytest.mark.parametrize(
    ("since", "follow", "start"), [(None, True, None), (None, False, 1), ("all", True, 1), ("17", False, 17)]
)
def test_since_says_where_to_begin(since: str | None, follow: bool, start: int | None) -> None:
    assert start_of(since, follow) == start


@pytest.mark.parametrize("since", ["0", "-1", "yesterday", ""])
def test_a_since_that_is_no_sequence_is_refused(since: str) -> None:
    with pytest.raises(InvalidSettings, match="--since"):
        start_of(since, True)


def test_an_event_is_one_line() -> None:
    event = CloudEvent(
        id="e", source="/stoker/worker/n1", type="stoker.instance.failed", time="2026-01-02T03:04:05.678901+00:00",
        subject="i-1", bootid="b", sequence="7", specversion="1.0",
        datacontenttype="application/json",
        data={"reason": "[x] gone", "model": "m"},
    )  # fmt: skip
    out = io.StringIO()
    Console(file=out, highlight=False, soft_wrap=True).print(line(12, event))
    assert out.getvalue() == "    12 03:04:05.678 instance.failed      i-1 reason=[x] gone model=m\n"
