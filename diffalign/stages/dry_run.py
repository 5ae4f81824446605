"""What `--dry-run` prints, for every verb: the resolved config as YAML, then facts as comments, then where the model is."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from diffalign.config import ModelSection, TuneSection, resolved_yaml
from diffalign.hub import download_command, hub_answers
from diffalign.pipelines import Backbone
from diffalign.pipelines.hub import hub_size
from diffalign.pipelines.known_models import known_models
from diffalign.progress import say, say_block
from diffalign.stages.resolve import model_is_here
from diffalign.training.memory import to_meta
from diffalign.training.tune import make_trainable

MANY_EPOCHS = 20
"""Passes over the data beyond which a run mostly repeats itself."""
TIME_UNKNOWN = "unknown; timing.jsonl has the seconds of a step once a run has begun"
NO_ANSWER = "the hub gave no answer"
NOT_HERE = "not predicted: the model is not on this machine"


def print_config(config: BaseModel) -> None:
    """Print the resolved config, which is a config file again; everything else is printed as comments below it."""
    say_block(resolved_yaml(config))


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """Print facts under a title, as comments."""
    if not facts:
        return
    say(f"# {title}")
    for key, value in facts.items():
        say(f"#   {key}: {value}")


def warn(text: str) -> None:
    """Print a warning, as a comment."""
    say(f"# warning: {text}")


def model_facts(backbone: Backbone | None, model: ModelSection) -> dict[str, object]:
    """Return what is known of the model; `trainable` is counted elsewhere, since nothing is tuned yet."""
    if backbone is None:
        return {"path": model.path, "facts": NOT_HERE}
    facts: dict[str, object] = {key: value for key, value in backbone.facts().items() if key != "trainable"}
    if backbone.device.type == "meta":
        facts |= {"revision": model.revision or "main", "sizes": "as published"}
    return facts


def count_trainable(backbone: Backbone, tune: TuneSection) -> int:
    """Return how many numbers `tune` trains. Uses the backbone up: only its shapes are left."""
    to_meta(backbone)
    make_trainable(backbone, tune.model_copy(update={"init": None}), 0, keep_reference=False)
    return sum(p.numel() for p in backbone.trainable().values())


def print_where(model: ModelSection, facts: Mapping[str, object]) -> None:
    """Print whether the model is on this machine, and otherwise how to get it: size, command, and terms to accept.

    facts: those of `model_facts`. Raises DiffalignError for what the hub itself refuses.
    """
    known, weights = known_models().get(model.path), facts.get("parameters")
    if model_is_here(model):
        print_facts("where it is", {"model": f"{model.path} is here"})
        return
    size = None
    if known is not None and isinstance(weights, int):
        size = known.download_bytes(model.variant, weights, _left_out(model))
    answers = not model.local_files_only and hub_answers()
    if answers:
        size = hub_size(model.path, model.revision, model.token, model.variant) or size
    folder = model.path.rpartition("/")[2]
    where = {"model": f"{model.path} is not in the local cache; {'a run downloads it' if answers else NO_ANSWER}"}
    if size is not None:
        where["size"] = f"about {size / 1e9:.1f} GB"
    where |= {"download": download_command(model.path, folder, model.variant), "then": f"model.path={folder}"}
    if known is not None and known.terms is not None:
        where["terms"] = f"accept them at {known.terms}, then `hf auth login` or HF_TOKEN"
    print_facts("where it is", where)


def _left_out(model: ModelSection) -> tuple[str, ...]:
    """Return the components that the model's options leave out."""
    return ("text_encoder_3", "tokenizer_3") if model.options.get("use_t5") is False else ()
