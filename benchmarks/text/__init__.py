"""The parts of the BAHE benchmark: its rows, its cells, and the steps that are timed."""
