"""Shared fixtures: tiny checkpoints built once, one thread, quiet libraries, no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # read when huggingface_hub is imported: a test that needs the network is a bug
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from helpers import tiny, tiny_qwen


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes by their number: their content may hold a date, and all workers must collect the same tests."""
    return f"{len(val)}-bytes" if isinstance(val, bytes) else None


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The number of threads changes the last bits of sums, so every test runs with the same one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """Warnings of the libraries about tiny models say nothing about the code under test."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")


@pytest.fixture(scope="session")
def sd15_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny genuine StableDiffusionPipeline folder (epsilon). Shared: do not write into it."""
    return tiny.sd15(tmp_path_factory.mktemp("sd15") / "model")


@pytest.fixture(scope="session")
def sdxl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny genuine StableDiffusionXLPipeline folder (epsilon). Shared: do not write into it."""
    return tiny.sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="session")
def sd3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny genuine StableDiffusion3Pipeline folder with its T5 (flow). Shared: do not write into it."""
    return tiny.sd3(tmp_path_factory.mktemp("sd3") / "model", t5=True)


@pytest.fixture(scope="session")
def flux_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny genuine FluxPipeline folder with guidance embedding (flow). Shared: do not write into it."""
    return tiny.flux(tmp_path_factory.mktemp("flux") / "model")


@pytest.fixture(scope="session")
def flux2_klein_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny genuine Flux2KleinPipeline folder, not distilled (flow). Shared: do not write into it."""
    return tiny.flux2_klein(tmp_path_factory.mktemp("flux2_klein") / "model")


@pytest.fixture(scope="session")
def sana_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny genuine SanaPipeline folder (flow, DPM-Solver). Shared: do not write into it."""
    return tiny.sana(tmp_path_factory.mktemp("sana") / "model")


@pytest.fixture(scope="session")
def pixart_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny genuine PixArtSigmaPipeline folder (epsilon, DPM-Solver). Shared: do not write into it."""
    return tiny.pixart(tmp_path_factory.mktemp("pixart") / "model")


@pytest.fixture(scope="session")
def z_image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny genuine ZImagePipeline folder with a fixed shift (flow). Shared: do not write into it."""
    return tiny_qwen.z_image(tmp_path_factory.mktemp("z_image") / "model")


@pytest.fixture(scope="session")
def qwen_image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny genuine QwenImagePipeline folder (flow). Shared: do not write into it."""
    return tiny_qwen.qwen_image(tmp_path_factory.mktemp("qwen_image") / "model")


@pytest.fixture(scope="session")
def qwen_image_21_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny genuine QwenImage21Pipeline folder (flow). Shared: do not write into it."""
    return tiny_qwen.qwen_image_21(tmp_path_factory.mktemp("qwen_image_21") / "model")


@pytest.fixture(scope="session")
def soak() -> bool:
    """True under `make soak`: a test with this fixture then runs its long form (more repetitions of the same)."""
    return os.environ.get("DIFFALIGN_SOAK") == "1"
