"""A clone of AntM2C's files: their columns and statistics at any size, and a truth that is known."""
