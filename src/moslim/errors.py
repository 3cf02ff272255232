"""Errors that the user of this package can mend."""

from __future__ import annotations


class UsageError(ValueError):
    """A mistake in an option, a config, data, weights or labels.

    Its message says what is wrong, where, and what to do. The command line prints it without a traceback and exits
    with status 2.
    """


class MissingFileError(UsageError, FileNotFoundError):
    """A file, folder or Hub name that does not exist or cannot be read."""
