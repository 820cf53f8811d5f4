"""Random and coverage-guided input for all that reads bytes from elsewhere."""
