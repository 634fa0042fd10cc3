"""A process that has imported the trainer, and forks others which start at once: see `forked` in conftest.py.

It reads {"code", "environment", "output"} as JSON lines, runs the code in a fork, and answers with the fork's pid. An
empty line waits for a fork to end, and the answer is [pid, exit code].
"""

import json
import os
import sys

import torch
import torch._dynamo  # which the first optimizer imports
import torchmetrics.image  # noqa: F401 (which the first evaluation imports)

import trainer.encode.command
import trainer.evaluate
import trainer.evaluate.command
import trainer.evaluate.extractors.build
import trainer.train  # noqa: F401
from data.processes import run_program


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


os.write(1, b"\n")
for line in sys.stdin:
    if line.strip():
        answer = os.fork()
        if not answer:
            run(**json.loads(line))
    else:
        pid, status = os.waitpid(-1, 0)
        answer = [pid, os.waitstatus_to_exitcode(status)]
    os.write(1, f"{json.dumps(answer)}\n".encode())
