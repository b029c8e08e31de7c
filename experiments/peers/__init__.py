"""Other people's ways of making the same update, as they publish them and tuned."""
