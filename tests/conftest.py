from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog

pytest_plugins = [
    "tests.support.nats_server",
    "tests.support.postgres_server",
    "tests.support.buses",
    "tests.support.databases",
    "tests.support.stack",
]


@pytest.fixture(autouse=True)
def _own_logs() -> Iterator[None]:
    """What one test sets up of the process's logs is no other test's business."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
