"""Training: one loop on accelerate (`loop.py`), the preference step, seeded order, checkpoints, trackers, progress."""
