"""Declarations of the tables and figures: one short file each, rows and columns, no loops."""
