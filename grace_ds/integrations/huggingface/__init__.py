"""GRACE under ``transformers.Trainer``; the public side is :mod:`grace_ds.huggingface`."""
