"""Backbones (one file per family), noise processes and adapters around diffusers pipelines.

Importing this package needs nothing heavy, so that `diffalign.pipelines.options` can be read without torch. Its public names
bring torch when they are first used; diffusers, transformers and peft are imported when a model is loaded.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffalign.pipelines.base import Backbone
    from diffalign.pipelines.loading import BACKBONES, load_backbone
    from diffalign.pipelines.process import Diffusion, Flow, NoiseProcess
else:

    def __getattr__(name: str) -> object:
        """Return a public name of this package (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from diffalign.pipelines import base, loading, process

        return {
            "BACKBONES": loading.BACKBONES,
            "Backbone": base.Backbone,
            "Diffusion": process.Diffusion,
            "Flow": process.Flow,
            "NoiseProcess": process.NoiseProcess,
            "load_backbone": loading.load_backbone,
        }[name]


__all__ = ["BACKBONES", "Backbone", "Diffusion", "Flow", "NoiseProcess", "load_backbone"]
