"""jsonargparse's error messages in plain words."""

import re

from models.load import system_names

DENIED = re.compile(r"Importing '(.*?)' is not allowed, denied by .*? to allow it\.")  # jsonargparse's words


def plain_message(message: str) -> str:
    """jsonargparse's message on one line, without Python's class paths, naming settings and choices in full."""
    known = f"system is one of {', '.join(system_names())}"
    if "Expected a dot import path string" in message:
        message += f" ({known.replace('system is', 'expected')})"
    message = DENIED.sub(rf"class_path \1 is not imported: {known}, and no other setting names a class", message)
    if message.startswith('Parser key "system":'):
        for nested in ('Parser key "', "Option '", "arguments: --"):
            head, found, tail = message.rpartition(nested)
            if head:
                message = f"{head}{found}system.{tail}"
    message = message.replace('Parser key "system":', "")
    for old, new in {"Parser key": "setting", "a typing.Literal": "one of ", "<class ": "", "'>": "'"}.items():
        message = message.replace(old, new)
    noise = ("Given value type", "Subtypes:", "Does not validate", "Errors:", "- Expected a 'NoneType'", "Problem with")
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(noise))
