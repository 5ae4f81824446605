"""A batch through the network a few images at a time: groups that are larger than memory, with the same gradient.

The first pass keeps no activations. Once the loss of the whole batch is known, so is its gradient with respect to each
prediction, and backward takes the images pass by pass: each is predicted again, this time with activations, and sends its
gradient into the weights. The exact gradient of the whole batch, for one more forward and the memory of a single pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Conditioning = dict[str, Tensor]
Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(noisy [N, C, h, w], t [N], conditioning each [N, ...]) -> prediction [N, C, h, w]."""


def in_passes(predict: Predict, noisy: Tensor, t: Tensor, conditioning: Conditioning, images: int | None) -> Tensor:
    """Predict the whole batch, [N, C, h, w], by at most `images` images at a time; None: all at once.

    Under grad mode every pass but the last one is predicted again in backward: that one goes backward first, so its
    activations may as well stay. `predict` is called there under whatever role holds then: run backward where the policy
    is active, as for a network with gradient checkpointing.
    """
    if images is None or len(noisy) <= images:
        return predict(noisy, t, conditioning)
    parts = []
    for start in range(0, len(noisy), images):
        rows = slice(start, start + images)
        own = (noisy[rows], t[rows], {name: values[rows] for name, values in conditioning.items()})
        again = torch.is_grad_enabled() and start + images < len(noisy)
        parts.append(checkpoint(predict, *own, use_reentrant=False) if again else predict(*own))
    return torch.cat(parts)
