"""A process that has imported the trainer, and forks others which start at once: see `forked` in conftest.py.

`python warm.py SOCKET PID` listens at a socket for one JSON line a connection, until the process PID has ended. It runs
{"code", "environment", "output"} in a fork and answers with the fork's pid; asked for a pid, it answers with the exit
code of that fork, null as long as it runs.
"""

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch._dynamo  # which the first optimizer imports
import torchmetrics.image  # noqa: F401 (which the first evaluation imports)

import trainer.encode.command
import trainer.evaluate
import trainer.evaluate.command
import trainer.evaluate.extractors.build
import trainer.train  # noqa: F401
from data.processes import run_program
from trainer.config.parser import configure


def run(code: str, environment: dict[str, str], output: str) -> None:
    """Run the code as a program of its own, whose standard streams go to the file `output`."""
    os.setsid()
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    del sys.modules["__main__"].__file__  # or processes that it starts would import this file, and all that it imports
    run_program(lambda: exec(code, {}))


def answer(question: dict | int) -> int | None:
    if isinstance(question, int):
        pid, status = os.waitpid(question, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None
    if pid := os.fork():
        return pid
    listening.close()
    run(**question)


configure(["--system", "VAEGAN", "--data.train", "/nowhere"])  # jsonargparse keeps what it reads in the code
path, tests = sys.argv[1:]
unfinished = f"{path}.unfinished"
listening = socket.socket(socket.AF_UNIX)
listening.bind(unfinished)
listening.listen()
listening.settimeout(1)
os.rename(unfinished, path)  # now it listens
while Path(f"/proc/{tests}").exists():
    with suppress(TimeoutError):
        connection, _ = listening.accept()
        with connection, connection.makefile("rw") as stream:
            stream.write(f"{json.dumps(answer(json.loads(stream.readline())))}\n")
