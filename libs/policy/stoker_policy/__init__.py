"""What to run where, and where its weights come from: pure functions from frozen facts. No clock, no chance, no I/O."""

from stoker_policy.cluster import Cluster
from stoker_policy.commands import Command, Decision, Migrate, Option, Prepare, Reject, Start, Stop
from stoker_policy.decide import Decided, decide
from stoker_policy.estimate import Absurd, EngineState, Estimates, Guess, Priors, Stage, StartFacts, StartSeen, Startup
from stoker_policy.evict import Candidate, choose_victims
from stoker_policy.facts import DemandView, FailureView, HeldView, InstanceView, LoadView, NodeView, View
from stoker_policy.fanout import plan_fanout
from stoker_policy.idle import IdleTimes, Window
from stoker_policy.place import place
from stoker_policy.replicas import Limits, Replicas
from stoker_policy.reserve import Reserved
from stoker_policy.sources import order_sources

__all__ = [
    "Absurd",
    "Candidate",
    "Cluster",
    "Command",
    "Decided",
    "Decision",
    "DemandView",
    "EngineState",
    "Estimates",
    "FailureView",
    "Guess",
    "HeldView",
    "IdleTimes",
    "InstanceView",
    "Limits",
    "LoadView",
    "Migrate",
    "NodeView",
    "Option",
    "Prepare",
    "Priors",
    "Reject",
    "Replicas",
    "Reserved",
    "Stage",
    "Start",
    "StartFacts",
    "StartSeen",
    "Startup",
    "Stop",
    "View",
    "Window",
    "choose_victims",
    "decide",
    "order_sources",
    "place",
    "plan_fanout",
]
