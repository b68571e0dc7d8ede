"""What a simulated cluster is asked to do: public traces, or requests drawn from a seed.

Everything here is an iterator of `Arrival`s in time order, made while it is read. Nothing holds a whole trace. What is
wrong with a file or a parameter is raised when the first arrival is asked for, or the one that it spoils.
"""

from stoker_sim.workload.arrival import Arrival, at_rate
from stoker_sim.workload.azure_functions import read_azure_functions
from stoker_sim.workload.azure_llm import read_azure_llm
from stoker_sim.workload.azure_shape import azure_shaped
from stoker_sim.workload.bursts import bursts, bursts_of_each
from stoker_sim.workload.lengths import GSM8K_LIKE, SHAREGPT_LIKE, Clipped, FileLengths, Lengths, LogNormalLengths
from stoker_sim.workload.mooncake import read_mooncake
from stoker_sim.workload.popularity import Popularity, even, shuffled, zipf

__all__ = [
    "GSM8K_LIKE",
    "SHAREGPT_LIKE",
    "Arrival",
    "Clipped",
    "FileLengths",
    "Lengths",
    "LogNormalLengths",
    "Popularity",
    "at_rate",
    "azure_shaped",
    "bursts",
    "bursts_of_each",
    "even",
    "read_azure_functions",
    "read_azure_llm",
    "read_mooncake",
    "shuffled",
    "zipf",
]
