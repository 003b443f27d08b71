"""What a run tells of itself: metrics, the schedules it keeps, progress."""
