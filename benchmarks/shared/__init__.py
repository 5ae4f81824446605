"""Parts that several benchmarks use, or that would make one too long. None of them is a benchmark."""
