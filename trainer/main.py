"""The door: `accelerate launch trainer/main.py --config RECIPE [--section.key value ...]`."""

import os
import sys

if not __package__:  # run as a file: put the repository, not trainer/, on the path, so that this very clone is imported
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from trainer.launcher import follow_launcher, listen

if __name__ == "__main__":
    follow_launcher()
    if not (dry := any(word.startswith("--dry_run") for word in sys.argv)):
        listen()

from data.processes import end_when_interrupted, run_program

if __name__ == "__main__" and dry:
    end_when_interrupted()

from trainer.config import configure

if __name__ == "__main__":
    config = configure()
    # After a mistake in the settings has been told, for these imports take seconds.
    if config.dry_run is None:
        from trainer.train import train as work
    else:
        from trainer.plan import dry_run as work
    run_program(lambda: work(config))
