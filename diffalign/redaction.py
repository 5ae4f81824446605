"""Keep access tokens out of everything that is written or printed, and folders out of what may be published.

One list of names and forms, for values and for texts.
"""

import os
import re
from difflib import get_close_matches
from typing import Any

HIDDEN = "***"
SECRET_KEYS = (
    "token", "hf_token", "access_token", "auth_token", "use_auth_token", "api_token", "bearer", "authorization", "api_key",
    "apikey", "api-key", "access_key", "secret_key", "secret", "client_secret", "password", "passwd", "credentials",
)  # fmt: skip
"""Keys, in small letters, whose values are nobody's business."""
ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")
_VALUE = r"""(?:'[^']*'|"[^"]*"|\[[^\]]*\]?|\{[^}]*\}?|(?!null\b|None\b|\*\*\*)[^\s,;'"\]})]+)"""
_NAMED = re.compile(rf"""(?i)(?<![\w-])((?:{"|".join(SECRET_KEYS)})['"]?\s*[=:]\s*(?:bearer\s+)?){_VALUE}""")
_TOKEN = re.compile(r"\b(hf|wandb)_[A-Za-z0-9_]{8,}")
_USER = re.compile(r"(\b[a-zA-Z][\w+.-]*://)[^/\s@'\"]+@")
_QUERY = re.compile(r"(?i)([?&][\w-]*(?:token|key|signature|credential|policy|secret|password)[\w-]*=)[^&\s'\"]+")


_FOLDERS = re.compile(r"""(?<![\w.:/~<])(?:~[\w.-]*|[A-Za-z]:)?[/\\](?:[^\s/\\'"<>|,;:*?]+[/\\])+(?=[^\s/\\'"<>|,;])""")


def without_folders(value: Any) -> Any:
    """Return values and texts with only the last part of absolute paths, which name users and machines.

    A text that is one absolute path as a whole may hold blanks.
    """
    if isinstance(value, dict):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    if not isinstance(value, str):
        return value
    if re.match(r"(/|~|[A-Za-z]:[/\\])", value) and "\n" not in value:
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] or "/"
    return _FOLDERS.sub("", value)


def is_secret(key: object) -> bool:
    """Return whether the value of a key must not be shown."""
    return isinstance(key, str) and key.strip().lower() in SECRET_KEYS


def holds_secret(dotted: str) -> bool:
    """Return whether a dotted key has a secret key in it, or one that is spelt nearly so, such as `model.tokn`."""
    return any(get_close_matches(word.strip().lower(), SECRET_KEYS, n=1, cutoff=0.8) for word in dotted.split("."))


def redact(text: str) -> str:
    """Return a text without tokens: values of secret keys, Hugging Face tokens, credentials in URLs, and the environment's."""
    for name in ENVIRONMENT:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, HIDDEN)
    text = _QUERY.sub(rf"\g<1>{HIDDEN}", _USER.sub(rf"\g<1>{HIDDEN}@", text))
    return _TOKEN.sub(HIDDEN, _NAMED.sub(_without_value, text))


def _without_value(found: re.Match[str]) -> str:
    """Return a key with its value hidden, and the end of a quoted path as it is: 'ftp://host/passwd': no such file."""
    path = found.string[: found.start()].endswith(("/", "\\")) and re.search("['\"]", found[1])
    return found[0] if path else f"{found[1]}{HIDDEN}"


def redact_argument(argument: str) -> str:
    """Return an argument `section.key=value` as messages show it: without the tokens in it."""
    dotted, equals, _ = argument.partition("=")
    return f"{dotted}={HIDDEN}" if equals and holds_secret(dotted) else redact(argument)


def redacted(value: Any) -> Any:
    """Return plain values with None in the place of what a secret key holds, and texts without tokens."""
    if isinstance(value, dict):
        return {key: None if is_secret(key) else redacted(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(one) for one in value]
    if isinstance(value, str):
        return redact(value)
    return value
