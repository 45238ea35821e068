"""A study's folder: what its files prove, what they ask for, and how trials end for good."""
