"""Messages of other libraries that tell a user of this command line nothing, left out of its output."""

from __future__ import annotations

import logging
import re
import warnings

from transformers.utils import logging as transformers_logging

_LOGGERS = tuple(
    f"{package}.{name}"
    for package in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
    for name in ("utilities.rank_zero", "utilities.seed", "accelerators.cuda", "trainer.connectors.signal_connector")
)
_INFO = re.compile(
    r"💡 Tip|Seed set to |GPU available: False|[TH]PU available|LOCAL_RANK: |Restoring states from the checkpoint path"
    r"|`Trainer\(\w+=.*\)` was configured so|Using \w+( \w+)? Automatic Mixed Precision"
    r"|The following callbacks returned in `LightningModule.configure_callbacks` will override"
)
_WARNINGS = (
    r".*module\(s\) in eval mode at the start of training",  # roles of a policy, a frozen backbone: each is in its own
    r".*does not have many workers",
    r".*LeafSpec.*is deprecated",
    r"The dirpath has changed from",  # each run has a folder of its own
    r"You have overridden `\w+` in `LightningModule` but have passed in a `LightningDataModule`",
    r"[\s\S]*JsonargparseDeprecationWarning",
    r"[\s\S]*deprecated in v4\.",
)


class _LeftOut(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _INFO.match(record.getMessage().strip())


_FILTER = _LeftOut()


def leave_out_noise() -> None:
    """Leaves out tips, reports and warnings of other libraries that do not matter here. May be called again."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", pattern)


def plain_warnings() -> None:
    """Shows a warning as one line, without the file and the line of code that it came from."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
