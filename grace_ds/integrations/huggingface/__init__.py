"""Run GRACE under ``transformers.Trainer``; the public interface is :mod:`grace_ds.huggingface`."""
