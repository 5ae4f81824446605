"""FID, KID, similarities and LPIPS against their formulae in numpy, on random weights in the published layouts.

Inception: torch-fidelity's weights-inception-2015-12-05-6726825d.pth, a state dict of its FeatureExtractorInceptionV3 (release
v0.2.0). AlexNet: torchvision's alexnet-owt-7be5be79.pth. CLIP and DINO: transformers folders.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from diffalign.errors import DiffalignError
from diffalign.evaluation import set_measures
from diffalign.evaluation.set_networks import Clip, Dino, Inception, Lpips, published_file
from helpers import pictures, tiny_rewards
from helpers.command_line import refused, run

IMAGES = [pictures.smooth(k, 96, 64) for k in range(4)] + [pictures.smooth(9, 60, 70)]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of random numbers: inception.pth, alexnet.pth, and the folders clip and dino."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchvision.models import alexnet
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        # The class loads a file when it is built; here it shows its layout.
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(network.state_dict(), folder / "inception.pth")
    torch.save(alexnet().state_dict(), folder / "alexnet.pth")
    tiny_rewards.clip_folder(folder / "clip")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ViTModel(ViTConfig(**shape, image_size=224, patch_size=16), add_pooling_layer=False).save_pretrained(
        folder / "dino"
    )
    return folder


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6."""
    c, d = np.cov(a.T), np.cov(b.T)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * np.real(sqrtm(c @ d))))


def mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Binkowski et al. 2018, eq. 4 with k(x, y) = (x.y / d + 1)^3, by loops."""
    n, d = a.shape

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / d + 1) ** 3)

    within = sum(k(s[i], s[j]) for s in (a, b) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within - 2 * sum(k(x, y) for x in a for y in b) / n**2


def test_fid() -> None:
    a, b = RNG.normal(size=(300, 12)) @ RNG.normal(size=(12, 12)), RNG.normal(0.3, 1.2, size=(200, 12))
    found = set_measures.fid(torch.tensor(a), torch.tensor(b))
    assert found.value == pytest.approx(frechet(a, b), rel=1e-6) and "biased" in found.note
    same = set_measures.fid(torch.tensor(a), torch.tensor(a))
    assert same.value == pytest.approx(0, abs=1e-5)
    with pytest.raises(
        DiffalignError, match="11 generated and 200 reference images are too few.*12 features.*use -m kid"
    ):
        set_measures.fid(torch.tensor(a[:11]), torch.tensor(b))


def test_kid() -> None:
    a, b = RNG.normal(size=(30, 5)), RNG.normal(0.5, 1, size=(30, 5))
    whole = set_measures.kid(torch.tensor(a), torch.tensor(b), subsets=2)
    assert whole.value == pytest.approx(mmd(a, b), rel=1e-9) and whole.note == "subsets of 30, not 1000"
    state = torch.get_rng_state()
    some = [
        set_measures.kid(torch.tensor(a), torch.tensor(b), subsets=20, subset_size=10, seed=s).value for s in (0, 0, 1)
    ]
    assert some[0] == some[1] != some[2] and torch.equal(torch.get_rng_state(), state)
    assert np.mean(some) == pytest.approx(mmd(a, b), abs=0.5)
    with pytest.raises(DiffalignError, match="subset_size=31, but there are 30 and 30 images"):
        set_measures.kid(torch.tensor(a), torch.tensor(b), subset_size=31)


def test_similarity() -> None:
    a, b = RNG.normal(size=(9, 6)), RNG.normal(0.5, 1, size=(4, 6))
    pairs = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x in a for y in b]
    found = set_measures.similarity("dino", torch.tensor(a), torch.tensor(b))
    assert found.value == pytest.approx(np.mean(pairs)) and " to " in found.spread


def test_inception_is_the_network_of_the_published_fid(weights: Path) -> None:
    """torch-fidelity's own class on the same file and the same pixels, one image at a time."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    found = Inception("fid", weights / "inception.pth").embed(IMAGES)
    oracle = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights / "inception.pth"))
    for row, image in zip(found, IMAGES, strict=True):
        pixels = torch.tensor(np.asarray(image.convert("RGB")).transpose(2, 0, 1)[None])
        torch.testing.assert_close(row, oracle(pixels)[0][0], rtol=1e-4, atol=1e-5)
    assert len({tuple(row.tolist()) for row in found}) == len(IMAGES)


