"""Kernels of the base's own path. ``paged.attention_reference`` states what attention means; the others are faster ways to it."""
