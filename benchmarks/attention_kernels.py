"""How far apart are the gradients of torch's attention kernels on a GPU, and how long do forward and backward take?

python benchmarks/attention_kernels.py

diffalign takes cuDNN's kernel away (diffalign/kernels.py). This shows what that costs at the shapes of large models, and
where gradients of random inputs differ from those of the memory-efficient kernel. bfloat16, milliseconds of the best of four.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# Batch, heads, queries, keys, width of a head.
SHAPES = {
    "SDXL, 64 x 64, itself": (8, 10, 4096, 4096, 64),
    "SDXL, 32 x 32, itself": (8, 20, 1024, 1024, 64),
    "SDXL, 64 x 64, text": (8, 10, 4096, 77, 64),
    "SD3.5-Medium, joint": (8, 24, 4429, 4429, 64),
    "FLUX.1-dev": (2, 24, 4608, 4608, 128),
    "28 tokens": (4, 2, 28, 28, 16),
}


def run(kernel: SDPBackend, inputs: list[Tensor], gradient: Tensor) -> tuple[float, list[Tensor]]:
    """Milliseconds, and the gradients of q, k and v."""
    times = []
    for _ in range(4):
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        began.record()
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(q, k, v)
        out.transpose(1, 2).flatten(2).backward(gradient)
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    return min(times), [x.grad.float() for x in (q, k, v) if x.grad is not None]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("the kernels that are compared need a CUDA device, and none is available")
    generator = torch.Generator("cuda").manual_seed(0)
    given = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    print("| attention | kernel | ms | gradients of q, k, v apart |\n|---|---|---|---|")
    for name, (batch, heads, queries, keys, width) in SHAPES.items():
        # As diffusers has them: heads beside width, seen with heads before tokens.
        inputs = [torch.randn(batch, n, heads, width, **given).transpose(1, 2) for n in (queries, keys, keys)]
        gradient = torch.randn(batch, queries, heads * width, **given)
        expected: list[Tensor] = []
        for kernel, backend in KERNELS.items():
            time, found = run(backend, inputs, gradient)
            expected = expected or found
            apart = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
            print(f"| {name} | {kernel} | {time:.2f} | {', '.join(f'{a:.1e}' for a in apart)} |", flush=True)


if __name__ == "__main__":
    main()
