"""Make a backbone trainable, as a config's `tune` section says."""

from diffalign.config import TuneSection
from diffalign.pipelines import Backbone


def make_trainable(
    backbone: Backbone, tune: TuneSection, seed: int, *, keep_reference: bool = True, init_is_reference: bool = True
) -> None:
    """Add a LoRA or free all weights, and put the trunk into train mode. The policy equals what it begins with.

    keep_reference: keep a frozen copy where all weights train; init_is_reference: the LoRA of `tune.init`, if there is one,
    is also what the policy is compared with, and not the bare model.
    """
    if tune.kind == "lora":
        backbone.add_lora(
            tune.rank,
            tune.alpha,
            targets=tune.targets,
            seed=seed,
            init=tune.init,
            init_is_reference=init_is_reference,
        )
    else:
        backbone.enable_full(keep_reference=keep_reference)
    backbone.trunk.train()
