"""What ends a run that cannot go on."""

from __future__ import annotations


class RunFailedError(Exception):
    """The run cannot go on; what was done is on disk."""

    exit_code = 1
