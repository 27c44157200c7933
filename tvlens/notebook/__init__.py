"""What notebooks show: values of tvlens, what heads attend to, tokens by their effect."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
