"""One file per benchmark: what docs/benchmarks.md says about its last result."""
