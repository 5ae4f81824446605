"""Loading: local folders, a hub (a small local server that speaks its protocol), and one clear line per mistake."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.pipelines import BACKBONES, load_backbone
from helpers import tiny
from helpers.http_server import Quiet, http_server

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- local folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "prediction"),
    [("sd15_dir", "sd15", "epsilon"), ("sdxl_dir", "sdxl", "epsilon"), ("sd3_dir", "sd3", "flow")],
)
def test_facts(name: str, family: str, prediction: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    backbone = load_backbone(folder)
    assert (backbone.family, backbone.revision, backbone.default_resolution) == (family, None, 64)
    facts = backbone.facts()
    assert facts["prediction"] == prediction and facts["path"] == str(folder)
    assert facts["trainable"] == 0
    parameters = facts["parameters"]
    backbone.add_lora(2, 2)
    assert backbone.facts()["parameters"] == parameters
    assert backbone.facts()["trainable"] == sum(p.numel() for p in backbone.trainable().values()) > 0


def test_prediction_type_and_zero_snr_come_from_the_scheduler(tmp_path: Path) -> None:
    zero: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    backbone = load_backbone(tiny.sd15(tmp_path / "v", "v_prediction", **zero))
    assert backbone.process.prediction_type == "v_prediction"
    assert float(backbone.process.coefficients(torch.tensor([999.0]))[0]) == 0.0
    for build in (tiny.sd15, tiny.sdxl):
        with pytest.raises(DiffalignError, match="zero terminal SNR"):
            load_backbone(build(tmp_path / build.__name__, "epsilon", **zero))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def remove(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return damage


def rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / old).rename(folder / new)


def index(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", lambda content: content.update(changes))


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


SUPPORTED = "StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline, FluxPipeline"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("model_index.json"), r"is no diffusers pipeline: it holds no model_index\.json"),
        (write("model_index.json", "{"), "is not valid JSON"),
        (write("model_index.json", "[]"), "names no _class_name"),
        (index(_class_name="KolorsPipeline"), f"KolorsPipeline is not supported; supported are {SUPPORTED}$"),
        (index(text_encoder=[None, None]), "component text_encoder is absent; only text_encoder_3, tokenizer_3 may be"),
        (index(vae=["my_code", "MyVAE"]), r"component vae is code of the repository \(my_code\), which is never run"),
        (remove("vae"), r"vae/ is missing; model_index\.json asks for it \(AutoencoderKL\)"),
        (remove("scheduler/scheduler_config.json"), r"scheduler/scheduler_config\.json is missing"),
        (remove("transformer/config.json"), r"transformer/config\.json is missing"),
        (remove(WEIGHTS), r"transformer/ holds no \.safetensors weights$"),
        (rename(WEIGHTS, "transformer/diffusion_pytorch_model.bin"), "is a pickle, which is not read"),
        (write(WEIGHTS, "garbage"), "is damaged or no safetensors file"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", lambda c: c.update(use_dynamic_shifting=True)),
         "use_dynamic_shifting is not supported"),
    ],
)  # fmt: skip
def test_damaged_folders(sd3_dir: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd3_dir, folder)
    damage(folder)
    with pytest.raises(DiffalignError, match=message) as error:
        load_backbone(folder)
    assert "\n" not in str(error.value) and ("scheduler" in str(error.value) or str(folder) in str(error.value))


@pytest.mark.parametrize("path", ["no/such/folder", "/nowhere", "./runs/model", "single-name"])
def test_missing_folders_never_reach_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(DiffalignError, match="does not exist"):
        load_backbone(path)


def test_other_refusals(sd15_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(DiffalignError, match="is damaged or no safetensors file"):
        load_backbone(file)
    with pytest.raises(DiffalignError, match="is a local folder, which has none"):
        load_backbone(sd15_dir, revision="main")
    with pytest.raises(DiffalignError, match="no weights of variant 'fp16'"):
        load_backbone(sd15_dir, variant="fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DiffalignError, match="CUDA was asked for and is not available"):
        load_backbone(sd15_dir, device="cuda")


def test_schedulers_that_no_process_describes(sd15_dir: Path, sd3_dir: Path, tmp_path: Path) -> None:
    for folder, scheduler, message in (
        (sd15_dir, "EDMEulerScheduler", "EDMEulerScheduler has no alphas_cumprod"),
        (sd3_dir, "DDIMScheduler", "SD3 needs a FlowMatch scheduler, not DDIMScheduler"),
    ):
        copy = tmp_path / scheduler
        shutil.copytree(folder, copy)
        index(scheduler=["diffusers", scheduler])(copy)
        write("scheduler/scheduler_config.json", json.dumps({"_class_name": scheduler}))(copy)
        with pytest.raises(DiffalignError, match=message):
            load_backbone(copy)


def test_guidance_distilled_models_are_refused(sd15_dir: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    folder = tmp_path / "model"
    shutil.copytree(sd15_dir, folder)
    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    UNet2DConditionModel.from_config(config, time_cond_proj_dim=8).save_pretrained(folder / "unet")
    with pytest.raises(DiffalignError, match="guidance-distilled"):
        load_backbone(folder)


def test_variants_are_loaded(sd15_dir: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(sd15_dir, safety_checker=None)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "unet/diffusion_pytorch_model.safetensors").exists()
    assert (
        load_backbone(tmp_path, variant="fp16").facts()["parameters"] == load_backbone(sd15_dir).facts()["parameters"]
    )


def test_t5_may_be_half_or_wholly_absent(sd3_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd3_dir, folder)
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(DiffalignError, match="text_encoder_3/ is missing"):
        load_backbone(folder)
    assert load_backbone(folder, use_t5=False).pipeline.text_encoder_3 is None
    index(text_encoder_3=[None, None])(folder)
    assert load_backbone(folder).pipeline.text_encoder_3 is None
    edit(folder / "model_index.json", lambda c: (c.pop("text_encoder_3"), c.pop("tokenizer_3")))
    assert load_backbone(folder).pipeline.text_encoder_3 is None


def test_fingerprint_follows_the_content(sd15_dir: Path, sdxl_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sd15_dir, folder)
    first = load_backbone(folder).fingerprint()
    assert len(first) == 16 and first == load_backbone(folder).fingerprint()
    assert first != load_backbone(folder, dtype=torch.bfloat16).fingerprint()
    assert first != load_backbone(sdxl_dir).fingerprint()
    # The same sizes and names, other weights.
    tiny.sd15(folder, seed=1)
    assert first != load_backbone(folder).fingerprint()


def test_every_family_has_its_class() -> None:
    assert {name: kind.family for name, kind in BACKBONES.items()} == {
        "StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl", "StableDiffusion3Pipeline": "sd3",
        "FluxPipeline": "flux", "Flux2Pipeline": "flux2", "Flux2KleinPipeline": "flux2_klein",
        "PixArtSigmaPipeline": "pixart", "SanaPipeline": "sana", "ZImagePipeline": "z_image",
        "QwenImagePipeline": "qwen_image", "QwenImage21Pipeline": "qwen_image_21",
    }  # fmt: skip


# --- the hub ---------------------------------------------------------------------------------------------------


class Hub(Quiet):
    """As much of the Hugging Face hub as a download needs, over one folder served as acme/model."""

    folder: Path
    requests: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers.get("Authorization")))
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
        owner = "/".join(path.split("/")[:2])
        if owner == "acme/gated":
            self.answer(b"", 403, X_Error_Code="GatedRepo", X_Error_Message="gated")
        elif owner == "acme/broken":
            self.answer(b"", 400)
        elif owner != "acme/model":
            self.answer(b"", 401, X_Error_Code="RepoNotFound")
        elif self.path.startswith("/api/"):
            self.repository(path)
        else:
            revision, name = path.removeprefix("acme/model/resolve/").split("/", 1)
            self.file(revision, name)

    do_HEAD = do_GET

    def repository(self, path: str) -> None:
        files = [str(f.relative_to(self.folder)) for f in sorted(self.folder.rglob("*")) if f.is_file()]
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": f, "oid": "0" * 40, "size": (self.folder / f).stat().st_size} for f in files
            ]
            self.answer(json.dumps(tree).encode(), Content_Type="application/json")
            return
        info = {"id": "acme/model", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
        self.answer(json.dumps(info).encode(), Content_Type="application/json")

    def file(self, revision: str, name: str) -> None:
        if revision not in ("main", "v1", COMMIT):
            self.answer(b"", 404, X_Error_Code="RevisionNotFound")
        elif not (self.folder / name).is_file():
            self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            tag = f'"{name.replace("/", "-")}"'
            self.answer((self.folder / name).read_bytes(), X_Repo_Commit=COMMIT, ETag=tag)


@pytest.fixture
def hub(sd3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub that serves a copy of the tiny SD3 as acme/model, with an empty cache on this side."""
    import diffusers.pipelines.pipeline_utils  # noqa: F401  # reads the constants when first imported
    from huggingface_hub import constants, hf_api

    class Here(Hub):
        folder = tmp_path / "served"
        requests: list[tuple[str, str | None]] = []  # noqa: RUF012  # one server, one list

    shutil.copytree(sd3_dir, Here.folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http_server(Here) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(hf_api.api, "endpoint", url)
        yield Here


def test_a_hub_id_is_resolved_to_a_commit(hub: type[Hub], sd3_dir: Path) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(b"pickle")
    (hub.folder / "code.py").write_text("raise SystemExit", encoding="utf-8")
    backbone = load_backbone("acme/model", revision="v1", token="hf_secret")
    assert (backbone.path, backbone.revision, backbone.facts()["revision"]) == ("acme/model", COMMIT, COMMIT)
    local = load_backbone(sd3_dir)
    assert all(torch.equal(p, local.trunk.state_dict()[n]) for n, p in backbone.trunk.state_dict().items())
    fetched = {path.split("?")[0].split("/")[-1] for path, _ in hub.requests}
    assert "diffusion_pytorch_model.safetensors" in fetched and not fetched & {"pytorch_model.bin", "code.py"}
    assert {token for path, token in hub.requests if "/resolve/" in path} == {"Bearer hf_secret"}

    # From the cache, without a single request.
    hub.requests.clear()
    again = load_backbone("acme/model", revision="v1", local_files_only=True)
    assert again.revision == COMMIT and hub.requests == []
    assert again.fingerprint() == backbone.fingerprint()
    with pytest.raises(DiffalignError, match="at revision v2 is not in the local cache and the hub was not asked"):
        load_backbone("acme/model", revision="v2", local_files_only=True)


def test_t5_is_not_downloaded_when_it_is_not_wanted(hub: type[Hub]) -> None:
    assert load_backbone("acme/model", use_t5=False).pipeline.text_encoder_3 is None
    assert not [p for p, _ in hub.requests if "/resolve/" in p and "text_encoder_3/model.safetensors" in p]


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        ("acme/gated", None, r"is gated: accept its conditions at http://127.*/acme/gated, then pass a token"),
        ("acme/nothing", None, r"no folder acme/nothing here, and http.*/acme/nothing does not exist or is private"),
        ("acme/model", "v9", "acme/model has no revision 'v9'"),
        ("acme/broken", None, r"not in the local cache and the hub gave no answer \(Bad request"),
    ],
)
def test_what_the_hub_refuses(hub: type[Hub], path: str, revision: str | None, message: str) -> None:
    with pytest.raises(DiffalignError, match=message) as error:
        load_backbone(path, revision=revision)
    assert "\n" not in str(error.value)


def test_repositories_that_lack_files(hub: type[Hub]) -> None:
    shutil.rmtree(hub.folder / "text_encoder_2")
    with pytest.raises(DiffalignError, match="text_encoder_2"):
        load_backbone("acme/model")
    (hub.folder / "model_index.json").unlink()
    with pytest.raises(DiffalignError, match=r"is no diffusers pipeline: http.* holds no model_index\.json"):
        load_backbone("acme/model", revision="v1")


def test_an_unreachable_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    url = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(DiffalignError, match=r"model_index\.json is not in the local cache and the hub gave no answer"):
        load_backbone("acme/model")
