"""What a simulated cluster consists of: machines, models, and how a loader uses the machines. TOML files."""

from stoker_sim.profiles.hardware import Devices, Hardware, NodeKind
from stoker_sim.profiles.load import BUILT_IN, load_profile
from stoker_sim.profiles.loaders import LoaderProfile
from stoker_sim.profiles.models import ModelProfile
from stoker_sim.profiles.profile import Profile

__all__ = ["BUILT_IN", "Devices", "Hardware", "LoaderProfile", "ModelProfile", "NodeKind", "Profile", "load_profile"]
