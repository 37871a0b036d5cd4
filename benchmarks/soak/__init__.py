"""Soaks: a real server while adapters are changed all the time, and with ten thousand of them. ``make soak`` runs both."""
