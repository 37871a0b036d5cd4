"""Programs that show Medley at work."""
