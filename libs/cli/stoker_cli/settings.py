"""Settings of `stoker up`: STOKER_UP_…"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import msgspec

from stoker_core.settings import SharedSettings

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]  # 0: any free one


class UpSettings(SharedSettings, frozen=True, kw_only=True):
    """The local system. Ports are on 127.0.0.1."""

    SCOPE: ClassVar[str] = "up"

    gateway_port: Port = 8080
    nats_port: Port = 14222
    postgres_port: Port = 15432
    cpu_slots: Annotated[int, msgspec.Meta(ge=1, le=64)] | None = None  # None: as the worker chooses
    demo: bool = True
    demo_cache: Path | None = None  # None: <home>/cache; several homes may share one
    ready_timeout_s: float = 180.0  # from the start of the services to a node that can start instances
