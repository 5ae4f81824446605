"""Define the one exception that is meant for the user and not for a debugger."""


class DiffalignError(Exception):
    """A mistake that the user can correct. The message is one line: what is wrong, where, and how to correct it.

    The command line prints it without a traceback and exits with code 2.
    """
