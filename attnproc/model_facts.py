"""What can be said of a model from its configuration alone: sizes of attention, and how pixels become tokens.

Facts come from diffusers 0.42.1 class defaults and from the conversion scripts of the checkpoints.
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnproc.errors import AttnProcError, SettingsError
from attnproc.layout import Grid

DENOISERS = ("transformer", "transformer_2", "unet")


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of one model.

    Attributes:
        name: as the user gave it.
        heads, head_dim, layers: of the self- or joint attention over all video tokens.
        mlp_width: hidden width of a plain two-matrix MLP of the same cost (a gated one is counted as what it costs).
        joint: whether text tokens are part of that attention; otherwise they enter by cross-attention.
        text_tokens: text tokens inside that attention, padding included; 0 unless joint.
        patch: (frames, rows, columns) of latent pixels in a token.
        compression: (time, space) of the autoencoder.
        own_first_frame: whether the first frame has a latent of its own (frames are then time * k + 1).
        size: default (height, width, frames) of the model; frames is 1 for picture models.
        steps, fps: default number of steps and frames per second.
    """

    name: str
    heads: int
    head_dim: int
    layers: int
    mlp_width: int
    joint: bool
    text_tokens: int
    patch: Grid
    compression: tuple[int, int]
    own_first_frame: bool
    size: tuple[int, int, int]
    steps: int
    fps: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def half_length(self) -> int:
        """Tokens at which self-attention is half of the FLOPs.

        Per token and layer: attention 4 N E, its projections 8 E^2, cross-attention's own 4 E^2, the MLP 4 E F.
        """
        return (2 if self.joint else 3) * self.width + self.mlp_width

    def grid(self, height: int, width: int, num_frames: int) -> Grid:
        """Latent grid (T, H, W) after patching.

        Raises:
            SettingsError: the model cannot make this size (pixels, frames).
        """
        time, space = self.compression
        for axis, pixels, patch in (("height", height, self.patch[1]), ("width", width, self.patch[2])):
            unit = space * patch
            if pixels < unit or pixels % unit:
                raise SettingsError(
                    f"{axis}={pixels} pixels does not fit {self.name}; it expects a positive multiple of {unit}. "
                    f"Use {_nearest_sizes(pixels, unit, 0)}."
                )
        first = 1 if self.own_first_frame else 0
        if self.size[2] == 1 and num_frames != 1:
            raise SettingsError(f"num_frames={num_frames} does not fit {self.name}, a picture model; use 1.")
        if num_frames < max(first, 1) or (num_frames - first) % time:
            rule = f"{time}k + 1" if first else f"{time}k"
            raise SettingsError(
                f"num_frames={num_frames} does not fit {self.name}; it expects {rule} frames. "
                f"Use {_nearest_sizes(num_frames, time, first)}."
            )
        latent = (num_frames - first) // time + first
        return -(-latent // self.patch[0]), height // space // self.patch[1], width // space // self.patch[2]


@dataclass(frozen=True)
class ModelConfigs:
    """Configurations of a pipeline or model, without weights. `pipeline_class` is None for a bare model."""

    name: str
    denoiser_class: str
    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any] = field(default_factory=dict)
    pipeline_class: str | None = None


@dataclass(frozen=True)
class _Class:
    """How the configuration of one model class is read, and what its pipeline does by default."""

    joint: bool
    size: tuple[int, int, int]
    steps: int
    fps: int
    text_tokens: int = 0
    compression: tuple[int, int] = (4, 8)
    mlp: str | int = 4  # configuration key, or multiple of the width
    layers: tuple[str, ...] = ("num_layers",)
    patch: Grid | None = None  # None: from the configuration
    own_first_frame: bool = True


_WAN = _Class(joint=False, mlp="ffn_dim", size=(480, 832, 81), steps=50, fps=16)
_HUNYUAN = _Class(
    joint=True,
    text_tokens=256,
    layers=("num_layers", "num_single_layers"),
    size=(720, 1280, 129),
    steps=50,
    fps=24,
)
_FLUX = _Class(
    joint=True,
    text_tokens=512,
    layers=("num_layers", "num_single_layers"),
    patch=(1, 2, 2),
    compression=(1, 8),
    size=(1024, 1024, 1),
    steps=28,
    fps=1,
)
CLASSES = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _Class(joint=False, mlp="ffn_dim", size=(544, 960, 97), steps=50, fps=24),
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "HunyuanVideo15Transformer3DModel": _Class(
        joint=True, text_tokens=1985, compression=(4, 16), size=(480, 848, 121), steps=50, fps=24
    ),
    "CogVideoXTransformer3DModel": _Class(joint=True, text_tokens=226, size=(480, 720, 49), steps=50, fps=8),
    # The MLP is gated and 8/3 E wide: three matrices that cost what two of 4 E do.
    "MochiTransformer3DModel": _Class(
        joint=True, text_tokens=256, compression=(6, 8), size=(480, 848, 163), steps=64, fps=30
    ),
    "LTXVideoTransformer3DModel": _Class(joint=False, compression=(8, 32), size=(512, 704, 161), steps=50, fps=24),
    "AllegroTransformer3DModel": _Class(joint=False, size=(720, 1280, 88), steps=100, fps=15, own_first_frame=False),
    "FluxTransformer2DModel": _FLUX,
    "SD3Transformer2DModel": _Class(
        joint=True, text_tokens=333, compression=(1, 8), size=(1024, 1024, 1), steps=28, fps=1
    ),
    "QwenImageTransformer2DModel": _Class(
        joint=True, text_tokens=512, compression=(1, 8), size=(1328, 1328, 1), steps=50, fps=1
    ),
}


