"""Settings from the environment: frozen, typed, and refused when unknown.

`STOKER_<FIELD>` holds what all services share; `STOKER_<SCOPE>_<FIELD>` holds one service's own.
A key that no scope knows stops the process at boot and is named, so that a typing error never
silently leaves a default in force.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit, urlunsplit

import msgspec

from stoker_core.errors import InvalidSettings

SCOPES = ("gateway", "scheduler", "worker", "storeagent", "up", "test")
"""Scopes that own keys `STOKER_<SCOPE>_…`. A process ignores other scopes' keys; each is checked by its owner."""

_SECRET_FIELD = re.compile(r"(password|secret|token|key)$")
_NODE_NAME = re.compile(r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")


def _default_node() -> str:
    name = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().split(".")[0].lower()).strip("-")
    return name[:63] or "node"


class SharedSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every service reads. Subclasses add their own fields and set SCOPE."""

    SCOPE: ClassVar[str] = ""

    home: Path = msgspec.field(default_factory=lambda: Path.home() / ".stoker")
    nats_url: str = "nats://127.0.0.1:4222"
    postgres_url: str = "postgresql://stoker@127.0.0.1:5432/stoker"
    node: str = msgspec.field(default_factory=_default_node)
    log_level: str = "info"
    log_format: str = "auto"  # auto (console on a terminal, else json) | json | console
    drain_s: float = 10.0


S = TypeVar("S", bound=SharedSettings)


def _shared_fields() -> set[str]:
    return {f.name for f in msgspec.structs.fields(SharedSettings)}


def known_keys(settings: type[SharedSettings]) -> dict[str, str]:
    """Environment key → field name, for every key that `settings` reads."""
    shared = _shared_fields()
    keys = {}
    for field in msgspec.structs.fields(settings):
        scope = "" if field.name in shared else f"{settings.SCOPE.upper()}_"
        keys[f"STOKER_{scope}{field.name.upper()}"] = field.name
    return keys


def _decode(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value).expanduser().absolute()
    raise NotImplementedError(kind)


def load(settings: type[S], env: Mapping[str, str] | None = None) -> S:
    """Build `settings` from `env` (default: the process's environment).

    Raises InvalidSettings naming the key: unknown, of the wrong type, or out of its range.
    """
    env = os.environ if env is None else env
    keys = known_keys(settings)
    others = tuple(f"STOKER_{scope.upper()}_" for scope in SCOPES if scope != settings.SCOPE)
    raw: dict[str, str] = {}
    for key, value in env.items():
        if key in keys:
            raw[keys[key]] = value
        elif key.startswith("STOKER_") and not key.startswith(others):
            # Compared without the prefix that all share, or any two keys would look alike.
            near = difflib.get_close_matches(key[len("STOKER_") :], [known[len("STOKER_") :] for known in keys], n=1)
            hint = f"; did you mean STOKER_{near[0]}?" if near else ""
            raise InvalidSettings(f"unknown setting {key}{hint}")
    try:
        loaded = msgspec.convert(raw, settings, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        field = re.search(r"\$\.(\w+)", str(error))
        key = next((k for k, name in keys.items() if field and name == field.group(1)), "a setting")
        raise InvalidSettings(f"{key}: {str(error).split(' - at')[0]}") from error
    if not _NODE_NAME.match(loaded.node):
        raise InvalidSettings(
            f"STOKER_NODE: {loaded.node!r} must be lower-case letters, digits and '-', at most 63 characters"
        )
    return loaded


def masked(settings: SharedSettings) -> dict[str, str]:
    """Environment key → value as text with secrets hidden, for `stoker doctor` and the boot log."""
    shown = {}
    for key, name in known_keys(type(settings)).items():
        value = getattr(settings, name)
        text = str(value)
        if value and _SECRET_FIELD.search(name):
            text = "***"
        elif "://" in text:
            parts = urlsplit(text)
            if parts.password:
                text = urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")))
        shown[key] = text
    return shown
