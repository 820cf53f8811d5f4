"""Federated analytics: sums over everybody's records, which stay where they are."""
