"""Named defects that the transparency tests must find (tests/test_teeth.py)."""
