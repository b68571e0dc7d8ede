"""The catalogue: registered models as the storage agent needs them."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.tiny_model import write_tiny_model

from stoker_contracts.control import RegisterModel
from stoker_core.errors import CheckpointChanged, CorruptCheckpoint, DatabaseUnavailable, ModelNotFound
from stoker_core.ids import SequentialIds
from stoker_db.memory import MemoryDatabase
from stoker_storeagent.adapters.catalogue import DatabaseCatalogue
from stoker_storeagent.register import Registrar
from stoker_storeagent.sources import Sources
from stoker_storeagent.sources.directory import DirectorySource

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
DIGESTS = {name: (f"xxh3_128:{number:032x}",) for number, name in enumerate(SHARDS)}


class NoEvents:
    def emit(self, event: tuple[str, str], subject: str, **data: Any) -> None: ...


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", shards=2)


@pytest.fixture
def database() -> MemoryDatabase:
    return MemoryDatabase()


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources({"file": DirectorySource([tmp_path])})


@pytest.fixture
def catalogue(database: MemoryDatabase, sources: Sources) -> DatabaseCatalogue:
    return DatabaseCatalogue(database, sources)


@pytest.fixture
async def model_id(database: MemoryDatabase, sources: Sources, model: Path) -> str:
    registrar = Registrar(database.models, sources, NoEvents(), SequentialIds())
    return (await registrar.register(RegisterModel(name="tiny", source=model.as_uri()))).model.model_id


async def test_a_model_is_found_without_its_source(
    catalogue: DatabaseCatalogue, sources: Sources, model_id: str, model: Path
) -> None:
    expected = await sources.inspect(str(model))
    model.rename(model.with_name("gone"))
    checkpoint, small = await catalogue.find(model_id)
    assert (checkpoint.model_id, checkpoint.name, checkpoint.source) == (model_id, "tiny", model.as_uri())
    assert checkpoint.manifest == expected.manifest
    assert checkpoint.versions == expected.versions
    assert small == expected.small_files
    assert checkpoint.small_bytes == sum(map(len, small.values()))
    assert not checkpoint.bound


async def test_digests_are_bound_once_and_found_ever_after(catalogue: DatabaseCatalogue, model_id: str) -> None:
    await catalogue.bind(model_id, {name: list(chunks) for name, chunks in DIGESTS.items()})
    checkpoint, _ = await catalogue.find(model_id)
    assert checkpoint.bound
    assert [checkpoint.digest(position) for position in range(checkpoint.positions)] == [
        DIGESTS[name][0] for name in SHARDS
    ]
    await catalogue.bind(model_id, DIGESTS)
    with pytest.raises(CorruptCheckpoint):
        await catalogue.bind(model_id, {SHARDS[0]: DIGESTS[SHARDS[1]], SHARDS[1]: DIGESTS[SHARDS[1]]})


async def test_an_unknown_model_is_not_found(catalogue: DatabaseCatalogue, model_id: str) -> None:
    with pytest.raises(ModelNotFound):
        await catalogue.find("model-none")


async def test_a_database_that_is_down_is_said_to_be(
    catalogue: DatabaseCatalogue, database: MemoryDatabase, model_id: str
) -> None:
    database.go_down()
    with pytest.raises(DatabaseUnavailable):
        await catalogue.find(model_id)


async def forget_manifest(database: MemoryDatabase, model_id: str) -> None:
    """As an earlier version registered it."""
    spec = await database.models.get("tiny")
    files = await database.models.files(model_id, with_content=True)
    await database.models.delete("tiny")
    await database.models.add(spec, [msgspec.structs.replace(file, version="") for file in files])


async def test_a_model_of_an_earlier_version_is_inspected_at_its_source(
    catalogue: DatabaseCatalogue, database: MemoryDatabase, model_id: str
) -> None:
    expected, small = await catalogue.find(model_id)
    await forget_manifest(database, model_id)
    assert await catalogue.find(model_id) == (expected, small)


async def test_a_model_of_an_earlier_version_whose_source_changed_is_not_served(
    catalogue: DatabaseCatalogue, database: MemoryDatabase, model_id: str, model: Path
) -> None:
    await forget_manifest(database, model_id)
    write_tiny_model(model, shards=2, layers=3)
    with pytest.raises(CheckpointChanged, match="register it anew"):
        await catalogue.find(model_id)
