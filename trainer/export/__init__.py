"""`python -m trainer.export`: a run's averaged networks as a folder that other tools open."""
