"""GenEval's detector without mmdet: Mask2Former (Swin-S, COCO instances) from transformers, and CLIP for colours.

The steps before and after the network are mmdet's, so that confidences mean what the evaluator's thresholds (0.3, and
0.9 for counting) were chosen for. Before: the shorter side becomes 800 pixels, or the longer 1333 if that is less; the
aspect stays; zeros are added on the right and below, up to multiples of 32. The folder's own image processor is not
used, since those of the published folders squash every image to 384 x 384. After: the 100 best (query, class) pairs;
confidence = class probability times the mean mask probability inside the mask; masks enlarged bilinearly, without
padding, to the image; a box is its mask's extent.

Colours: each object is cut out by its box, pixels outside its mask become grey (#999), and CLIP ViT-L/14 chooses among
ten colours with three prompts each. The evaluator uses open_clip's ViT-L/14 with OpenAI's weights. transformers' copy
of them, which other rewards use too, gives the same logits (checked by a test) as long as it computes with QuickGELU.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import DiffalignError
from diffalign.pretrained import load_part
from diffalign.rewards.clip import L14, CLIPScore, quick_gelu
from diffalign.rewards.detection import Detection
from diffalign.rewards.learned import DTYPES
from diffalign.rewards.pixels import normalise, to_tensor
from diffalign.rewards.published_weights import fetch, fingerprint, pretrained

REPO = "facebook/mask2former-swin-small-coco-instance"
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_PROMPTS = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
GREY = "#999"
SHORTEST, LONGEST, DIVISOR = 800, 1333, 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, which the Swin backbone was trained with."""
MAX_DETECTIONS = 100
# COCO's 80 classes in their order, under GenEval's names (three are longer than COCO's: computer mouse, tv remote,
# computer keyboard).
LABELS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


