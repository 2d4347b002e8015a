"""Pictures that explain themselves: heat maps with scales, block masks, and what one query sees on the latent grid."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from attnproc.files import replacing
from attnproc.pipelines.inspection import InspectingProcessor, MaskView, Observation

if TYPE_CHECKING:
    from attnproc.pipelines.comparison import Row

MARGIN, LINE = 16, 18
TITLE, TEXT, SMALL = (ImageFont.load_default(size) for size in (18, 13, 11))
INK, PALE, EMPTY = (25, 25, 30), (120, 120, 125), (226, 226, 230)
# Dark to light, so that it also reads without colour.
RAMP = np.array([(28, 20, 75), (60, 70, 150), (35, 135, 150), (90, 190, 110), (245, 230, 75)], dtype=np.float64)


def colour(value: float, low: float, high: float) -> tuple[int, int, int]:
    """The colour of a value on the scale from `low` to `high`."""
    place = 0.0 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
    where = place * (len(RAMP) - 1)
    first = min(int(where), len(RAMP) - 2)
    mixed = RAMP[first] + (where - first) * (RAMP[first + 1] - RAMP[first])
    return int(mixed[0]), int(mixed[1]), int(mixed[2])


def heat_map(
    title: str, values: np.ndarray, row_name: str, column_name: str, *, low: float, high: float, note: str = ""
) -> Image.Image:
    """`values` (rows, columns) as coloured cells with ticks and a scale; NaN is grey. `note` says what grey is."""
    rows, columns = values.shape
    cell = int(np.clip(420 / max(columns, 1), 4, 26)), int(np.clip(300 / max(rows, 1), 4, 26))
    left, top = 52, 2 * LINE + 18
    width = left + max(columns * cell[0], 300) + 96
    height = top + rows * cell[1] + LINE + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((0, 0), title, INK, TEXT)
    draw.text((0, LINE), f"{row_name} down, {column_name} across" + (f"; grey: {note}" if note else ""), PALE, SMALL)
    for i in range(rows):
        for j in range(columns):
            box = (left + j * cell[0], top + i * cell[1], left + (j + 1) * cell[0] - 1, top + (i + 1) * cell[1] - 1)
            value = float(values[i, j])
            draw.rectangle(box, EMPTY if np.isnan(value) else colour(value, low, high))
    for i in range(0, rows, 14 // cell[1] + 1):
        draw.text((left - 8, top + i * cell[1] + cell[1] / 2), str(i), PALE, SMALL, anchor="rm")
    for j in range(0, columns, 22 // cell[0] + 1):
        draw.text((left + j * cell[0] + cell[0] / 2, top - 4), str(j), PALE, SMALL, anchor="mb")
    bar = left + columns * cell[0] + 18
    tall = max(rows * cell[1], 80)
    for y in range(min(tall, height - top)):
        draw.line((bar, top + y, bar + 12, top + y), colour(high - (high - low) * y / tall, low, high))
    draw.text((bar + 17, top), f"{high:.2f}", INK, SMALL)
    draw.text((bar + 17, min(top + tall, height) - 14), f"{low:.2f}", INK, SMALL)
    return sheet


def mask_picture(view: MaskView) -> Image.Image:
    """The block mask of a head, and beside it the frames of the latent grid with what the middle query sees."""
    blocks = Image.fromarray(np.where(view.blocks, 30, 236).astype(np.uint8)).convert("RGB")
    side = 220
    blocks = blocks.resize(
        (side, side), Image.Resampling.NEAREST if max(view.blocks.shape) <= side else Image.Resampling.BOX
    )
    frames, height, width = view.seen.shape
    scale = max(1, int(min(side / 2.4 / height, 110 / width)))
    per_row = max(1, 620 // (width * scale + 10))
    lines = -(-frames // per_row)
    tall = max(side, lines * (height * scale + LINE))
    size = max(side + 40 + per_row * (width * scale + 10), 640), tall + 3 * LINE + 6
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    share = float(view.blocks.mean())
    draw.text((0, 0), f"layer {view.layer}, head {view.head}, step {view.step}", INK, TEXT)
    draw.text((0, LINE), f"blocks kept ({share:.0%}, dark)", PALE, SMALL)
    sheet.paste(blocks, (0, 2 * LINE + 4))
    draw.rectangle((0, 2 * LINE + 4, side - 1, 2 * LINE + 3 + side), outline=PALE)
    draw.text((0, 2 * LINE + 6 + side), "query blocks down, key blocks across", PALE, SMALL)
    left = side + 40
    t, y, x = view.query
    draw.text((left, LINE), f"what the query at frame {t}, row {y}, column {x} (red) sees: dark, by frame", PALE, SMALL)
    for frame in range(frames):
        place = (
            left + (frame % per_row) * (width * scale + 10),
            2 * LINE + 4 + (frame // per_row) * (height * scale + LINE),
        )
        picture = np.where(view.seen[frame][..., None] > 0, (40, 60, 130), (226, 226, 230)).astype(np.uint8)
        if frame == t:
            picture[y, x] = (220, 40, 40)
        tile = Image.fromarray(picture).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, place)
        draw.text((place[0], place[1] + height * scale), f"t={frame}", PALE, SMALL)
    return sheet


def time_bar(planning: float, attention: float) -> Image.Image:
    """Planning and attention as parts of one bar."""
    sheet = Image.new("RGB", (560, 3 * LINE + 4), "white")
    draw = ImageDraw.Draw(sheet)
    total = max(planning + attention, 1e-9)
    draw.text(
        (0, 0), f"time: planning {planning:.2f} s ({planning / total:.1%}), attention {attention:.2f} s", INK, TEXT
    )
    split = int(540 * planning / total)
    draw.rectangle((0, LINE + 6, 540, LINE + 22), colour(0.45, 0, 1))
    draw.rectangle((0, LINE + 6, split, LINE + 22), colour(0.95, 0, 1))
    draw.text((0, 2 * LINE + 6), "yellow: planning, blue-green: attention (dense calls included)", PALE, SMALL)
    return sheet


def inspection_picture(inspector: InspectingProcessor, data: dict[str, Any]) -> Image.Image:
    """All of an inspected run on one sheet."""
    observations = inspector.observations
    parts: list[Image.Image] = [_heading(data)]
    if observations:
        layers, heads = int(data["layers"]), len(observations[0].recall[0])
        grey = "dense calls"
        titles = {"density": "density", "recall": "recall: share of the true attention mass that is kept"}
        for what, title in titles.items():
            by_step = table(observations, what, "step", int(data["steps"]), layers)
            by_head = table(observations, what, "head", heads, layers)
            lowest = 0.0 if what == "density" else min(0.9, float(np.floor(10 * np.nanmin(by_head)) / 10))
            maps = (
                heat_map(title, by_step, "layers", "steps", low=lowest, high=1.0, note=grey),
                heat_map(f"{what} by head", by_head, "layers", "heads", low=lowest, high=1.0, note=grey),
            )
            parts.append(beside(maps))
    parts.append(time_bar(data["planning_seconds"], data["attention_seconds"]))
    parts += [mask_picture(view) for _, view in sorted(inspector.views.items())]
    return stack(parts)


def table(observations: Sequence[Observation], what: str, axis: str, columns: int, layers: int) -> np.ndarray:
    """Mean of "density" or "recall" by layer and by "step" or "head"; NaN where there was no sparse call."""
    total, count = np.zeros((layers, columns)), np.zeros((layers, columns))
    for observation in observations:
        values = np.asarray(getattr(observation, what))  # (samples, heads)
        places = [observation.step] if axis == "step" else range(values.shape[1])
        for place in places:
            total[observation.layer, place] += values.mean() if axis == "step" else values[:, place].mean()
            count[observation.layer, place] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


SERIES = {  # by method: colours that differ in brightness too
    "radial": (31, 90, 160),
    "sparge": (214, 95, 20),
    "adaspa": (30, 140, 90),
    "vmoba": (150, 60, 150),
    "paro": (190, 150, 20),
}


def line_chart(
    title: str, series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str, size: tuple[int, int]
) -> Image.Image:
    """Points (x, y) of each series joined by lines, with axes, ticks and a legend."""
    width, height = size
    left, right, top, bottom = 58, 110, 2 * LINE + 6, 44
    points = [point for line in series.values() for point in line]
    x_low, x_high = 0.0, 1.0
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    step = _tick_step(y_high - y_low)
    y_low, y_high = step * np.floor(y_low / step), step * np.ceil(max(y_high, y_low + step) / step)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_low) / (x_high - x_low) * (width - left - right)
        return across, height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    draw.text((0, 0), title, INK, TEXT)
    for y in np.arange(y_low, y_high + step / 2, step):
        draw.line((*place(x_low, y), *place(x_high, y)), EMPTY)
        draw.text((left - 6, place(0, y)[1]), f"{y:g}" if step >= 1 else f"{y:.2f}", PALE, SMALL, anchor="rm")
    for x in np.arange(0.0, 1.01, 0.2):
        draw.line((*place(x, y_low), *place(x, y_high)), EMPTY)
        draw.text((place(x, 0)[0], height - bottom + 6), f"{x:.1f}", PALE, SMALL, anchor="mt")
    draw.text(((left + width - right) / 2, height - 16), x_name, PALE, SMALL, anchor="mm")
    draw.text((0, LINE), y_name, PALE, SMALL)
    for number, (name, line) in enumerate(series.items()):
        ink = SERIES.get(name, INK)
        ordered = [place(*point) for point in sorted(line)]
        if len(ordered) > 1:
            draw.line(ordered, ink, 2)
        for x, y in ordered:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), ink)
        legend = top + number * LINE
        draw.ellipse((width - right + 14, legend + 4, width - right + 22, legend + 12), ink)
        draw.text((width - right + 28, legend), name, INK, SMALL)
    return sheet


def comparison_picture(title: str, rows: Sequence["Row"], shown: Mapping[str, np.ndarray]) -> Image.Image:
    """Quality and recall over measured density, one line a method; and frames of the first case, if there are any."""
    measures = {
        "PSNR to the dense video, dB": "psnr",
        "recall: share of the attention mass kept": "recall",
        "relative L1 error of the attention output": "error",
    }
    charts = []
    for label, field in measures.items():
        series: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            value = getattr(row, field)
            if value is not None and row.density is not None:
                series.setdefault(row.method, []).append((row.density, value))
        if series:
            charts.append(
                line_chart("", series, "density of sparse calls (share of query-key pairs)", label, (520, 330))
            )
    heading = Image.new("RGB", (1000, 26), "white")
    ImageDraw.Draw(heading).text((0, 0), title, INK, TITLE)
    parts = [heading, *([beside(charts)] if charts else []), *([film_strip(shown)] if shown else [])]
    return stack(parts)


def film_strip(shown: Mapping[str, np.ndarray]) -> Image.Image:
    """Five frames of each video, float (frames, height, width, 3) from 0.0 to 1.0, one video a line."""
    scale = max(1, round(72 / next(iter(shown.values())).shape[1]))
    lines = []
    for name, video in shown.items():
        chosen = video[np.linspace(0, len(video) - 1, 5).round().astype(int)]
        pictures = [Image.fromarray((frame * 255).round().clip(0, 255).astype(np.uint8)) for frame in chosen]
        tall, wide = pictures[0].height * scale, pictures[0].width * scale
        line = Image.new("RGB", (110 + 5 * (wide + 4), tall + 4), "white")
        ImageDraw.Draw(line).text((0, tall // 2 - 8), name, INK, SMALL)
        for number, picture in enumerate(pictures):
            line.paste(picture.resize((wide, tall), Image.Resampling.NEAREST), (110 + number * (wide + 4), 0))
        lines.append(line)
    per_column = -(-len(lines) // 2)
    columns = [lines[:per_column], lines[per_column:]]
    return beside([_column(column) for column in columns if column])


def _column(parts: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _tick_step(span: float) -> float:
    """A round step that gives about five ticks."""
    raw = max(span, 1e-6) / 5
    power = 10.0 ** np.floor(np.log10(raw))
    return float(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw))


def beside(parts: Sequence[Image.Image]) -> Image.Image:
    """Pictures next to each other on white."""
    sheet = Image.new("RGB", (sum(part.width + MARGIN for part in parts), max(part.height for part in parts)), "white")
    left = 0
    for part in parts:
        sheet.paste(part, (left, 0))
        left += part.width + MARGIN
    return sheet


def stack(parts: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other on white."""
    width = max(part.width for part in parts) + 2 * MARGIN
    sheet = Image.new("RGB", (width, sum(part.height + MARGIN for part in parts) + MARGIN), "white")
    top = MARGIN
    for part in parts:
        sheet.paste(part, (MARGIN, top))
        top += part.height + MARGIN
    return sheet


def save(picture: Image.Image, path: Path) -> None:
    """Writes a PNG whole or not at all."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _heading(data: dict[str, Any]) -> Image.Image:
    sparse = "no sparse call" if data["sparse_density"] is None else f"{data['sparse_density']:.3f} in sparse calls"
    recall = "" if data["recall"] is None else f", recall {data['recall']:.3f}"
    lines = [
        f"{data['method']['method']} on {data['model']}",
        f'"{data["prompt"]}", seed {data["seed"]}, {data["steps"]} steps',
        f"density {data['density']:.3f} over the run, {sparse}{recall}",
        f"{data['sparse_calls']} sparse and {data['dense_calls']} dense attention calls",
    ]
    lines += [f"dense {count} times: {reason}" for reason, count in data["fallbacks"].items()]
    sheet = Image.new("RGB", (900, 26 + LINE * len(lines)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((0, 0), lines[0], INK, TITLE)
    for number, line in enumerate(lines[1:]):
        draw.text((0, 28 + number * LINE), line, INK, TEXT)
    return sheet
