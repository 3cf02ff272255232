"""Callbacks that monitor, log, check and save a run."""

from typing import TYPE_CHECKING

from moslim.utils import lazy_exports

if TYPE_CHECKING:
    from moslim.callbacks.dashboards import CompletionTable as CompletionTable
    from moslim.callbacks.dashboards import Dashboard as Dashboard
    from moslim.callbacks.guards import Gate as Gate
    from moslim.callbacks.guards import GateError as GateError
    from moslim.callbacks.guards import GuardError as GuardError
    from moslim.callbacks.guards import Guards as Guards
    from moslim.callbacks.guards import Replay as Replay
    from moslim.callbacks.monitors import RoleMemory as RoleMemory
    from moslim.callbacks.monitors import StepCheckpoint as StepCheckpoint
    from moslim.callbacks.monitors import StyleProbe as StyleProbe
    from moslim.callbacks.monitors import ThroughputMonitor as ThroughputMonitor

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CompletionTable": "moslim.callbacks.dashboards",
        "Dashboard": "moslim.callbacks.dashboards",
        "Gate": "moslim.callbacks.guards",
        "GateError": "moslim.callbacks.guards",
        "ThroughputMonitor": "moslim.callbacks.monitors",
        "GuardError": "moslim.callbacks.guards",
        "Guards": "moslim.callbacks.guards",
        "Replay": "moslim.callbacks.guards",
        "RoleMemory": "moslim.callbacks.monitors",
        "StepCheckpoint": "moslim.callbacks.monitors",
        "StyleProbe": "moslim.callbacks.monitors",
    },
)
