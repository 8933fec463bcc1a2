"""Training: batching, scoring, the loop, checkpoints and records. Imports no method."""
