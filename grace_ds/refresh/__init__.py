"""The refresh: from collected rows to the next schedule.  :mod:`grace_ds.refresh.line` has one statement per stage."""
