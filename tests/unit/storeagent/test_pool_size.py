import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.pool import Pool
from stoker_core.clock import SystemClock
from stoker_core.errors import InvalidSettings
from stoker_core.settings import load
from stoker_storeagent.adapters import pool
from stoker_storeagent.adapters.pool import OpenPool, available_bytes, open_pool
from stoker_storeagent.keep import PoolKeep
from stoker_storeagent.settings import StoreagentSettings


def settings(**keys: object) -> StoreagentSettings:
    quiet = {"POOL_LOCK": "false", "POOL_HUGE": "none"}
    return load(StoreagentSettings, {f"STOKER_STOREAGENT_{key}": str(value) for key, value in (quiet | keys).items()})


@contextlib.asynccontextmanager
async def opened(directory: Path, **keys: object) -> AsyncIterator[OpenPool]:
    """Of a node without a worker."""
    keep = PoolKeep(directory / "keeper.sock", boot_id="b", clock=SystemClock(), jitter=lambda: 0.5)
    with contextlib.closing(keep), contextlib.closing(await open_pool(settings(**keys), keep, timeout_s=5.0)) as made:
        yield made


async def test_a_pool_takes_a_quarter_of_what_is_available_in_whole_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "available_bytes", lambda: 4 * (3 * CHUNK_BYTES + 5))
    async with opened(tmp_path) as made:
        assert made.pool.status().total_bytes == 3 * CHUNK_BYTES
        assert (made.records, made.loading) == ((), ())


async def test_a_pool_has_the_size_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "available_bytes", lambda: 0)
    async with opened(tmp_path, POOL_BYTES=2 * CHUNK_BYTES) as made:
        assert made.pool.status().total_bytes == 2 * CHUNK_BYTES


@pytest.mark.parametrize("size_bytes", [1, 2 * CHUNK_BYTES - 1])
async def test_a_pool_that_would_be_too_small_is_refused_by_the_name_of_its_setting(
    tmp_path: Path, size_bytes: int
) -> None:
    with pytest.raises(InvalidSettings, match="STOKER_STOREAGENT_POOL_BYTES"):
        async with opened(tmp_path, POOL_BYTES=size_bytes):
            pass


def test_a_container_with_less_memory_than_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_CGROUP_FILES", ())
    whole = available_bytes()
    limit, used = tmp_path / "max", tmp_path / "current"
    limit.write_text(f"{whole // 2}\n")
    used.write_text(f"{whole // 4}\n")
    monkeypatch.setattr(pool, "_CGROUP_FILES", ((str(tmp_path / "gone"), str(used)), (str(limit), str(used))))
    assert available_bytes() == whole // 2 - whole // 4
    (tmp_path / "memory.stat").write_text(f"anon 4096\ninactive_file {whole // 8}\nactive_file 4096\n")
    assert available_bytes() == whole // 2 - whole // 4 + whole // 8, "what is only cached can be taken"
    limit.write_text("max\n")
    assert available_bytes() > whole // 2


async def test_a_pool_whose_pages_cannot_be_had_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, POOL_BYTES=2 * CHUNK_BYTES) as both:
        await checked(both.pool, monkeypatch)


async def checked(made: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        warned: list[str] = []
        patch.setattr(Pool, "wait_warm", lambda self, timeout_s: False)
        patch.setattr(made, "native", _Without(made.native))
        patch.setattr(pool.log, "warning", lambda what, **more: warned.append(f"{what}: {more['error']}"))
        async with asyncio.timeout(5):
            await pool._warm(made)
    assert warned == ["pool_not_warm: Cannot allocate memory"]


class _Without:
    """A native pool that the kernel gives no pages."""

    fault_errno = errno.ENOMEM

    def __init__(self, native: object) -> None:
        self._native = native

    def __getattr__(self, name: str) -> object:
        return getattr(self._native, name)
