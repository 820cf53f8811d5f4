"""Bytes to typed messages and back: bounds checked, no I/O."""
