# SPDX-License-Identifier: Apache-2.0
"""This package under NeMo RL's name: ``nemo_rl.X`` is the module ``nemo_rl_ref.X`` itself.

It has NeMo RL's names and numbers as far as the mirror goes. See `nemo_rl_ref.export.STAND_IN`.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec


class _Alias(MetaPathFinder, Loader):
    def find_spec(self, fullname, path, target=None):
        return ModuleSpec(fullname, self) if fullname.startswith(f"{__name__}.") else None

    def create_module(self, spec):
        module = importlib.import_module(f"nemo_rl_ref{spec.name.removeprefix(__name__)}")
        self._own = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = self._own  # the import has put that of the alias in its place


sys.meta_path.insert(0, _Alias())
