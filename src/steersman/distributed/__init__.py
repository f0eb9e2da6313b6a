"""Methods for training over networks, and for planning the networks."""

from steersman.catalog import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__)
