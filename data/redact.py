"""Credentials in what is told and kept: URLs stay whole only where they are opened, and in the user's own recipe."""

import re
from typing import Any

HIDDEN = "***"
# What stands before a host, and any query: most are signatures.
USER, QUERY = (
    re.compile(r"(?<=://)[^/\s'\"]*@"),
    re.compile(r"(?<=://)([^\s'\"?]*)\?[^\s'\"]*?(?=[:,.;)]*(?:[\s'\"]|$))"),
)
COMMAND = re.compile(r"pipe:.*")
WORDS = re.compile(
    r"(\b(?:bearer|basic)\s+|\s(?:-u|--user)[\s=]?|\w*(?:token|secret|password|passwd|key|signature)\w*\s*[=:]\s*)"
    r"[^\s'\"]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """A text without the user names, passwords and queries of the URLs in it, and without the passwords and tokens that
    follow a word for such in a `pipe:` command."""
    text = QUERY.sub(rf"\1?{HIDDEN}", USER.sub(f"{HIDDEN}@", text))
    return COMMAND.sub(lambda command: WORDS.sub(rf"\1{HIDDEN}", command[0]), text)


def redacted_all(value: Any) -> Any:
    """Plain data with every text in it redacted."""
    if isinstance(value, dict):
        return {key: redacted_all(one) for key, one in value.items()}
    if isinstance(value, list):
        return [redacted_all(one) for one in value]
    return redacted(value) if isinstance(value, str) else value
