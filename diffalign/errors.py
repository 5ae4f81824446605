"""Define the one exception that is meant for the user and not for a debugger."""

from typing import ClassVar

from diffalign.error_codes import NOT_INSTALLED, code_of_traceback


class DiffalignError(Exception):
    """A mistake that the user can correct. The message is one line: what is wrong, where, and how to correct it.

    The command line prints it without a traceback and exits with code 2. The newlines of a library's words in it become
    blanks. docs/errors.md explains the codes.
    """

    fixed_code: ClassVar[str | None] = None
    """The code of a class of errors that several packages raise; None: it follows from where the error was raised."""

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(filter(None, str(message).splitlines())))

    @property
    def code(self) -> str:
        """The short code of this kind of mistake, such as DA102."""
        return self.fixed_code or code_of_traceback(self.__traceback__)


class NotInstalled(DiffalignError):
    """A package of an extra is missing."""

    fixed_code = NOT_INSTALLED


def brief(error: BaseException) -> str:
    """Return a library's message on one line, cut to 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
