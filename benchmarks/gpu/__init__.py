"""Everything that a machine with a GPU can tell, in pieces that can be continued: `python -m benchmarks.gpu`."""
