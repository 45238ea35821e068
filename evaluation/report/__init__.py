"""Figures and tables of what was evaluated, built as plain data."""
