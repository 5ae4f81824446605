"""Base classes of rewards on a neural network: weights that load late and can be released, device, dtype."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Metadata, Prepared, PreparedReward
from diffalign.rewards.published_weights import fetch, fingerprint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LearnedOptions(TypedDict, total=False):
    """Options of every reward on a network; `LearnedReward` explains them."""

    weights: str | Path | None
    revision: str
    device: str
    dtype: str


class LearnedReward(PreparedReward):
    """A reward on published weights.

    weights: a local copy (a file, or the folder that holds it); default: the hub's at `revision`. dtype: of the
    network; the last product and the score are always float32, since float16 has steps of 0.00024 where HPSv2's scores
    lie.
    """

    repo: str
    file: str | None = None

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        revision: str = "main",
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        if dtype not in DTYPES:
            raise DiffalignError(f"reward {self.name}: dtype {dtype!r}; one of {', '.join(DTYPES)}")
        self.local = weights
        self.revision = revision
        self.device = device
        self.dtype = DTYPES[dtype]
        self.reasons = []
        self._network: torch.nn.Module | None = None
        self._path: Path | None = None

    @property
    def path(self) -> Path:
        """The weights on disk, fetched at first use."""
        if self._path is None:
            self._path = fetch(self.name, self.repo, self.file, self.revision, self.local)
        return self._path

    @property
    def network(self) -> Any:
        """The network on the device, in evaluation mode, its parameters without gradients."""
        if self._network is None:
            self._network = self.build().to(self.device).eval().requires_grad_(False)
        return self._network

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """Return the network with its weights, in `self.dtype`, from `self.path`."""

    def weights_id(self) -> str:
        copy = "" if self.local is None else "local copy of "
        return f"{copy}{self.repo}{'/' + self.file if self.file else ''}@{fingerprint(self.path)}"

    def options(self) -> dict[str, Any]:
        return {} if self.dtype == torch.float32 else {"dtype": str(self.dtype).removeprefix("torch.")}

    def free(self) -> None:
        self._network = None
        if self.device != "cpu":
            torch.cuda.empty_cache()


class TensorReward(LearnedReward):
    """A reward whose network takes one tensor [B, 3, S, S]; images and float pixels both end in `forward`."""

    differentiable = True

    @abstractmethod
    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Return the score, float32 [B], of pixels as the network takes them."""

    @abstractmethod
    def prepare_tensors(self, pixels: Tensor) -> Tensor:
        """Do what `prepare` does to float pixels [B, 3, H, W] in [0, 1], with gradient."""

    def score_tensors(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        check_pixels(self.name, pixels, prompts)
        # float32 up to the network: neighbouring bfloat16 values are up to 2 of 256 levels apart.
        return self.forward(self.prepare_tensors(pixels.to(self.device).float()), prompts).float()

    @torch.no_grad()
    def measure_prepared(
        self, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        self.reasons = [""] * len(items)
        pixels = torch.stack([item for item in items if isinstance(item, Tensor)])
        return {self.columns[0]: self.forward(pixels.to(self.device), prompts).float().cpu()}


class CosineReward(TensorReward):
    """A reward on the cosine of an image's embedding and its prompt's."""

    @abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Return unit vectors of prepared pixels, float32 [B, D]."""

    @abstractmethod
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Return unit vectors of texts, float32 [B, D]."""

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Return unit vectors of prompts, float32 [B, D]; each distinct prompt is encoded once."""
        unique = list(dict.fromkeys(prompts))
        place = {prompt: i for i, prompt in enumerate(unique)}
        return self.embed_texts(unique)[[place[p] for p in prompts]]

    def cosine(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Return the cosine of each image with its prompt, float32 [B]."""
        text = self.embed_prompts(prompts)
        return (self.embed_images(pixels) * text).sum(-1)


class TokenizedReward(TensorReward):
    """A reward whose tokenizer is transformers'. tokenizer: a local copy of its folder."""

    def __init__(self, *, tokenizer: str | Path | None = None, **shared: Unpack[LearnedOptions]) -> None:
        super().__init__(**shared)
        self.local_tokenizer = tokenizer
        self._tokenizer: Any = None


def check_pixels(name: str, pixels: Tensor, prompts: list[str]) -> None:
    """Raise DiffalignError unless there are float pixels [B, 3, H, W] and B prompts."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point() or len(prompts) != len(pixels):
        raise DiffalignError(
            f"reward {name}: pixels of shape {list(pixels.shape)}, {pixels.dtype} with {len(prompts)} prompts; "
            "float [B, 3, H, W] in [0, 1] and B prompts are needed"
        )
