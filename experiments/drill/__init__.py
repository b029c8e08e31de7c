"""What `experiments.kill_drill` kills, and how."""
