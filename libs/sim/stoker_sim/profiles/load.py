"""From a TOML file to a `Profile`; what is wrong is said with the file and the key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from stoker_core.errors import InvalidProfile
from stoker_sim.profiles.hardware import NodeKind
from stoker_sim.profiles.models import ModelProfile
from stoker_sim.profiles.profile import Profile

BUILT_IN = ("paper", "h100", "thousand")
FILE_BYTES_MAX = 1 << 20
MODELS_MAX = NODES_MAX = 100_000

_FIELD = re.compile(r"field `([^`]+)`")
_WHERE = re.compile(r"^(.*?) - at `\$\.?(.*)`$")


def load_profile(name: str) -> Profile:
    """name: one of BUILT_IN, or the path of a TOML file, which ends in .toml. Raises InvalidProfile."""
    if name in BUILT_IN:
        return _load(Path(__file__).with_name(f"{name}.toml"))
    if not name.endswith(".toml"):
        raise InvalidProfile(
            name, f"is neither a built-in profile ({', '.join(BUILT_IN)}) nor a file that ends in .toml"
        )
    return _load(Path(name))


def _load(path: Path) -> Profile:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidProfile(str(path), error.strerror or "cannot be read") from error
    if len(content) > FILE_BYTES_MAX:
        raise InvalidProfile(str(path), f"is longer than {FILE_BYTES_MAX:,} bytes")
    try:
        profile = msgspec.convert(tomllib.loads(content.decode()), Profile)
    except UnicodeDecodeError as error:
        raise InvalidProfile(str(path), "is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidProfile(str(path), f"is no TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise _named(path, str(error)) from error
    _check(path, profile)
    return profile


def _named(path: Path, message: str) -> InvalidProfile:
    """msgspec names the field in the text or at the end of the way to it; the key is both together."""
    match = _WHERE.match(message)
    reason, where = (match.group(1), match.group(2)) if match else (message, "")
    field = _FIELD.search(reason)
    return InvalidProfile(str(path), reason, key=".".join(filter(None, (where, field.group(1) if field else ""))))


def _check(path: Path, profile: Profile) -> None:
    """What no single value shows."""
    kinds: list[tuple[str, Sequence[NodeKind | ModelProfile], int]] = [
        ("hardware.nodes", profile.hardware.nodes, NODES_MAX),
        ("models", profile.models, MODELS_MAX),
    ]
    for table, parts, most in kinds:
        if (total := sum(part.count for part in parts)) > most:
            raise InvalidProfile(str(path), f"{total:,} in all are more than {most:,}", key=table)
        seen: set[str] = set()
        for index, part in enumerate(parts):
            if not seen.isdisjoint(part.names):
                raise InvalidProfile(
                    str(path), f"{part.name!r} gives a name that is taken", key=f"{table}[{index}].name"
                )
            seen.update(part.names)
    for index, model in enumerate(profile.models):
        if (need_bytes := model.context_tokens * model.kv_bytes_per_token) > model.kv_cache_bytes:
            reason = f"{model.kv_cache_bytes:,} bytes hold no whole context: {model.context_tokens:,} tokens need {need_bytes:,}"
            raise InvalidProfile(str(path), reason, key=f"models[{index}].kv_cache_bytes")
    names = [loader.name for loader in profile.loaders]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidProfile(str(path), f"{name!r} is taken", key=f"loaders[{index}].name")
