"""The door: `accelerate launch trainer/main.py --config RECIPE [--section.key value ...]`."""

import os
import sys

if not __package__:  # run as a file: put the repository, not trainer/, on the path, so that this very clone is imported
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from trainer.config import configure

if __name__ == "__main__":
    config = configure()
    from trainer.train import train  # after a mistake in the settings has been told, for its imports take seconds

    train(config)
    # All is saved and every process is here: leave without taking the process group's threads down, which now and then
    # aborts a loaded machine's rank and makes a finished run look failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
