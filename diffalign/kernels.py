"""Which of torch's kernels may be used at all."""

import torch


def avoid_cudnn_attention() -> None:
    """Take cuDNN's kernel out of those that `scaled_dot_product_attention` chooses from, in the whole process.

    torch tries it first on Hopper GPUs, and its backward is wrong for some inputs while its forward is right: on an H100 with
    torch 2.11 and cuDNN 9.19 a small FLUX had gradients 70 or 700 times too large, or infinite, in bfloat16. NaNs of the same
    kernel: github.com/pytorch/pytorch/issues/196678. Flash and memory-efficient attention remain.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
