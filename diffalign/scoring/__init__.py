"""Scoring of images from anywhere: sources, prompts, decoding, a store that survives a kill, tables and the gallery."""
