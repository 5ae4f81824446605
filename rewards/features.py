"""Frozen features of images: what a personal reward sees. Of the pixels alone, or of a model that others trained."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import DiffalignError
from diffalign.pretrained import load_part
from diffalign.rewards.clip import ClipReward, CLIPScore, PickScore
from diffalign.rewards.hpsv2 import HPSv2
from diffalign.rewards.learned import DTYPES
from diffalign.rewards.pixels import to_tensor
from diffalign.rewards.published_weights import fetch, fingerprint, pretrained

SIDE = 64
"""Pixels of a side to which an image is reduced before its colours are measured."""
HUES, LEVELS, CELLS = 12, 8, 4


class Features(ABC):
    """Numbers of an image that training does not change. name: as options name them. reads: as of a reward."""

    name: str
    reads: tuple[str, ...] = ()
    preprocessing: str = "RGB"
    licence: str = "Apache-2.0 (this project)"
    longest: int = 0

    @abstractmethod
    def prepare(self, image: Image.Image) -> Tensor:
        """Do the part that needs no model: an image to a tensor [3, H, W]."""

    @abstractmethod
    def prepare_tensors(self, pixels: Tensor) -> Tensor:
        """Do what `prepare` does to float pixels [B, 3, H, W] in [0, 1], with gradient."""

    @abstractmethod
    def embed(self, prepared: Tensor, prompts: list[str]) -> Tensor:
        """Return the features of prepared pixels, float32 [B, D], on the model's device."""

    def importance(self, width: int) -> Tensor:
        """Return how much each of `width` standardised features may say, float64 [D]: a priori all parts say as much."""
        return torch.full((width,), width**-0.5, dtype=torch.float64)

    def lengths(self, prompts: list[str]) -> list[int]:
        """Return the prompts' lengths in tokens; needed where `longest` is not 0."""
        raise NotImplementedError

    def weights_id(self) -> str:
        """Return which weights these are."""
        return "none"

    def options(self) -> dict[str, Any]:
        """Return the options that change a feature."""
        return {}

    def free(self) -> None:
        """Release the weights; the next call loads them again."""
        return


