"""Federated LoRA fine-tuning that counts every byte it sends.

What the package exports, and from where, stands in `__init__.pyi` beside this file, for people and type checkers alike.
Each name is loaded when it is first used, so that `import fedloom` loads no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
