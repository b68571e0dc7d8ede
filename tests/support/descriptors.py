"""How many descriptors this process has open: none may be left behind."""

from __future__ import annotations

import gc
import os


def descriptors_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def descriptors_before() -> int:
    """As `descriptors_open`, at a test's beginning: what earlier tests left to the collector is not this one's to count."""
    gc.collect()
    return descriptors_open()
