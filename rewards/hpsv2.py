"""HPSv2 and HPSv2.1 (Wu et al. 2023, arXiv 2306.09341) on open_clip, from the published checkpoints.

The score is the cosine of a ViT-H-14 tuned on human choices, without a scale (tables in the paper show 100 times it).
Most ports miss that the image is letterboxed in black, not cropped, and is resized as a float tensor.
"""

from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import DiffalignError
from diffalign.rewards.learned import CosineReward, LearnedOptions
from diffalign.rewards.pixels import letterbox, normalise, to_tensor
from diffalign.rewards.published_weights import fill_empty, load_state, without_memory

SIDE = 224
FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


class HPSv2(CosineReward):
    """Cosine of image and prompt. Releases cannot be compared with each other, nor scores of different prompts.

    release: 2.1 (the default of `hpsv2.evaluate`) or 2.0 (that of `hpsv2.score`). antialias: torchvision's default for
    tensors was off when the paper's tables were made and is on in current releases; for a fine pattern reduced from
    1024 px scores differ by at most 0.06. architecture: of the checkpoint, an open_clip name.
    """

    name = "hpsv2"
    columns = ("hpsv2",)
    range = (-1.0, 1.0)
    usual = "0.15 to 0.35"
    licence = "Apache-2.0"
    weights = "xswu/HPSv2"
    size = "2 GB"
    source = "arXiv 2306.09341"
    repo = "xswu/HPSv2"
    longest = 77
    preprocessing = "longer side to 224 bicubic on floats, black letterbox, CLIP normalisation"

    def __init__(
        self,
        *,
        release: str | float = "2.1",
        antialias: bool = True,
        architecture: str = "ViT-H-14",
        **shared: Unpack[LearnedOptions],
    ) -> None:
        super().__init__(**shared)
        if str(release) not in FILES:
            raise DiffalignError(f"reward hpsv2: release {release}; one of {', '.join(FILES)}")
        self.release = str(release)
        self.file = FILES[self.release]
        self.antialias = antialias
        self.architecture = architecture
        self._tokenizer: Any = None

    def options(self) -> dict[str, Any]:
        return {**super().options(), "release": self.release, "antialias": self.antialias}

    @property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer, loaded at first use."""
        if self._tokenizer is None:
            import open_clip

            self._tokenizer = open_clip.get_tokenizer(self.architecture)
        return self._tokenizer

    def lengths(self, prompts: list[str]) -> list[int]:
        return [len(self.tokenizer.encode(prompt)) + 2 for prompt in prompts]  # with beginning and end

    def build(self) -> torch.nn.Module:
        import open_clip

        path = self.path
        state = load_state(path, "state_dict")
        sizes = open_clip.get_model_config(self.architecture)
        if sizes is None:
            raise DiffalignError(f"reward hpsv2: architecture {self.architecture}: open_clip has no such model")
        with without_memory():
            model = open_clip.CLIP(**sizes)
        fill_empty(model, state, path, self.name, self.dtype, self.device)
        return model.to(self.dtype)  # the text encoder's mask, too

    def prepare(self, image: Image.Image) -> Tensor:
        # RGB first: with an alpha channel the original keeps four channels and then fails in the patch embedding.
        return normalise(letterbox(to_tensor(image), SIDE, self.antialias))

    def prepare_tensors(self, pixels: Tensor) -> Tensor:
        return normalise(letterbox(pixels, SIDE, self.antialias))

    def embed_images(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.network.encode_image(pixels.to(self.dtype)).float(), dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        network = self.network  # before the tokenizer: loading it makes the architecture known
        return F.normalize(network.encode_text(self.tokenizer(texts).to(self.device)).float(), dim=-1)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return self.cosine(pixels, prompts)
