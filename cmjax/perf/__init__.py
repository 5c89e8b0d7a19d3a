"""The performance model: counts what a traced step does, and prices it on machines that are not there.

`layout.Layout` is what is priced, `price.price` prices it, `hardware.hardware` finds a machine;
docs/performance-model.md says what it knows and how far it is off. This front door imports nothing, so that a command's
`--help` needs no JAX.
"""
