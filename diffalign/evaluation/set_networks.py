"""The networks of measures of sets: Inception (FID, KID), AlexNet (LPIPS), CLIP and DINO, from weights as published.

    inception  torch-fidelity's weights-inception-2015-12-05-6726825d.pth: the network of the published FID, converted from
               TensorFlow; pool3, 2048 features, images resized as TensorFlow 1 does
    alexnet    torchvision's alexnet-owt-7be5be79.pth below LPIPS's linear layers, which torchmetrics brings along
    clip       openai/clip-vit-base-patch32, projected image embeddings
    dino       facebook/dino-vits16, the class token

Checkpoints are read as tensors only: torch-fidelity and torchvision would unpickle whatever a file holds.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.errors import DiffalignError, brief
from diffalign.packages import extras_named
from diffalign.pretrained import load_model
from diffalign.rewards.pixels import crop_square, normalise
from diffalign.rewards.published_weights import fetch, fill, fingerprint, load_state

INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Embedding(Protocol):
    """A network that gives one vector an image. name: with its layer. identity: equal ones give equal vectors."""

    name: str
    size: int
    identity: str

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Return float32 [B, size] on the CPU."""
        ...


def published_file(measure: str, url: str, local: Path | None) -> Path:
    """Return a checkpoint on disk: `local`, or the file of `url` in torch's cache, fetched where it is not there.

    Its name ends in the beginning of its SHA-256, which is checked when it is fetched. Raises DiffalignError with the way
    out where it cannot be.
    """
    if local is not None:
        path = local.expanduser()
        if not path.is_file():
            raise DiffalignError(f"measure {measure}: {path} does not exist; it should be a copy of {url}")
        return path
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    beginning = name.rpartition("-")[2].partition(".")[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / name
            torch.hub.download_url_to_file(url, str(part), hash_prefix=beginning, progress=False)
            part.replace(path)
    except (OSError, RuntimeError) as error:
        raise DiffalignError(
            f"measure {measure}: {url} is not reachable: {brief(error)}. Download it elsewhere and point to the copy: "
            f"-m {measure}:weights=PATH"
        ) from error
    return path


class Inception:
    """pool3 of the published FID's Inception network."""

    name: str = "inception-2015-12-05 pool3"
    size: int = 2048

    def __init__(self, measure: str, weights: Path | None = None, device: str = "cpu") -> None:
        with extras_named(f"measure {measure}"):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        path = published_file(measure, INCEPTION, weights)
        # The package unpickles the file that it is given, so it gets one that holds the checked tensors alone.
        checked = io.BytesIO()
        torch.save(load_state(path), checked)
        checked.seek(0)
        try:
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=checked)
        except RuntimeError as error:
            raise DiffalignError(f"measure {measure}: {path} does not fit the network: {brief(error)}") from error
        self.network, self.device = network.to(device), device
        self.identity = f"{INCEPTION.rpartition('/')[2]}@{fingerprint(path)}"

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Return float32 [B, 2048]; the network resizes, and images of equal sizes go together."""
        found = torch.empty(len(images), self.size)
        for side in {image.size for image in images}:
            rows = [i for i, image in enumerate(images) if image.size == side]
            pixels = torch.stack([_bytes(images[i]) for i in rows]).to(self.device)
            found[rows] = self.network(pixels)[0].float().cpu()
        return found


class Clip:
    """Image embeddings of OpenAI's CLIP ViT-B/32."""

    name: str = "clip-vit-base-patch32"
    repo: str = "openai/clip-vit-base-patch32"

    def __init__(
        self, measure: str, weights: Path | None = None, device: str = "cpu", model: str | None = None
    ) -> None:
        from transformers import CLIPModel

        self.network, self.device, self.identity = _transformers(
            CLIPModel, measure, model or self.repo, weights, device
        )
        self.size = int(self.network.config.projection_dim)
        self.name = model or self.name

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Return float32 [B, size]."""
        pixels = torch.stack([normalise(crop_square(image, 224, "round")) for image in images]).to(self.device)
        features: Tensor = self.network.get_image_features(pixel_values=pixels).pooler_output
        return features.float().cpu()


class Dino:
    """The class token of DINO's ViT-S/16, as DreamBooth's DINO score takes it."""

    name: str = "dino-vits16"
    repo: str = "facebook/dino-vits16"

    def __init__(
        self, measure: str, weights: Path | None = None, device: str = "cpu", model: str | None = None
    ) -> None:
        from transformers import ViTModel

        self.network, self.device, self.identity = _transformers(
            ViTModel, measure, model or self.repo, weights, device, add_pooling_layer=False
        )
        self.size = int(self.network.config.hidden_size)
        self.name = model or self.name

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Return float32 [B, size]. As DINO's own evaluation: the shorter side 256 bicubic, the centre's 224."""
        centres = [crop_square(image, 256, "round")[:, 16:240, 16:240] for image in images]
        pixels = torch.stack([normalise(one, IMAGENET_MEAN, IMAGENET_STD) for one in centres]).to(self.device)
        states: Tensor = self.network(pixel_values=pixels).last_hidden_state
        return states[:, 0].float().cpu()


