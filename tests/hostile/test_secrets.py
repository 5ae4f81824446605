"""Tokens are in no file and in no message, wherever they were given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.config import load
from diffalign.config.commented import commented_recipe
from diffalign.config.load import resolved_yaml
from diffalign.errors import DiffalignError
from diffalign.progress import say, say_aside, say_block
from diffalign.redaction import redact, redacted
from diffalign.rewards import Reward
from diffalign.stages.rounds import _decisive
from helpers.command_line import run

SECRET = "s3cr3t-abc.def"
GIVEN = [
    ("train", "sd3_rankdpo", ["data.path=x", f"model.token={SECRET}"]),
    ("train", "sd3_rankdpo", ["data.path=x", "model={path: x, token: " + SECRET + "}"]),
    (
        "train",
        "sd3_rankdpo",
        ["data.path=x", f"validation.rewards=[{{name: geneval, options: {{api_key: {SECRET}}}}}]"],
    ),
    ("train", "sd3_rankdpo", ["data.path=x", f"model.path=https://me:{SECRET}@example.org/x"]),
    ("synth", "synth_shapes", [f"generators.0.model.token={SECRET}"]),
    ("synth", "synth_shapes", [f"generators.0.options={{password: {SECRET}}}"]),
    ("rounds", "rounds_shapes_gdro", [f"overrides=[model.token={SECRET}, train.steps=3]"]),
    ("rounds", "rounds_shapes_gdro", [f"overrides=['model={{path: x, token: {SECRET}}}']"]),
]
WRONG = [
    ("train", [f"model.token=[{SECRET}]"]),
    ("train", [f"model.token.x={SECRET}"]),
    ("train", [f"model.token={SECRET}", "model.token.x=1"]),
    ("train", ["model={path: x, token: " + SECRET + ", foo: 1}"]),
    ("train", ["model={path: 3, token: " + SECRET + "}"]),
    ("train", [f"model.token=*{SECRET}"]),
    ("train", [f"model.token=!{SECRET}"]),
    ("train", [f"model.token=!!int {SECRET}"]),
    ("train", [f"model.token='{SECRET}"]),
    ("train", [f"modl.token={SECRET}"]),
    ("train", [f"model.tokn={SECRET}"]),
    ("train", [f"model.Token={SECRET}"]),
    ("train", [f"model.path=https://me:{SECRET}@example.org/x", "model.path.x=1"]),
    ("synth", ["generators=[{name: 3, model: {path: x, token: " + SECRET + "}}]"]),
    ("synth", ["generators={model: {path: x, token: " + SECRET + "}}"]),
    ("synth", [f"generators.0.model.token=[{SECRET}]"]),
    ("synth", ["generators.0=5", f"generators.0.model.token={SECRET}"]),
    ("rounds", [f"overrides=[model.token={SECRET}, 5]"]),
    ("rounds", [f"overrides=model.token={SECRET}"]),
]
RECIPES = {"train": "sd3_rankdpo", "synth": "synth_shapes", "rounds": "rounds_shapes_gdro"}


@pytest.mark.parametrize("number", range(len(GIVEN)))
def test_what_a_config_writes(number: int) -> None:
    kind, recipe, overrides = GIVEN[number]
    config = load(kind, recipe, overrides)
    texts = [resolved_yaml(config), config.model_dump_json(), str(config.model_dump(mode="json"))]
    if kind == "rounds":
        texts.append(json.dumps(_decisive(config)))  # type: ignore[arg-type]  # load returns the base of all configs
    assert not [text for text in texts if SECRET in text]


def test_the_token_reaches_the_hub() -> None:
    config: Any = load("train", "sd3_rankdpo", ["data.path=x", f"model.token={SECRET}"])
    assert config.model.token == SECRET
    assert SECRET not in repr(config) and SECRET not in str(config)


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_messages_about_mistakes(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, overrides = WRONG[number]
    with pytest.raises(DiffalignError) as caught:
        load(kind, RECIPES[kind], overrides)
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
    assert run(kind, RECIPES[kind], *overrides) == 2
    assert SECRET not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "line",
    [f"token: [{SECRET}]", f"token: *{SECRET}", f"token: !{SECRET} x", f"token: !!int {SECRET}", f"tokn: {SECRET}"],
)
def test_mistakes_in_a_file(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.yaml").write_text(f"kind: train\nmodel:\n  path: x\n  {line}\n")
    with pytest.raises(DiffalignError) as caught:
        load("train", tmp_path / "c.yaml")
    assert SECRET not in str(caught.value)


def test_a_printed_recipe(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"kind: train\nrun_dir: r\ndata: {{path: d}}\nmodel: {{path: x, token: {SECRET}}}\n")
    assert SECRET not in commented_recipe(path)


@pytest.mark.parametrize(
    "text",
    [
        f"token={SECRET}", f"model.token: '{SECRET}'", f'{{"token": "{SECRET}"}}', f"{{'api_key': '{SECRET}'}}",
        f"Authorization: Bearer {SECRET}", f"https://me:{SECRET}@example.org/x", f"https://example.org/x?token={SECRET}&y=1",
        f"https://x.org/?X-Amz-Signature={SECRET}", f"password = {SECRET},", f"API_KEY={SECRET}", "hf_abcdefghijklmnop",
        f"https://example.org/token={SECRET}", f"{{'path': 'a/b', 'token': '{SECRET}'}}",
    ],
)  # fmt: skip
def test_texts(text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for printed in (say, say_aside, say_block):
        printed(text)
        shown = "".join(capsys.readouterr())
        assert SECRET not in shown and "abcdefgh" not in shown and "***" in shown
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert "0123456789" not in redact("key 0123456789abcdef refused")


@pytest.mark.parametrize(
    "text",
    [
        "pass a token (model.token or `hf auth login`)", "token: null", "max_tokens: 512", "pad_token: <pad>", "tokens=77",
        "a key=value", "https://example.org/a?page=2", "hf_hub", "train.steps=200", "tokenizer: x", "mail me@example.org",
        "prompt_token_count=3", "cannot open 'ftp://host/passwd': no such file", "'/run/secret': denied",
        r"'C:\keys\token': gone",
    ],
)  # fmt: skip
def test_ordinary_texts_stay(text: str) -> None:
    assert redact(text) == text == redacted(text)


class WithOption(Reward):
    """A reward of another package that asks a service."""

    name, columns, range, licence, weights, reads = "service", ("score",), (0.0, 1.0), "none", "none", ()

    def __init__(self, api_key: str = "") -> None:
        self.api_key = api_key

    def options(self) -> dict[str, Any]:
        return {"api_key": self.api_key, "url": f"https://me:{self.api_key}@example.org", "scale": 2}

    def measure(self, images: Any, prompts: Any, metadata: Any = None) -> Any:
        raise NotImplementedError


def test_options_of_rewards() -> None:
    made = WithOption(SECRET)
    for kept in (made.identity(), made.provenance()):
        assert SECRET not in json.dumps(kept) and "scale" in json.dumps(kept)
