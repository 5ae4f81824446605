"""The predicted memory of a step: with and without gradient checkpointing, in float32 and under autocast."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import flux, sdxl

from diffalign.pipelines import load_backbone
from diffalign.training.footprint import CudaRules, LiveBytes, step_peak, to_meta


@pytest.mark.parametrize("named", [False, True])
def test_attention_by_place_and_by_name(named: bool) -> None:
    """FLUX in diffusers names query, key and value; the matrix of all pairs, 64 x 64 a head, exists in neither case."""
    inputs = {name: torch.empty(1, 2, 64, 8, device="meta") for name in ("query", "key", "value")}
    with LiveBytes() as live, CudaRules(None):
        if named:
            out = F.scaled_dot_product_attention(**inputs, dropout_p=0.0)
        else:
            out = F.scaled_dot_product_attention(*inputs.values())
    assert out.shape == (1, 2, 64, 8)
    assert live.peak == 4 * 2 * (64 * 8 + 64)  # the output and one number a query


@pytest.mark.parametrize("build", [sdxl, flux])
def test_checkpointing_is_predicted_to_save_memory(build: object, tmp_path: Path) -> None:
    """The blocks run again within backward, by the same rules as in forward: else autograd refuses what they keep."""
    assert callable(build)
    folder = build(tmp_path / "model")
    for tune, autocast in (("lora", None), ("full", torch.bfloat16)):
        peaks = []
        for saving in (False, True):
            backbone = load_backbone(folder, gradient_checkpointing=saving)
            conditioning = backbone.encode_prompts(["a red circle"])
            channels = backbone.latent_channels
            to_meta(backbone)
            if tune == "lora":
                backbone.add_lora(4, 4.0)
            else:
                backbone.enable_full()
            backbone.trunk.train()
            peak, gradients = step_peak(
                backbone, (8, channels, 16, 16), conditioning, reference=True, autocast=autocast
            )
            assert 0 < gradients < peak
            peaks.append(peak)
        assert peaks[1] < peaks[0], (tune, autocast)
