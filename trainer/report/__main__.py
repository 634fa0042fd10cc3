"""`python -m trainer.report`: see command.py."""

from data.processes import end_when_interrupted, run_command

if __name__ == "__main__":
    end_when_interrupted()
    from trainer.report.command import main

    run_command(main)
