"""What SIGTERM does to a run of several processes: all stop after the same batch."""

from __future__ import annotations

from types import FrameType

from lightning.pytorch.trainer.connectors.signal_connector import _SIGNUM, _SignalConnector


class FlagOnly(_SignalConnector):
    """Notes that SIGTERM came, and tells processes that this one started; the loops ask for it between batches.

    Lightning 2.6 would broadcast from within the signal handler, that is possibly in the middle of another collective
    of the same process, and the processes would wait for each other for ever.
    """

    def _sigterm_notifier_fn(self, signum: _SIGNUM, _: FrameType) -> None:
        launcher = self.trainer.strategy.launcher
        if not self.received_sigterm and launcher is not None:
            launcher.kill(signum)
        self.received_sigterm = True
