"""The door: `accelerate launch trainer/main.py --config RECIPE [--section.key value ...]`."""

import os
import sys

if not __package__:  # run as a file: put the repository, not trainer/, on the path, so that this very clone is imported
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from trainer.config import configure

if __name__ == "__main__":
    config = configure()
    from trainer.train import train  # after a mistake in the settings has been told, for its imports take seconds

    try:
        code = train(config)
    except SystemExit as stopped:  # what went wrong has been told
        code = int(stopped.code or 0)
    # Leave without taking the process group's threads down, which now and then aborts a loaded machine's rank, or waits
    # for one that is gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
