"""What a node knows of models: looked up once, kept on the disk, and bound once all of it has arrived."""

import asyncio
from collections.abc import Mapping, Sequence

import pytest
from tests.support.storeagent_fakes import Disk, digests, model
from tests.support.virtual_time import in_virtual_time, steps

from stoker_core.errors import CorruptCheckpoint, DatabaseUnavailable, ModelNotFound, StorageFailed
from stoker_storeagent.known import Known
from stoker_storeagent.records import Checkpoint

DIGESTS = digests(model())


class Catalogue:
    """Implements ports.Catalogue. away: the database cannot be reached."""

    def __init__(self, *checkpoints: Checkpoint) -> None:
        self.models = {checkpoint.model_id: checkpoint for checkpoint in checkpoints}
        self.away = False
        self.asked: list[str] = []

    async def find(self, model_id: str) -> tuple[Checkpoint, Mapping[str, bytes]]:
        self.asked.append(model_id)
        found = self.models.get(model_id)  # an answer may be old when it comes
        await self._answers()
        if found is None:
            raise ModelNotFound(model_id)
        return found, {"config.json": b"{}"}

    async def bind(self, model_id: str, bound: Mapping[str, Sequence[str]]) -> None:
        await self._answers()
        before = self.models[model_id]
        after = before.with_digests(bound)
        if before.bound and before != after:
            raise CorruptCheckpoint(model_id, "other digests are bound")
        self.models[model_id] = after

    async def _answers(self) -> None:
        await asyncio.sleep(0.01)
        if self.away:
            raise DatabaseUnavailable


def known_of(*checkpoints: Checkpoint) -> tuple[Known, Catalogue, Disk]:
    catalogue, disk = Catalogue(*checkpoints), Disk()
    return Known(catalogue, disk), catalogue, disk


def other_bytes(model_id: str = "m") -> Checkpoint:
    """The model as others bound it."""
    made = model(model_id)
    return made.with_digests(made.by_shard([f"other {position}" for position in range(made.positions)]))


@in_virtual_time
async def test_a_models_folder_is_there_once_it_is_found() -> None:
    known, _, disk = known_of(model())
    assert await known.find("m") == model()
    assert disk.kept == {"m": model()}
    assert known.ids == {"m"}
    assert known.get("m") == model()


@in_virtual_time
async def test_all_who_ask_at_once_share_one_look_up() -> None:
    known, catalogue, _ = known_of(model())
    found = await asyncio.gather(*(known.find("m") for _ in range(5)))
    assert catalogue.asked == ["m"]
    assert all(checkpoint is found[0] for checkpoint in found)


@in_virtual_time
async def test_who_leaves_does_not_stop_the_look_up_for_others() -> None:
    known, catalogue, _ = known_of(model())
    leaving, staying = asyncio.create_task(known.find("m")), asyncio.create_task(known.find("m"))
    await steps(2)
    leaving.cancel()
    assert await staying == model()
    assert catalogue.asked == ["m"]


@in_virtual_time
async def test_a_bound_model_is_never_looked_up_again_and_one_that_is_not_is_in_case_others_bound_it() -> None:
    known, catalogue, _ = known_of(model())
    await known.find("m")
    catalogue.models["m"] = model(bound=True)
    assert (await known.find("m")).bound
    catalogue.away = True
    assert (await known.find("m")).bound
    assert len(catalogue.asked) == 2


@in_virtual_time
async def test_what_the_disk_had_is_known_without_the_database() -> None:
    known, catalogue, _ = known_of()
    known.adopt([model(), model("bound", bound=True)])
    catalogue.away = True
    assert not (await known.find("m")).bound
    assert (await known.find("bound")).bound
    with pytest.raises(DatabaseUnavailable):
        await known.find("never seen")


@in_virtual_time
async def test_a_look_up_that_failed_is_tried_again_by_the_next() -> None:
    known, catalogue, disk = known_of()
    with pytest.raises(ModelNotFound):
        await known.find("m")
    catalogue.models["m"] = model()
    disk.faults["keep"] = [StorageFailed("/ssd", "EIO")]
    with pytest.raises(StorageFailed):
        await known.find("m")
    assert known.get("m") is None
    assert await known.find("m") == model()


@in_virtual_time
async def test_the_first_to_have_all_of_a_model_binds_its_digests_everywhere() -> None:
    known, catalogue, disk = known_of(model())
    bound = await known.bind(await known.find("m"), DIGESTS)
    assert bound == model(bound=True)
    assert catalogue.models["m"] == disk.kept["m"] == known.get("m") == bound
    assert await known.bind_waiting() == []


@in_virtual_time
async def test_who_has_other_bytes_than_the_first_is_refused() -> None:
    known, catalogue, _ = known_of(model())
    checkpoint = await known.find("m")
    catalogue.models["m"] = other_bytes()
    with pytest.raises(CorruptCheckpoint):
        await known.bind(checkpoint, DIGESTS)
    assert await known.bind_waiting() == []
    assert known.get("m") == model()


@in_virtual_time
async def test_while_the_database_is_away_binding_waits() -> None:
    known, catalogue, disk = known_of(model())
    checkpoint = await known.find("m")
    catalogue.away = True
    assert await known.bind(checkpoint, DIGESTS) is checkpoint
    with pytest.raises(DatabaseUnavailable):
        await known.bind_waiting()
    catalogue.away = False
    assert await known.bind_waiting() == []
    assert catalogue.models["m"] == disk.kept["m"] == known.get("m") == model(bound=True)


@in_virtual_time
async def test_of_digests_that_waited_those_which_are_refused_are_told() -> None:
    known, catalogue, _ = known_of(model("a"), model("b"), model("c"))
    catalogue.away = True
    for model_id in "abc":
        await known.bind(model(model_id), DIGESTS)
    catalogue.away, catalogue.models["b"] = False, other_bytes("b")
    assert await known.bind_waiting() == ["b"]
    assert [catalogue.models[model_id].bound for model_id in "ac"] == [True, True]


@in_virtual_time
async def test_what_was_refused_is_told_even_if_the_database_goes_away_after_that() -> None:
    known, catalogue, _ = known_of(model("a"), model("b"))
    catalogue.away = True
    for model_id in "ab":
        await known.bind(model(model_id), DIGESTS)
    catalogue.away, catalogue.models["a"] = False, other_bytes("a")
    binding = asyncio.create_task(known.bind_waiting())
    await asyncio.sleep(0.015)  # between the two
    catalogue.away = True
    assert await binding == ["a"]
    catalogue.away = False
    assert await known.bind_waiting() == []
    assert catalogue.models["b"].bound


@in_virtual_time
async def test_what_is_deleted_is_forgotten_with_the_digests_that_waited() -> None:
    known, catalogue, _ = known_of(model())
    checkpoint = await known.find("m")
    catalogue.away = True
    await known.bind(checkpoint, DIGESTS)
    known.forget("m")
    catalogue.away = False
    assert await known.bind_waiting() == []
    assert not catalogue.models["m"].bound
    assert known.ids == set()


@pytest.mark.parametrize("later_s", [0.0, 0.003, 0.006, 0.009, 0.012])
@in_virtual_time
async def test_a_look_up_from_before_does_not_undo_a_binding(later_s: float) -> None:
    known, _, disk = known_of(model())
    binding = asyncio.create_task(known.bind(await known.find("m"), DIGESTS))
    await asyncio.sleep(later_s)
    await known.find("m")
    await binding
    known_now = known.get("m")
    assert known_now is not None
    assert known_now.bound
    assert disk.kept["m"].bound
