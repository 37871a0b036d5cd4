"""The names of the parts of a step, for whoever measures them and whoever reports them."""

LINEARS, ATTENTION, SMALL, EDITS = "linears", "attention", "norms, RoPE, SiLU", "adapter edits"
SAMPLING, REST, MESSAGES = "sampling", "Python, other", "messages"
PARTS = (LINEARS, ATTENTION, SMALL, EDITS, SAMPLING, REST)
"""What adds up to a step in the engine; messages, tokenizer and HTTP come on top."""
