"""Latency: measured on real processes, and predicted for machines that are not at hand."""
