"""What views of a run show, as it grows: its logs, its metrics. Reads only; never imports torch."""
