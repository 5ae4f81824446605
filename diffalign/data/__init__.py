"""Datasets on disk: images, scores and groups; how they are made, and the latent cache that training reads."""
