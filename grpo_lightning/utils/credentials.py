"""What tokens, keys and passwords look like: refused among the options, kept from workers of rewards."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from grpo_lightning.errors import ConfigError

# Rows match the end of a key in snake case. `token` and `key` mean much else: what stands before decides.
NAMES = (
    r"(hf|hub|auth|access|api|refresh|session|security|personal|github|gitlab|wandb|slack|sas)_token",
    r"(api|access|secret|private|auth|account|encryption|signing|ssh)_?key(_id)?",
    r"secrets?|password|passwd|passphrase|credentials?",
    r"authorization|bearer|connection_string",
)
_NAME = re.compile(rf"(.*_)?({'|'.join(NAMES)})|token")

VALUES = (
    r"hf_[A-Za-z0-9]{20,}",  # Hugging Face
    r"sk-[A-Za-z0-9]{32,}|sk-(ant|or|proj|svcacct)-[\w-]{20,}",  # OpenAI, Anthropic, OpenRouter
    r"(gsk|npm|r8)_[A-Za-z0-9]{30,}|glpat-[\w-]{20,}|dckr_pat_[\w-]{20,}",
    r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}",
    r"(AKIA|ASIA)[0-9A-Z]{16}",  # AWS
    r"AIza[0-9A-Za-z_-]{35}",  # Google
    r"xox[abeoprs]-[0-9A-Za-z-]{10,}|hooks\.slack\.com/services/\w+",
    r"pypi-[A-Za-z0-9_-]{50,}|wandb_v\d_\w{20,}",
    r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}",  # JSON web tokens
    r"-----BEGIN [A-Z ]*PRIVATE KEY",
    r"\w+://[^/\s:@]*:[^/\s@]+@",  # scheme://user:password@host
)
_VALUE = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(VALUES)})")
_VARIABLE = re.compile(
    r"(^|_)(TOKENS?|KEYS?|APIKEYS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?"
    r"|COOKIES?|SESSION|AUTH|SOCK|DSN)(_|$)",
    re.IGNORECASE,
)
"""environment variables; wider than `NAMES`, since one that is left out by mistake costs little"""
_ALIKE = re.compile(r"[!-~]{6,}")
"""one word, as every token is; a name with a marker such as `</s>` for its value is no secret"""


def without_credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables whose name or value does not look like a credential."""
    return {
        name: value
        for name, value in environment.items()
        if not _VARIABLE.search(name) and not _VALUE.search(value)
    }


def check_credentials(config: Any) -> None:
    """Raises ConfigError that names the first key whose name or value is that of a credential.

    Args:
        config: parsed options, nested mappings and lists; values are never shown.
    """
    for key, why in _found(config, ""):
        raise ConfigError(
            f"{key} {why}; options are written into config.yaml and every checkpoint. Take it out and give "
            "it by the environment (HF_TOKEN, WANDB_API_KEY, ...)"
        )


def _found(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if hasattr(value, "as_dict"):  # jsonargparse's Namespace
        value = value.as_dict()
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _found(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple, set)):
        for number, inner in enumerate(value):
            yield from _found(inner, f"{key}[{number}]")
    elif isinstance(value, str):
        if _VALUE.search(value):
            yield key, "has a value that looks like a credential"
        elif is_credential_name(key) and _ALIKE.fullmatch(value) and not value.startswith("<"):
            yield key, "is named like a credential"


def is_credential_name(key: str) -> bool:
    """True if an option of this name, dotted, would hold a token, a key or a password."""
    last = re.sub(r"\[\d+\]$", "", key).rpartition(".")[2]
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", last).replace("-", "_").lower()
    return _NAME.fullmatch(snake) is not None