def _sizes(model: str, heads: int, head_dim: int, layers: int, **more: Any) -> tuple[str, dict[str, Any]]:
    config = {"num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers, "patch_size": 2}
    return model, {**config, **more}


#: Published checkpoints by name: class and the part of the configuration that is read.
KNOWN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan2.1-1.3b": _sizes("WanTransformer3DModel", 12, 128, 30, ffn_dim=8960),
    "wan2.1-14b": _sizes("WanTransformer3DModel", 40, 128, 40, ffn_dim=13824),
    "wan2.2-a14b": _sizes("WanTransformer3DModel", 40, 128, 40, ffn_dim=13824),
    "wan2.2-ti2v-5b": _sizes("WanTransformer3DModel", 24, 128, 30, ffn_dim=14336),
    "skyreels-v2-1.3b": _sizes("SkyReelsV2Transformer3DModel", 12, 128, 30, ffn_dim=8960),
    "skyreels-v2-14b": _sizes("SkyReelsV2Transformer3DModel", 40, 128, 40, ffn_dim=13824),
    "hunyuanvideo": _sizes("HunyuanVideoTransformer3DModel", 24, 128, 20, num_single_layers=40),
    "hunyuanvideo-1.5": _sizes("HunyuanVideo15Transformer3DModel", 16, 128, 54, patch_size=1),
    "cogvideox-2b": _sizes("CogVideoXTransformer3DModel", 30, 64, 30),
    "cogvideox-5b": _sizes("CogVideoXTransformer3DModel", 48, 64, 42),
    "cogvideox1.5-5b": _sizes("CogVideoXTransformer3DModel", 48, 64, 42, patch_size_t=2),
    "mochi-1": _sizes("MochiTransformer3DModel", 24, 128, 48),
    "ltx-2b": _sizes("LTXVideoTransformer3DModel", 32, 64, 28, patch_size=1),
    "ltx-13b": _sizes("LTXVideoTransformer3DModel", 32, 128, 48, patch_size=1),
    "allegro": _sizes("AllegroTransformer3DModel", 24, 96, 32),
    "flux.1": _sizes("FluxTransformer2DModel", 24, 128, 19, num_single_layers=38),
    "sd3-medium": _sizes("SD3Transformer2DModel", 24, 64, 24),
    "sd3.5-large": _sizes("SD3Transformer2DModel", 38, 64, 38),
    "qwen-image": _sizes("QwenImageTransformer2DModel", 24, 128, 60),
}
# What the checkpoint, not its class, decides.
_KNOWN_VAES = {"wan2.2-ti2v-5b": {"scale_factor_spatial": 16, "scale_factor_temporal": 4}}
_KNOWN_SIZES = {"wan2.2-ti2v-5b": (704, 1280, 121), "cogvideox1.5-5b": (768, 1360, 81)}


def model_facts(configs: ModelConfigs) -> ModelFacts:
    """Reads the facts out of configurations.

    Raises:
        SettingsError: nothing is known of the model class, or its configuration lacks what is read.
    """
    rule, config = CLASSES.get(configs.denoiser_class), configs.denoiser
    if rule is None:
        raise SettingsError(
            f"{configs.name} is a {configs.denoiser_class}, of which no sizes are known; expected one of "
            f"{', '.join(CLASSES)}. Estimate with a known model of about its size instead."
        )
    try:
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        layers = sum(config[key] for key in rule.layers)
        mlp_width = config[rule.mlp] if isinstance(rule.mlp, str) else rule.mlp * heads * head_dim
        patch = rule.patch or _patch(config)
    except (KeyError, TypeError) as error:
        raise SettingsError(
            f"the configuration of {configs.name} has no usable {error} for a {configs.denoiser_class}; expected "
            "one written by save_pretrained. Download or save the model again."
        ) from error
    text_tokens = config.get("max_text_seq_length") or rule.text_tokens
    return ModelFacts(
        name=configs.name,
        heads=heads,
        head_dim=head_dim,
        layers=layers + len(config.get("vace_layers") or ()),
        mlp_width=mlp_width,
        joint=rule.joint,
        text_tokens=text_tokens if rule.joint else 0,
        patch=patch,
        compression=_compression(configs.vae, rule.compression),
        own_first_frame=rule.own_first_frame,
        size=_KNOWN_SIZES.get(configs.name, rule.size),
        steps=rule.steps,
        fps=rule.fps,
    )


