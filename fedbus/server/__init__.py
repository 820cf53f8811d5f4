"""The server: bus, engine and strategy in one TaskGroup."""
