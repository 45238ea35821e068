"""The law in size and data: L(N, D), isoFLOP parabolas, the size for a budget."""
