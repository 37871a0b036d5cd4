"""PEFT's checkpoints: a file for every ``peft_type``, and what several of them share."""
