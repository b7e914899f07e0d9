"""The error a person can cause and mend."""

from __future__ import annotations


class GriffinError(ValueError):
    """Something the caller can put right: the message names the thing, the numbers and the next step.

    The command line prints the message alone and exits with status 2.
    """
