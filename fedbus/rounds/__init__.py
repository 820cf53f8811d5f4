"""The rounds, sans-IO: events and the time go in, commands come out. Standard library only."""
