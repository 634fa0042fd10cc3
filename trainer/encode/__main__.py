"""`python -m trainer.encode`: see arguments.py."""

from data.processes import end_when_interrupted, run_command

if __name__ == "__main__":
    end_when_interrupted()
    from trainer.encode.command import main

    run_command(main)
