import asyncio

import pytest
from tests.support.databases import DatabaseKind, a_model, execute

from stoker_contracts.models import Tier
from stoker_core.errors import CorruptCheckpoint, ModelExists, ModelNotFound, RefusedCheckpoint
from stoker_db.pg import PgDatabase
from stoker_db.ports import Database, ModelFile, Placement

CONFIG = ModelFile(path="config.json", size_bytes=2, digest="sha256:c0", content=b"{}")
WEIGHTS = ModelFile(path="model.safetensors", size_bytes=269_000_000_000)


async def test_a_model_is_returned_as_it_was_added(database: Database) -> None:
    await database.models.add(a_model(), [WEIGHTS, CONFIG])
    assert await database.models.get("tiny") == a_model()


async def test_all_models_come_ordered_by_name_by_code_point(database: Database) -> None:
    for name in ("b", "a-2", "B", "a.1", "a"):
        await database.models.add(a_model(name), [])
    assert [model.name for model in await database.models.all()] == ["B", "a", "a-2", "a.1", "b"]


async def test_an_unknown_model_is_not_found(database: Database) -> None:
    with pytest.raises(ModelNotFound) as caught:
        await database.models.get("nothing")
    assert caught.value.model == "nothing"
    assert await database.models.all() == []


async def test_files_come_ordered_by_path_with_contents_only_when_asked_for(database: Database) -> None:
    await database.models.add(a_model(), [WEIGHTS, CONFIG])
    assert await database.models.files("model-tiny", with_content=True) == [CONFIG, WEIGHTS]
    without = await database.models.files("model-tiny", with_content=False)
    assert [(f.path, f.size_bytes, f.digest, f.content) for f in without] == [
        ("config.json", 2, "sha256:c0", None),
        ("model.safetensors", 269_000_000_000, "", None),
    ]


async def test_an_empty_content_is_not_an_absent_one(database: Database) -> None:
    await database.models.add(a_model(), [ModelFile(path="empty", size_bytes=0, content=b"")])
    assert [f.content for f in await database.models.files("model-tiny", with_content=True)] == [b""]


async def test_an_unknown_model_has_no_files(database: Database) -> None:
    assert await database.models.files("model-nothing", with_content=True) == []


async def test_a_taken_name_is_refused_and_the_first_registration_stays(database: Database) -> None:
    await database.models.add(a_model(), [CONFIG])
    with pytest.raises(ModelExists) as caught:
        await database.models.add(a_model(model_id="model-second"), [WEIGHTS])
    assert caught.value.model == "tiny"
    assert (await database.models.get("tiny")).model_id == "model-tiny"
    assert await database.models.files("model-second", with_content=False) == []
    assert await database.models.files("model-tiny", with_content=True) == [CONFIG]


async def test_of_simultaneous_registrations_of_a_name_one_wins(database_kind: DatabaseKind) -> None:
    clients = [database_kind.database, database_kind.other] * 3
    outcomes = await asyncio.gather(
        *(
            client.models.add(a_model(model_id=f"model-{number}"), [CONFIG, WEIGHTS])
            for number, client in enumerate(clients)
        ),
        return_exceptions=True,
    )
    assert [type(o) for o in outcomes if o is not None] == [ModelExists] * 5
    winner = (await database_kind.database.models.get("tiny")).model_id
    for number in range(6):
        files = await database_kind.database.models.files(f"model-{number}", with_content=False)
        assert len(files) == (2 if f"model-{number}" == winner else 0)


