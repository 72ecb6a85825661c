"""What a user sees in a terminal: log lines, progress, tables. Rich is imported here alone."""
