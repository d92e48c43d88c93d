"""SPD: sync-point drop for tensor-parallel LLaMA models."""

__version__ = "0.1.0"
