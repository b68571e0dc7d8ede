"""The simulator finds what is broken: agents without one of their precautions are caught within 200 seeds."""

from collections.abc import Callable
from typing import Any

import pytest

from stoker_sim.quiet import quiet
from stoker_sim.store.flaws import Flaw
from stoker_sim.store.scenario import run_seed
from stoker_storeagent import transfer
from stoker_storeagent.ledger import Ledger
from stoker_storeagent.pool_tier import PoolTier
from stoker_storeagent.residents import Resident, Residents
from stoker_storeagent.shelving import Shelving

SEEDS = 200

Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]


def evicts_what_is_held(patch: Patch) -> None:
    def evictable(self: Residents, starting: bool) -> list[Resident]:
        return sorted((resident for resident in self if not resident.busy), key=lambda one: (one.used_s, one.model_id))

    def free(self: Residents, resident: Resident) -> None:
        self.drop(resident)
        self._all.remove(resident)

    patch.setattr(Residents, "_evictable", evictable)
    patch.setattr(Residents, "free", free)


def skips_the_digest(patch: Patch) -> None:
    class Unchecked(transfer.Transfer):
        async def _arrive(self, position: int, place: memoryview) -> Any:
            checkpoint, self._checkpoint = (
                self._checkpoint,
                self._checkpoint.with_digests(self._checkpoint.by_shard([""] * self._checkpoint.positions)),
            )
            try:
                return await super()._arrive(position, place)
            finally:
                self._checkpoint = checkpoint

    patch.setattr("stoker_storeagent.ssd_tier.Transfer", Unchecked)


def forgets_to_free_chunks(patch: Patch) -> None:
    async def let_go(self: PoolTier, resident: Resident) -> None:
        self.room_changed()

    patch.setattr(PoolTier, "let_go", let_go)


def frees_without_noting_it(patch: Patch) -> None:
    def without_notes(original: Any) -> Any:
        async def free(self: PoolTier, *args: Any) -> Any:
            noted, self._noted = self._noted, lambda: None
            try:
                return await original(self, *args)
            finally:
                self._noted = noted

        return free

    patch.setattr(PoolTier, "free", without_notes(PoolTier.free))


def reserves_nothing(patch: Patch) -> None:
    patch.setattr(Ledger, "_choose", lambda self, need_bytes, now_s, *, but: [])


def leaves_models_pinned(patch: Patch) -> None:
    def close(self: Shelving) -> None:
        self._pinned = False
        original(self)

    original = Shelving.close
    patch.setattr(Shelving, "close", close)


def never_frees_what_left_the_disk(patch: Patch) -> None:
    patch.setattr(Ledger, "_disown", lambda self, model_id, digests: [])


@pytest.mark.parametrize(
    "mutant",
    [
        evicts_what_is_held,
        skips_the_digest,
        forgets_to_free_chunks,
        frees_without_noting_it,
        reserves_nothing,
        leaves_models_pinned,
        never_frees_what_left_the_disk,
    ],
    ids=lambda mutant: mutant.__name__,
)
def test_an_agent_that_is_broken_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet()
    mutant(monkeypatch)
    for seed in range(SEEDS):
        try:
            run_seed(seed, weights={"doom agent": 25})
        except Flaw as flaw:
            print(seed, flaw)
            return
    pytest.fail("nobody noticed")
