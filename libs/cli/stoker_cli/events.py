"""`stoker events`: the event stream, live or replayed."""

from __future__ import annotations

import sys

import msgspec
from rich.console import Console
from rich.markup import escape

from stoker_bus.nats import NatsBus
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.events import CloudEvent
from stoker_core.errors import InvalidMessage, InvalidSettings

CONNECT_TIMEOUT_S = 5.0


def subject_of(wanted: str) -> str:
    """A filter ('instance', 'instance.*', '*.failed', '' for all) as a NATS subject. Raises InvalidSettings."""
    area, dot, what = wanted.partition(".")
    parts = [area, *what.split(".")] if dot else [area]
    if not wanted:
        return subjects.EVENTS_ALL
    if not all(parts) or any(not part.replace("_", "a").isalnum() and part not in ("*", ">") for part in parts):
        raise InvalidSettings(f"--filter: {wanted!r} is no filter like 'instance', 'instance.*' or '*.failed'")
    return subjects.event(area, what or ">") if area != ">" else subjects.EVENTS_ALL


def start_of(since: str | None, follow: bool) -> int | None:
    """--since as a sequence to replay from; None: only what comes. Raises InvalidSettings."""
    if since is None:
        return None if follow else 1
    if since == "all":
        return 1
    if since.isdecimal() and int(since) > 0:
        return int(since)
    raise InvalidSettings(f"--since: {since!r} is neither 'all' nor a sequence number from 1")


def line(sequence: int, event: CloudEvent) -> str:
    """One event as rich markup: sequence, time, type, subject, data."""
    data = " ".join(f"[dim]{key}=[/]{escape(str(value))}" for key, value in event.data.items())
    kind = event.type.removeprefix("stoker.")
    colour = "red" if kind.endswith((".failed", ".silent", ".refused")) else "cyan"
    return f"[dim]{sequence:>6} {event.time[11:23]}[/] [{colour}]{kind:<20}[/] {escape(event.subject)} {data}".rstrip()


async def show(nats_url: str, *, wanted: str, since: str | None, follow: bool, as_json: bool) -> None:
    """Print events until the end of what is kept, or with `follow` until interrupted."""
    subject, start = subject_of(wanted), start_of(since, follow)
    console = Console(highlight=False, soft_wrap=True)
    bus = await NatsBus.connect(nats_url, name="stoker-events", timeout_s=CONNECT_TIMEOUT_S)
    try:
        async for message in bus.follow(subject, since_sequence=start, follow=follow):
            if as_json:
                sys.stdout.write(
                    msgspec.json.encode({"seq": message.sequence, **_fields(message.data)}).decode() + "\n"
                )
                sys.stdout.flush()
            else:
                try:
                    console.print(line(message.sequence, decode(CloudEvent, message.data)))
                except InvalidMessage as error:
                    console.print(f"{message.sequence:>6} not understood: {error.message}", markup=False)
    finally:
        await bus.close()


def _fields(data: bytes) -> dict[str, object]:
    fields = msgspec.json.decode(data)
    return fields if isinstance(fields, dict) else {"data": fields}
