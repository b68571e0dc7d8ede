"""Settings of the storage agent: `STOKER_STOREAGENT_<FIELD>`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from stoker_core.errors import InvalidSettings
from stoker_core.settings import SharedSettings

SOCKET_PATH_BYTES_MAX = 100
"""Linux takes 107; the rest is left to what tools append."""


class StoreagentSettings(SharedSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    SCOPE: ClassVar[str] = "storeagent"

    ssd_capacity_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0  # 0: 80% of what is free or held already
    ssd_dir: str = ""  # default: <home>/nodes/<node>/ssd
    ssd_threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4  # writes to it at once
    scrub_bytes_per_s: Annotated[int, msgspec.Meta(ge=0)] = (
        16 * 1024 * 1024
    )  # 0: chunks are checked only when they are read
    socket: str = ""  # default: <home>/nodes/<node>/store.sock
    keeper_socket: str = ""  # the worker's; default: <home>/nodes/<node>/keeper.sock
    allowed_roots: str = "/"  # absolute directories joined by ':'; models are registered from under these only
    leases_max: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 256  # open connections
    pool_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0  # 0: a quarter of the memory available at start
    pool_huge: Literal["auto", "hugetlb", "collapse", "none"] = "auto"  # pages
    pool_lock: bool = True
    pool_fault_threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    pool_wait_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 10.0  # how long a lease waits for room in the pool
    reader: Literal["auto", "io_uring", "threads"] = "auto"
    ring_slots: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 16  # chunks of device memory for each load; 0: none
    fetches_at_once: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8  # chunks, from peers and sources together
    network_bytes_per_s: Annotated[int, msgspec.Meta(ge=0)] = 0  # in, and as much again out; 0: no limit
    cluster_token: Annotated[str, msgspec.Meta(pattern=r"^(.{16,})?$")] = (
        ""  # 16 characters or more, the same on all nodes; empty: chunks are neither given to peers nor taken from them
    )
    peer_host: str = "127.0.0.1"  # where peers are heard
    peer_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0  # 0: any that is free
    peer_advertise: str = ""  # the host that peers are told; default: peer_host
    peers_max: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64  # connections of peers
    s3_endpoint_url: str = ""  # default: what AWS_ENDPOINT_URL says, or AWS itself
    s3_region: str = ""  # default: as AWS's own tools find it; so are credentials
    s3_anonymous: bool = False  # ask without credentials
    metric_sample_s: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    metric_keep_s: Annotated[float, msgspec.Meta(gt=0)] = 7 * 24 * 3600.0

    @property
    def ssd_path(self) -> Path:
        return Path(self.ssd_dir).expanduser().absolute() if self.ssd_dir else self._node_dir / "ssd"

    @property
    def socket_path(self) -> Path:
        """Raises InvalidSettings if it is too long for a Unix socket."""
        path = Path(self.socket).expanduser().absolute() if self.socket else self._node_dir / "store.sock"
        size_bytes = len(str(path).encode())
        if size_bytes > SOCKET_PATH_BYTES_MAX:
            raise InvalidSettings(
                f"the socket's path {path} has {size_bytes} bytes; a Unix socket may have {SOCKET_PATH_BYTES_MAX}. "
                "Set STOKER_STOREAGENT_SOCKET or a shorter STOKER_HOME"
            )
        return path

    @property
    def keeper_path(self) -> Path:
        return (
            Path(self.keeper_socket).expanduser().absolute() if self.keeper_socket else self._node_dir / "keeper.sock"
        )

    @property
    def allowed_root_paths(self) -> tuple[Path, ...]:
        """Raises InvalidSettings unless there is one and all are absolute."""
        roots = tuple(Path(root) for root in self.allowed_roots.split(":") if root)
        if not roots or not all(root.is_absolute() for root in roots):
            raise InvalidSettings("STOKER_STOREAGENT_ALLOWED_ROOTS: must be absolute directories joined by ':'")
        return roots

    @property
    def _node_dir(self) -> Path:
        return self.home / "nodes" / self.node
