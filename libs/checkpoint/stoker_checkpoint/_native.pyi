"""The native part of the loader. Nothing here knows safetensors: it moves bytes of files into chunks of a pool.

Every blocking call releases the GIL. Sizes are bytes. Functions of the operating system that fail raise OSError.
"""

from collections.abc import Sequence
from pathlib import Path

CHUNK_BYTES: int  # 16 MiB
ALIGN_BYTES: int  # 4096: of file offsets, sizes and memory of every read

# Board.state
LOADING: int
DONE: int
FAILED: int
CANCELLED: int

# Why a load failed: Board.failure()[0]
READ_ERROR: int  # the kernel's errno
TRUNCATED: int  # the file ended before its registered size
CHANGED: int  # size or mtime differ from those given
MISMATCH: int  # a digest differs (reported by whoever verified)
SOURCE: int  # what belongs there cannot be had from anywhere (reported by the load's owner)

class Pool:
    """One memfd cut into chunks. Threads of the lowest priority fault, collapse and lock it from the first chunk on."""

    def __init__(
        self,
        chunks: int,
        *,
        huge: str = "auto",  # auto (hugetlb if enough pages are reserved, else collapse) | hugetlb | collapse | none
        lock: bool = True,
        fault_threads: int = 2,
        register_cuda: bool = False,
    ) -> None: ...
    @staticmethod
    def adopt(
        fd: int, used: Sequence[int], *, lock: bool = True, fault_threads: int = 2, register_cuda: bool = False
    ) -> Pool:
        """Take over the pool behind `fd` (duplicated): `used` chunks stay allocated. Raises ValueError if it is no pool."""

    def fileno(self) -> int: ...
    def reader_fd(self) -> int:
        """A new read-only descriptor for consumers, close-on-exec; the caller closes it."""

    def allocate(self, count: int) -> list[int] | None:
        """Faulted chunks first; None, and nothing is taken, if fewer than `count` are free."""

    def free(self, chunks: Sequence[int]) -> None:
        """Raises ValueError for a chunk that is not allocated, before any is freed."""

    def chunk(self, index: int) -> memoryview:
        """Its CHUNK_BYTES, writable; keeps the pool alive."""

    def wait_warm(self, timeout_s: float) -> bool: ...
    @property
    def chunks_total(self) -> int: ...
    @property
    def chunks_free(self) -> int: ...
    @property
    def chunks_warm(self) -> int: ...
    @property
    def chunks_huge(self) -> int: ...
    @property
    def chunks_locked(self) -> int: ...
    @property
    def pages(self) -> str:
        """hugetlb | collapsed | small: what the chunks lie on. `collapsed` only while no collapse has been refused."""

    @property
    def fault_errno(self) -> int:
        """Of the first refusal, else 0; as the next two. Chunks whose memory was refused stay cold."""

    @property
    def collapse_errno(self) -> int: ...
    @property
    def lock_errno(self) -> int: ...
    def close(self) -> None:
        """Ends the fault threads. Memory goes with the last view, load or memoryview of it. Idempotent."""

