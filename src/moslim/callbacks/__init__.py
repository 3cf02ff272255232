"""Callbacks that watch a run."""

from typing import TYPE_CHECKING

from moslim.utils.exports import lazy_exports

if TYPE_CHECKING:
    from moslim.callbacks.checkpoint import StepCheckpoint as StepCheckpoint
    from moslim.callbacks.completions import CompletionTable as CompletionTable
    from moslim.callbacks.dashboard import Dashboard as Dashboard
    from moslim.callbacks.gate import Gate as Gate
    from moslim.callbacks.gate import GateError as GateError
    from moslim.callbacks.gauges import Gauges as Gauges
    from moslim.callbacks.guards import GuardError as GuardError
    from moslim.callbacks.guards import Guards as Guards
    from moslim.callbacks.replay import Replay as Replay
    from moslim.callbacks.role_memory import RoleMemory as RoleMemory
    from moslim.callbacks.style_probe import StyleProbe as StyleProbe

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CompletionTable": "moslim.callbacks.completions",
        "Dashboard": "moslim.callbacks.dashboard",
        "Gate": "moslim.callbacks.gate",
        "GateError": "moslim.callbacks.gate",
        "Gauges": "moslim.callbacks.gauges",
        "GuardError": "moslim.callbacks.guards",
        "Guards": "moslim.callbacks.guards",
        "Replay": "moslim.callbacks.replay",
        "RoleMemory": "moslim.callbacks.role_memory",
        "StepCheckpoint": "moslim.callbacks.checkpoint",
        "StyleProbe": "moslim.callbacks.style_probe",
    },
)
