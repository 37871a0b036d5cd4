"""Checkpoints and outputs of the AdapterHub library, which needs an older transformers than the server does. See make_golden.py."""
