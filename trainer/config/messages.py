"""jsonargparse's error messages in plain words."""

import re

from models.load import system_names

DENIED = re.compile(r"Importing '(.*?)' is not allowed, denied by .*? to allow it\.")
NOISE = ("Given value type", "Subtypes:", "Does not validate", "Errors:", "- Expected a 'NoneType'", "Problem with")
VALUE = re.compile(  # a value that a number's type refuses, in the words of jsonargparse and of Python
    r"(?:(?<=: )(\S+) does not conform to restriction \S+"
    r"|does not conform to restriction \S+ Given value: (.+)"
    r"|(?:invalid literal for int\(\) with base 10|could not convert string to float): '(.*)')"
)
WRONG = re.compile(
    r'setting "([\w.]+)": (?=Not|Expected)(?:Not of type (\w+): )?(?:Expected (.+?)\.? )?(?:Got|Given) value: (.*)'
)
VARYING = re.compile(r"(?:Not of type|Expected)(?:(?!setting).)*? Not of type Schedule: (?=Expected)")
TYPES = {
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number of at least 0",
    "PositiveFloat": "a number above 0",
    "a 'int'": "a whole number",
    "a 'float'": "a number (float)",
    "a 'bool'": "true or false",
    "a 'tuple'": "a list of two numbers",
}


def plain_message(message: str) -> str:
    """Return jsonargparse's message on one line, without Python's class paths, with settings as they are typed."""
    systems = ", ".join(system_names())
    if "Expected a dot import path string" in message:
        return f"system must be one of {systems}; got {message.rpartition(': ')[2].split()[0]}"
    message = DENIED.sub(
        rf"class_path \1 is not imported: system is one of {systems}, and no other setting names a class", message
    )
    if message.startswith('Parser key "system":'):
        for nested in ('Parser key "', "Option '", "arguments: --"):
            head, found, tail = message.rpartition(nested)
            if head:
                message = f"{head}{found}system.{tail}"
        message = message.replace('Parser key "system":', "")
    for old, new in {"Parser key": "setting", "a typing.Literal": "one of ", "<class ": "", "'>": "'"}.items():
        message = message.replace(old, new)
    lines = [line.strip() for line in message.splitlines()]
    text = " ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(NOISE))
    text = VARYING.sub("", text)  # the second of two complaints says what a setting that may vary can be
    if wrong := WRONG.search(VALUE.sub(lambda found: f"Got value: {found[found.lastindex or 0]}", text)):
        setting, kind, expected, value = wrong.groups()
        return f"{setting} must be {TYPES.get(expected or kind, expected or kind)}; got {value}"
    return text
