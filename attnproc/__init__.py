"""Sparse video attention and training-free control for Hugging Face diffusers.

import attnproc
pipe.attn_processor = attnproc.RadialAttnProcessor()
"""

from attnproc._checkout import link_checkout

link_checkout()

from attnproc.errors import AttnProcError, AttnProcWarning, SettingsError, UnsupportedError  # noqa: E402
from attnproc.estimation import Estimate, estimate  # noqa: E402
from attnproc.installation import (  # noqa: E402
    add_to_pipelines,
    install,
    installed,
    report,
    uninstall,
    using,
)
from attnproc.processor import AttnProcessor, DenseAttnProcessor  # noqa: E402
from attnproc.reports import Report  # noqa: E402
from attnproc.sparse.adaspa import AdaSpaAttnProcessor  # noqa: E402
from attnproc.sparse.paro import PAROAttnProcessor  # noqa: E402
from attnproc.sparse.radial import RadialAttnProcessor  # noqa: E402
from attnproc.sparse.sparge import SpargeAttnProcessor  # noqa: E402
from attnproc.sparse.vmoba import VMoBAAttnProcessor  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AdaSpaAttnProcessor",
    "AttnProcError",
    "AttnProcWarning",
    "AttnProcessor",
    "DenseAttnProcessor",
    "Estimate",
    "PAROAttnProcessor",
    "RadialAttnProcessor",
    "Report",
    "SettingsError",
    "SpargeAttnProcessor",
    "UnsupportedError",
    "VMoBAAttnProcessor",
    "__version__",
    "estimate",
    "install",
    "installed",
    "report",
    "uninstall",
    "using",
]

add_to_pipelines()
