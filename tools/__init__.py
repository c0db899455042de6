"""Development, benchmarks and chaos tests: beside the product, which imports none of it."""
