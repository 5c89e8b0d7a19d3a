"""Instances: a model on devices, and what runs plans on it."""
