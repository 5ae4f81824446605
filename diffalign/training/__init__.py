"""Training: one run for all methods (`run.py`), their steps, seeded order, checkpoints, trackers, progress."""
