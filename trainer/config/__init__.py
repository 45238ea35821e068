"""A run is its config: a section a file; `run` puts them together, `tree` reads, merges and checks them."""
