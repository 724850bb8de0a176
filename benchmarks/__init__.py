"""What is measured: the paper's experiments."""
