"""A stateful firewall daemon whose connection tracker runs in userspace. Read core/conntrack.py first."""

import os
import sys
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType


class _PureFinder:
    """Finds the Python source of our modules where a compiled one stands beside it."""

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None" = None
    ) -> ModuleSpec | None:
        """Look only for `.py` files, and only for our own modules."""
        if path is None or not fullname.startswith(__name__ + "."):
            return None
        for folder in path:
            spec = FileFinder(folder, (SourceFileLoader, [".py"])).find_spec(fullname, target)
            if spec is not None:
                return spec
        return None


if os.environ.get("CONNTRACKD_PURE") == "1":
    sys.meta_path.insert(0, _PureFinder())
