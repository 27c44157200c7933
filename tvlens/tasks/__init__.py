"""Tasks: shipped text tasks, files of your own, function classes, and the prompts made of them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
