"""Tests of server.engine.kernels."""
