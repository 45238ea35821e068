"""What features say of two sets of images: mathematics on arrays, no files."""
