"""The door: `accelerate launch trainer/main.py --config RECIPE [--section.key value ...]`."""

import os
import sys

if not __package__:  # run as a file: put the repository, not trainer/, on the path, so that this very clone is imported
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":  # workers that read data import this file, too, and would import all the rest for nothing
    from trainer.distributed.launcher import follow_launcher
    from trainer.distributed.stop import listen_early

    follow_launcher()
    dry = any(word.startswith("--dry_run") for word in sys.argv)
    if not dry:
        listen_early()

    from data.processes import end_when_interrupted, run_program

    if dry:
        end_when_interrupted()

    from trainer.config.parser import configure

    config = configure()
    # After a mistake in the settings has been told, for these imports take seconds.
    if config.dry_run is None:
        from trainer.train import train as work
    else:
        from trainer.dry_run import dry_run as work
    run_program(lambda: work(config))
