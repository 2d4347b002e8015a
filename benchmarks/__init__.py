"""Commands that measure and save tables: `python -m benchmarks.<name>`."""
