"""Commands end as a user expects: Ctrl-C at any moment is one line and code 130."""

import argparse
import runpy
import signal
import sys
from types import ModuleType

import pytest

from data import processes

DATA = ["data.prepare", "data.inspect", "data.index"]
COMMANDS = [
    "trainer.generate",
    "trainer.evaluate",
    "trainer.compare",
    "trainer.prefetch",
    "trainer.export",
    "trainer.report",
    "trainer.encode",
    *DATA,
]
# What a command imports first, once Ctrl-C is taken care of; others import trainer.distributed.exit.
FIRST_IMPORT = {
    f"trainer.{name}": f"trainer.{name}.command" for name in ("evaluate", "generate", "export", "encode", "report")
}
FIRST_IMPORT |= {"trainer.main": "trainer.config.parser"}
FIRST_IMPORT |= dict.fromkeys(DATA, "data.command")


@pytest.fixture
def command(monkeypatch):
    """`python -m NAME`, in this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(name):
        monkeypatch.setattr(sys, "argv", [name, "--dry_run"])
        is_package = hasattr(sys.modules.get(name), "__path__")  # whose submodules other tests go on using
        monkeypatch.delitem(sys.modules, f"{name}.__main__" if is_package else name, raising=False)
        runpy.run_module(name, run_name="__main__")

    yield start
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_interrupted_says_so_in_one_line(command, monkeypatch, capsys, name):
    def interrupt(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", interrupt)
    monkeypatch.setattr("trainer.config.parser.in_order", interrupt)  # the comparison's first step
    with pytest.raises(SystemExit) as stopped:
        command(name)
    assert (stopped.value.code, capsys.readouterr().err) == (130, "interrupted\n")


@pytest.mark.parametrize("name", [*COMMANDS, "trainer.main"])
def test_a_command_is_interrupted_while_it_imports(command, monkeypatch, capfd, name):
    """Its first slow import, or this stand-in for it, comes after Ctrl-C is taken care of."""

    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    class Slow(ModuleType):
        def __getattr__(self, name):
            if not name.startswith("__"):
                signal.raise_signal(signal.SIGINT)
            raise AttributeError(name)

    monkeypatch.setattr(processes.os, "_exit", end)
    first = FIRST_IMPORT.get(name, "trainer.distributed.exit")
    monkeypatch.setitem(sys.modules, first, Slow(first))
    with pytest.raises(Ended, match="130"):
        command(name)
    assert capfd.readouterr().err == "interrupted\n"
