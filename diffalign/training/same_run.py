"""Whether a checkpoint belongs to the run that a config describes.

Each field of a config states what a new value of it does to a run that resumes (`OnResume` in `config/section.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffalign.config import BackboneRunConfig, RunConfig
from diffalign.config.model import current_keys
from diffalign.config.section import OnResume
from diffalign.errors import DiffalignError
from diffalign.files import dotted_keys
from diffalign.training.protocols import PlainConfig

Resolved = Mapping[str, str]
"""What keys stand for: fingerprints of the content behind paths, the precision behind `auto`."""


@dataclass(frozen=True)
class Change:
    """A key whose value, or what it stands for, differs from the checkpoint's. effect: as in `OnResume`; None: refused."""

    key: str
    before: str
    now: str
    effect: str | None

    def __str__(self) -> str:
        return f"{self.key} was {self.before}, is now {self.now}"


def changes(
    stored: PlainConfig, config: RunConfig, before: Resolved, now: Resolved, *, loaded: bool = True
) -> list[Change]:
    """Return what differs between a checkpoint's config, with what its keys stood for, and the config of a command.

    loaded: whether model and data are there; if not, keys that name what is not resolved yet are left out.
    """
    old = dotted_keys(config.former_values()) | dotted_keys(current_keys(stored))
    new = dotted_keys(current_keys(plain_config(config)))
    rules, found = config.resume_rules(), []
    for key in sorted(old.keys() | new.keys() | before.keys()):
        rule, same = _rule_of(key, rules), old.get(key) == new.get(key)
        if rule is not None and not loaded and rule.pending is not ... and new.get(key) == rule.pending:
            continue
        if rule is not None and rule.effect == "named" and key in before:
            if old.get(key) is None and new.get(key) is None:
                continue  # it names nothing; the key that does is compared
            if key in now and before[key] != now[key]:
                found.append(Change(key, f"{old.get(key)} ({before[key]})", f"{new.get(key)} ({now[key]})", None))
                continue
            if key not in now and not loaded:
                continue
            allowed = key in now
        else:
            free = rule is not None and rule.effect in ("none", "rounding")
            allowed = free and rule is not None and (_holds(rule, old) or _holds(rule, new))
        if not same:
            effect = rule.effect if rule is not None and allowed else None
            found.append(Change(key, repr(old.get(key)), repr(new.get(key)), effect))
    return found


def plain_config(config: RunConfig) -> PlainConfig:
    """Return the config as a run writes it: as JSON, without the access token."""
    return config.model_dump(mode="json", exclude={"model": {"token"}})


def _rule_of(key: str, rules: Mapping[str, OnResume]) -> OnResume | None:
    """Return the rule of a key, or of the nearest section around it."""
    parts = key.split(".")
    return next((rules[k] for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in rules), None)


def _holds(rule: OnResume, config: Mapping[str, object]) -> bool:
    """Return whether a rule holds for a config with dotted keys."""
    return all(key not in config or config[key] == value for key, value in rule.only_where)


def refuse_another_run(path: Path, found: list[Change], config: RunConfig) -> None:
    """Raise DiffalignError that names what makes the run of the checkpoint `path` another one, if anything does."""
    refused = [change for change in found if change.effect is None]
    if not refused:
        return
    more = f" (and {len(refused) - 1} more: {', '.join(c.key for c in refused[1:])})" if len(refused) > 1 else ""
    lora = isinstance(config, BackboneRunConfig) and config.tune.kind == "lora"
    raise DiffalignError(
        f"{path} belongs to another config: {refused[0]}{more}; restore the old value to resume, or choose another run_dir"
        + (f", where tune.init={path} starts from what was trained here" if lora else "")
    )


def describe_changes(found: list[Change]) -> str | None:
    """Return one line about what changed without making another run; None where nothing did."""
    exact = [str(change) for change in found if change.effect in ("none", "named")]
    rounded = [str(change) for change in found if change.effect == "rounding"]
    parts = [f"{'; '.join(exact)}: no number changes"] if exact else []
    parts += [f"{'; '.join(rounded)}: numbers stay the same within rounding"] if rounded else []
    return f"changed: {'. '.join(parts)}" if parts else None
