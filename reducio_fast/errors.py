"""The one exception for mistakes a user can make and mend."""

from __future__ import annotations


class ReducioError(ValueError):
    """Bad input: one clear line that names the argument, what was given and what would be right.

    The command line prints it on stderr and exits with status 2; no traceback is shown, because the message is meant
    to be enough. Everything else that is raised is a defect of ours and keeps its traceback.
    """
