"""Medley's server: one frozen base model, many tenants' adapters in one continuous batch."""

__version__ = "0.1.0"
