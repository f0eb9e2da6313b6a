"""Methods for language models, on transformers' ``generate``."""

from steersman.catalog import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"ContrastiveSearch": "steersman.language.contrastive_search:ContrastiveSearch"}
)
