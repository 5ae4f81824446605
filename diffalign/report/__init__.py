"""Reports: one self-contained HTML file a run, contact sheets, and model cards."""
