"""A prediction with guidance inside it, for methods whose policy is the guided model (Flow-GRPO)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffalign.objectives.distribution_matching import guided
from diffalign.pipelines import Backbone
from diffalign.training.protocols import Conditioning


def guided_prediction(
    backbone: Backbone,
    noisy: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    scale: float,
    module: nn.Module | None = None,
) -> Tensor:
    """Return u + scale (c - u) of the current role, as the pipeline changes it, [N, C, h, w].

    c alone for a scale of 1 or without `unconditional`.

    unconditional: [1, ...] each. Both come from one forward of 2 N, with a gradient through both. module: as
    `Backbone.predict` takes it.
    """
    if unconditional is None or scale == 1.0:
        return backbone.predict(noisy, t, conditioning, module=module)
    both = {
        name: torch.cat([value, unconditional[name].to(value).expand_as(value)]) for name, value in conditioning.items()
    }
    found = backbone.predict(torch.cat([noisy, noisy]), torch.cat([t, t]), both, module=module)
    conditional, other = found.chunk(2)
    return backbone.rescale_guided(guided(conditional, other, scale), conditional)
