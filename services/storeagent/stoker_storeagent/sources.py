"""Where models may come from: directories of this node, under the roots that its operator allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stoker_core.errors import RefusedCheckpoint

SOURCE_CHARS_MAX = 4096


class Sources:
    """allowed_roots: a source lies under one of them once links are followed."""

    def __init__(self, allowed_roots: Sequence[Path]) -> None:
        self._allowed_roots = allowed_roots

    def directory(self, source: str) -> Path:
        """The directory that a `file://` URL or an absolute path means, without links. Blocks on the disk.

        Raises RefusedCheckpoint for anything else, and for what is missing or not allowed.
        """
        named = _named(source)
        try:
            root = named.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise RefusedCheckpoint(str(named), getattr(error, "strerror", None) or "a loop of links") from error
        if not any(root.is_relative_to(allowed.resolve()) for allowed in self._allowed_roots):
            raise RefusedCheckpoint(
                str(named), "it lies outside of the directories that STOKER_STOREAGENT_ALLOWED_ROOTS allows"
            )
        return root


def _named(source: str) -> Path:
    if len(source) > SOURCE_CHARS_MAX:
        raise RefusedCheckpoint(source[:100], f"the source has more than {SOURCE_CHARS_MAX} characters")
    path = source
    if "://" in source or source.startswith("file:"):
        try:
            parts = urlsplit(source)
        except ValueError as error:
            raise RefusedCheckpoint(source, f"is no URL: {error}") from error
        if parts.scheme != "file" or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise RefusedCheckpoint(source, "the source must be file:///absolute/directory")
        path = unquote(parts.path, errors="surrogateescape")
    if not path.startswith("/") or "\0" in path:
        raise RefusedCheckpoint(source, "is no absolute directory; the source must be file:///absolute/directory")
    return Path(path)
