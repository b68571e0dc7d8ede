"""What every Stoker process shares: errors, settings, logs, traces, clocks, ids and the service runner."""

from importlib.metadata import version as _version

__version__ = _version("stoker")
