"""Schedules as tables: the order of actions of every stage, as plain data. Never imports torch."""