def test_lpips(weights: Path) -> None:
    """The definition in numpy on torchvision's AlexNet: unit vectors, squared differences, the published linear layers."""
    import torchmetrics
    from torchvision.models import alexnet

    layers = alexnet()
    layers.load_state_dict(torch.load(weights / "alexnet.pth", weights_only=True))
    heads = torch.load(
        Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth", "cpu", weights_only=True
    )

    def taps(image: Image.Image) -> list[np.ndarray]:
        x = np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        h, found = torch.tensor((x - shift[:, None, None]) / scale[:, None, None], dtype=torch.float32)[None], []
        for i, layer in enumerate(layers.features.eval()):
            h = layer(h)
            if i in (1, 4, 7, 9, 11):
                found.append(h[0].detach().numpy().astype(np.float64))
        return found

    expected = 0.0
    for k, (a, b) in enumerate(zip(taps(IMAGES[0]), taps(IMAGES[1]), strict=True)):
        a, b = (v / np.sqrt((v**2).sum(0, keepdims=True) + 1e-8) for v in (a, b))
        head = heads[f"lin{k}.model.1.weight"].numpy().reshape(-1, 1, 1)
        expected += float((head * (a - b) ** 2).sum(0).mean())
    network = Lpips("lpips", weights / "alexnet.pth")
    assert network.distances([IMAGES[0]], [IMAGES[1]])[0] == pytest.approx(expected, rel=1e-3)
    both = network.distances([IMAGES[4], IMAGES[0]], [IMAGES[4], IMAGES[1]])  # of two sizes
    assert both == pytest.approx([0, expected], rel=1e-3, abs=1e-7)


def test_pairs() -> None:
    assert set_measures.pairs_of(["a", "b", "a", "a"]) == [("a", 0, 2), ("a", 0, 3), ("a", 2, 3)]
    assert set_measures.pairs_of([None, None]) == [("", 0, 1)] and set_measures.pairs_of(["", "a", "a"]) == [
        ("a", 1, 2)
    ]
    many = set_measures.pairs_of([None] * 500)
    assert (
        len(set(many)) == 2000 and all(i < j for _, i, j in many) and {i for _, i, _ in many} > set(range(0, 400, 40))
    )
    with pytest.raises(DiffalignError, match="no two images share a prompt"):
        set_measures.pairs_of(["a", "b"])
    found = set_measures.diversity([("a", 0, 1), ("a", 0, 2), ("b", 3, 4)], [1.0, 3.0, 8.0])
    assert found.value == 5 and found.note == "3 pairs within 2 prompts"


