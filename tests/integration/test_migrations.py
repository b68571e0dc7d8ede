import asyncio
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection
from tests.support.databases import execute

from stoker_core.errors import DatabaseUnavailable, SetupFailed
from stoker_db.migrate import current, downgrade, upgrade, with_connection
from stoker_db.tables import metadata

CHECKOUT = Path(__file__).parents[2]

# Everything that Postgres keeps of tables, as text: two databases with equal answers have equal tables.
CATALOG = {
    "columns": """
        SELECT table_name, column_name, data_type, udt_name, is_nullable, column_default, is_identity,
            identity_generation, collation_name
        FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2
    """,
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2
    """,
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1, 2",
}


async def catalog(url: str) -> dict[str, list[tuple[object, ...]]]:
    found = {name: await execute(url, query) for name, query in CATALOG.items()}
    return {name: [row for row in rows if row[0] != "alembic_version"] for name, rows in found.items()}


async def tables(url: str) -> set[object]:
    return {row[0] for row in await execute(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}


async def test_migrating_an_empty_database_gives_what_the_metadata_gives(empty_postgres_url: str) -> None:
    await with_connection(empty_postgres_url, metadata.create_all)
    wanted = await catalog(empty_postgres_url)
    await with_connection(empty_postgres_url, metadata.drop_all)
    await upgrade(empty_postgres_url)
    assert await catalog(empty_postgres_url) == wanted
    assert all(wanted.values())


async def test_alembic_sees_no_difference_from_the_metadata(postgres_url: str) -> None:
    differences: list[object] = []

    def compare(connection: Connection) -> None:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        differences.extend(compare_metadata(context, metadata))

    await with_connection(postgres_url, compare)
    assert differences == []


async def test_migrating_twice_changes_nothing_and_keeps_the_rows(empty_postgres_url: str) -> None:
    assert await current(empty_postgres_url) is None
    await upgrade(empty_postgres_url)
    before, revision = await catalog(empty_postgres_url), await current(empty_postgres_url)
    assert revision is not None
    await execute(empty_postgres_url, "UPDATE leader SET term = 7")
    await upgrade(empty_postgres_url)
    assert (await catalog(empty_postgres_url), await current(empty_postgres_url)) == (before, revision)
    assert await execute(empty_postgres_url, "SELECT id, term, holder FROM leader") == [(1, 7, "")]


async def test_simultaneous_migrations_wait_for_one_another(empty_postgres_url: str) -> None:
    await asyncio.gather(*(upgrade(empty_postgres_url) for _ in range(4)))
    assert await execute(empty_postgres_url, "SELECT count(*) FROM leader") == [(1,)]


async def test_migrating_down_leaves_no_table_and_up_again_works(postgres_url: str) -> None:
    await downgrade(postgres_url)
    assert await tables(postgres_url) == {"alembic_version"}
    assert await current(postgres_url) is None
    await upgrade(postgres_url)
    assert await tables(postgres_url) == {"alembic_version", *metadata.tables}


async def test_the_second_version_keeps_what_the_first_one_held_and_can_be_undone(postgres_url: str) -> None:
    await downgrade(postgres_url, "0001")
    await execute(postgres_url, "INSERT INTO models VALUES ('m1', 'tiny', 'LlamaForCausalLM', 1, '{}')")
    await execute(postgres_url, "INSERT INTO model_files VALUES ('m1', 'config.json', 2, 'sha256:c0', '{}')")
    await execute(postgres_url, "INSERT INTO placements VALUES ('m1', 'a', 'ssd', 1)")
    await upgrade(postgres_url)
    assert await execute(postgres_url, "SELECT manifest FROM models") == [(b"",)]
    assert await execute(postgres_url, "SELECT digest, version, chunk_digests FROM model_files") == [
        ("sha256:c0", "", [])
    ]
    await execute(postgres_url, "INSERT INTO placements VALUES ('m1', 'a', 'peer', 1)")
    await downgrade(postgres_url, "0001")
    assert await execute(postgres_url, "SELECT tier FROM placements") == [("ssd",)]
    assert await execute(postgres_url, "SELECT model_id, digest FROM model_files") == [("m1", "sha256:c0")]


async def test_a_migration_that_fails_leaves_the_database_as_it_was(empty_postgres_url: str) -> None:
    await execute(empty_postgres_url, "CREATE TABLE leader (mine text)")
    with pytest.raises(Exception, match="leader"):
        await upgrade(empty_postgres_url)
    assert await tables(empty_postgres_url) == {"leader"}


async def test_a_database_of_an_unknown_later_version_is_left_alone(postgres_url: str) -> None:
    await execute(postgres_url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SetupFailed, match="9999"):
        await upgrade(postgres_url)
    assert await current(postgres_url) == "9999"


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(DatabaseUnavailable):
        await upgrade("postgresql://stoker@127.0.0.1:1/stoker")


@pytest.mark.timeout(360)  # it may compile the native loader
def test_the_installed_wheel_migrates_with_its_own_copy(empty_postgres_url: str, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=CHECKOUT, check=True, capture_output=True, timeout=300)
    installed = tmp_path / "installed"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(installed)
    script = """
import asyncio, sys
from stoker_db import migrate
asyncio.run(migrate.upgrade(sys.argv[1]))
print(migrate.__file__)
"""
    # Without site: the development install of this environment would come before the wheel.
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, empty_postgres_url],
        env=os.environ | {"PYTHONPATH": f"{installed}:{sysconfig.get_path('purelib')}"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert Path(done.stdout.strip()).is_relative_to(installed)
    assert asyncio.run(tables(empty_postgres_url)) == {"alembic_version", *metadata.tables}


async def test_the_command_line_of_alembic_migrates_too(
    empty_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_POSTGRES_URL", empty_postgres_url)
    monkeypatch.chdir(CHECKOUT)
    await asyncio.to_thread(command.upgrade, Config("alembic.ini"), "head")
    assert await tables(empty_postgres_url) == {"alembic_version", *metadata.tables}
