"""The parts of the quality benchmark: its cases, their raw rows, the cells that are run and kept, and the measures."""
