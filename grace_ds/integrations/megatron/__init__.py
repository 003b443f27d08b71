"""Run GRACE in a Megatron job: wrap the training dataset, count the optimizer's steps; see :mod:`grace_ds.megatron`."""
