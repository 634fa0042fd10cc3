"""The set-up says what to install when it cannot go on."""

import subprocess

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
