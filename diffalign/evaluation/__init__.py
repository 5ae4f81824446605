"""Evaluation: base against tuned at the same prompts and seeds, with paired intervals over prompts."""
