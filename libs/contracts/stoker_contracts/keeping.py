"""Between a node's storage agent and its worker, on a Unix socket: JSON, one message a line.

    agent:  KeeperHello
    worker: Kept
    agent:  Keep or Drop, any number of times, one at a time
    worker: Keeping, to each of them; and Loaded at any time after Kept

The worker keeps two descriptors for the agent, so that what they refer to outlives it: the pool's memfd, and the memfd of
the table that says which models lie in the pool. They come in this order, in the same sendmsg and by SCM_RIGHTS, with Keep
and with a Kept that says `kept`. The worker looks into neither. What it keeps stays when the connection ends; it goes with
the worker, or when the agent says so. A newer connection takes the place of an older one.
"""

from __future__ import annotations

from stoker_contracts.codec import Contract

DESCRIPTORS = 2
"""Of the pool and of the table."""


class KeeperHello(Contract, frozen=True):
    """Agent → worker, within HELLO_S of connecting."""

    boot_id: str  # the agent's


class Kept(Contract, frozen=True, tag="kept"):
    """Worker → agent: what there is of an earlier agent's. Two descriptors come with it if `kept`."""

    loading: tuple[str, ...] = ()  # ids of instances that are starting: they may still read from that agent's pool
    kept: bool = False


class Keep(Contract, frozen=True, tag="keep"):
    """Agent → worker, with two descriptors: they replace what was kept. Retry-safe."""


class Drop(Contract, frozen=True, tag="drop"):
    """Agent → worker: keep nothing any more. Retry-safe."""


class Keeping(Contract, frozen=True, tag="keeping"):
    """Worker → agent: the last Keep or Drop was done."""


class Loaded(Contract, frozen=True, tag="loaded"):
    """Worker → agent: an instance of those in Kept is not starting any more: it is ready, failed, or stops."""

    instance_id: str


ToKeeper = Keep | Drop
FromKeeper = Kept | Keeping | Loaded
HELLO_S = 5.0
LINE_LIMIT_BYTES = 64 * 1024
