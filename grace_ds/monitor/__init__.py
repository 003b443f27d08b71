"""Report on a run: its metrics, the schedules that it keeps, its progress."""
