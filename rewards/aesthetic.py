"""LAION's aesthetic predictor v2 (improved-aesthetic-predictor): an affine head on OpenAI's CLIP ViT-L/14.

OpenAI's CLIP uses QuickGELU. open_clip's `ViT-L-14` with pretrained="openai" only warns and runs with GELU, which a
third party measured to shift such scores by 0.6. transformers' copy of the model has quick_gelu in its config; a copy
that does not is refused.
"""

from pathlib import Path
from typing import Unpack

from torch import Tensor, nn

from diffalign.pretrained import load_part
from diffalign.rewards.clip import L14, ClipOptions, ClipReward, quick_gelu
from diffalign.rewards.published_weights import fetch, fill, fingerprint, load_state, pretrained

HEAD_REPO, HEAD_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"


def linear_head(width: int, sizes: tuple[int, ...], dropouts: tuple[float, ...]) -> nn.Sequential:
    """Return linear layers with dropout between and no activation: an affine map, as published.

    Layer numbers match the checkpoints'.
    """
    layers: list[nn.Module] = []
    for i, size in enumerate(sizes):
        layers.append(nn.Linear(width, size))
        width = size
        if i < len(dropouts):
            layers.append(nn.Dropout(dropouts[i]))
    return nn.Sequential(*layers)


class AestheticModel(nn.Module):
    """CLIP and the head in one module, so that they move together."""

    def __init__(self, clip: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.clip, self.head = clip, head


class Aesthetic(ClipReward):
    """About 1 to 10, most images 4 to 7; the prompt is not read.

    weights: a local copy of the head `sac+logos+ava1-l14-linearMSE.pth`; default: the copy in trl-lib's hub repository.
    clip: a local copy of openai/clip-vit-large-patch14.
    """

    name = "aesthetic"
    columns = ("aesthetic",)
    range = (1.0, 10.0)
    usual = "4 to 7"
    licence = "Apache-2.0 (head), MIT (CLIP)"
    weights = f"{L14}, {HEAD_REPO}"
    size = "1.7 GB"
    source = "github.com/christophschuhmann/improved-aesthetic-predictor"
    repo = HEAD_REPO
    file = HEAD_FILE
    reads = ()
    longest = 0
    rounding = "round"

    def __init__(self, *, clip: str | Path | None = None, **shared: Unpack[ClipOptions]) -> None:
        super().__init__(**shared)
        self.local_clip = clip

    @property
    def clip_path(self) -> Path:
        """The folder of CLIP."""
        return fetch(self.name, L14, None, "main", self.local_clip, "clip")

    def weights_id(self) -> str:
        return f"{super().weights_id()} on {L14}@{fingerprint(self.clip_path)}"

    def build(self) -> nn.Module:
        from transformers import CLIPConfig, CLIPModel

        folder = quick_gelu(self.name, self.clip_path)
        clip = pretrained(CLIPModel, folder, self.name, self.dtype)
        width = load_part(CLIPConfig, folder, f"reward {self.name}").projection_dim
        head = linear_head(width, (1024, 128, 64, 16, 1), (0.2, 0.2, 0.1))
        state = {k.removeprefix("layers."): v for k, v in load_state(self.path, "state_dict").items()}
        fill(head, state, self.path, self.name)
        return AestheticModel(clip, head.float())

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        features = self.network.clip.get_image_features(pixel_values=pixels.to(self.dtype)).pooler_output
        scores: Tensor = self.network.head(nn.functional.normalize(features.float(), dim=-1))
        return scores[:, 0]
