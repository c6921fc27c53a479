"""Published procedures in full, where a method of the package does only a part of them or in another order: for tests
and benchmarks."""
