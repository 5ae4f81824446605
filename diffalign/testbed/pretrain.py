"""Train the shipped base models from random weights: `diffalign testbed pretrain shapes-sd3 --out FOLDER`.

The steps: draw scenes, train the VAE, then train trunk and text encoders together on latents. In the last part of the
run a share of each caption's attributes is random. Such a base draws clean shapes but follows prompts loosely, like
models trained on web captions, so there is something for preference learning to improve. A run that is stopped resumes
from its last snapshot.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import l1_loss, mse_loss

from diffalign import stopping
from diffalign.files import replacing
from diffalign.progress import Say
from diffalign.testbed.models import BUILDERS, autoencoder
from diffalign.testbed.scenes import render
from diffalign.testbed.shape_prompts import TAGS, Metadata, combinations, misdescribed, scene_for
from diffalign.testbed.tokenizers import T5_LENGTH

Pipeline: TypeAlias = StableDiffusion3Pipeline | StableDiffusionXLPipeline


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that made a shipped model, stored beside its weights."""

    scenes: int = 24_000
    vae_steps: int = 1_600
    vae_batch: int = 16
    vae_lr: float = 2e-3
    kl_weight: float = 1e-5
    steps: int = 9_000
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 200
    ema: float = 0.998
    caption_dropout: float = 0.1
    caption_noise: float = 0.35
    clean_share: float = 0.75  # of the steps, before captions become noisy
    bf16: bool = False  # trunk and VAE under autocast: faster on CPUs with matrix units for it
    snapshot_every: int = 250
    seed: int = 0


# The VAE with more levels has more to learn. The transformer's steps cost more, and it needs fewer on its coarse latents.
SETTINGS = {
    "shapes-sd3": PretrainSettings(vae_steps=1_200, vae_batch=32, kl_weight=3e-4, steps=4_000, bf16=True),
    "shapes-sdxl": PretrainSettings(),
}


def draw_scenes(settings: PretrainSettings) -> tuple[list[Metadata], np.ndarray]:
    """Return the captions' metadata and images [N, 64, 64, 3] uint8, all six kinds of prompt in equal shares."""
    rng = np.random.default_rng([settings.seed, 1])
    wordings = {tag: [w for c in combinations(tag) for w in c] for tag in TAGS}
    described, images = [], []
    for i in range(settings.scenes):
        options = wordings[TAGS[i % len(TAGS)]]
        described.append(options[rng.integers(len(options))])
        images.append(np.asarray(render(scene_for(described[-1], rng))))
    return described, np.stack(images)


def to_pixels(images: np.ndarray) -> Tensor:
    """Convert uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the learning rate of a step: linear warm-up, a plateau, half a cosine to zero over the second half.

    Because of the plateau a run can still be made longer in its first half.
    """
    fall = max(0.0, 2 * step / steps - 1)
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * fall))


