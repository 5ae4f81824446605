"""Datasets on disk: images, scores, groups; sampling, scoring, ranking; the latent cache that training reads."""
