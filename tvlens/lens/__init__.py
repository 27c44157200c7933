"""The instrument: a frozen model, what is changed in it, and how its answers are read."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
