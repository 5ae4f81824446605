"""Tune a trunk: LoRA or full, its roles, its weights on disk.

After `add_lora` the policy is an adapter in float32 and the reference the bare base (or a second, frozen adapter).
After `enable_full` the policy is the trunk itself in float32 and the reference a frozen copy. `follow_policy` makes the
reference one that can move. Distillation calls the policy
"student" and the reference "teacher"; `add_fake` gives it a third network, an adapter or a copy as the policy is.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from diffalign.errors import DiffalignError
from diffalign.files import replacing_folder
from diffalign.files.published import drop_local_paths
from diffalign.kernels import align_weights
from diffalign.pipelines import adapters
from diffalign.pipelines.checkpointing import Checkpointing, checkpoint_function
from diffalign.pipelines.components import DIFFUSERS
from diffalign.pipelines.lean_blocks import fuse_norms
from diffalign.pipelines.lora_file import TextEncoders, checkpoint_tuning, is_checkpoint, read_checkpoint
from diffalign.pipelines.quantize import is_quantized
from diffalign.pretrained import load_model, quiet_progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

ROLES = ("policy", "reference", "base", "student", "teacher", "fake")
SAME_AS = {"student": "policy", "teacher": "reference"}


class Tunable(ABC):
    """The half of a backbone that concerns trained weights."""

    trunk_name: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    blocks: ClassVar[tuple[str, ...]]
    """Class names of the layers that repeat and hold nearly all weights: what is quantised, compiled and sharded."""
    compiled: ClassVar[tuple[str, ...]] = ()
    """Class names of further layers that are compiled, for what else costs memory traffic."""

    pipeline: DiffusionPipeline
    trunk: nn.Module
    """The policy's trunk."""
    _model: ModelMixin
    """The same module, for what diffusers adds to nn.Module."""
    lora_text_encoders: TextEncoders = "refuse"
    """What to do with a LoRA that adapts text encoders, too: refuse it, or ignore that part."""
    tuning: str | None = None
    """None, "lora" or "full"."""
    checkpointing: Checkpointing = False
    """What blocks keep for backward."""
    lowers_adapters: bool = False
    """Whether `predict` computes a LoRA in the type of the frozen weights; the trained weights are float32 in either case."""
    _full_reference: nn.Module | None = None
    _full_base: nn.Module | None = None
    """The base where all weights train and the reference is no longer it."""
    _full_fake: nn.Module | None = None

    @property
    @abstractmethod
    def pipeline_trunk(self) -> nn.Module:
        """The trunk that the pipeline samples with now (the reference's inside `role("reference")`)."""

    @pipeline_trunk.setter
    @abstractmethod
    def pipeline_trunk(self, module: nn.Module) -> None: ...

    @staticmethod
    def base_dtype(trunk: nn.Module) -> torch.dtype:
        """Return the dtype of the trunk's own weights, whatever that of an adapter in it."""
        return next(p.dtype for n, p in trunk.named_parameters() if ".lora_" not in n and p.is_floating_point())

    def add_lora(
        self,
        rank: int,
        alpha: float,
        targets: Sequence[str] | None = None,
        seed: int = 0,
        init: str | Path | None = None,
        init_is_reference: bool = True,
    ) -> None:
        """Train a LoRA: the policy is an adapter in float32, the reference the bare base.

        `targets`: names of layers (None: the family's attention projections). `init`: start from a saved LoRA, which
        also becomes the frozen reference, unless `init_is_reference` is false; its rank and alpha must be those given.
        Raises DiffalignError for targets that match nothing and for a LoRA that does not fit.
        """
        self._require_untuned()
        if init is None:
            adapters.add_adapter(self.trunk, rank, alpha, tuple(targets or self.lora_targets), seed)
        else:
            # Without an adapter of its own the reference is the bare base.
            for name in (adapters.REFERENCE, adapters.POLICY) if init_is_reference else (adapters.POLICY,):
                self._load_adapter(init, name)
            adapters.check_rank(self.trunk, init, rank, alpha, targets)
            self._activate_policy()
        self.tuning = "lora"

    def _activate_policy(self) -> None:
        """Activate the policy adapter and let it alone train. Called outside any graph, so switching is safe here."""
        self._model.set_adapter(adapters.POLICY)
        for name, parameter in self.trunk.named_parameters():
            parameter.requires_grad_(f".{adapters.POLICY}." in name and ".lora_" in name)

    def enable_full(self, *, keep_reference: bool = True, init: str | Path | None = None) -> None:
        """Train the whole trunk in float32. The reference is a frozen copy in the dtype that was loaded.

        `keep_reference=False` saves that copy for methods that need none. `init`: start policy and reference from a
        folder that `save_weights` wrote.
        """
        self._require_untuned()
        if is_quantized(self.trunk):
            raise DiffalignError(
                "tune.kind=full: quantised weights cannot train; set model.quantize=none, or tune.kind=lora"
            )
        if init is not None:
            self.load_weights(init)
        align_weights(self.trunk)  # the untrained policy must equal its reference to the last bit
        if keep_reference:
            self._full_reference = copy.deepcopy(self.trunk).eval().requires_grad_(False)
        self.trunk.float().requires_grad_(True)
        self.tuning = "full"

    def follow_policy(self, *, keep_base: bool = False) -> None:
        """Make the reference a second set of the policy's weights in float32, equal to them now; `followers` are its tensors.

        An adapter of the same rank and targets, or a copy of the trunk. keep_base: keep the role "base" also where all weights
        train. Call it once, after `add_lora` or `enable_full` and before anything is trained.
        """
        if self.tuning == "full":
            self._full_base = self._full_reference if keep_base else None
            self._full_reference = copy.deepcopy(self.trunk).eval().requires_grad_(False)
            return
        if not adapters.has_adapter(self.trunk, adapters.REFERENCE):
            self._add_like_policy(adapters.REFERENCE, 0)
            self._activate_policy()
        with torch.no_grad():
            for name, value in self.followers().items():
                value.copy_(self.trainable()[name])

    def followers(self) -> dict[str, nn.Parameter]:
        """Return the reference's parameters under the names of the policy's, after `follow_policy`."""
        if self.tuning == "full" and self._full_reference is not None:
            return dict(sorted(self._full_reference.named_parameters()))
        second = adapters.adapter_parameters(self.trunk, adapters.REFERENCE)
        return {
            name.replace(f".{adapters.REFERENCE}.", f".{adapters.POLICY}."): value for name, value in second.items()
        }

    def _add_like_policy(self, adapter: str, seed: int) -> None:
        """Add an adapter of the policy's rank, alpha and targets."""
        config: Any = vars(self.trunk)["peft_config"][adapters.POLICY]
        adapters.add_adapter(self.trunk, config.r, config.lora_alpha, sorted(config.target_modules), seed, adapter)

    def trunks(self) -> list[nn.Module]:
        """Return the policy's trunk, and after full fine-tuning began the copies of reference and base that are kept."""
        return [trunk for trunk in (self.trunk, self._full_reference, self._full_base) if trunk is not None]

    def compile_blocks(self, dynamic: bool = False, backend: str = "inductor") -> None:
        """Compile the repeated blocks in place, after `add_lora` or `enable_full`; weights keep their names.

        Blocks of a kind and shape share their graphs: one for each of policy and reference, so nothing is compiled again after
        the first step. Later runs find the generated code in `~/.cache/diffalign/compiled`, or where TORCHINDUCTOR_CACHE_DIR
        says. dynamic: one graph for all sizes of images, for data in several buckets.
        backend: torch.compile's.
        """
        import torch._dynamo

        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path("~/.cache/diffalign/compiled").expanduser()))
        # The default of 8 graphs for a block's code is less than SD3.5's kinds of blocks times roles and sizes.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for trunk in self.trunks():
            for module in trunk.modules():
                if type(module).__name__ in (*self.blocks, *self.compiled):
                    module.compile(dynamic=dynamic, backend=backend)

    def add_fake(self, seed: int = 0) -> None:
        """Add a second trained network beside the policy, equal to the reference at first: role "fake" of distillation.

        Of the policy's kind: an adapter of the same rank and targets, or a float32 copy of the trunk. Call it once, after
        `add_lora` or `enable_full` and before anything is trained.
        """
        if self.tuning is None or self._full_fake is not None or adapters.has_adapter(self.trunk, adapters.FAKE):
            raise RuntimeError("add_fake: tune the policy first, and add one fake network")
        if self.tuning == "full":
            self._full_fake = copy.deepcopy(self.trunk).float().requires_grad_(True).train()
            return
        self._add_like_policy(adapters.FAKE, seed)
        if adapters.has_adapter(self.trunk, adapters.REFERENCE):
            start = adapters.adapter_parameters(self.trunk, adapters.REFERENCE)
            for name, parameter in adapters.adapter_parameters(self.trunk, adapters.FAKE).items():
                parameter.data.copy_(start[name.replace(f".{adapters.FAKE}.", f".{adapters.REFERENCE}.")].data)
        self._activate_policy()
        for parameter in adapters.adapter_parameters(self.trunk, adapters.FAKE).values():
            parameter.requires_grad_(True)

    def _require_untuned(self) -> None:
        if self.tuning is not None or adapters.has_adapter(self.trunk, adapters.POLICY):
            raise RuntimeError("this backbone already has trained weights; load a fresh one")

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Run as one of ROLES inside the block, for `predict` and `sample`; student is policy, teacher is reference.

        base is the model without anything that was trained or loaded on top of it.

        No requires_grad changes and no autograd state is touched, so a graph built before or after keeps its gradients.
        Run backward outside a reference block, and the fake's inside one of its own: gradient checkpointing repeats the
        forward there, under the role of that moment.
        """
        if name not in ROLES:
            raise ValueError(f"unknown role '{name}'; choose one of {', '.join(ROLES)}")
        name = SAME_AS.get(name, name)
        if self.tuning == "full":
            reference = self._full_reference
            base = self._full_base or reference
            module = {"policy": self.trunk, "reference": reference, "base": base, "fake": self._full_fake}[name]
            if module is None and name == "fake":
                raise RuntimeError("there is no fake network: call add_fake first")
            if module is None:
                raise DiffalignError("the reference was not kept (enable_full with keep_reference=False)")
            before = self.pipeline_trunk
            self.pipeline_trunk = module
            try:
                yield
            finally:
                self.pipeline_trunk = before
            return
        with self._adapter_role(name):
            yield

    def compute_low(self) -> None:
        """Compute `predict` in the type of the frozen weights from here on, adapters and norms included, without autocast.

        For a LoRA on 16-bit weights. The trained weights stay float32, and so do their gradients.
        """
        self.lowers_adapters = True
        fuse_norms(self.trunk)

    def checkpoint(self, kind: Checkpointing) -> None:
        """Choose what blocks keep for backward from here on; gradients are the same."""
        self.checkpointing = kind
        if kind:
            self._model.enable_gradient_checkpointing(checkpoint_function(self.trunk, kind))
        else:
            self._model.disable_gradient_checkpointing()

    @contextmanager
    def whole_graph(self) -> Iterator[None]:
        """Switch the trunk's gradient checkpointing off inside the block, so that backward may run after it.

        For a reference that passes a gradient on to its input: checkpointing would repeat its forward in the backward pass,
        when the policy's adapter is active again.
        """
        before = self.checkpointing
        if before:
            self.checkpoint(False)
        try:
            yield
        finally:
            if before:
                self.checkpoint(before)

    def _adapter_role(self, name: str) -> AbstractContextManager[None]:
        if name == "fake" and not adapters.has_adapter(self.trunk, adapters.FAKE):
            raise RuntimeError("there is no fake network: call add_fake first")
        if not adapters.has_adapter(self.trunk, adapters.POLICY):
            return nullcontext()
        if name in (adapters.POLICY, adapters.FAKE):
            return adapters.use_adapter(self.trunk, name)
        second = name == "reference" and adapters.has_adapter(self.trunk, adapters.REFERENCE)
        return adapters.use_adapter(self.trunk, adapters.REFERENCE if second else None)

    def trainable(self, role: str = "policy") -> dict[str, nn.Parameter]:
        """Return the parameters that train of the policy (student) or the fake network: float32, by stable name, sorted."""
        if role == "fake" and self._full_fake is not None:
            return dict(sorted(self._full_fake.named_parameters()))
        if role == "fake":
            return adapters.adapter_parameters(self.trunk, adapters.FAKE)
        own = (item for item in self.trunk.named_parameters() if item[1].requires_grad)
        return dict(sorted((n, p) for n, p in own if not (".lora_" in n and f".{adapters.FAKE}." in n)))

    # --- save and load -----------------------------------------------------------------------------------------

    def save_weights(self, folder: str | Path) -> None:
        """Write the policy for use in diffusers: a LoRA for `load_lora_weights`, or the trunk's folder."""
        with replacing_folder(Path(folder)) as part:
            if adapters.has_adapter(self.trunk, adapters.POLICY):
                adapters.save_adapter(self.trunk, self.trunk_name, adapters.POLICY, part)
            else:
                self.save_trunk(self._model, part)

    def save_trunk(self, trunk: ModelMixin, folder: str | Path) -> None:
        """Write a trunk of this backbone's class as `save_weights` does after full fine-tuning."""
        with quiet_progress():
            trunk.save_pretrained(Path(folder) / self.trunk_name)
        drop_local_paths(Path(folder) / self.trunk_name)

    def load_weights(self, folder: str | Path) -> None:
        """Put trained weights into the policy: for inference, or before training.

        folder: a LoRA that anybody saved (`read_lora_file` says which), a trunk's folder, or a checkpoint of a run, of which
        the average is taken if it was kept. Raises DiffalignError if there are none, or if they do not fit.
        """
        folder = Path(folder)
        if not folder.exists():
            raise DiffalignError(f"no weights at {folder}: the folder does not exist")
        if trains_all(folder, self.trunk_name):
            checkpoint = is_checkpoint(folder)
            self._load_full(folder if checkpoint else folder / self.trunk_name, checkpoint)
            return
        self._load_adapter(folder, adapters.POLICY)
        self._activate_policy()
        if self.tuning != "lora":
            self.trunk.requires_grad_(False)

    def _load_adapter(self, folder: str | Path, adapter: str) -> None:
        adapters.load_adapter(
            self.pipeline, self.trunk, self.trunk_name, folder, adapter, text_encoders=self.lora_text_encoders
        )

    def _load_full(self, folder: Path, checkpoint: bool) -> None:
        """Load the whole trunk from its folder, or from a checkpoint, into the policy."""
        if checkpoint:
            values = read_checkpoint(folder)
        else:
            kind: Any = type(self.trunk)
            loaded = load_model(kind, folder, "weights", stem=DIFFUSERS, dtype=self.base_dtype(self.trunk))
            values = loaded.state_dict()
        # A checkpoint holds no tables that the model computes itself.
        own = dict(self.trunk.named_parameters()) if checkpoint else self.trunk.state_dict()
        wrong = sorted(name for name in own.keys() | values.keys() if _shape(own, name) != _shape(values, name))
        if wrong:
            raise DiffalignError(
                f"{folder}: these weights do not fit the model, was it trained on another one? {len(wrong)} tensors are "
                f"missing, left over or of another shape; first {wrong[0]}"
            )
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)


def trains_all(folder: Path, trunk_name: str) -> bool:
    """Return whether a folder of weights, or a checkpoint, holds the whole trunk and not a LoRA."""
    if is_checkpoint(folder):
        return bool(checkpoint_tuning(folder)["kind"] == "full")
    return (folder / trunk_name / "config.json").is_file()


def _shape(state: Mapping[str, torch.Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None
