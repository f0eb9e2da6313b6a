"""steersman: published methods for steering generative models, as drop-ins, with proof."""

__version__ = "0.1.0"
