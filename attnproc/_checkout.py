"""Makes `attnproc.kernels`, `attnproc.pipelines` and `attnproc.demos` importable from a clone.

The three are sub-packages that lie beside this folder instead of inside it. An editable install maps them, but a
plain `pip install .` followed by running anything from the clone would find this folder first and miss them.
Inside a wheel there is no `pyproject.toml` beside the package, so nothing is added there.
"""

import importlib.util
import sys
from pathlib import Path

FOLDERS = {
    "attnproc.kernels": "kernels/block_sparse",
    "attnproc.pipelines": "pipelines",
    "attnproc.demos": "demos",
}


class CheckoutFinder:
    """A meta path finder for exactly the names in `FOLDERS`; silent about everything else."""

    def __init__(self, root: Path):
        self.root = root

    def find_spec(self, name, path=None, target=None):
        folder = FOLDERS.get(name)
        if folder is None:
            return None
        location = self.root / folder
        return importlib.util.spec_from_file_location(
            name, location / "__init__.py", submodule_search_locations=[str(location)]
        )


def link_checkout() -> None:
    """Appends the finder once if this package lies in a clone. Ordinary finders keep priority."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        return
    # Compared by name: a second copy of this module would make another class of the same name.
    if not any(type(finder).__name__ == CheckoutFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(CheckoutFinder(root))
