"""Speed and memory, always against a peer measured in the same process: `python -m benchmarks`, or `make bench`."""
