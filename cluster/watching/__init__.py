"""What a study shows: events, status, logs, the live display and the summary at the end."""
