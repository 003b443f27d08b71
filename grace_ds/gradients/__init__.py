"""Per-sample gradient sketches read from the job's own backward, and the trusted basis they are compared with."""
