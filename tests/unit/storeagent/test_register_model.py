from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.tiny_model import write_tiny_model

from stoker_bus.memory import MemoryBroker, MemoryBus
from stoker_bus.port import Message, ask
from stoker_checkpoint.leased import decode_manifest
from stoker_checkpoint.manifest import Manifest
from stoker_checkpoint.open import open_checkpoint
from stoker_contracts import subjects
from stoker_contracts.control import Failed, Registered, RegisterModel, RegisterReply
from stoker_contracts.models import ModelOptions, ModelSpec
from stoker_core.errors import InvalidModelName, InvalidRequest, ModelExists, RefusedCheckpoint
from stoker_core.ids import SequentialIds
from stoker_db.memory import MemoryDatabase
from stoker_db.ports import ModelFile
from stoker_storeagent.handlers import Handlers
from stoker_storeagent.ports import Inspected, OnBytes
from stoker_storeagent.register import Registrar
from stoker_storeagent.sources import Sources
from stoker_storeagent.sources.directory import DirectorySource


class RecordedEvents:
    def __init__(self) -> None:
        self.emitted: list[tuple[tuple[str, str], str]] = []

    def emit(self, event: tuple[str, str], subject: str, **data: Any) -> None:
        self.emitted.append((event, subject))


class RemoteSource:
    """A directory under another name, whose files have versions."""

    kind = "s3"

    def __init__(self, directory: Path) -> None:
        self.local, self.directory, self.version = DirectorySource([directory]), directory, "etag-1"

    async def inspect(self, url: str) -> Inspected:
        found = await self.local.inspect(self.directory.as_uri())
        versions = dict.fromkeys(found.versions, self.version)
        return msgspec.structs.replace(found, source=url, versions=versions)

    async def read(self, url: str, shard: str, version: str, offset: int, into: memoryview, on_bytes: OnBytes) -> None:
        raise AssertionError("registration reads no weights")


def sources_of(*roots: Path) -> Sources:
    return Sources({"file": DirectorySource(roots)})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", shards=2)


@pytest.fixture
def database() -> MemoryDatabase:
    return MemoryDatabase()


@pytest.fixture
def events() -> RecordedEvents:
    return RecordedEvents()


@pytest.fixture
def registrar(database: MemoryDatabase, events: RecordedEvents, tmp_path: Path) -> Registrar:
    return Registrar(database.models, sources_of(tmp_path), events, SequentialIds())


async def test_a_model_is_registered_with_its_files(
    registrar: Registrar, database: MemoryDatabase, events: RecordedEvents, model: Path
) -> None:
    made = await registrar.register(RegisterModel(name="tiny", source=model.as_uri()))
    assert made.created
    assert made.model == await database.models.get("tiny")
    assert made.model.source == model.as_uri()
    files = {file.path: file for file in await database.models.files(made.model.model_id, with_content=True)}
    assert made.files == len(files)
    assert made.total_bytes == sum(file.size_bytes for file in files.values())
    assert files["config.json"].content == (model / "config.json").read_bytes()
    assert files["config.json"].digest.startswith("sha256:")
    weights = files["model-00001-of-00002.safetensors"]
    assert (weights.content, weights.digest, weights.chunk_digests) == (None, "", ())
    assert weights.version == str(weights.size_bytes)
    assert events.emitted == [(("model", "registered"), made.model.model_id)]


async def test_what_the_headers_say_is_kept_but_not_when_the_files_were_written(
    registrar: Registrar, database: MemoryDatabase, model: Path
) -> None:
    made = await registrar.register(RegisterModel(name="tiny", source=model.as_uri()))
    kept = decode_manifest(await database.models.manifest(made.model.model_id), "kept")
    assert kept == timeless(open_checkpoint(model))


def timeless(manifest: Manifest) -> Manifest:
    shards = tuple(msgspec.structs.replace(shard, mtime_ns=-1) for shard in manifest.shards)
    return msgspec.structs.replace(manifest, shards=shards)


async def test_a_repeat_is_answered_with_the_registration_that_exists(
    registrar: Registrar, database: MemoryDatabase, events: RecordedEvents, model: Path
) -> None:
    first = await registrar.register(RegisterModel(name="tiny", source=model.as_uri()))
    chunks = {f"model-0000{n}-of-00002.safetensors": ("xxh3_128:" + "0" * 32,) for n in (1, 2)}
    await database.models.bind_chunks(first.model.model_id, chunks)
    again = await registrar.register(RegisterModel(name="tiny", source=str(model)))
    assert not again.created
    assert again.model == first.model
    assert len(events.emitted) == 1


@pytest.mark.parametrize("change", ["source", "options", "contents", "headers"])
async def test_the_same_name_with_other_contents_is_refused(
    registrar: Registrar, model: Path, tmp_path: Path, change: str
) -> None:
    await registrar.register(RegisterModel(name="tiny", source=model.as_uri()))
    source, options = model, ModelOptions()
    if change == "source":
        source = write_tiny_model(tmp_path / "other", shards=2)
    elif change == "options":
        options = ModelOptions(keep_alive_s=1.0)
    elif change == "headers":
        shard = model / "model-00001-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes().replace(b'"shape":[512,64]', b'"shape":[64,512]'))
    else:
        (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelExists):
        await registrar.register(RegisterModel(name="tiny", source=source.as_uri(), options=options))


async def test_a_model_whose_source_has_another_version_of_it_by_now_is_another_model(
    database: MemoryDatabase, events: RecordedEvents, model: Path
) -> None:
    remote = RemoteSource(model)
    registrar = Registrar(database.models, Sources({"s3": remote}), events, SequentialIds())
    order = RegisterModel(name="tiny", source="s3://models/tiny")
    first = await registrar.register(order)
    assert first.model.source == "s3://models/tiny"
    files = await database.models.files(first.model.model_id, with_content=False)
    assert {file.version for file in files if file.path.endswith(".safetensors")} == {"etag-1"}
    assert not (await registrar.register(order)).created
    remote.version = "etag-2"
    with pytest.raises(ModelExists):
        await registrar.register(order)