class PixelFeatures(Features):
    """Colours and contrasts of an image reduced to 64 x 64 pixels, 79 numbers; nothing to download.

    Mean colour; what the mean colours of 4 x 4 cells differ from it; deviation of each channel; shares of 8 levels of
    brightness; strength of 12 hues; mean and deviation of the saturation; mean steps between neighbours across and down; log
    of the Laplacian's variance. They know no object: on photographs take a model's features.
    """

    name = "pixels"
    preprocessing = "64 x 64 by means of areas"

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def prepare(self, image: Image.Image) -> Tensor:
        return self.prepare_tensors(to_tensor(image)[None])[0]

    def prepare_tensors(self, pixels: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pixels, SIDE)

    def embed(self, prepared: Tensor, prompts: list[str]) -> Tensor:
        pixels = prepared.to(self.device).float()
        grey = (pixels * pixels.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1)
        # The plane of colours: red points to the right, hues go around.
        across = pixels[:, 0] - (pixels[:, 1] + pixels[:, 2]) / 2
        up = (pixels[:, 1] - pixels[:, 2]) * 0.75**0.5
        saturation = (across.square() + up.square() + 1e-8).sqrt()
        angles = torch.arange(HUES, device=pixels.device) * (2 * torch.pi / HUES)
        hues = (across[..., None] * angles.cos() + up[..., None] * angles.sin()).relu()
        levels = (1 - (grey[..., None] * (LEVELS - 1) - torch.arange(LEVELS, device=pixels.device)).abs()).relu()
        laplacian = 4 * grey[:, 1:-1, 1:-1] - grey[:, :-2, 1:-1] - grey[:, 2:, 1:-1] - grey[:, 1:-1, :-2]
        laplacian = laplacian - grey[:, 1:-1, 2:]
        colour = pixels.mean((2, 3))
        parts = [
            colour,
            (F.adaptive_avg_pool2d(pixels, CELLS) - colour[..., None, None]).flatten(1),
            _deviation(pixels.flatten(2)),
            levels.mean((1, 2)),
            hues.mean((1, 2)),
            saturation.mean((1, 2))[:, None],
            _deviation(saturation.flatten(1))[:, None],
            (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean((1, 2))[:, None],
            (grey[:, 1:] - grey[:, :-1]).abs().mean((1, 2))[:, None],
            torch.log(1e-4 + laplacian.flatten(1).var(1, correction=0))[:, None],
        ]
        return torch.cat(parts, dim=1)

    def importance(self, width: int) -> Tensor:
        parts = ((3, 1.0), (3 * CELLS**2, 0.5), (3, 1.0), (LEVELS, 1.0), (HUES, 1.0), *[(1, 1.0)] * 5)
        return torch.cat([torch.full((size,), share * size**-0.5, dtype=torch.float64) for size, share in parts])


def _deviation(values: Tensor) -> Tensor:
    """Return the standard deviation over the last axis, with a gradient also where all values are equal."""
    return (values.var(-1, correction=0) + 1e-8).sqrt()


class TowerFeatures(Features):
    """The image's unit vector of a reward with two towers, and its cosine with the prompt: float32 [B, D + 1]."""

    reads = ("prompt",)

    def __init__(self, reward: ClipReward | HPSv2) -> None:
        self.reward = reward
        self.name = reward.name
        self.preprocessing, self.licence, self.longest = reward.preprocessing, reward.licence, reward.longest

    def prepare(self, image: Image.Image) -> Tensor:
        return self.reward.prepare(image)

    def prepare_tensors(self, pixels: Tensor) -> Tensor:
        return self.reward.prepare_tensors(pixels.to(self.reward.device).float())

    def embed(self, prepared: Tensor, prompts: list[str]) -> Tensor:
        image = self.reward.embed_images(prepared.to(self.reward.device))
        cosine = (image * self.reward.embed_prompts(prompts)).sum(-1, keepdim=True)
        return torch.cat([image, cosine], dim=1)

    def importance(self, width: int) -> Tensor:
        return torch.cat([super().importance(width - 1), torch.ones(1, dtype=torch.float64)])

    def lengths(self, prompts: list[str]) -> list[int]:
        return self.reward.lengths(prompts)

    def weights_id(self) -> str:
        return self.reward.weights_id()

    def options(self) -> dict[str, Any]:
        return self.reward.options()

    def free(self) -> None:
        self.reward.free()


class VisionFeatures(Features):
    """The pooled output of any vision tower that transformers loads by itself, such as DINOv2, SigLIP or a CLIP.

    model: its hub id. weights: a local folder in its place. revision: of the hub. Of a model with two towers the vision
    tower is taken. Images go through the folder's own image processor, so there is no gradient.
    """

    name = "vision"
    preprocessing = "the model's own image processor"
    licence = "the model's own"

    def __init__(
        self,
        *,
        model: str = "",
        weights: str | Path | None = None,
        revision: str = "main",
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        if not model and weights is None:
            raise DiffalignError(
                "features vision: name a model, as vision:model=facebook/dinov2-base or vision:weights=FOLDER"
            )
        if dtype not in DTYPES:
            raise DiffalignError(f"features vision: dtype {dtype!r}; one of {', '.join(DTYPES)}")
        self.model, self.local, self.revision, self.device, self.dtype = model, weights, revision, device, dtype
        self._path: Path | None = None
        self._loaded: tuple[Any, Any] | None = None  # transformers types neither

    @property
    def path(self) -> Path:
        """The model's folder, fetched at first use."""
        if self._path is None:
            self._path = fetch("personal", self.model or "the vision tower", None, self.revision, self.local, "tower")
        return self._path

    def _parts(self) -> tuple[Any, Any]:
        """Return the image processor and the tower, loaded at first use."""
        if self._loaded is None:
            from transformers import AutoImageProcessor, AutoModel

            processor = load_part(AutoImageProcessor, self.path, "features vision")
            model: Any = pretrained(AutoModel, self.path, "personal", DTYPES[self.dtype])
            tower = model.vision_model if "vision_config" in model.config.to_dict() else model
            self._loaded = processor, tower.to(self.device).eval().requires_grad_(False)
        return self._loaded

    def prepare(self, image: Image.Image) -> Tensor:
        found: Tensor = self._parts()[0](images=[image.convert("RGB")], return_tensors="pt")["pixel_values"][0]
        return found

    def prepare_tensors(self, pixels: Tensor) -> Tensor:
        raise DiffalignError(
            "reward personal: features of `vision` have no gradient; take pickscore, clipscore, hpsv2 or pixels"
        )

    def embed(self, prepared: Tensor, prompts: list[str]) -> Tensor:
        out = self._parts()[1](pixel_values=prepared.to(self.device, DTYPES[self.dtype]))
        pooled: Tensor | None = out.pooler_output
        return F.normalize((out.last_hidden_state.mean(1) if pooled is None else pooled).float(), dim=-1)

    def weights_id(self) -> str:
        copy = "" if self.local is None else "local copy of "
        return f"{copy}{self.model or 'a vision tower'}@{fingerprint(self.path)}"

    def options(self) -> dict[str, Any]:
        return {} if self.dtype == "float32" else {"dtype": self.dtype}

    def free(self) -> None:
        self._loaded = None


TOWERS: dict[str, type[PickScore] | type[CLIPScore] | type[HPSv2]] = {
    "pickscore": PickScore,
    "clipscore": CLIPScore,
    "hpsv2": HPSv2,
}
"""Rewards whose two towers give features; their options are those of the reward."""
NAMES = (PixelFeatures.name, *TOWERS, VisionFeatures.name)


def load_features(name: str, options: Mapping[str, Any], device: str = "cpu") -> Features:
    """Build features by name; weights load at first use. Raises DiffalignError for an unknown name or option."""
    try:
        if name == PixelFeatures.name:
            return PixelFeatures(**{"device": device, **options})
        if name == VisionFeatures.name:
            return VisionFeatures(**{"device": device, **options})
        if name in TOWERS:
            return TowerFeatures(TOWERS[name](**{"device": device, **options}))
    except TypeError as error:
        raise DiffalignError(f"features {name}: {error}; `diffalign rewards {name}` lists its options") from error
    raise DiffalignError(f"features {name!r}: unknown; one of {', '.join(NAMES)}")


def probe(features: Features) -> Tensor:
    """Return the features of one fixed picture, float32 [D]: equal weights give equal ones, wherever they lie."""
    ramp = torch.linspace(0, 255, 96).to(torch.uint8)
    channels = (ramp[:, None].expand(96, 96), ramp[None].expand(96, 96), ramp.flip(0)[:, None].expand(96, 96))
    picture = Image.fromarray(torch.stack(channels, dim=-1).numpy())
    with torch.no_grad():
        return features.embed(features.prepare(picture)[None], ["a ramp of colours"])[0].float().cpu()
