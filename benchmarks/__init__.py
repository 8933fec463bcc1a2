"""Speed and memory against TRL and transformers, on the same rows in one run on one machine: `make bench`."""
