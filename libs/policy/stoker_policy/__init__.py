"""What to run where: pure functions from a frozen `Cluster` to a list of commands. No clock, no chance, no I/O."""

from stoker_policy.cluster import Cluster, DemandView, FailureView, HeldView, InstanceView, NodeView
from stoker_policy.commands import Command, Prepare, Reject, Start, Stop
from stoker_policy.decide import decide

__all__ = [
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
    "decide",
]
