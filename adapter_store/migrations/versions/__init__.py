"""One file for each revision of the tables, oldest first. A revision that was released never changes."""
