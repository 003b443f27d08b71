"""GRACE in a Megatron job: the training dataset wrapped, the optimizer's steps counted; see :mod:`grace_ds.megatron`."""
