"""Structured logs."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from stoker_core.errors import InvalidSettings
from stoker_core.logging import get_logger, setup_logging
from stoker_core.tracing import inject, setup_tracing, span


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_is_one_json_object_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("worker", log_format="json", node="node-1")
    get_logger("load").info("load_done", bytes=7, text="two\nlines")
    [line] = lines(capsys)
    assert line.pop("timestamp")
    assert line == {
        "event": "load_done",
        "level": "info",
        "service": "worker",
        "node": "node-1",
        "component": "load",
        "bytes": 7,
        "text": "two\nlines",
    }


def test_a_logger_made_before_the_set_up_follows_it(capsys: pytest.CaptureFixture[str]) -> None:
    log = get_logger("early")
    setup_logging("worker", log_format="json")
    log.info("x")
    assert lines(capsys)[0]["service"] == "worker"


def test_a_replaced_and_closed_standard_error_stops_no_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        closed = io.StringIO()
        patch.setattr(sys, "stderr", closed)
        setup_logging("worker", log_format="json")
        closed.close()
    get_logger("x").info("still heard")
    logging.getLogger("library").warning("and this")
    written = capsys.readouterr().err
    assert '"still heard"' in written
    assert "library: and this" in written


def test_the_trace_id_is_on_the_lines_of_a_span(capsys: pytest.CaptureFixture[str]) -> None:
    setup_tracing("test")
    setup_logging("worker", log_format="json")
    log = get_logger("x")
    with span("work") as current:
        log.info("inside")
        headers = inject()
    log.info("outside")
    trace_id = f"{current.get_span_context().trace_id:032x}"
    inside, outside = lines(capsys)
    assert inside["trace_id"] == trace_id
    assert "trace_id" not in outside
    assert headers["traceparent"].split("-")[1] == trace_id
    assert inject() == {}


def test_a_span_continues_what_headers_describe() -> None:
    setup_tracing("test")
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with span("work", headers=headers) as current:
        assert f"{current.get_span_context().trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"


def test_lines_below_the_level_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("worker", level="warning", log_format="json")
    log = get_logger("x")
    log.info("no")
    log.warning("yes")
    assert [line["event"] for line in lines(capsys)] == ["yes"]


def test_an_exception_is_one_field_of_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("worker", log_format="json")
    try:
        raise ValueError("broken")
    except ValueError as error:
        get_logger("x").error("failed", exc_info=error)
    [line] = lines(capsys)
    assert "ValueError: broken" in str(line["exception"])


@pytest.mark.parametrize(
    ("level", "log_format", "key"), [("loud", "json", "STOKER_LOG_LEVEL"), ("info", "xml", "STOKER_LOG_FORMAT")]
)
def test_an_unknown_level_or_format_is_refused(level: str, log_format: str, key: str) -> None:
    with pytest.raises(InvalidSettings, match=key):
        setup_logging("worker", level=level, log_format=log_format)
