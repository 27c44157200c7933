"""The models that are looked at: what tvlens asks of one, and the catalogue of those there are."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
