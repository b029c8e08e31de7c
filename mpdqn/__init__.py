"""mpdqn: exact data- and pipeline-parallel training of large convolutional Q-networks."""

__version__ = "0.1.0"
