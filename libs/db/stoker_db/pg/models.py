"""Models and their files."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy import LargeBinary, delete, null, select, update
from sqlalchemy.dialects.postgresql import insert

from stoker_contracts.models import ModelSpec
from stoker_core.errors import ModelExists, ModelNotFound
from stoker_db.checks import check_chunks, check_files
from stoker_db.pg.session import Session
from stoker_db.ports import ModelFile
from stoker_db.tables import model_files, models

_FILE = [model_files.c[name] for name in ModelFile.__struct_fields__ if name != "content"]


class PgModels:
    """Implements stoker_db.ports.Models."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def add(self, spec: ModelSpec, files: Sequence[ModelFile], manifest: bytes = b"") -> None:
        """Also raises RefusedCheckpoint for files that `check_files` refuses."""
        check_files(files)
        row = insert(models).values(
            model_id=spec.model_id,
            name=spec.name,
            architecture=spec.architecture,
            weight_bytes=spec.weight_bytes,
            # Spelled out: a message leaves defaults out, but a stored model must not change with a later default.
            spec=msgspec.structs.asdict(spec),
            manifest=manifest,
        )
        async with self._session.transaction() as connection:
            added = await connection.execute(
                row.on_conflict_do_nothing(constraint="uq_models_name").returning(models.c.name)
            )
            if added.first() is None:
                raise ModelExists(spec.name)
            if files:
                rows = [{"model_id": spec.model_id, **msgspec.structs.asdict(file)} for file in files]
                await connection.execute(insert(model_files), rows)

    async def get(self, name: str) -> ModelSpec:
        async with self._session.transaction() as connection:
            spec = (await connection.execute(select(models.c.spec).where(models.c.name == name))).scalar_one_or_none()
        if spec is None:
            raise ModelNotFound(name)
        return msgspec.convert(spec, ModelSpec)

    async def all(self) -> list[ModelSpec]:
        async with self._session.transaction() as connection:
            specs = (await connection.execute(select(models.c.spec).order_by(models.c.name))).scalars().all()
        return msgspec.convert(list(specs), list[ModelSpec])

    async def files(self, model_id: str, *, with_content: bool) -> list[ModelFile]:
        content = model_files.c.content if with_content else null().cast(LargeBinary).label("content")
        query = select(*_FILE, content).where(model_files.c.model_id == model_id).order_by(model_files.c.path)
        async with self._session.transaction() as connection:
            rows = (await connection.execute(query)).all()
        return [msgspec.convert(row, ModelFile, from_attributes=True) for row in rows]

    async def manifest(self, model_id: str) -> bytes:
        query = select(models.c.manifest).where(models.c.model_id == model_id)
        async with self._session.transaction() as connection:
            return (await connection.execute(query)).scalar_one_or_none() or b""

    async def bind_chunks(self, model_id: str, digests: dict[str, tuple[str, ...]]) -> None:
        """Paths that the model does not have are left out."""
        of_model = model_files.c.model_id == model_id
        # Locked in one order, so that two agents which bind at once neither deadlock nor overwrite.
        query = (
            select(model_files.c.path, model_files.c.chunk_digests)
            .where(of_model, model_files.c.path.in_(digests))
            .order_by(model_files.c.path)
            .with_for_update()
        )
        async with self._session.transaction() as connection:
            bound = {row.path: row.chunk_digests for row in (await connection.execute(query)).all()}
            check_chunks(bound, digests)
            for path in (path for path, known in bound.items() if not known):
                change = update(model_files).where(of_model, model_files.c.path == path)
                await connection.execute(change.values(chunk_digests=list(digests[path])))

    async def delete(self, name: str) -> ModelSpec:
        async with self._session.transaction() as connection:
            gone = await connection.execute(delete(models).where(models.c.name == name).returning(models.c.spec))
            spec = gone.scalar_one_or_none()
        if spec is None:
            raise ModelNotFound(name)
        return msgspec.convert(spec, ModelSpec)
