"""How well a loader uses the machines."""

from __future__ import annotations

from stoker_sim.profiles.quantities import Fraction, Name, Part, Seconds


class LoaderProfile(Part, frozen=True):
    """remote, peer, ssd, dram: the part of that way's bandwidth that it reaches; dram is host memory → device.

    fixed_s: what every load costs besides its bytes.
    pipelined: stages overlap, so that the slowest counts; else each waits for the one before, and they add up.
    engine_start_s: everything else from the start's order to a ready engine, in the state in which its system keeps engines.
    """

    name: Name
    remote: Fraction
    peer: Fraction
    ssd: Fraction
    dram: Fraction
    fixed_s: Seconds
    pipelined: bool
    engine_start_s: Seconds
