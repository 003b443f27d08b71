"""The refresh: collected rows in, the next schedule out.  :mod:`grace_ds.refresh.line` has one statement a stage."""
