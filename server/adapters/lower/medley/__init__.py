"""Medley's own formats, for what no library has one (docs/FORMATS.md)."""
