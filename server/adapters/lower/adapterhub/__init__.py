"""AdapterHub's checkpoints: a file for every architecture, and for heads, which are stored beside them."""
