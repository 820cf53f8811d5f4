"""The worker: tasks of many virtual clients -> the user's code, a few at a time -> updates."""
