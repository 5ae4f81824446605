"""`diffalign doctor`: what this machine has, in plain text: versions, devices, kernels, extras, the hub, disk space."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from diffalign.errors import brief
from diffalign.files import free_bytes
from diffalign.hub import hub_answers
from diffalign.packages import EXTRAS, install_command
from diffalign.progress import say
from diffalign.version import __version__

CORE = ("torch", "torchvision", "transformers", "huggingface_hub", "safetensors", "numpy", "pyarrow", "pillow")
TRAINING = ("diffusers", "accelerate", "peft")
ROOM = 5e9
"""Bytes below which a disk is called nearly full: less than the weights of one large model."""
GIB = 2**30

Fact = tuple[str, str, str]
"""(what, the finding, what is wrong with it and how to mend it; "" if nothing)."""


def doctor() -> bool:
    """Print what is found, and below it what is wrong. Returns whether nothing is."""
    problems = []
    for heading, facts in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("kernels", _kernels()),
        ("extras", _extras()),
        ("hub", _hub()),
        ("disk", _disk()),
    ):
        say(heading)
        for what, found, wrong in facts:
            say(f"  {what:<16} {found}")
            if wrong:
                problems.append(f"{what}: {wrong}")
    say("")
    for problem in problems:
        say(f"problem: {problem}")
    if not problems:
        say("no problem found")
    return not problems


def imported_torch() -> ModuleType | str:
    """Return torch, or the reason why it cannot be imported. For commands that also help where torch is broken."""
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways
        return f"{brief(error)}; install torch again, from https://pytorch.org"
    return torch


def _versions() -> Iterator[Fact]:
    yield "diffalign", __version__, ""
    yield "python", f"{platform.python_version()} ({sys.executable})", ""
    yield "system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", ""
    for name in (*CORE, *TRAINING):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            needed = name in CORE
            command = "pip install --force-reinstall diffalign" if needed else install_command(name)
            yield name, f"not installed; {command}", f"not installed; {command}" if needed else ""
            continue
        yield name, version, ""


def _devices() -> Iterator[Fact]:
    torch = imported_torch()
    if isinstance(torch, str):
        yield "torch", "cannot be imported", torch
        return
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "no usable GPU" if built else "this torch is built for CPUs alone"
        yield "cuda", f"no: {why}; small models run on the CPU", ""
        return
    yield "cuda", f"{torch.version.cuda or torch.version.hip}, {torch.cuda.device_count()} devices", ""
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
            has = torch.cuda.get_device_properties(index)
        except RuntimeError as error:
            yield f"cuda:{index}", "cannot be used", brief(error)
            continue
        memory = f"{total / GIB:.0f} GiB, {free / GIB:.0f} free"
        yield f"cuda:{index}", f"{has.name}, {memory}, compute {has.major}.{has.minor}", ""


def _kernels() -> Iterator[Fact]:
    torch = imported_torch()
    if isinstance(torch, str):
        yield "unknown", "torch cannot be imported", ""
        return
    cuda = torch.cuda.is_available()
    yield "bfloat16", "yes" if not cuda or torch.cuda.is_bf16_supported() else "no: model.dtype=float16 or float32", ""
    if cuda:
        yield "flash attention", "yes" if torch.backends.cuda.flash_sdp_enabled() else "switched off", ""
    yield "xformers", "yes" if find_spec("xformers") else "no; not needed, attention: sdpa is torch's own", ""
    compiles = find_spec("triton") is not None
    yield "torch.compile", "yes" if compiles else "no: triton is not installed; leave model.compile out", ""


def _extras() -> Iterator[Fact]:
    for extra, modules in EXTRAS.items():
        absent = [module for module in modules if find_spec(module) is None]
        state = f"no {', '.join(absent)}; {install_command(absent[0])}" if absent else "installed"
        yield extra, state, ""


def _hub() -> Iterator[Fact]:
    from huggingface_hub import constants, get_token

    offline = constants.HF_HUB_OFFLINE
    answers = "switched off by HF_HUB_OFFLINE" if offline else "answers" if hub_answers() else "no answer"
    yield "huggingface.co", f"{answers}{'' if answers == 'answers' else '; models must be in the cache'}", ""
    yield "login", "yes" if get_token() else "none; gated models need `hf auth login`", ""


def _disk() -> Iterator[Fact]:
    from huggingface_hub import constants

    for what, folder in (
        ("here", Path.cwd()),
        ("model cache", Path(constants.HF_HUB_CACHE)),
        ("temporary", Path(tempfile.gettempdir())),
    ):
        free = free_bytes(folder)
        wrong = f"{folder} has {free / 1e9:.1f} GB left; free some, or move it to another disk"
        yield what, f"{free / 1e9:.0f} GB free, {folder}", wrong if free < ROOM else ""
