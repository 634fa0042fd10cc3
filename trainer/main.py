"""The entry point: `accelerate launch trainer/main.py --config RECIPE [--section.setting value ...]`."""

import os
import sys

if not __package__:  # run as a file: put the repository on the path instead of trainer/, so that this clone is imported
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":  # data workers import this file, and need nothing of this
    from trainer.distributed.launcher import follow_launcher, import_accelerate
    from trainer.distributed.stop import listen_early

    follow_launcher()
    dry_run = any(word.startswith("--dry_run") for word in sys.argv)
    if not dry_run:
        listen_early()

    from data.processes import end_when_interrupted, run_program

    if dry_run:
        end_when_interrupted()

    from trainer.config.parser import configure

    config = configure()
    # These imports take seconds: mistakes in the settings are reported first.
    import_accelerate()
    if config.dry_run is None:
        from trainer.train import train as work
    else:
        from trainer.dry_run import dry_run as work
    run_program(lambda: work(config))
