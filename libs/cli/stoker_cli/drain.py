"""`stoker drain`: have a node emptied, and say how far it is until nothing is left there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from urllib.parse import quote

from stoker_cli.answers import Draining
from stoker_cli.client import Gateway, parse
from stoker_core.errors import ApiFailed

POLL_S = 0.5


async def drain(gateway: Gateway, node: str, *, wait: bool, say: Callable[[str], None]) -> None:
    """Say each change until nothing is left there, or only what is left now.

    Raises ApiFailed, also if somebody undoes it meanwhile, and NotRunning.
    """
    path = _path(node)
    found = parse(await gateway.json("POST", path), Draining)
    said = line(found)
    say(said)
    while wait and not found.drained:
        await asyncio.sleep(POLL_S)
        found = await gateway.get(path, Draining)
        if not found.draining:
            raise ApiFailed(f"{node} is not drained any more: somebody undid it", status=409)
        if line(found) != said:
            said = line(found)
            say(said)


async def undo(gateway: Gateway, node: str) -> None:
    """Raises ApiFailed, NotRunning."""
    await gateway.json("DELETE", _path(node))


def line(found: Draining) -> str:
    """'node-a: 3 instances left, 1 of them busy'."""
    if found.drained:
        return f"{found.node}: nothing is left there"
    if not found.live:
        return f"{found.node}: its worker is silent; what is left there is not known"
    count, busy = len(found.instances), sum(instance.running > 0 for instance in found.instances)
    left = f"{count} instance{'' if count == 1 else 's'} left"
    return f"{found.node}: {left}, {busy} of them busy" if busy else f"{found.node}: {left}"


def _path(node: str) -> str:
    return f"/admin/v1/nodes/{quote(node, safe='')}/drain"
