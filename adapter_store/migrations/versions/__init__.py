"""Revisions of the catalog, oldest first by name."""
