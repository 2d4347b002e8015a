"""The command `attnproc`: generate, calibrate, inspect, record, bench, estimate, list, doctor; for pictures image,
story and compose, which stand in cli_images.py.

Exit codes: 0 done; 1 it failed; 2 bad arguments; 3 a combination that is not supported, or `--strict` forbids;
130 interrupted. Heavy imports happen inside the commands.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from attnproc.errors import AttnProcError, SettingsError
from attnproc.pipelines import cli_images, cli_shared
from attnproc.pipelines.cli_shared import Device, DType, Offload, Set, exit_codes, quiet_libraries

app = typer.Typer(
    help="Sparse video attention and control of image models for Hugging Face diffusers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None,
    typer.Option(
        help="shapes-video (ships with the package, needs no download), a local folder, or a Hugging Face id. "
        "(default: shapes-video)"
    ),
]
Attention = Annotated[str | None, typer.Option(help="Method; see `attnproc list`. (default: radial)")]
Preset = Annotated[
    str | None, typer.Option(help="Published settings by name. (default: none; shapes-video has its own)")
]
Quality = Annotated[str | None, typer.Option(help="high, balanced or fast. (default: balanced)")]
Plan = Annotated[
    str | None, typer.Option(help="Calibration file of `attnproc calibrate`, for paro and sparge. (default: none)")
]
Frames = Annotated[int | None, typer.Option(help="Frames of the video. (default: the model's; shapes-video 17)")]
Height = Annotated[int | None, typer.Option(help="Pixels. (default: the model's; shapes-video 64)")]
Width = Annotated[int | None, typer.Option(help="Pixels. (default: the model's; shapes-video 64)")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. (default: the model's; shapes-video 20)")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale, 1 is none. (default: the model's; shapes-video 4)")
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. (default: off)")] = False,
) -> None:
    cli_shared.debug = debug


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows; may also stand in --config.")] = None,
    model: Model = None,
    attention: Attention = None,
    preset: Preset = None,
    quality: Quality = None,
    plan: Plan = None,
    set_: Set = None,
    strict: Annotated[
        bool | None,
        typer.Option("--strict", help="Exit 3 rather than run dense where sparse is meant. (default: off)"),
    ] = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it must not show. (default: the model's)")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first video; the next ones count up. (default: 0)")] = None,
    num_videos: Annotated[int | None, typer.Option(help="Videos, in numbered files. (default: 1)")] = None,
    dtype: DType = None,
    device: Device = None,
    offload: Offload = None,
    output: Annotated[
        str | None,
        typer.Option(help="File .mp4 or .gif, or a new folder for PNG pictures. (default: video.mp4)"),
    ] = None,
    compare: Annotated[
        bool | None,
        typer.Option("--compare", help="Also make the dense video, and print quality and time. (default: off)"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these as keys; flags override it. (default: none)")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all, print plan and estimate, load no weights. (default: off)"),
    ] = False,
) -> None:
    """Generates a video with sparse attention, and a JSON record of the run beside it.

    Videos of shapes-video are enlarged to 256 pixels when written.
    """
    flags = {key: value for key, value in locals().items() if key not in ("set_", "config", "dry_run")}
    with exit_codes():
        quiet_libraries()
        from attnproc.pipelines.generate import generate as run
        from attnproc.pipelines.generate import prepare
        from attnproc.pipelines.settings import RunSettings, parse_assignments

        flags["set"] = parse_assignments(set_) if set_ else None
        job = prepare(RunSettings.from_sources(config, flags))
        if dry_run:
            _print_plan(job)
            return
        run(job, Console(), Console(stderr=True))


for picture_command in cli_images.COMMANDS:
    app.command()(picture_command)


@app.command()
def inspect(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    model: Model = None,
    attention: Attention = None,
    preset: Preset = None,
    quality: Quality = None,
    plan: Plan = None,
    set_: Set = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    dtype: DType = None,
    device: Device = None,
    offload: Offload = None,
    heads: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER:HEAD,...",
            help="Heads whose masks are drawn, counted from 0. (default: head 0 of the middle and the last layer)",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="PNG file; the numbers go beside it as JSON.")] = Path("inspection.png"),
) -> None:
    """Shows what a method does in a run: density, recall, masks on the latent grid, time. Writes a PNG and a JSON."""
    flags = {key: value for key, value in locals().items() if key not in ("set_", "heads", "output")}
    with exit_codes():
        quiet_libraries()
        from attnproc.pipelines import inspection

        chosen = None if heads is None else inspection.parse_heads(heads)
        inspection.check_target(output)
        job = _job(flags, set_)
        inspection.inspect(job, chosen, output, Console(), Console(stderr=True))


@app.command()
def calibrate(
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt a line.")],
    output: Annotated[Path, typer.Option(help="File .safetensors; while unfinished, .partial.safetensors beside it.")],
    attention: Annotated[str, typer.Option(help="paro or sparge.")] = "paro",
    density: Annotated[
        float | None, typer.Option(help="Share of the query-key pairs to keep. (default: the method's)")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="sparge: largest relative L1 error of a head. (default: the method's)")
    ] = None,
    model: Model = None,
    set_: Set = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt's noise; the next ones count up.")] = 0,
    dtype: DType = None,
    device: Device = None,
    offload: Offload = None,
) -> None:
    """Learns a plan for one model and size from dense runs of some prompts. Goes on where it was interrupted."""
    names = ("model", "frames", "height", "width", "steps", "guidance", "seed", "dtype", "device", "offload")
    flags = {key: value for key, value in locals().items() if key in names}
    with exit_codes():
        quiet_libraries()
        from attnproc.pipelines import calibrate as calibration
        from attnproc.pipelines.settings import parse_assignments

        calibration.check_target(output)
        texts = calibration.read_prompts(prompts)
        job = _job({**flags, "attention": "dense", "prompt": texts[0]}, None)
        settings = parse_assignments(set_ or [])
        processor = calibration.calibrator(
            attention, settings, model=job.source.name, density=density, max_error=max_error
        )
        calibration.calibrate(job, processor, texts, output, Console(stderr=True))
        use = f"{output}; use it with: attnproc generate ... --attention {attention} --plan {output}"
        Console().print(use, markup=False, soft_wrap=True)


@app.command()
def record(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    output: Annotated[Path, typer.Option(help="New folder for the recording.")],
    at_steps: Annotated[str, typer.Option(metavar="N,N,...", help="Steps to record, counted from 0.")],
    layers: Annotated[str, typer.Option(metavar="N,N,...", help="Attention layers to record, counted from 0.")],
    model: Model = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    dtype: DType = None,
    device: Device = None,
    offload: Offload = None,
) -> None:
    """Records queries, keys and values of a dense run, for `attnproc bench --recorded` without the model."""
    flags = {key: value for key, value in locals().items() if key not in ("output", "at_steps", "layers")}
    with exit_codes():
        quiet_libraries()
        from attnproc.pipelines import recording

        recording.check_folder(output)
        chosen = [_numbers(name, text, int) for name, text in (("at-steps", at_steps), ("layers", layers))]
        job = _job({**flags, "attention": "dense"}, None)
        recording.record(job, *chosen, output, Console(), Console(stderr=True))


@app.command()
def bench(
    methods: Annotated[
        str | None,
        typer.Option(
            help="Sparse methods. (default: radial,sparge,adaspa,vmoba,paro; on a recording those that need no plan)"
        ),
    ] = None,
    density: Annotated[str, typer.Option(help="Shares of the query-key pairs to keep.")] = "0.5,0.3,0.2",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, one prompt a line. (default: held-out captions of the Shapes world)"),
    ] = None,
    cases: Annotated[int, typer.Option(help="Prompts to run.")] = 12,
    recorded: Annotated[
        Path | None, typer.Option(help="Folder of `attnproc record`, instead of running a model. (default: none)")
    ] = None,
    model: Model = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="One setting of every method; may be repeated. (default: none)"
        ),
    ] = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt's noise; the next ones count up.")] = 0,
    dtype: DType = None,
    device: Device = None,
    offload: Offload = None,
    output: Annotated[Path, typer.Option(help="PNG file with the plot; the numbers go beside it as JSON.")] = Path(
        "comparison.png"
    ),
) -> None:
    """Compares methods with dense attention at equal seeds: PSNR, SSIM, recall, time, and what a detector reads."""
    names = ("model", "frames", "height", "width", "steps", "guidance", "seed", "dtype", "device", "offload")
    flags = {key: value for key, value in locals().items() if key in names}
    with exit_codes():
        quiet_libraries()
        from attnproc.pipelines import comparison, inspection
        from attnproc.pipelines.recording import Recording
        from attnproc.pipelines.settings import parse_assignments

        inspection.check_target(output)
        targets = _numbers("density", density, float)
        chosen = comparison.default_methods(on_recording=recorded is not None)
        if methods is not None:
            chosen = [name.strip() for name in methods.split(",")]
        comparison.check_request(chosen, targets)
        messages = Console(stderr=True)
        overrides = parse_assignments(set_ or [])
        if recorded is not None:
            flags["prompts"] = prompts
            unused = [name for name, value in flags.items() if value is not None and name != "seed"]
            if unused:
                raise SettingsError(
                    f"--recorded came with --{', --'.join(unused)}, which say how to run a model; expected one or the "
                    "other. Leave them out."
                )
            recording = Recording.open(recorded)
            rows, shown = comparison.compare_recorded(recording, chosen, targets, overrides), {}
            about = dict(recording.index)
            title = f"{len(recording)} recorded calls of {recording.index['model']}"
        else:
            job = _job({**flags, "attention": "dense", "prompt": "comes with each case"}, None)
            tried, learned = comparison.cases_of(job, prompts, cases)
            rows, shown = comparison.compare(job, tried, learned, chosen, targets, overrides, messages)
            about = comparison.about(job, tried, learned)
            title = f"{job.source.name}, {len(tried)} prompts, {job.arguments['num_inference_steps']} steps"
        comparison.save(title, rows, shown, about, output)
        Console(width=max(Console().width, 150)).print(comparison.table(rows, title))
        Console().print(f"{output}, {output.with_suffix('.json').name}", markup=False, soft_wrap=True)


@app.command()
def estimate(
    model: Annotated[
        str,
        typer.Argument(help="A name such as wan2.1-14b (see `attnproc list`), a local folder, or a Hugging Face id."),
    ],
    attention: Attention = None,
    preset: Preset = None,
    quality: Quality = None,
    plan: Plan = None,
    set_: Set = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    batch: Annotated[int, typer.Option(help="Samples of one denoiser call.", show_default=True)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON. (default: off)")] = False,
) -> None:
    """Says what a method can gain on a model before it is run. Reads configurations only, never weights."""
    with exit_codes():
        import dataclasses

        import attnproc
        from attnproc.pipelines.loading import EMBEDDED_DEFAULTS, EMBEDDED_SIDES, embedded_location
        from attnproc.pipelines.settings import EMBEDDED, RunSettings, parse_assignments

        flags = {"model": model, "attention": attention, "preset": preset, "quality": quality, "plan": plan}
        flags["set"] = parse_assignments(set_) if set_ else None
        processor = RunSettings.from_sources(None, {**flags, "prompt": "none is needed"}).processor()
        size = {"height": height, "width": width, "num_frames": frames, "steps": steps}
        target = embedded_location(model) if model in EMBEDDED_SIDES else model
        if model == EMBEDDED:
            own = {**EMBEDDED_DEFAULTS, "steps": EMBEDDED_DEFAULTS["num_inference_steps"]}
            size = {key: own[key] if value is None else value for key, value in size.items()}
        found = attnproc.estimate(target, processor=processor, batch=batch, **size)
        if model == EMBEDDED:
            found = dataclasses.replace(found, model=EMBEDDED)
        if as_json:
            _print_json(found.to_dict())
        else:
            Console().print(found.table())


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON. (default: off)")] = False) -> None:
    """Lists methods, presets, model families, and the names that `estimate` knows."""
    with exit_codes():
        from rich.table import Table

        from attnproc.families import FAMILIES
        from attnproc.methods import METHODS, method_class
        from attnproc.model_facts import KNOWN_MODELS
        from attnproc.pipelines.picture_job import CONTROL_METHODS

        classes = {name: method_class(name) for name in METHODS}
        data = {
            "methods": {name: (cls.__doc__ or "").partition("\n")[0] for name, cls in classes.items()},
            "presets": {name: cls.presets() for name, cls in classes.items()},
            "families": {family.name: list(family.models) for family in FAMILIES},
            "models": list(KNOWN_MODELS),
            "control": {
                command: {"method": method.title, "models": list(method.pipeline.accepted)}
                for command, method in CONTROL_METHODS.items()
            },
        }
        if as_json:
            _print_json(data)
            return
        console = Console()
        table = Table(title="methods (--attention)", show_header=False)
        for name, text in data["methods"].items():  # type: ignore[attr-defined]
            table.add_row(name, text)
        console.print(table)
        table = Table("method", "preset", "for", title="presets (--preset); --json also tells their sources")
        for name, presets in data["presets"].items():  # type: ignore[attr-defined]
            for preset, entry in presets.items():
                table.add_row(name, preset, entry["for"])
        console.print(table)
        table = Table(title="model families (every other model runs dense)", show_header=False)
        for name, models in data["families"].items():  # type: ignore[attr-defined]
            table.add_row(name, ", ".join(models))
        console.print(table)
        table = Table("command", "method", "pipelines", title="control of image models, without training")
        for command, entry in data["control"].items():  # type: ignore[attr-defined]
            table.add_row(f"attnproc {command}", entry["method"], ", ".join(entry["models"]))
        console.print(table)
        console.print("names for `attnproc estimate`:", ", ".join(KNOWN_MODELS), highlight=False)


@app.command()
def doctor(
    selftest: Annotated[
        bool,
        typer.Option(
            "--selftest",
            help="Compare every backend with the float64 definition; exit 1 if one is wrong. (default: off)",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="Where --selftest runs: auto, cpu, cuda ...")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Of the random inputs of --selftest. (default: random)")] = None,
) -> None:
    """Says what this machine can run, why not the rest, and whether what runs is right."""
    with exit_codes():
        import random

        from attnproc.pipelines import doctor as checks
        from attnproc.pipelines.loading import pick_device
        from attnproc.pipelines.settings import RunSettings

        console = Console()
        for table in (checks.version_table(), checks.device_table(), checks.backend_table()):
            console.print(table)
        if not selftest:
            return
        where, _ = pick_device(RunSettings(prompt="none is needed", device=device))
        seed = random.randrange(2**31) if seed is None else seed
        results = checks.selftest(where, seed)
        console.print(checks.selftest_table(results, where, seed))
        wrong = [f"{check.backend} ({check.dtype})" for check in results if not check.passed]
        if wrong:
            raise AttnProcError(
                f"{', '.join(wrong)} did not match the float64 definition; expected the allowed error. Use another "
                "backend, such as --set backend=flex, and report this with the tables above."
            )


def main() -> None:
    """Entry point of the command `attnproc`."""
    app()


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise SettingsError(f"--{name} {text!r} is not a list of numbers; expected some such as 0.5,0.3.") from error


def _job(flags: dict[str, Any], assignments: list[str] | None) -> Any:
    """The checked run of a command that takes the flags of `generate`."""
    from attnproc.pipelines.generate import prepare
    from attnproc.pipelines.settings import RunSettings, parse_assignments

    return prepare(RunSettings.from_sources(None, {**flags, "set": parse_assignments(assignments or []) or None}))


def _print_plan(job: Any) -> None:
    from rich.table import Table

    console = Console()
    table = Table(title="plan (nothing was loaded)", show_header=False)
    rows = {
        "model": f"{job.source.name} ({job.source.pipeline_class})",
        **job.arguments,
        "seed": job.settings.seed,
        "device": job.device,
        "dtype": str(job.dtype).removeprefix("torch."),
        "offload": job.settings.offload,
        "attention": repr(job.processor),
        "videos": ", ".join(map(str, job.outputs)),
        "compare with dense": "yes" if job.settings.compare else "no",
    }
    for name, value in rows.items():
        table.add_row(name.replace("_", " "), str(value))
    console.print(table)
    if job.estimate is None:
        console.print(f"no estimate: no sizes are known of {job.source.denoiser_class}")
    else:
        console.print(job.estimate.table())


def _print_json(data: Any) -> None:
    import json

    typer.echo(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
