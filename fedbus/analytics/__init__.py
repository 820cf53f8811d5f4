"""Federated analytics: figures of the pooled data, of which nothing but sums leaves a client."""
