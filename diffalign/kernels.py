"""Choose which of torch's kernels may be used, and make equal weights round in the same way."""

import torch
from torch import nn


def avoid_cudnn_attention() -> None:
    """Stop `scaled_dot_product_attention` from using cuDNN's kernel, in the whole process.

    torch tries that kernel first on Hopper GPUs. Its forward pass is right, but its backward pass is wrong for some
    inputs: on an H100 with torch 2.11 and cuDNN 9.19 a small FLUX had gradients 70 or 700 times too large, or infinite,
    in bfloat16. NaNs from the same kernel: github.com/pytorch/pytorch/issues/196678. Flash and memory-efficient
    attention stay available.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def align_weights(module: nn.Module) -> None:
    """Copy a module's weights to memory of their own, in place.

    Weights read from a file lie in memory as they lie in the file. Copies are aligned, and some CPUs sum aligned numbers in
    another order. So equal weights could give results that differ in the last bits: a full copy of a model and the model, or
    one checkpoint in two formats.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
