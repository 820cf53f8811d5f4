"""How updates become the next model: pure numpy, one update at a time."""
