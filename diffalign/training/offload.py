"""AdamW whose averages live in the host's memory, for full fine-tuning on a GPU that cannot hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor


class OffloadedAdamW(torch.optim.AdamW):
    """Fused AdamW, one parameter after the other: its two averages come to the parameter's device for the update only.

    It computes the same numbers. An update moves 16 bytes a trained number over the bus.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, **options, fused=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one update. A closure is refused: the gradients are there already."""
        if closure is not None:
            raise ValueError("OffloadedAdamW.step takes no closure")
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    self._move(parameter, parameter.device)
                    self.param_groups = [{**group, "params": [parameter]}]
                    super().step()
                    self._move(parameter, torch.device("cpu"))
        finally:
            self.param_groups = groups
        return None

    def _move(self, parameter: Tensor, device: torch.device) -> None:
        state = self.state[parameter]
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.to(device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the averages into the host's memory; torch would put them beside their parameters."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, entries in state_dict["state"].items():
            self.state[parameters[index]] = {
                name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
                for name, value in entries.items()
            }
