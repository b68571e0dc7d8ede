"""Whole storage agents against faults drawn from seeds. One that fails: `python -m stoker_sim.store --seeds N --logs`."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from stoker_sim.quiet import quiet
from stoker_sim.store.scenario import run_seed

BATCH, BATCHES = 20, 10


@pytest.fixture(autouse=True)
def _no_logs() -> None:
    quiet()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_tiers_keep_their_promises_whatever_fails(batch: int) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        try:
            outcomes.update(run_seed(seed).outcomes)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert outcomes[""] > outcomes.total() / 4, "hardly anything started: nothing was tested"


def test_a_seed_runs_the_same_way_in_any_process() -> None:
    traces = set()
    for hash_seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-m", "stoker_sim.store", "--seeds", "3..6", "--traces"],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        traces.add(done.stdout)
    assert len(traces) == 1
    assert traces.pop().count(" steps, ") == 3


def test_a_seed_that_fails_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, "--seeds", "0..50"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "seed " in done.stdout
    assert "Flaw: " in done.stdout


BROKEN = """
import sys
from stoker_sim.store.__main__ import main
from stoker_storeagent.residents import Residents
Residents.evict.__globals__["choose_victims"] = lambda *_: ()
sys.exit(main())
"""
