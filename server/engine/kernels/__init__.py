"""Kernels of the base's own path: linears, attention, and what lies between, each beside its reference; ``swap`` puts them into a model."""

from server.engine.kernels.gathered import GatheredAttention
from server.engine.kernels.native import Native, load_native
from server.engine.kernels.paged import AttentionKernel, PagedRows, Rules, attention_reference

__all__ = ["AttentionKernel", "GatheredAttention", "Native", "PagedRows", "Rules", "attention_reference", "load_native"]
