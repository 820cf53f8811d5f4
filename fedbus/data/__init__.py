"""Datasets for examples and tests, and ways to share one out among clients."""
