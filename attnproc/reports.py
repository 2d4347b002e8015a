"""What happened in the last run: per layer method, density, dense and sparse calls, fallbacks, time."""

import dataclasses
import io
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rich.table import Table

    from attnproc.kernels import BlockMask


@dataclass
class SiteStats:
    """Counters of one attention site in the current or last run."""

    dense_calls: int = 0
    sparse_calls: int = 0
    _kept: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    fallbacks: Counter[str] = field(default_factory=Counter)
    replaced: bool = False
    _seconds: dict[str, float] = field(default_factory=lambda: {"planning": 0.0, "attention": 0.0})
    _events: list[tuple[str, Any, Any]] = field(default_factory=list)

    def __deepcopy__(self, memo: dict) -> "SiteStats":
        """A copy of a model starts with an empty report; CUDA events cannot be copied."""
        return SiteStats(replaced=self.replaced)

    @contextmanager
    def timed(self, what: str, device: torch.device) -> Iterator[None]:
        """Adds the time of a block to "planning" or "attention"; on CUDA by events, without waiting for the device."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((what, start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[what] += time.perf_counter() - began

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent "planning" and in "attention"."""
        for what, start, end in self._events:
            end.synchronize()
            self._seconds[what] += start.elapsed_time(end) / 1000.0
        self._events.clear()
        return dict(self._seconds)

    def add_density(self, mask: "BlockMask") -> None:
        """Notes the density of a sparse call without waiting for the device."""
        self._kept.append((mask.kept_pairs, mask.visible_keys[..., 0].numel() * mask.query_length * mask.key_length))

    @property
    def density(self) -> list[float]:
        """Measured density of each sparse call."""
        return [int(pairs) / possible for pairs, possible in self._kept]


@dataclass(frozen=True)
class SiteReport:
    """One row of a report: one attention site of one denoiser."""

    denoiser: str
    site: str
    method: str
    dense_calls: int
    sparse_calls: int
    density_mean: float | None
    density_min: float | None
    density_max: float | None
    planning_seconds: float
    attention_seconds: float
    fallbacks: dict[str, int]
    replaced: bool


@dataclass(frozen=True)
class Report:
    """Result of `attnproc.report`. Printing it gives a table; `to_dict` gives plain data."""

    settings: dict[str, dict[str, Any]]
    sites: list[SiteReport]

    @property
    def density(self) -> float:
        """Kept share of query-key pairs over all calls of the run, dense calls counted as 1.0."""
        calls = sum(s.dense_calls + s.sparse_calls for s in self.sites)
        kept = sum(s.dense_calls + s.sparse_calls * (s.density_mean or 0.0) for s in self.sites)
        return kept / calls if calls else 1.0

    @property
    def sparse_density(self) -> float | None:
        """Mean density of the sparse calls alone, or None if there were none."""
        calls = sum(s.sparse_calls for s in self.sites)
        return sum(s.sparse_calls * (s.density_mean or 0.0) for s in self.sites) / calls if calls else None

    @property
    def fallbacks(self) -> dict[str, int]:
        """How often attention ran dense although the settings wanted it sparse, by reason."""
        total: Counter[str] = Counter()
        for site in self.sites:
            total.update(site.fallbacks)
        return dict(total)

    @property
    def attention_seconds(self) -> float:
        """Seconds in attention and its planning, over all sites."""
        return sum(s.attention_seconds + s.planning_seconds for s in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "settings": self.settings,
            "density": self.density,
            "sparse_density": self.sparse_density,
            "attention_seconds": self.attention_seconds,
            "fallbacks": self.fallbacks,
            "sites": [dataclasses.asdict(site) for site in self.sites],
        }

    def table(self) -> "Table":
        """The report as a rich table."""
        from rich.table import Table

        table = Table(title=f"attention density {self.density:.3f}, dense steps and layers included")
        for heading in ("site", "method"):
            table.add_column(heading)
        for heading in ("dense calls", "sparse calls", "density", "planning s", "attention s"):
            table.add_column(heading, justify="right")
        table.add_column("fallback to dense")
        for site in self.sites:
            density = "-" if site.density_mean is None else f"{site.density_mean:.3f}"
            if site.density_mean is not None and site.density_min != site.density_max:
                density += f" ({site.density_min:.3f} to {site.density_max:.3f})"
            notes = "; ".join(f"{reason} ({count} calls)" for reason, count in site.fallbacks.items())
            table.add_row(
                f"{site.denoiser}.{site.site}" if site.denoiser else site.site,
                "replaced by something else" if site.replaced else site.method,
                str(site.dense_calls),
                str(site.sparse_calls),
                density,
                f"{site.planning_seconds:.3f}",
                f"{site.attention_seconds:.3f}",
                notes,
            )
        return table

    def __repr__(self) -> str:
        text = io.StringIO()
        from rich.console import Console

        Console(width=160, file=text).print(self.table())
        return text.getvalue()


def site_report(denoiser: str, name: str, method: str, stats: SiteStats) -> SiteReport:
    """The row of one site."""
    density, seconds = stats.density, stats.seconds
    return SiteReport(
        denoiser=denoiser,
        site=name,
        method=method,
        dense_calls=stats.dense_calls,
        sparse_calls=stats.sparse_calls,
        density_mean=sum(density) / len(density) if density else None,
        density_min=min(density, default=None),
        density_max=max(density, default=None),
        planning_seconds=seconds["planning"],
        attention_seconds=seconds["attention"],
        fallbacks=dict(stats.fallbacks),
        replaced=stats.replaced,
    )
