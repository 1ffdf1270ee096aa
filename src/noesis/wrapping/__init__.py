"""The container: wrap, Wrapped, capture, RunState, Alarms."""
