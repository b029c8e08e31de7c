"""The planner: what a table costs before anything runs. Never imports torch."""
