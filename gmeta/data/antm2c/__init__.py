"""AntM2C, a click log of five kinds of items with texts and images: its files to the rows of a pack.

The files are given out on request; `gmeta synth --kind antm2c` makes a clone of them.
"""
