from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from tests.support.checkpoints import plain_checkpoint

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.readers import Engine

ENGINES: tuple[Engine, ...] = get_args(Engine)
POOL_CHUNKS = 8


@pytest.fixture(params=ENGINES)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """POOL_CHUNKS chunks, by each engine. Whatever the test does, the pool must have all of them back in the end."""
    with Pool(POOL_CHUNKS * CHUNK_BYTES, huge="none", lock=False, reader=request.param) as pool:
        yield pool
        assert pool.native.chunks_free == POOL_CHUNKS


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40 MiB, which is three chunks, with eight tensors. Nobody changes it."""
    directory = tmp_path_factory.mktemp("model")
    plain_checkpoint(directory)
    return directory
