"""The one exception that is meant for the user rather than for a debugger."""


class DiffalignError(Exception):
    """A mistake the user can mend. The message is one line: what is wrong, where, and what would fix it.

    The command line prints it without a traceback and exits with code 2.
    """
