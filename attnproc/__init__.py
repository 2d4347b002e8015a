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
from attnproc.sparse.radial import RadialAttnProcessor  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AttnProcError",
    "AttnProcWarning",
    "AttnProcessor",
    "DenseAttnProcessor",
    "Estimate",
    "RadialAttnProcessor",
    "Report",
    "SettingsError",
    "UnsupportedError",
    "__version__",
    "estimate",
    "install",
    "installed",
    "report",
    "uninstall",
    "using",
]

add_to_pipelines()
