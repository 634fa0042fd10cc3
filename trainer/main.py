"""The door: `accelerate launch trainer/main.py --config RECIPE [--section.key value ...]`."""

import os
import sys

if not __package__:  # run as a file: put the repository, not trainer/, on the path, so that this very clone is imported
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from trainer.launcher import follow_launcher, listen

if __name__ == "__main__":
    follow_launcher()
    signals = listen()

from data.processes import run
from trainer.config import configure

if __name__ == "__main__":
    config = configure()
    # After a mistake in the settings has been told, for these imports take seconds.
    if config.dry_run is None:
        from trainer.train import train as work
    else:
        signals.close()  # it has nothing to save
        from trainer.plan import dry_run as work
    run(lambda: work(config))
