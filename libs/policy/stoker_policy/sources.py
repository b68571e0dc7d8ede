"""Which peers a node takes chunks from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from stoker_contracts.control import Located


def order_sources(
    node: str, located: Sequence[Located], wanted: Sequence[str], bandwidth: Mapping[str, float]
) -> list[Located]:
    """The peers that `node` may take a model's chunks from, best first: the wanted ones in their order, then the others.

    Others that serve fewer transfers come first, so that chains form and not stars: one that still receives and serves
    nobody goes before a holder that serves somebody. Then the faster link, then the complete before the receiving, then
    by name. Left out is who can give nothing, and who receives from `node` itself, directly or through others: two that wait
    for one another would wait for ever.
    bandwidth: peer → bytes/s from it to `node`; 0 or absent: unknown, counts as the median of the others.
    """
    known = [bytes_per_s for bytes_per_s in bandwidth.values() if bytes_per_s > 0]
    usual = median(known) if known else 0.0
    place = {name: index for index, name in reversed(list(enumerate(wanted)))}

    def order(peer: Located) -> tuple[int, int, float, bool, str]:
        if peer.node in place:
            return (place[peer.node], 0, 0.0, False, "")
        bytes_per_s = bandwidth.get(peer.node, 0.0) or usual
        return (len(wanted), peer.serving, -bytes_per_s, peer.held_bytes < peer.total_bytes, peer.node)

    return sorted((peer for peer in located if _useful(peer, node)), key=order)


def _useful(peer: Located, node: str) -> bool:
    gives = bool(peer.address) and (peer.held_bytes > 0 or peer.receiving)
    return gives and peer.node != node and node not in peer.upstream
