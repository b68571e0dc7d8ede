"""What to read of a checkpoint: from the tensors that are wanted to aligned reads into chunks. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import msgspec

from stoker_checkpoint.header import Shard, TensorRef, shown
from stoker_checkpoint.manifest import Manifest, is_plain_name
from stoker_core.errors import InvalidRequest

CHUNK_BYTES = 16 * 2**20
"""Of one file and of the pool: chunk i of a file holds its bytes from i × CHUNK_BYTES on."""
ALIGN_BYTES = 4096
"""What O_DIRECT asks of offsets, sizes and memory on every disk we know."""
GAP_BYTES_MAX = 2**20
"""Unwanted bytes between two tensors that are read all the same: at 1 GB/s they take a millisecond, which is about
what another read costs on a disk behind a network."""


class ReadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Which bytes of which files go where.

    shards: names of the files to read.  positions: (index into shards, chunk of that file) in the order of the files;
    a view of the load maps their chunks side by side. There is at least one.
    extents: (position, index into shards, offset, size), by position and offset; multiples of ALIGN_BYTES, none
    crosses a chunk, the last of a file may pass its end by less than ALIGN_BYTES.
    offsets: of each wanted tensor in the view; 0 for those without bytes.  read_bytes: of the files, by all extents.
    """

    shards: tuple[str, ...]
    positions: tuple[tuple[int, int], ...]
    extents: tuple[tuple[int, int, int, int], ...]
    offsets: dict[str, int]
    read_bytes: int


def plan_reads(manifest: Manifest, names: Collection[str] | None = None, *, whole_chunks: bool = False) -> ReadPlan:
    """Cover the tensors called `names` (None: whole files, headers included) with reads that never overlap.

    whole_chunks: read all of every chunk that is touched, as checking digests needs.
    Takes time linear in the number of tensors and chunks. Raises InvalidRequest naming a tensor that does not exist.
    """
    wanted = None if names is None else set(names)
    shards: list[str] = []
    positions: list[tuple[int, int]] = []
    extents: list[tuple[int, int, int, int]] = []
    offsets: dict[str, int] = {}
    read_bytes = 0

    def read(shard: Shard, ranges: Iterable[tuple[int, int]]) -> dict[int, int]:
        """Plan these aligned ranges of one file. Returns chunk of the file → position."""
        nonlocal read_bytes
        found: dict[int, int] = {}
        for begin, end in ranges:
            chunk = begin // CHUNK_BYTES
            if chunk not in found:
                found[chunk] = len(positions)
                positions.append((len(shards), chunk))
            end = min(end, aligned(shard.size_bytes))
            extents.append((len(positions) - 1, len(shards), begin, end - begin))
            read_bytes += min(end, shard.size_bytes) - begin
        if found:
            shards.append(shard.name)
        return found

    for shard in manifest.shards:
        tensors = shard.tensors if wanted is None else [t for t in shard.tensors if t.name in wanted]
        if wanted is None:
            ranges = _chunks(range(chunk_count(shard.size_bytes)))
        elif whole_chunks:
            ranges = _chunks(dict.fromkeys(begin // CHUNK_BYTES for begin, _ in _pieces(tensors)))
        else:
            ranges = _merged(_pieces(tensors))
        found = read(shard, ranges)
        for tensor in tensors:
            chunk, within = divmod(tensor.offset_bytes, CHUNK_BYTES)
            offsets[tensor.name] = found[chunk] * CHUNK_BYTES + within if tensor.size_bytes else 0
    if wanted is not None and (unknown := wanted - offsets.keys()):
        raise InvalidRequest(f"the checkpoint has no tensor {shown(min(unknown))}", "names")
    if not positions:  # only tensors without bytes; a load needs a position, and finds out whether a file is there
        read(manifest.shards[0], _chunks([0]) if whole_chunks else [(0, ALIGN_BYTES)])
    return ReadPlan(
        shards=tuple(shards),
        positions=tuple(positions),
        extents=tuple(extents),
        offsets=offsets,
        read_bytes=read_bytes,
    )


def aligned(size: int) -> int:
    """Rounded up to a multiple of ALIGN_BYTES."""
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def chunk_count(size: int) -> int:
    """Of a file of that size."""
    return -(-size // CHUNK_BYTES)


def shards_of(plan: ReadPlan, manifest: Manifest) -> list[Shard]:
    """The shards that the plan reads. Raises InvalidRequest if one is not the manifest's."""
    by_name = {shard.name: shard for shard in manifest.shards}
    for name in plan.shards:
        if name not in by_name or not is_plain_name(name):
            raise InvalidRequest(f"the plan reads {shown(name)}, which is no shard of the checkpoint", "plan")
    return [by_name[name] for name in plan.shards]


def check_whole_chunks(plan: ReadPlan, shards: Sequence[Shard], param: str) -> None:
    """shards: the plan's. Raises InvalidRequest, naming `param`, if it reads less than every chunk that it touches."""
    for _, file, offset, size in plan.extents:
        if offset % CHUNK_BYTES or size < min(CHUNK_BYTES, shards[file].size_bytes - offset):
            raise InvalidRequest("a plan of less than whole chunks cannot be verified", param)


def _chunks(indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    for index in indices:
        yield index * CHUNK_BYTES, (index + 1) * CHUNK_BYTES


def _pieces(tensors: Iterable[TensorRef]) -> Iterator[tuple[int, int]]:
    """Aligned begin and end of each tensor's part of each chunk, ascending; neighbours may overlap."""
    for tensor in tensors:
        at, end = tensor.offset_bytes, tensor.offset_bytes + tensor.size_bytes
        while at < end:
            stop = min(end, (at // CHUNK_BYTES + 1) * CHUNK_BYTES)
            yield at - at % ALIGN_BYTES, aligned(stop)
            at = stop


def _merged(pieces: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join what overlaps or lies less than GAP_BYTES_MAX apart in one chunk."""
    begin = end = 0
    for next_begin, next_end in pieces:
        same_chunk = begin // CHUNK_BYTES == next_begin // CHUNK_BYTES
        if begin < end and same_chunk and next_begin - end < GAP_BYTES_MAX:
            end = next_end
            continue
        if begin < end:
            yield begin, end
        begin, end = next_begin, next_end
    if begin < end:
        yield begin, end
