"""The client: task -> the user's code in a thread -> update -> receipt."""
