"""The door: `accelerate launch trainer/main.py --config RECIPE [--section.key value ...]`."""

import os
import sys

if not __package__:  # run as a file: put the repository, not trainer/, on the path, so that this very clone is imported
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from trainer.launcher import follow_launcher

if __name__ == "__main__":
    follow_launcher()

from trainer.config import configure

if __name__ == "__main__":
    config = configure()
    # After a mistake in the settings has been told, for these imports take seconds.
    if config.dry_run is None:
        from trainer.train import train as work
    else:
        from trainer.plan import dry_run as work
    try:
        code = work(config)
    except SystemExit as stopped:  # what went wrong has been told
        code = int(stopped.code or 0)
    # Leave without taking the process group's threads down, which now and then aborts a loaded machine's rank, or waits
    # for one that is gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
