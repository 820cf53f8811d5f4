"""What a late update still counts."""

from __future__ import annotations


def polynomial(staleness: int, exponent: float) -> float:
    """s(tau) = (1 + tau)^-a, Xie et al. 2019 (Asynchronous Federated Optimization), section 5.2."""
    return float((1 + staleness) ** -exponent)
