"""Where ``grace-ds run --grace FILE`` leaves the file with the grace block; imports nothing, as every process reads it."""

GIVEN = "GRACE_DS_BLOCK"
