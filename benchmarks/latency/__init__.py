"""Latency of the scorer and of the whole frame, beside other ways to do the same work, in one process."""
