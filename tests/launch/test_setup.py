"""The set-up says what to install when it cannot go on, and installs all that is imported."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

from conftest import ROOT


def setup(tmp_path, python):
    command = ["sh", str(ROOT / "launch" / "setup.sh"), str(python)]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)


def test_a_missing_python_is_named(tmp_path):
    done = setup(tmp_path, "no-such-python")
    assert done.returncode == 1
    assert "no-such-python not found. Install Python 3.11 or newer" in done.stderr


def test_an_old_python_is_named(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = setup(tmp_path, old)
    assert done.returncode == 1
    assert "Python 3.9.1 is too old" in done.stderr


def test_a_python_without_venv_is_told_what_to_install(tmp_path):
    bare = tmp_path / "python3.11"
    bare.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nexit 1\n')
    bare.chmod(0o755)
    done = setup(tmp_path, bare)
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr


def test_an_environment_of_another_copy_is_left_alone(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / ".venv").symlink_to(tmp_path / "other")
    done = setup(tmp_path, sys.executable)
    assert done.returncode == 1
    assert f".venv is a link to {tmp_path / 'other'}, whose packages" in done.stderr
    assert not [*(tmp_path / "other").iterdir()]


def plain(name: str) -> str:
    """A distribution's name, less version, extras and spelling."""
    return re.split(r"[\[<>=~! ]", name)[0].lower().replace("_", "-")


def test_every_imported_package_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    declared = {plain(name) for name in project["dependencies"] + extras}
    installed, imported = packages_distributions(), set()
    for path in (path for folder in ("trainer", "models", "data") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    others = imported - sys.stdlib_module_names - {"trainer", "models", "data"}
    assert "psutil" in others
    missing = {name for name in others if not {plain(of) for of in installed.get(name, [name])} & declared}
    assert not missing
