"""Arguments that several verbs share."""

from typing import Annotated

import typer

Source = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped recipe such as sdxl_dpo.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.SUB=VALUE", help="Values that replace those of CONFIG, such as train.steps=200."),
]
