//! Benchmarks live beside this file; run them with `make bench`.
