"""One driver per engine: each a program of its own, in an environment of its own, that speaks ``protocol``."""