def test_clip_and_dino(weights: Path) -> None:
    """Against transformers' own processors, which crop and normalise by themselves."""
    from torchvision import transforms
    from transformers import CLIPModel, ViTModel

    clip = CLIPModel.from_pretrained(weights / "clip").eval()
    square = [image.resize((224, 224), Image.Resampling.BICUBIC) for image in IMAGES]  # no crop is left to do
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    change = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    with torch.no_grad():
        expected = clip.visual_projection(clip.vision_model(torch.stack([change(i) for i in square])).pooler_output)
    torch.testing.assert_close(Clip("clip-i", weights / "clip").embed(square), expected, rtol=1e-4, atol=1e-5)

    change = transforms.Compose([
        transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    vit = ViTModel.from_pretrained(weights / "dino", add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = vit(torch.stack([change(image.convert("RGB")) for image in IMAGES])).last_hidden_state[:, 0]
    torch.testing.assert_close(Dino("dino", weights / "dino").embed(IMAGES), expected, rtol=1e-3, atol=1e-4)


def folders(root: Path) -> tuple[Path, Path]:
    for side, first in (("a", 0), ("b", 50)):
        (root / side).mkdir()
        for k in range(4):
            pictures.smooth(first + k, 64, 64).save(root / side / f"{k}.png")
            (root / side / f"{k}.txt").write_text(f"prompt {k // 2}")
    return root / "a", root / "b"


def test_the_command(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folders(tmp_path)
    given = [
        f"kid:weights={weights}/inception.pth,subset_size=3", f"dino:weights={weights}/dino",
        f"clip-i:weights={weights}/clip", f"lpips:weights={weights}/alexnet.pth",
    ]  # fmt: skip
    options = [part for text in given for part in ("-m", text)]
    (a / "broken.png").write_bytes(b"nothing")
    assert run("measure", a, "--reference", b, *options, "-o", tmp_path / "m.json", "--device", "cpu") == 0
    shown = capsys.readouterr()
    assert "2 pairs within 2 prompts" in shown.out and "not measured: " in shown.err
    assert "kid: subsets of 3, not 1000" in shown.out
    found = json.loads((tmp_path / "m.json").read_text())["measures"]
    assert found["kid"]["generated"] == 4 and found["kid"]["reference"] == 4 and "inception" in found["kid"]["features"]
    images = [[Image.open(side / f"{k}.png") for k in range(4)] for side in (a, b)]
    vectors = [Dino("dino", weights / "dino").embed(side).double().numpy() for side in images]
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x in vectors[0] for y in vectors[1]]
    assert found["dino"]["value"] == pytest.approx(np.mean(cosines), rel=1e-6)


def test_mistakes(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folders(tmp_path)
    assert "4 generated and 4 reference images are too few" in refused(
        capsys, "measure", a, "--reference", b, "-m", "fid"
    )
    assert "give them as --reference" in refused(capsys, "measure", a, "-m", "kid")
    assert "unknown measure; one of fid, kid" in refused(capsys, "measure", a, "-m", "fidd")
    for twice in (
        ("-m", "kid,kid"),
        ("-m", "fid,kid", "-m", "kid:subset_size=5"),
        ("-m", "kid:seed=1", "-m", "kid:seed=2"),
    ):
        assert "-m kid: named twice" in refused(capsys, "measure", a, "--reference", b, *twice)
    assert "unknown option 'size'; it has weights, subsets" in refused(capsys, "measure", a, "-m", "kid:size=3")
    for out, words in ((tmp_path / "m.txt", "ends in .json"), (tmp_path / "m.json", "a folder; name a file")):
        (tmp_path / "m.json").mkdir(exist_ok=True)
        assert words in refused(capsys, "measure", a, "--reference", b, "-m", "kid", "-o", out)
    assert "a whole number" in refused(capsys, "measure", a, "-m", "kid:subsets=0")
    gone = refused(capsys, "measure", a, "--reference", b, "-m", f"kid:weights={tmp_path}/gone.pth")
    assert "it should be a copy of https://github.com/toshas/torch-fidelity" in gone
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": Path}))
    assert "evil.pth" in refused(capsys, "measure", a, "--reference", b, "-m", f"kid:weights={tmp_path}/evil.pth")
    wrong = refused(capsys, "measure", a, "--reference", b, "-m", f"kid:weights={weights}/alexnet.pth")
    assert "does not fit the network" in wrong
    assert "measure lpips: " in refused(capsys, "measure", a, "-m", f"lpips:weights={weights}/inception.pth")
    missing = refused(capsys, "measure", a, "--reference", b, "-m", f"dino:weights={tmp_path}/gone")
    assert missing.startswith("error: measure dino: ")


def test_weights_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fails(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        assert hash_prefix == "0123abcd"
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with pytest.raises(DiffalignError, match=r"net-0123abcd.pth is not reachable: .*no route.*-m fid:weights=PATH"):
        published_file("fid", "https://example.org/net-0123abcd.pth", None)
    (tmp_path / "checkpoints" / "net-0123abcd.pth").write_bytes(b"x")
    assert published_file("fid", "https://example.org/net-0123abcd.pth", None).read_bytes() == b"x"


def test_missing_packages_are_named(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (
        "torchmetrics",
        "torchmetrics.image.kid",
        "torchmetrics.functional.image.lpips",
        "torch_fidelity.feature_extractor_inceptionv3",
    ):
        monkeypatch.setitem(sys.modules, module, None)
    advice = r"is not installed; pip install 'diffalign\[metrics\]'"
    with pytest.raises(DiffalignError, match=f"measure kid: torch_fidelity {advice}"):
        Inception("kid", weights / "inception.pth")
    with pytest.raises(DiffalignError, match=f"measure lpips: torchmetrics {advice}"):
        Lpips("lpips", weights / "alexnet.pth")
    with pytest.raises(DiffalignError, match=f"measure kid: torchmetrics {advice}"):
        set_measures.kid(torch.zeros(3, 2), torch.zeros(3, 2))
