"""Seeded sweeps of runs and their comparison. Needs neither torch nor TRL, except to bind recipes before a sweep."""
