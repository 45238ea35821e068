"""A run is its config: one file a section; `run` puts them together, reads, merges and checks them."""
