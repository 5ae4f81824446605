"""Define the one exception that is meant for the user and not for a debugger."""


class DiffalignError(Exception):
    """A mistake that the user can correct. The message is one line: what is wrong, where, and how to correct it.

    The command line prints it without a traceback and exits with code 2. The newlines of a library's words in it become
    blanks.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(filter(None, str(message).splitlines())))


def brief(error: BaseException) -> str:
    """Return a library's message on one line, cut to 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
