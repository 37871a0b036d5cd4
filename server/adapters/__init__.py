"""Lowering adapters to programs, and executing programs at the sites of the base model."""
