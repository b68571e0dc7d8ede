"""Which nodes fell silent, as far as this process can tell from its own link."""

from __future__ import annotations

from collections.abc import Iterable

from stoker_scheduler.records import Node


class Silence:
    """Three seconds without a status count only while the own link was up throughout.

    If most nodes fall silent at once it takes majority_limit_s, for which another node must have spoken all along.
    """

    def __init__(self, *, limit_s: float, majority_limit_s: float, led_s: float) -> None:
        self._limit_s, self._majority_limit_s = limit_s, majority_limit_s
        self._led_s = led_s
        self._link_since_s = self._spoken_since_s = led_s
        self._reconnects = 0
        self.majority = False
        """Over half of the nodes are overdue at once: more likely this link than they, so none is declared dead yet."""

    def check(self, nodes: Iterable[Node], now_s: float, *, connected: bool, reconnects: int) -> list[Node]:
        """Nodes that fell silent since the last call; they are marked so.

        A node that this leader never heard (a row of Postgres) is silent after one limit, whatever the others do:
        it may have been switched off long ago.
        """
        if not connected or reconnects != self._reconnects:
            self._link_since_s, self._reconnects = now_s, reconnects
        speaking = [n for n in nodes if not n.silent]
        heard = [n for n in speaking if n.heard_s is not None]
        # Half a limit is a missed status. Nodes cut off together pass the limit one by one, as their last
        # statuses were spread over an interval; by the first, all are overdue.
        overdue = [n for n in heard if self._silent_s(n, now_s) > self._limit_s / 2]
        self.majority = 2 * len(overdue) > len(heard)
        if len(overdue) == len(heard):
            self._spoken_since_s = now_s
        newly = [n for n in speaking if self._silent_s(n, now_s) > self._limit_s and self._believed(n, now_s)]
        for node in newly:
            node.silent = True
        return newly

    def _believed(self, node: Node, now_s: float) -> bool:
        """Whether this node's silence is its own: always, unless most are silent with it."""
        if not self.majority or node.heard_s is None:
            return True
        proven_s = min(self._silent_s(node, now_s), now_s - max(self._spoken_since_s, self._link_since_s))
        return proven_s > self._majority_limit_s

    def _silent_s(self, node: Node, now_s: float) -> float:
        return now_s - max(node.heard_s or self._led_s, self._link_since_s, self._led_s)
