"""How well and how fast does the OCR reward read rendered text?

python benchmarks/ocr_accuracy.py [--images 160] [--sides 512 256]

160 pictures of drawn fonts, sizes and grounds, none left out: those of tests/rewards/test_ocr.py. Milliseconds are CPU time
of one thread, which other work on the machine disturbs less than wall time. Writes results/ocr.json.
"""

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from diffalign.rewards import load_reward
from helpers import lettering

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 256])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    drawn = lettering.rendered(arguments.images)
    prompts = [f'a sign that says "{text}"' for text, _ in drawn]
    result: dict[str, object] = {
        "pictures": len(drawn),
        "fonts": len(lettering.families()),
        "text heights, px": lettering.SIZES,
        "picture sides, px": lettering.SIDES,
        "grounds": lettering.GROUNDS,
        "machine": platform.machine(),
        "rapidocr": version("rapidocr"),
        "onnxruntime": version("onnxruntime"),
    }
    for side in arguments.sides:
        reward = load_reward("ocr", side=side, threads=1)
        reward.score([drawn[0][1]], prompts[:1])  # weights are loaded here
        started = time.process_time()
        measured = reward.measure([image for _, image in drawn], prompts)
        spent = time.process_time() - started
        result[f"side={side}"] = {
            "exact": round(measured["exact"].mean().item(), 4),
            "similarity": round(measured["similarity"].mean().item(), 4),
            "CPU ms a picture": round(1000 * spent / len(drawn), 1),
        }
        print(f"side={side}: {result[f'side={side}']}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ocr.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
