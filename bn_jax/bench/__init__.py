"""Benchmarks: accuracy, speed, memory and compile time, compared with other libraries."""
