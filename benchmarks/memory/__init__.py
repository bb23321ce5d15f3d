"""What a training step keeps in memory: counted on a CPU, predicted for any batch, measured on a GPU."""
