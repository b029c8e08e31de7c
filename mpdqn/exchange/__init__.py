"""Exchange: when and how the data-parallel replicas of a stage agree."""
