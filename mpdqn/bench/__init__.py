"""What `mpdqn compare` runs: layouts in interleaved rounds, and the tables, plots and sentences made of the records."""
