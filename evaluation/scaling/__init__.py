"""Scaling laws from evaluated points: frontier, fits, bootstrap, hold-out. numpy and scipy only."""
