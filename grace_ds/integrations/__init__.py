"""Connect GRACE to the host frameworks: DeepSpeed, transformers and Megatron."""
