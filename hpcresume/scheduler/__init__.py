"""The scheduler engines: Slurm through its clients, and a local driver of real processes."""
