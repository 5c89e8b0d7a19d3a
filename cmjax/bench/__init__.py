"""Benchmarks, one module per `cmjax bench` subcommand."""
