"""TangleNAS: gradient-based one-shot architecture search over weight-entangled spaces.

The public surface, grouped by who needs it, is listed in `__init__.pyi`. Names load on first use: importing the package
imports neither torch nor any plugin, so that `tanglenas --help` and the listing of plugins stay fast.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
