"""Backbones (one file per family), noise processes and adapters around diffusers pipelines.

Importing this package needs torch only; diffusers, transformers and peft are imported when a model is loaded.
"""

from diffalign.pipelines.base import Backbone
from diffalign.pipelines.loading import BACKBONES, load_backbone
from diffalign.pipelines.process import Diffusion, Flow, NoiseProcess

__all__ = ["BACKBONES", "Backbone", "Diffusion", "Flow", "NoiseProcess", "load_backbone"]