@pytest.mark.parametrize(
    "path", ["", ".", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\0b"], ids=lambda path: repr(path)
)
async def test_a_path_that_is_not_plain_is_refused_and_nothing_is_written(database: Database, path: str) -> None:
    with pytest.raises(RefusedCheckpoint) as caught:
        await database.models.add(a_model(), [CONFIG, ModelFile(path=path, size_bytes=1)])
    assert caught.value.path == path
    assert await database.models.all() == []
    assert await database.models.files("model-tiny", with_content=False) == []


@pytest.mark.parametrize("bad", [CONFIG, ModelFile(path="x", size_bytes=-1)], ids=["twice", "negative"])
async def test_a_file_listed_twice_or_of_negative_size_is_refused(database: Database, bad: ModelFile) -> None:
    with pytest.raises(RefusedCheckpoint):
        await database.models.add(a_model(), [CONFIG, bad])
    assert await database.models.all() == []


async def test_a_failure_at_a_file_leaves_no_model_behind(postgres_url: str) -> None:
    await execute(
        postgres_url, "ALTER TABLE model_files ADD CONSTRAINT no_weights CHECK (path NOT LIKE '%.safetensors')"
    )
    database = await PgDatabase.connect(postgres_url)
    with pytest.raises(Exception, match="no_weights"):
        await database.models.add(a_model(), [CONFIG, WEIGHTS])
    assert await database.models.all() == []
    assert await database.models.files("model-tiny", with_content=False) == []
    await database.close()


async def test_a_manifest_is_kept_as_it_was_added_until_the_model_is_deleted(database: Database) -> None:
    await database.models.add(a_model(), [WEIGHTS], bytes(range(256)))
    await database.models.add(a_model("other"), [WEIGHTS])
    assert await database.models.manifest("model-tiny") == bytes(range(256))
    assert await database.models.manifest("model-other") == b""
    await database.models.delete("tiny")
    assert await database.models.manifest("model-tiny") == b""


async def test_versions_and_digests_of_chunks_are_returned_as_they_were_added(database: Database) -> None:
    bound = ModelFile(path="a.safetensors", size_bytes=1, version='"etag"', chunk_digests=("xxh3_128:a", "xxh3_128:b"))
    await database.models.add(a_model(), [WEIGHTS, bound])
    for with_content in (True, False):
        assert await database.models.files("model-tiny", with_content=with_content) == [bound, WEIGHTS]


async def chunks(database: Database) -> dict[str, tuple[str, ...]]:
    return {f.path: f.chunk_digests for f in await database.models.files("model-tiny", with_content=False)}


async def test_chunks_are_bound_once_known_and_binding_the_same_again_changes_nothing(database: Database) -> None:
    await database.models.add(a_model(), [CONFIG, WEIGHTS])
    for _ in range(2):
        await database.models.bind_chunks("model-tiny", {"model.safetensors": ("x:aa", "x:bb")})
        assert await chunks(database) == {"config.json": (), "model.safetensors": ("x:aa", "x:bb")}


@pytest.mark.parametrize(
    ("found", "named"),
    [(("x:00", "x:ff", "x:ff"), "chunk 1 "), (("x:00",), "chunk 1 "), (("x:00", "x:01", "x:02", "x:03"), "chunk 3 ")],
    ids=["other", "fewer", "more"],
)
async def test_differing_chunks_are_refused_by_the_first_one_and_no_other_file_is_bound(
    database: Database, found: tuple[str, ...], named: str
) -> None:
    bound = ModelFile(path="b.safetensors", size_bytes=1, chunk_digests=("x:00", "x:01", "x:02"))
    await database.models.add(a_model(), [ModelFile(path="a.safetensors", size_bytes=1), bound, WEIGHTS])
    with pytest.raises(CorruptCheckpoint) as caught:
        await database.models.bind_chunks(
            "model-tiny", {"a.safetensors": ("x:aa",), "b.safetensors": found, "model.safetensors": ("x:bb",)}
        )
    assert caught.value.path == "b.safetensors"
    assert named in caught.value.reason
    assert await chunks(database) == {
        "a.safetensors": (),
        "b.safetensors": ("x:00", "x:01", "x:02"),
        "model.safetensors": (),
    }


async def test_of_simultaneous_bindings_that_differ_one_wins(database_kind: DatabaseKind) -> None:
    await database_kind.database.models.add(a_model(), [WEIGHTS])
    outcomes = await asyncio.gather(
        *(
            client.models.bind_chunks("model-tiny", {"model.safetensors": (digest,)})
            for client, digest in [(database_kind.database, "x:aa"), (database_kind.other, "x:bb")]
        ),
        return_exceptions=True,
    )
    assert sorted(type(o).__name__ for o in outcomes) == ["CorruptCheckpoint", "NoneType"]
    bound = await chunks(database_kind.database)
    assert bound == {"model.safetensors": ("x:aa" if outcomes[0] is None else "x:bb",)}


async def test_binding_chunks_of_a_deleted_model_or_of_no_file_changes_nothing(database: Database) -> None:
    await database.models.bind_chunks("model-gone", {"model.safetensors": ("x:aa",)})
    await database.models.add(a_model(), [WEIGHTS])
    await database.models.bind_chunks("model-tiny", {"other.safetensors": ("x:aa",)})
    await database.models.bind_chunks("model-tiny", {})
    assert await chunks(database) == {"model.safetensors": ()}


async def test_as_many_chunks_as_a_model_of_a_terabyte_has_are_bound(database: Database) -> None:
    many = tuple(f"xxh3_128:{chunk:032x}" for chunk in range(1 << 16))
    await database.models.add(a_model(), [WEIGHTS])
    await database.models.bind_chunks("model-tiny", {"model.safetensors": many})
    assert await chunks(database) == {"model.safetensors": many}


async def test_deleting_forgets_a_model_its_files_and_its_placements_and_no_other(database: Database) -> None:
    for name in ("tiny", "other"):
        await database.models.add(a_model(name), [CONFIG, WEIGHTS])
        await database.tiers.place(Placement(model_id=f"model-{name}", node="n", tier=Tier.SSD, held_bytes=1))
    assert await database.models.delete("tiny") == a_model("tiny")
    with pytest.raises(ModelNotFound):
        await database.models.get("tiny")
    assert await database.models.files("model-tiny", with_content=False) == []
    assert [p.model_id for p in await database.tiers.placements()] == ["model-other"]
    assert len(await database.models.files("model-other", with_content=False)) == 2


async def test_deleting_an_unknown_model_says_so(database: Database) -> None:
    with pytest.raises(ModelNotFound):
        await database.models.delete("nothing")


async def test_a_deleted_name_can_be_registered_again(database: Database) -> None:
    await database.models.add(a_model(), [CONFIG])
    await database.models.delete("tiny")
    await database.models.add(a_model(model_id="model-second"), [WEIGHTS])
    assert (await database.models.get("tiny")).model_id == "model-second"


async def test_a_model_stored_by_a_neighbouring_version_is_read(postgres_url: str) -> None:
    """A field that this version does not know is ignored; one that the other did not know has its default."""
    database = await PgDatabase.connect(postgres_url)
    await database.models.add(a_model(), [])
    await execute(postgres_url, """UPDATE models SET spec = (spec || '{"from_the_future": 1}') - 'wait_s'""")
    model = await database.models.get("tiny")
    assert (model.wait_s, model.queue_max) == (60.0, 3)
    await database.close()
