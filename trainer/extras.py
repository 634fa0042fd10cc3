"""Optional packages, which are imported only where they are needed."""

from importlib import import_module
from typing import Any


def needs(what: str, extra: str, *packages: str) -> Any:
    """Return the first of some packages, all of which are imported.

    Args:
        what: needs them, as it is typed
        extra: of this project's, which installs them
        packages: names of modules

    Raises:
        ValueError: one is not installed; says how to install it.
    """
    try:
        first, *_ = [import_module(package) for package in packages]
        return first
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} needs {error.name}, which is not installed: pip install 'vaegan-trainer[{extra}]'"
        ) from error
