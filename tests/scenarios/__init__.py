"""The engine's decisions as transcripts that people read, and that the engine is held to.

Each text file here is a scenario: a title, what it shows, the settings, then lines of a time and what happened, and
below each, indented, what the engine said. `python -m tests.scenarios.record` writes the answers anew, and the lines
that happen by themselves: deadlines of the engine ("time is up"), commits, and heartbeats where they are answered.
`script.py` has the words for what happens, `words.py` those of the engine.
"""
