"""From the host to the device without waiting for either."""

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` on the device. To a GPU they go by way of pinned memory, so the host goes on to the next thing at once; torch
    keeps the pinned copy until the GPU has read it."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
