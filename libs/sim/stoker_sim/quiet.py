"""Logs of what is simulated, left out: nobody reads those of a thousand agents."""

from __future__ import annotations

import logging

import structlog


def quiet() -> None:
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), cache_logger_on_first_use=False
    )
