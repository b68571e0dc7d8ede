"""Where a model to deploy lies, as the gateway takes it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote


def source_url(given: str) -> str:
    """A URL as it is; anything else is a path on this machine."""
    return given if "://" in given else Path(given).expanduser().resolve().as_uri()


def default_name(url: str) -> str:
    """The last part of a source's path; of a bucket's root the bucket."""
    return unquote(url.rstrip("/").rpartition("/")[2])
