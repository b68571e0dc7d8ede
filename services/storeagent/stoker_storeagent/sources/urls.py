"""What the URL of a source means. Pure; a message never shows what a URL may hold of credentials."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from stoker_checkpoint.header import shown
from stoker_core.errors import RefusedCheckpoint

SOURCE_CHARS_MAX = 4096
PREFIX_BYTES_MAX = 1024
"""Of a key of S3."""
FORMS = {"file": "file:///absolute/directory", "s3": "s3://bucket/prefix"}

_SHOWN_CHARS = 200
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


class S3Prefix(NamedTuple):
    """A model's place in a bucket. prefix: without a slash at its end; empty for the bucket itself."""

    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        """In the one form that is kept."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def folder(self) -> str:
        """What the keys of the model's files begin with."""
        return f"{self.prefix}/" if self.prefix else ""


def scheme_of(source: str) -> str:
    """Of a URL; `file` for an absolute path, empty for anything else."""
    if source.startswith("/"):
        return "file"
    return source.partition(":")[0].lower() if ":" in source[:20] else ""


def shown_source(source: str) -> str:
    """A source for a message: cut, without a user, password, query or fragment, which may be what gives access."""
    if source.startswith("/"):
        return source[:_SHOWN_CHARS]
    scheme, slashes, rest = re.split("[?#]", source[:_SHOWN_CHARS], maxsplit=1)[0].partition("://")
    if not slashes:
        return scheme.rpartition("@")[2]
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def file_path(source: str) -> Path:
    """The absolute path that a `file://` URL, or such a path itself, means. Raises RefusedCheckpoint."""
    _check_length(source)
    path = source
    if not source.startswith("/"):
        try:
            parts = urlsplit(source)
        except ValueError as error:
            raise RefusedCheckpoint(shown_source(source), f"is no URL: {error}") from error
        if parts.scheme != "file" or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise RefusedCheckpoint(shown_source(source), f"the source must be {FORMS['file']}")
        path = unquote(parts.path, errors="surrogateescape")
    if not path.startswith("/") or "\0" in path:
        raise RefusedCheckpoint(shown_source(source), f"is no absolute directory; the source must be {FORMS['file']}")
    return Path(path)


def s3_prefix(source: str) -> S3Prefix:
    """What an `s3://` URL means, taken literally: keys are not percent-encoded in it. Raises RefusedCheckpoint."""
    _check_length(source)
    scheme, _, rest = source.partition("://")
    if scheme.lower() != "s3" or "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
        raise RefusedCheckpoint(shown_source(source), f"the source must be {FORMS['s3']}, with nothing beside it")
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise RefusedCheckpoint(shown_source(source), f"{shown(bucket)} is no name of a bucket")
    prefix = prefix.rstrip("/")
    parts = prefix.split("/") if prefix else []
    if any(part in ("", ".", "..") for part in parts) or not prefix.isprintable():
        raise RefusedCheckpoint(shown_source(source), "its prefix has a part that cannot be a directory's name")
    if len(prefix.encode()) > PREFIX_BYTES_MAX:
        raise RefusedCheckpoint(shown_source(source), f"its prefix has more than {PREFIX_BYTES_MAX} bytes")
    return S3Prefix(bucket, prefix)


def _check_length(source: str) -> None:
    if len(source) > SOURCE_CHARS_MAX:
        raise RefusedCheckpoint(shown_source(source), f"the source has more than {SOURCE_CHARS_MAX} characters")
