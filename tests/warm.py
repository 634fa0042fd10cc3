"""A process that has imported the trainer, and forks ranks which start at once: see `ranks` in conftest.py.

Reads {"arguments", "environment", "output", "fault"} as JSON lines and answers with the pid; an empty line asks for
[pid, code] of one that ended.
"""

import json
import os
import sys

import torch

import trainer.evaluate
import trainer.extractor  # noqa: F401
from data.processes import run_program
from trainer.config import configure
from trainer.train import train


def rank(arguments: list[str], environment: dict[str, str], output: str, fault: str) -> None:
    """What trainer/main.py does, after a fault's code has been run."""
    os.setsid()
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    exec(fault, {"arguments": arguments})
    run_program(lambda: train(configure(arguments)))


os.write(1, b"\n")
for line in sys.stdin:
    if line.strip():
        answer = os.fork()
        if not answer:
            rank(**json.loads(line))
    else:
        pid, status = os.waitpid(-1, 0)
        answer = [pid, os.waitstatus_to_exitcode(status)]
    os.write(1, f"{json.dumps(answer)}\n".encode())
