"""A study as it is asked for: its file, the ladder, the trials and what each takes."""
