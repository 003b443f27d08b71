"""Read corpora that other libraries have written as datasets: ``MMapTokens("corpus_text_document", length=1024)``."""

from grace_ds.data.megatron_bin import MMapTokens

__all__ = ["MMapTokens"]
