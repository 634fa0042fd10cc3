"""Credentials in messages and files: URLs are complete only where they are opened, and in the user's own recipe."""

import re
from typing import Any

from data.files import escaped

HIDDEN = "***"
URL = re.compile(r"://[^\s'\"]*")  # from where its kind ends
COMMAND = re.compile(r"pipe:.*")
WORDS = re.compile(
    r"(\b(?:bearer|basic)\s+|\s(?:-u|--user)[\s=]?|(?:token|secret|password|passwd|key|signature)\w{0,40}\s?[=:]\s?)"
    r"[^\s'\"]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """Return a text without the users, passwords and queries of URLs, and without what follows a word such as
    "password" or "token" in a `pipe:` command."""
    text = URL.sub(_without_credentials, text)
    return COMMAND.sub(lambda command: WORDS.sub(rf"\1{HIDDEN}", command[0]), text)


def printable(text: str, keep: str = "\n") -> str:
    """Return a text that is safe to print: credentials are hidden, control characters but for `keep` escaped."""
    return escaped(redacted(text), keep)


def _without_credentials(url: re.Match[str]) -> str:
    """Return a URL, or several in a chain, without users and passwords, and without queries: most are signatures."""
    places, mark, query = url[0].partition("?")
    hosts = (place.partition("/") for place in places.split("://"))
    clean = "://".join(
        f"{HIDDEN}@{host.rpartition('@')[2]}{slash}{rest}" if "@" in host else f"{host}{slash}{rest}"
        for host, slash, rest in hosts
    )
    after = query[len(query.rstrip(":,.;)")) :]  # the punctuation of a sentence
    return f"{clean}?{HIDDEN}{after}" if mark else clean


def redacted_all(value: Any) -> Any:
    """Return plain data with every text in it redacted."""
    if isinstance(value, dict):
        return {key: redacted_all(one) for key, one in value.items()}
    if isinstance(value, list):
        return [redacted_all(one) for one in value]
    return redacted(value) if isinstance(value, str) else value
