"""Speed and memory, side by side with the other ways of doing the same work: `python -m benchmarks`."""