class Lpips:
    """LPIPS 0.1 on AlexNet (Zhang et al. 2018): a distance of two images of equal size."""

    name: str = "LPIPS 0.1, AlexNet"

    def __init__(self, measure: str, weights: Path | None = None, device: str = "cpu") -> None:
        with extras_named(f"measure {measure}"):
            from torchmetrics.functional.image.lpips import _LPIPS
        path = published_file(measure, ALEXNET, weights)
        # pnet_rand: without it the class would fetch AlexNet itself. The published LPIPS layers lie in the package.
        self.network: nn.Module = _LPIPS(net="alex", pnet_rand=True)
        state = {name: value for name, value in load_state(path).items() if name.startswith("features.")}
        fill(_alexnet(self.network), state, path, measure, asked="measure")
        self.network, self.device = self.network.to(device).eval(), device
        self.identity = f"{ALEXNET.rpartition('/')[2]}@{fingerprint(path)}"

    @torch.no_grad()
    def distances(self, first: Sequence[Image.Image], second: Sequence[Image.Image]) -> list[float]:
        """Return the distance of each pair, whose images have one size."""
        found = [0.0] * len(first)
        for side in {image.size for image in first}:
            rows = [i for i, image in enumerate(first) if image.size == side]
            a, b = (self._pixels([images[i] for i in rows]) for images in (first, second))
            for row, distance in zip(rows, self.network(a, b, normalize=True).flatten().tolist(), strict=True):
                found[row] = float(distance)
        return found

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([_bytes(image) for image in images]).to(self.device).float() / 255


def _alexnet(network: Any) -> nn.Module:
    """Return AlexNet's layers under torchvision's names, which LPIPS keeps in five slices."""
    layers = nn.ModuleDict()
    for piece in (network.net.slice1, network.net.slice2, network.net.slice3, network.net.slice4, network.net.slice5):
        layers.update(dict(piece.named_children()))
    return nn.ModuleDict({"features": layers})


def _transformers(
    kind: Any, measure: str, repo: str, weights: Path | None, device: str, **options: Any
) -> tuple[Any, str, str]:
    """Return a model of transformers with its every tensor from the folder, the device, and which weights these are.

    kind is typed Any: transformers' classes are lazy, and a type checker sees placeholders.
    """
    folder = fetch(measure, repo, None, "main", weights, asked="measure")
    network = load_model(
        kind, folder, f"measure {measure}", dtype=torch.float32, weights_only=True, trust_remote_code=False, **options
    )
    return network.to(device).eval().requires_grad_(False), device, f"{repo}@{fingerprint(folder)}"


def _bytes(image: Image.Image) -> Tensor:
    """Return uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.uint8)).permute(2, 0, 1)


def unit(features: Tensor) -> Tensor:
    """Return unit vectors in float64 [n, d]."""
    return F.normalize(features.double(), dim=-1)