def read_configs(target: Any) -> ModelConfigs:
    """Configurations of a pipeline, a model, a known name, a local folder or a Hugging Face id. Reads no weights.

    Raises:
        SettingsError: `target` names nothing that can be found, or a folder without usable configurations.
        AttnProcError: the Hugging Face hub cannot be reached.
    """
    if isinstance(target, str) and target in KNOWN_MODELS:
        denoiser_class, config = KNOWN_MODELS[target]
        return ModelConfigs(target, denoiser_class, config, _KNOWN_VAES.get(target, {}))
    if isinstance(target, str | Path):
        return _from_files(str(target))
    return _from_objects(target)


def _from_objects(target: Any) -> ModelConfigs:
    is_pipeline = hasattr(target, "components")
    parts = [getattr(target, name, None) for name in DENOISERS] if is_pipeline else [target]
    model: Any = next((part for part in parts if part is not None), None)
    if not hasattr(model, "config"):
        raise SettingsError(
            f"target is a {type(target).__name__}; expected a diffusers pipeline or model, one of "
            f"{', '.join(KNOWN_MODELS)}, a local folder, or a Hugging Face id such as 'owner/name'."
        )
    names = [cls.__name__ for cls in type(model).__mro__]
    denoiser_class = next((name for name in names if name in CLASSES), names[0])
    vae = getattr(target, "vae", None) if is_pipeline else None
    return ModelConfigs(
        type(target).__name__,
        denoiser_class,
        dict(model.config),
        {} if vae is None else {"_class_name": type(vae).__name__, **vae.config},
        type(target).__name__ if is_pipeline else None,
    )


def _from_files(name: str) -> ModelConfigs:
    folder = Path(name).expanduser()
    if not folder.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        match = difflib.get_close_matches(name, [*KNOWN_MODELS, "shapes-video", "shapes-image"], n=1)
        raise SettingsError(
            f"model {name!r} is not known; expected a local folder, a Hugging Face id such as 'owner/name', or one "
            f"of {', '.join(KNOWN_MODELS)}." + (f" Did you mean {match[0]!r}?" if match else "")
        )
    index = _read_json(name, "model_index.json", optional=True)
    if index is None:
        config = _read_json(name, "config.json")
        assert config is not None
        return ModelConfigs(name, str(config.get("_class_name")), config)
    denoiser = next((part for part in DENOISERS if index.get(part, [None])[0]), None)
    if denoiser is None:
        raise SettingsError(
            f"{name} is a {index.get('_class_name')} without a denoiser; expected a pipeline with a transformer. "
            "Choose a video pipeline."
        )
    config = _read_json(name, f"{denoiser}/config.json")
    assert config is not None
    vae = _read_json(name, "vae/config.json", optional=True)
    return ModelConfigs(name, str(index[denoiser][1]), config, vae or {}, str(index.get("_class_name")))


def _read_json(name: str, file: str, optional: bool = False) -> dict[str, Any] | None:
    """One JSON file of a local folder or hub repository; None if it is missing and optional."""
    folder = Path(name).expanduser()
    path = folder / file if folder.is_dir() else _download(name, file)
    if path is None or not path.is_file():
        if optional:
            return None
        raise SettingsError(
            f"{name} has no {file}; expected a model written by save_pretrained. Check the name, or save it again."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); expected JSON. Save or download it again.") from error
    if not isinstance(data, dict):
        raise SettingsError(f"{path} holds a {type(data).__name__}; expected a JSON object. Save or download it again.")
    return data


def _download(name: str, file: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RemoteEntryNotFoundError as MissingFile

    try:
        return Path(hf_hub_download(name, file))
    except MissingFile:
        return None
    except GatedRepoError as error:
        raise SettingsError(
            f"model {name!r} is gated; expected access. Accept its licence on its page and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise SettingsError(
            f"model {name!r} is not on the Hugging Face hub, or is private; expected 'owner/name'. "
            "Check the spelling, or log in with `hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise AttnProcError(
            f"{file} of {name!r} is not in the local cache, and the Hugging Face hub cannot be reached; expected one "
            "of both. Check the connection, or give a local folder."
        ) from error


def _patch(config: Mapping[str, Any]) -> Grid:
    patch = config["patch_size"]
    if isinstance(patch, int):
        return config.get("patch_size_t") or 1, patch, patch
    time, rows, columns = patch
    return time, rows, columns


def _compression(vae: Mapping[str, Any], default: tuple[int, int]) -> tuple[int, int]:
    time = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio") or default[0]
    space = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
    if space is None and vae.get("_class_name") in ("AutoencoderKL", "AutoencoderKLCogVideoX", "AutoencoderKLAllegro"):
        space = 2 ** (len(vae["block_out_channels"]) - 1)
    return time, space or default[1]


def _nearest_sizes(value: int, unit: int, first: int) -> str:
    below = (value - first) // unit * unit + first
    return " or ".join(str(size) for size in (below, below + unit) if size > 0)
