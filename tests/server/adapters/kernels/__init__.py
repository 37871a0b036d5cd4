"""Tests of Triton kernels: in Triton's interpreter where there is no GPU (see tests/conftest.py)."""
