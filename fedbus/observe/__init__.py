"""What a run tells the people who watch it."""