class Board:
    """Shared memory of one load: its chunk table, which positions are ready, how it ended. A memfd."""

    @staticmethod
    def open(fd: int) -> Board:
        """Map the board behind `fd` (duplicated). Raises ValueError if it is none."""

    def fileno(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def window(self) -> int:
        """Distinct chunks if the load streams through a window: position p lies in table[p] until released. 0: none."""

    @property
    def table(self) -> list[int]: ...
    @property
    def ready_count(self) -> int: ...
    @property
    def released(self) -> int:
        """Of a window: positions below this one are done with."""

    @property
    def state(self) -> int: ...
    def is_ready(self, position: int) -> bool: ...
    def wait(self, position: int, timeout_s: float) -> bool:
        """True once `position` is ready; False after the timeout or once the load ended without it."""

    def release(self, position: int) -> None:
        """A consumer of a window is done with all positions below `position`."""

    def failure(self) -> tuple[int, int, int, int]:
        """(kind, file index, byte offset in the file, errno)."""

class Reader:
    """Reads files into a pool's chunks, O_DIRECT where the file system takes it; one queue for all of its loads."""

    def __init__(self, pool: Pool, engine: str, *, depth: int, block_bytes: int) -> None:
        """engine: io_uring | threads.  depth: reads in flight; so depth × block_bytes is the bound.

        Raises OSError if the kernel refuses the engine (ENOSYS, EPERM, ENOMEM).
        """

    @property
    def engine(self) -> str: ...
    @property
    def registered_buffers(self) -> bool: ...
    def start(
        self,
        files: Sequence[tuple[str, int, int]],  # path, size, mtime in ns (-1: not checked)
        extents: Sequence[tuple[int, int, int, int]],  # position, file index, offset, size; ascending by position
        table: Sequence[int],  # position → chunk
        *,
        window: int = 0,
        hold: bool = False,
        recover: bool = False,
        priority: int = 0,
    ) -> Load:
        """Begin to read; returns at once. Extents are multiples of ALIGN_BYTES (a size may pass the file's end) and lie
        at `offset % CHUNK_BYTES` of their chunk.

        hold: positions that were read wait in next_read() until publish().  priority: higher first, else by arrival.
        recover: it holds; positions without extents are the owner's to write and publish, and so are those that
        next_failed() gives. No file ends such a load.
        Raises ValueError for what breaks these rules. Files are opened by the reader: their errors end the load.
        """

    def close(self) -> None:
        """Cancels its loads, waits for reads in flight, ends its threads. Idempotent."""

class Load:
    """A load in progress, on the side that reads. Dropping it cancels it."""

    @property
    def board(self) -> Board: ...
    @property
    def direct(self) -> bool:
        """Whether every file so far was read with O_DIRECT."""

    @property
    def read_bytes(self) -> int: ...
    def fileno(self) -> int:
        """An eventfd that becomes readable when positions became ready, were read (hold) or failed (recover), or the load ended."""

    @property
    def unsettled(self) -> int:
        """Positions of files that were neither published nor became the owner's; 0 after the end."""

    def next_read(self, timeout_s: float) -> int | None:
        """hold: a position that was read and waits to be published; None after the timeout, if none is unsettled, or the end."""

    def publish(self, position: int) -> None:
        """Raises ValueError for a position that does not wait for it, or whose window is not open."""

    def reject(self, position: int, kind: int, file: int, offset: int) -> None:
        """recover: what was read of a position is wrong; it is the owner's now."""

    def next_failed(self) -> tuple[int, int, int, int, int] | None:
        """recover: a position that is the owner's from now on: (position, kind, file index, offset, errno). Does not wait."""

    def window_open(self, position: int) -> bool:
        """Whether what streamed through the position's chunk before it was published and released."""

    def fail(self, kind: int, file: int, offset: int, errno: int) -> None: ...
    def cancel(self) -> None:
        """No read is begun any more. Reads in flight end by themselves: join() before the chunks are freed."""

    def join(self, timeout_s: float) -> bool:
        """Whether the load has ended and touches its chunks no more."""

class View:
    """Chunks side by side at one address, 2 MiB aligned: a consumer's mapping. Exports a buffer (tensors keep it alive).

    Private: what a consumer writes stays in its own copy of the page and never reaches the pool.
    """

    def __init__(self, pool_fd: int, table: Sequence[int]) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def touch(self, offset: int, size: int) -> int:
        """Read one byte of every page; returns their sum (so that nobody optimises it away)."""

    def privatise(self, offset: int, size: int) -> None:
        """Give these pages copies of this process's own (MADV_POPULATE_WRITE): they stay as they are whatever the pool does."""

class Writer:
    """Calls of the kernel in threads of its own. What is done is told by an eventfd and taken with `take_done`."""

    def __init__(self, threads: int) -> None:
        """Raises ValueError for a number of threads that is not within 1 to 64."""

    def fileno(self) -> int:
        """Readable while there is something to take."""

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """One pwrite; returns its ticket. The caller keeps `fd` and `data` until it is done.

        Raises ValueError without data or with more than 1024 calls waiting, RuntimeError once closed.
        """

    def sync(self, fd: int) -> int:
        """One fdatasync; as `write`."""

    def open(self, path: Path, flags: int, mode: int) -> int:
        """One open, with O_CLOEXEC; as `write`."""

    def rename(self, source: Path, target: Path) -> int:
        """One rename; as `write`."""

    def take_done(self) -> list[tuple[int, int]]:
        """(ticket, what the call returned or -errno) of what is done and was not taken."""

    def close(self) -> None:
        """Do what waits, then end the threads. Idempotent."""

def io_uring_errno() -> int:
    """0 if this kernel gives us an io_uring, else why not."""

def sequential_read(path: str, size_bytes: int, *, block_bytes: int) -> float:
    """Seconds to read the file once, O_DIRECT, one block after the other, into one buffer: the raw device. For benchmarks."""

DEVICE_ERROR: int  # a kind of failure, of rings only: a call of the CUDA driver; its errno is the CUresult

def cuda_available() -> tuple[bool, str]:
    """Whether there is a CUDA driver with a device; if not, why."""

def cuda_devices() -> list[bytes]:
    """The 16 bytes of each device's UUID, by ordinal. Raises RuntimeError if the driver refuses or is missing."""

def cuda_pinned() -> tuple[int, str]:
    """Bytes of pools that this process has registered with CUDA, and why more were refused (empty: they were not)."""

class DeviceRing:
    """Slots of CHUNK_BYTES in one device's memory, made with cuMemCreate. Serves one load at a time."""

    def __init__(self, device: int, slots: int) -> None:
        """Raises RuntimeError, naming the call and its result, if the driver refuses; ValueError for fewer than 2 slots."""

    def fileno(self) -> int:
        """Of the memory. A process that maps it keeps it, whatever becomes of this ring."""

    @property
    def slots(self) -> int: ...

class Feeder:
    """Copies a load's positions into a ring as they become ready, on a thread of its own; releases those of a window.

    It ends when all are copied, when the load ends early, or by cancel(). Dropping it cancels it and waits for copies.
    """

    def __init__(self, ring: DeviceRing, board: Board, pool: Pool, spans: Sequence[tuple[int, int]]) -> None:
        """spans: for each position, offset and size of the bytes of its chunk to copy. Raises ValueError if they do not fit."""

    def fileno(self) -> int:
        """An eventfd that becomes readable, and stays so, once it ended."""

    @property
    def board_fd(self) -> int:
        """Of the ring's board: what a consumer needs beside the ring's memory."""

    @property
    def filled(self) -> int:
        """Positions that are on the device, or were."""

    @property
    def state(self) -> int: ...
    def failure(self) -> tuple[int, int, int, int]: ...
    def cancel(self) -> None: ...
    def join(self, timeout_s: float) -> bool:
        """Whether it ended and touches neither pool nor ring any more."""

class DeviceRingView:
    """A consumer's side of a ring, in any process. Device work that uses its memory is waited for before it is unmapped."""

    def __init__(self, ring_fd: int, board_fd: int, device: int) -> None:
        """device: the ring's, as numbered in this process. The descriptors stay the caller's.

        Raises ValueError if that is another device or the board is none, RuntimeError if the driver refuses.
        """

    @property
    def positions(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def state(self) -> int: ...
    def failure(self) -> tuple[int, int, int, int]: ...
    def wait(self, position: int, timeout_s: float) -> bool:
        """True once `position` is in the ring; False after the timeout or once feeding ended without it."""

    def slot_of(self, position: int) -> int:
        """Raises ValueError if the position is not in the ring yet."""

    def address(self, slot: int) -> int:
        """On the device."""

    def free(self, slot: int) -> None:
        """Nothing uses the slot any more, on the device either: the feeder may overwrite it now."""
