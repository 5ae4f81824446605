"""A group of commands of which one needs no name, so that each has a `--help` of its own."""

from typing import Any, ClassVar

from typer.core import TyperGroup


class DefaultGroup(TyperGroup):
    """A group whose first argument may be that of its `default` command: `bench MODEL` is `bench run MODEL`.

    The context is typed Any: its class is click's, or that of the copy of click inside typer.
    """

    default: ClassVar[str]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Return what is left of the arguments, with the command in front."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)
