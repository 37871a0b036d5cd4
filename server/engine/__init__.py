"""The engine: scheduling, paged K/V, the ragged batch and the model. It knows programs, never methods."""
