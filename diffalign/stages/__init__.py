"""What each verb does, as a function from folders to a folder. Names in a config are resolved in `resolve.py` alone."""
