"""The experiments of the paper, measured with this project's library."""