def _batches(n: int, batch: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([seed, 2])
    for _ in range(steps):
        yield rng.integers(n, size=batch)


def train_vae(name: str, images: np.ndarray, settings: PretrainSettings, say: Say) -> AutoencoderKL:
    """Train the VAE by L1 and L2 reconstruction with a small KL term."""
    torch.manual_seed(settings.seed)
    vae = autoencoder(name).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.vae_lr, weight_decay=0.0)
    started = time.monotonic()
    for step, index in enumerate(_batches(len(images), settings.vae_batch, settings.vae_steps, settings.seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.vae_steps, settings.vae_lr, 50)
        pixels = to_pixels(images[index]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = l1_loss(decoded, pixels) + mse_loss(decoded, pixels) + settings.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            say(f"vae step {step}/{settings.vae_steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s")
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch: int = 64) -> Tensor:
    """Return posterior means [N, C, h, w], neither shifted nor scaled."""
    parts = [vae.encode(to_pixels(images[i : i + batch])).latent_dist.mode() for i in range(0, len(images), batch)]
    return torch.cat(parts).contiguous()


def prepare(
    name: str, folder: Path, settings: PretrainSettings, say: Say
) -> tuple[AutoencoderKL, list[Metadata], Tensor]:
    """Return scenes' metadata, a trained VAE and latents; VAE and latents are kept in `folder` for the next run.

    The mean and spread of the latents become the VAE's shift and scale.
    """
    stored = folder / f"{name}-latents.safetensors"
    described, images = draw_scenes(settings)
    say(f"{len(images)} scenes drawn")
    if not (folder / f"{name}-vae").is_dir():
        vae = train_vae(name, images, settings, say)
        latents = encode(vae, images[:4096])
        vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
        vae.save_pretrained(folder / f"{name}-vae")
    vae = AutoencoderKL.from_pretrained(folder / f"{name}-vae").eval()
    vae.register_to_config(_name_or_path="")  # the folder that it came from means nothing to others
    if not stored.is_file():
        save_file({"latents": encode(vae, images)}, stored)
    return vae, described, load_file(stored)["latents"]


def condition(pipeline: Pipeline, captions: list[str]) -> dict[str, Tensor]:
    """Return the trunk's arguments for captions, with gradient to the text encoders; "" stands for no caption."""
    if isinstance(pipeline, StableDiffusion3Pipeline):
        embeds, _, pooled, _ = pipeline.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    # SDXL's unconditional branch is zeros (`force_zeros_for_empty_prompt`), not the encoding of "".
    keep = torch.tensor([float(bool(c)) for c in captions])
    embeds, pooled = embeds * keep[:, None, None], pooled * keep[:, None]
    size = torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(len(captions), 6)
    return {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": size}}


def denoising_loss(
    pipeline: Pipeline, latents: Tensor, captions: list[str], generator: torch.Generator, bf16: bool = False
) -> Tensor:
    """Return the loss: rectified flow with logit-normal times for the MMDiT, epsilon prediction for the UNet."""
    noise = torch.randn(latents.shape, generator=generator)
    arguments = condition(pipeline, captions)
    # The fused CPU attention has a backward in bf16 that is slower than the plain one by half.
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), sdpa_kernel(SDPBackend.MATH):
        if isinstance(pipeline, StableDiffusion3Pipeline):
            t = torch.sigmoid(torch.randn(len(latents), generator=generator))[:, None, None, None]
            noisy = (1 - t) * latents + t * noise
            velocity = pipeline.transformer(noisy, timestep=1000 * t.flatten(), **arguments).sample
            return mse_loss(velocity.float(), noise - latents)
        process = DDPMScheduler.from_config(pipeline.scheduler.config)
        t = torch.randint(1000, (len(latents),), generator=generator)
        return mse_loss(pipeline.unet(process.add_noise(latents, noise, t), t, **arguments).sample.float(), noise)


def learners(pipeline: Pipeline) -> torch.nn.ModuleDict:
    """Return what is trained: the trunk and every text encoder."""
    names = [n for n, c in pipeline.components.items() if isinstance(c, torch.nn.Module) and n != "vae"]
    return torch.nn.ModuleDict({n: pipeline.components[n] for n in names})


def save(pipeline: Pipeline, averages: dict[str, Tensor], folder: Path) -> None:
    """Save the averaged weights in bf16, in diffusers' layout."""
    modules = learners(pipeline)
    current = {k: v.clone() for k, v in modules.state_dict().items()}
    modules.load_state_dict(averages, strict=False)
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    pipeline.to(torch.float32)
    modules.load_state_dict(current)
    pipeline.vae = AutoencoderKL.from_pretrained(folder / "vae").eval()


def _captions(settings: PretrainSettings, step: int, described: list[Metadata]) -> list[str]:
    """Return the captions of a step's images: some dropped and, in the last part of the run, some attributes wrong."""
    rng = np.random.default_rng([settings.seed, 3, step])
    noise = settings.caption_noise if step >= settings.clean_share * settings.steps else 0.0
    return ["" if rng.random() < settings.caption_dropout else misdescribed(one, rng, noise) for one in described]


def _restore(
    snapshot: Path, modules: torch.nn.Module, optimizer: torch.optim.Optimizer, averages: dict[str, Tensor]
) -> int:
    """Load a snapshot in place; return how many steps were done."""
    state = torch.load(snapshot, weights_only=True)
    modules.load_state_dict(state["modules"])
    optimizer.load_state_dict(state["optimizer"])
    averages.update(state["averages"])
    return int(state["step"])


def main(
    name: str, out: Path, settings: PretrainSettings | None = None, say: Say = print, until: int | None = None
) -> None:
    """Pre-train `name` into `out` / `name`; intermediate states lie in `out`, from which a second run resumes.

    `until`: stop after this many steps, and save only a snapshot.
    """
    settings = settings or SETTINGS[name]
    out.mkdir(parents=True, exist_ok=True)
    vae, described, latents = prepare(name, out, settings, say)
    torch.manual_seed(settings.seed)
    if name == "shapes-sdxl":  # its pipeline has a scale but no shift
        vae.register_to_config(shift_factor=None)
        latents = latents * vae.config.scaling_factor
    else:
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    pipeline = BUILDERS[name](vae)
    modules = learners(pipeline).train()
    parameters = dict(modules.named_parameters())
    averages = {k: p.detach().clone() for k, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.01)
    snapshot, first = out / f"{name}-snapshot.pt", 0
    if snapshot.is_file():
        first = _restore(snapshot, modules, optimizer, averages)
        stopping.keep(f"step {first} of {settings.steps} is")
    log, started, running = out / f"{name}-log.jsonl", time.monotonic(), 0.0
    batches = list(_batches(len(latents), settings.batch, settings.steps, settings.seed))
    last = settings.steps if until is None else min(until, settings.steps)
    for step in range(first, last):
        # Seeded by the step, so that a resumed run draws what an uninterrupted one would.
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        captions = _captions(settings, step, [described[i] for i in batches[step]])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr, settings.warmup)
        loss = denoising_loss(pipeline, latents[batches[step]], captions, generator, settings.bf16)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(settings.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(averages.values()), [p.detach() for p in parameters.values()], 1 - decay)
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            with log.open("a") as stream:
                stream.write(json.dumps({"step": step, "loss": round(running, 5)}) + "\n")
            say(f"{name} step {step}/{settings.steps} loss {running:.4f} {time.monotonic() - started:.0f} s")
        if (step + 1) % settings.snapshot_every == 0 or step + 1 == last:
            state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "averages": averages}
            with replacing(snapshot) as part:
                torch.save(state | {"step": step + 1}, part)
            stopping.keep(f"step {step + 1} of {settings.steps} is")
    if last < settings.steps:
        return
    save(pipeline, averages, out / name)
    (out / name / "pretraining.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
