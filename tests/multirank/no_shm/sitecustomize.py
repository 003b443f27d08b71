"""Keeps DeepSpeed from compiling its CPU op, for a minute, in processes of programs that cannot be told so in code."""

from grace_ds.utils.imports import after_import


def _without(module):  # type: ignore[no-untyped-def]
    module.__compatible_ops__["deepspeed_shm_comm"] = False


after_import("deepspeed.ops", _without)
