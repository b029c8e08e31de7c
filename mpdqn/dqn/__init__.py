"""Deep Q-learning as pure tensor functions: batches, agents and losses."""
