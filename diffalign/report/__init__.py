"""Reports: one self-contained HTML file a run."""
