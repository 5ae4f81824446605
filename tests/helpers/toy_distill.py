"""A toy of three small networks for the distillation loop; as a program, so that tests can start it in several processes.

python toy_distill.py RUN_DIR STEPS GROUPS_PER_STEP MICRO_BATCH [GAN_WEIGHT]
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.config import DistillConfig
from diffalign.pipelines.few_step import FewStep
from diffalign.pipelines.process import Flow
from diffalign.training.device import start_accelerator
from diffalign.training.distillation.method import Distillation
from diffalign.training.run import run as train
from helpers.files import rows

SHAPE = (2, 4, 4)
WIDTH = 32
TIMES = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


class Networks(nn.Module):
    """One frozen matrix, and a low-rank addition for the student and for the fake network."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.base = nn.Parameter(torch.randn(WIDTH + 4, WIDTH, generator=generator) / 6, requires_grad=False)
        for name in ("student", "fake"):
            self.register_parameter(f"{name}_down", nn.Parameter(torch.randn(WIDTH + 4, 3, generator=generator) / 6))
            self.register_parameter(f"{name}_up", nn.Parameter(torch.zeros(3, WIDTH)))
        self.active: str | None = "student"
        self.mid_block = nn.Identity()  # where a critic looks

    def forward(self, x: Tensor, prompt: Tensor, time: Tensor) -> Tensor:
        features = torch.cat([x.flatten(1), prompt, time[:, None]], dim=1)
        out = features @ self.base
        if self.active is not None:
            own = dict(self.named_parameters())
            out = out + features @ own[f"{self.active}_down"] @ own[f"{self.active}_up"]
        middle: Tensor = self.mid_block(out.view_as(x))
        return middle


class ToyBackbone:
    device, dtype, family, guided = torch.device("cpu"), torch.float32, "toy", False

    def __init__(self) -> None:
        self.process = Flow()
        self.trunk = Networks()

    @property
    def pipeline_trunk(self) -> nn.Module:
        return self.trunk

    def middle_block(self) -> nn.Module:
        return self.trunk.mid_block

    def add_lora(self, *args: Any, **kwargs: Any) -> None:
        pass

    def add_fake(self, seed: int = 0) -> None:
        pass

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        self.trunk.active = None if name == "teacher" else name
        try:
            yield
        finally:
            self.trunk.active = "student"

    def predict(self, noisy: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return self.trunk(noisy, conditioning["prompt"], t)

    def image_positions(self, features: Tensor, noisy: Tensor) -> Tensor:
        return features

    def trainable(self, role: str = "student") -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.trunk.named_parameters() if n.startswith(role)}

    def save_weights(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: p.detach().clone() for k, p in self.trainable().items()}, folder / "weights.safetensors")


class ToyPrompts:
    def __init__(self, prompts: int = 13) -> None:
        rng = np.random.default_rng(0)
        self.prompts = torch.from_numpy(rng.standard_normal((prompts, 3), dtype=np.float32))
        self.ids = [f"p{i}" for i in range(prompts)]
        self.unconditional = {"prompt": torch.zeros(1, 3)}

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        return {"prompt": self.prompts[indices]}


def brightness(latents: Tensor, indices: list[int]) -> dict[str, Tensor]:
    """A reward: the latent's mean."""
    return {"mean": latents.flatten(1).mean(dim=1)}


def toy_config(run_dir: Path, **sections: Any) -> DistillConfig:
    """Keyword sections are merged over the defaults."""
    plain: dict[str, Any] = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "model": {"path": "toy"},
        "prompts": "toy",
        "match": {"guidance": 3.0},
        "group": {"size": 2},
        "fake": {"updates": 2, "optimizer": {"lr": 1e-2}},
        "train": {"steps": 6, "groups_per_step": 4, "micro_batch": 4, "threads": 1},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 3},
        "tracking": {"trackers": []},
    }
    for name, values in sections.items():
        plain[name] = {**plain.get(name, {}), **values} if isinstance(values, dict) else values
    return DistillConfig.model_validate(plain)


class ToyImages:
    """Real latents with prompts, as `RealImages` gives them."""

    def __init__(self, images: int = 11) -> None:
        rng = np.random.default_rng(1)
        self.latents = torch.from_numpy(rng.standard_normal((images, *SHAPE), dtype=np.float32)) + 1.0
        self.prompts = torch.from_numpy(rng.standard_normal((images, 3), dtype=np.float32))

    def batch(self, numbers: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = [n % len(self.latents) for n in numbers]
        return self.latents[rows], {"prompt": self.prompts[rows]}


def run(
    config: DistillConfig,
    backbone: ToyBackbone | None = None,
    scores: Any = None,
    times: Tensor = TIMES,
    real: Any = None,
    source: Any = None,
    **given: Any,
) -> None:
    """`given`: further arguments of the run."""
    backbone = backbone or ToyBackbone()
    student = FewStep(backbone.process, times, config.student.sampler, config.student.eta)
    method: Any = Distillation(
        config, backbone, student, source or ToyPrompts(), SHAPE, start_accelerator(config), scores, None,
        real or ToyImages(),
    )  # fmt: skip
    train(config, method, **{"say": lambda _: None, **given})


def distilled(run_dir: Path, judge: Any = None, **sections: Any) -> list[dict[str, float]]:
    run(toy_config(run_dir, **sections), scores=judge)
    return rows(run_dir)


def moved(seed: int = 3) -> ToyBackbone:
    """A backbone whose student and fake differ from the teacher."""
    backbone = ToyBackbone()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for role in ("student", "fake"):
            for parameter in backbone.trainable(role).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return backbone


def network(backbone: ToyBackbone, role: str, x: Tensor, t: Any, prompt: Tensor) -> Tensor:
    time = torch.as_tensor(t, dtype=torch.float32).expand(len(x))
    with backbone.role(role):
        return backbone.trunk(x, prompt, time)


if __name__ == "__main__":
    run_dir, steps, groups, micro = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    settings = {"steps": steps, "groups_per_step": groups, "micro_batch": micro}
    gan = {"weight": float(sys.argv[5]), "real": "toy"} if len(sys.argv) > 5 else {}
    run(toy_config(run_dir, train=settings, reward={"terms": [{"name": "mean"}]}, gan=gan), scores=brightness)
