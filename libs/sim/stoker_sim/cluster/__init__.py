"""A simulated cluster: requests, instances, tiers and links in virtual time, under policies that are compared.

The machines are simulated, not the decisions: Stoker's policy is the `stoker_policy` that the scheduler runs.
"""

from stoker_sim.cluster.build import POLICIES, Setup, build
from stoker_sim.cluster.measure import Measured
from stoker_sim.cluster.world import World

__all__ = ["POLICIES", "Measured", "Setup", "World", "build"]
