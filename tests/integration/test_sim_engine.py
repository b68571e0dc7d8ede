"""The `sim` engine and its weights: leased and read like a real engine's."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.fake_instance import model_spec
from tests.support.lent import abandoned, lent
from tests.support.tiny_model import write_tiny_model

from stoker_core.errors import InvalidMessage, LoadCancelled
from stoker_worker.engines.sim import SimEngine


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", shards=2, tokenizer=False)


def test_it_is_built_once_all_was_read_and_ends_its_lease(directory: Path) -> None:
    with lent(directory) as lease:
        engine = SimEngine(model_spec(), lease, step_s=0.0)
        assert lease.load_ms == engine.load_ms > 0


def test_without_its_agent_it_fails_and_uses_nothing(directory: Path) -> None:
    with abandoned(directory) as lease:
        with pytest.raises(LoadCancelled):
            SimEngine(model_spec(), lease, step_s=0.0)
        assert lease.load_ms is None


def test_a_lease_on_something_else_is_refused(directory: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", shards=3, tokenizer=False)
    with lent(other) as lease, lent(directory) as another:
        lease.path = another.path
        with pytest.raises(InvalidMessage):
            SimEngine(model_spec(), lease, step_s=0.0)
