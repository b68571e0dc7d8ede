"""What to run where, and where its weights come from: pure functions from frozen facts. No clock, no chance, no I/O."""

from stoker_policy.cluster import Cluster, DemandView, FailureView, HeldView, InstanceView, NodeView
from stoker_policy.commands import Command, Prepare, Reject, Start, Stop
from stoker_policy.decide import decide
from stoker_policy.evict import Candidate, choose_victims
from stoker_policy.fanout import plan_fanout
from stoker_policy.sources import order_sources

__all__ = [
    "Candidate",
    "Cluster",
    "Command",
    "DemandView",
    "FailureView",
    "HeldView",
    "InstanceView",
    "NodeView",
    "Prepare",
    "Reject",
    "Start",
    "Stop",
    "choose_victims",
    "decide",
    "order_sources",
    "plan_fanout",
]