def network_input(image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """Return what mmdet's test pipeline gives the network of an RGB image, and its height and width without padding.

    The input is float32 [1, 3, H, W]. Bilinear on 8 bits without antialiasing, as OpenCV resizes; the padding is 0 after
    the normalisation, as there.
    """
    short, long = min(image.size), max(image.size)
    scale = min(SHORTEST / short, LONGEST / long)
    height, width = (max(1, int(side * scale + 0.5)) for side in (image.height, image.width))
    levels = to_tensor(image)[None] * 255
    resized = F.interpolate(levels, (height, width), mode="bilinear", align_corners=False).round() / 255
    bottom, right = -height % DIVISOR, -width % DIVISOR
    return F.pad(normalise(resized, MEAN, STD), (0, right, 0, bottom)), (height, width)


def instances(
    classes: Tensor, masks: Tensor, padded: tuple[int, int], valid: tuple[int, int], size: tuple[int, int]
) -> list[tuple[int, float, Tensor]]:
    """Return (class, confidence, mask [H, W]) of one image, as mmdet's head does.

    classes: logits [Q, C + 1], "no object" last. masks: logits [Q, h, w] of the padded input. padded, valid: height and
    width of the input with and without its padding. size: of the image.
    """
    probabilities = classes.float().softmax(-1)[:, :-1]
    scores, places = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
    count = probabilities.shape[1]
    enlarged = F.interpolate(masks[None].float(), padded, mode="bilinear", align_corners=False)
    enlarged = enlarged[..., : valid[0], : valid[1]]
    enlarged = F.interpolate(enlarged, size, mode="bilinear", align_corners=False)[0]
    found = []
    for score, place in zip(scores.tolist(), places.tolist(), strict=True):
        logits = enlarged[place // count]
        mask = logits > 0
        inside = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        if mask.any():
            found.append((place % count, score * inside.item(), mask))
    return found


def extent(mask: Tensor) -> tuple[float, float, float, float]:
    """Return (x1, y1, x2, y2) of a mask, the far sides exclusive."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def cut_out(image: Image.Image, mask: Tensor, box: tuple[float, float, float, float]) -> Image.Image:
    """Return the object on grey, cropped to its box."""
    blank = Image.new("RGB", image.size, GREY)
    shape = Image.fromarray((mask.to(torch.uint8) * 255).cpu().numpy())
    x1, y1, x2, y2 = (round(v) for v in box)
    return Image.composite(image, blank, shape).crop((x1, y1, x2, y2))


class Mask2FormerDetector:
    """The architecture of GenEval's detector, with Facebook's weights of it. weights, clip: local copies of the folders.

    GenEval's own weights are OpenMMLab's training of the same network, which no hub folder for transformers holds.

    Detections below `threshold` are not returned and their colours not computed; GenEval keeps those above 0.3.
    """

    labels = LABELS
    colors = COLORS

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        clip: str | Path | None = None,
        revision: str = "main",
        device: str = "cpu",
        dtype: str = "float32",
        threshold: float = 0.3,
    ) -> None:
        if dtype not in DTYPES:
            raise DiffalignError(f"reward geneval: dtype {dtype!r}; one of {', '.join(DTYPES)}")
        self.local, self.revision, self.device, self.dtype = weights, revision, device, DTYPES[dtype]
        self.threshold = threshold
        self.local_clip = clip
        self._shared = {"device": device, "dtype": dtype}
        self._network: Any = None
        self._clipscore: CLIPScore | None = None
        self._palette: dict[str, Tensor] = {}

    @property
    def path(self) -> Path:
        """The folder of Mask2Former."""
        return fetch("geneval", REPO, None, self.revision, self.local)

    @property
    def clip_path(self) -> Path:
        """The folder of CLIP. Raises DiffalignError if it is missing or computes with another activation."""
        return quick_gelu("geneval", fetch("geneval", L14, None, "main", self.local_clip, "clip"))

    def weights_id(self) -> str:
        """Return both models with their revisions."""
        return f"{REPO}@{fingerprint(self.path)}, {L14}@{fingerprint(self.clip_path)}"

    def free(self) -> None:
        """Release the weights; the next call loads them again."""
        self._network = None
        self._palette = {}
        self._clipscore = None

    def _load(self) -> None:
        from transformers import AutoConfig, Mask2FormerForUniversalSegmentation

        classes = load_part(AutoConfig, self.path, "reward geneval").num_labels
        if classes != len(LABELS):
            raise DiffalignError(f"reward geneval: {self.path} knows {classes} classes, not COCO's 80")
        model = pretrained(Mask2FormerForUniversalSegmentation, self.path, "geneval", self.dtype)
        self._network = model.to(self.device).eval().requires_grad_(False)

    @property
    def _clip(self) -> CLIPScore:
        if self._clipscore is None:
            self._clipscore = CLIPScore(convention="cosine", weights=self.clip_path, **self._shared)
        return self._clipscore

    @torch.no_grad()
    def detect(self, images: list[Image.Image]) -> list[list[Detection]]:
        """Return the objects of each image with their colours.

        One image at a time: sizes differ, and padding would change them.
        """
        if self._network is None:
            self._load()
        return [self._detect(image.convert("RGB")) for image in images]

    def _detect(self, image: Image.Image) -> list[Detection]:
        pixels, valid = network_input(image)
        out = self._network(pixel_values=pixels.to(self.device, self.dtype))
        size = (image.height, image.width)
        padded = (pixels.shape[-2], pixels.shape[-1])
        found = [
            (LABELS[label], score, extent(shape), shape)
            for label, score, shape in instances(
                out.class_queries_logits[0], out.masks_queries_logits[0], padded, valid, size
            )
            if score > self.threshold
        ]
        crops = [cut_out(image, shape, box) for _, _, box, shape in found]
        colors = self._colors(crops, [label for label, *_ in found])
        return [
            Detection(label, box, score, color) for (label, score, box, _), color in zip(found, colors, strict=True)
        ]

    def _colors(self, crops: list[Image.Image], labels: list[str]) -> list[str]:
        if not crops:
            return []
        pixels = torch.stack([self._clip.prepare(crop) for crop in crops]).to(self.device)
        images = self._clip.embed_images(pixels)
        return [
            COLORS[int((self._classifier(label) @ image).argmax())] for image, label in zip(images, labels, strict=True)
        ]

    def _classifier(self, label: str) -> Tensor:
        """Return one unit vector a colour [10, D]: the normalised mean of its prompts' unit vectors."""
        if label not in self._palette:
            prompts = [p.format(color=color, label=label) for color in COLORS for p in COLOR_PROMPTS]
            vectors = self._clip.embed_prompts(prompts).unflatten(0, (len(COLORS), len(COLOR_PROMPTS)))
            self._palette[label] = F.normalize(vectors.mean(1), dim=-1)
        return self._palette[label]
