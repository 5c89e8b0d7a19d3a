"""The benchmarks behind `cmjax bench`: each module has a `run(...)` that returns JSON-ready values."""
