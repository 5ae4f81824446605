"""Published suites of prompts and judges: what each draws, what judges it, and how its scores are formed. One file each."""