async def test_a_model_that_an_earlier_version_registered_is_the_same_still(
    registrar: Registrar, database: MemoryDatabase, model: Path
) -> None:
    first = await registrar.register(RegisterModel(name="tiny", source=model.as_uri()))
    files = await database.models.files(first.model.model_id, with_content=True)
    await database.models.delete("tiny")
    old = [msgspec.structs.replace(file, version="") for file in files]
    await database.models.add(first.model, old)
    assert (await registrar.register(RegisterModel(name="tiny", source=model.as_uri()))).model == first.model


async def test_of_two_who_register_at_once_one_creates(
    database: MemoryDatabase, events: RecordedEvents, model: Path, tmp_path: Path
) -> None:
    class Late:
        """Somebody else registers between this one's look and its write."""

        def __init__(self) -> None:
            self.missed = False

        async def get(self, name: str) -> ModelSpec:
            if not self.missed:
                self.missed = True
                await Registrar(database.models, sources_of(tmp_path), events, SequentialIds()).register(order)
                return await database.models.get("nobody")
            return await database.models.get(name)

        async def files(self, model_id: str, *, with_content: bool) -> list[ModelFile]:
            return await database.models.files(model_id, with_content=with_content)

        async def manifest(self, model_id: str) -> bytes:
            return await database.models.manifest(model_id)

        async def add(self, spec: ModelSpec, files: Sequence[ModelFile], manifest: bytes) -> None:
            await database.models.add(spec, files, manifest)

    order = RegisterModel(name="tiny", source=model.as_uri())
    late = Registrar(Late(), sources_of(tmp_path), events, SequentialIds())  # type: ignore[arg-type]
    assert not (await late.register(order)).created
    assert len(await database.models.all()) == 1


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "-a", "a b", "ä", "a" * 97, "a\n"])
async def test_a_name_that_is_none_is_refused(registrar: Registrar, model: Path, name: str) -> None:
    with pytest.raises(InvalidModelName):
        await registrar.register(RegisterModel(name=name, source=model.as_uri()))


@pytest.mark.parametrize(
    "source",
    ["", "relative/dir", "s3://bucket/x", "http://x/y", "file://host/x", "file:relative", "file:///x?y", "http://[::1", "/no/\0where", "/no/where", "/etc",
     "/" + "a" * 5000],
)  # fmt: skip
async def test_a_source_that_is_no_directory_here_or_not_allowed_is_refused(
    registrar: Registrar, database: MemoryDatabase, source: str
) -> None:
    with pytest.raises(RefusedCheckpoint):
        await registrar.register(RegisterModel(name="tiny", source=source))
    assert await database.models.all() == []


async def test_a_link_does_not_lead_out_of_the_allowed_roots(
    database: MemoryDatabase, events: RecordedEvents, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "link").symlink_to(model)
    registrar = Registrar(database.models, sources_of(tmp_path / "allowed"), events, SequentialIds())
    with pytest.raises(RefusedCheckpoint, match="STOKER_STOREAGENT_ALLOWED_ROOTS"):
        await registrar.register(RegisterModel(name="tiny", source=str(tmp_path / "allowed" / "link")))


async def test_a_refused_model_leaves_nothing_behind(
    registrar: Registrar, database: MemoryDatabase, events: RecordedEvents, model: Path
) -> None:
    with pytest.raises(InvalidRequest):
        await registrar.register(
            RegisterModel(name="tiny", source=str(model), options=ModelOptions(max_model_len=10**6))
        )
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RefusedCheckpoint, match="shards are missing"):
        await registrar.register(RegisterModel(name="tiny", source=str(model)))
    assert await database.models.all() == []
    assert events.emitted == []


def registrations(bus: MemoryBus, registrar: Registrar) -> Callable[[Message], Awaitable[None]]:
    unasked: Any = None  # what answers the other orders
    return Handlers(bus, registrar, unasked, unasked, unasked, node="n1").register


async def registration(bus: MemoryBus, name: str, source: str) -> Registered | Failed:
    order = RegisterModel(name=name, source=source)
    reply: Registered | Failed = await ask(bus, subjects.store_register("n1"), order, RegisterReply, timeout_s=10)
    return reply


async def test_the_bus_hears_registered_or_failed(registrar: Registrar, database: MemoryDatabase, model: Path) -> None:
    broker = MemoryBroker()
    agent, gateway = broker.connect(), broker.connect()
    await agent.subscribe(subjects.store_register("n1"), registrations(agent, registrar))
    assert isinstance(await registration(gateway, "tiny", str(model)), Registered)
    refused = await registration(gateway, "tiny2", str(model / "nothing"))
    assert isinstance(refused, Failed)
    assert (refused.code, refused.retryable) == ("refused_checkpoint", False)
    database.go_down()
    down = await registration(gateway, "tiny3", str(model))
    assert isinstance(down, Failed)
    assert (down.code, down.retryable) == ("database_unavailable", True)


async def test_a_file_name_that_is_no_text_is_answered_all_the_same(registrar: Registrar, model: Path) -> None:
    (model / b"\xff.py".decode("utf-8", "surrogateescape")).write_text("")
    broker = MemoryBroker()
    agent, gateway = broker.connect(), broker.connect()
    await agent.subscribe(subjects.store_register("n1"), registrations(agent, registrar))
    refused = await registration(gateway, "tiny", str(model))
    assert isinstance(refused, Failed)
    assert "custom code" in refused.message
