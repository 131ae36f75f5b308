"""Sizes of a pi0.5 network and of the graph made of it, from a checkpoint's `config.json` or by name.

Two spellings of `config.json` exist: openpi's converter writes `action_horizon` and `action_dim`, LeRobot writes
`chunk_size` and `max_action_dim`. Both name the Gemma sizes by variant; a network of other sizes states them in
`architecture`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.files import read_text

DEFAULT_PROMPT_LENGTH = 200
"""openpi's `max_token_len` and LeRobot's `tokenizer_max_length` for pi0.5."""

DEFAULT_STEPS = 10
"""openpi's `num_steps` and LeRobot's `num_inference_steps`."""

DEFAULT_HORIZON = 50
"""openpi's default `action_horizon` and LeRobot's default `chunk_size`."""

DEFAULT_ACTION_DIM = 32
"""openpi's default `action_dim` and LeRobot's default `max_action_dim`: real actions are padded to it."""

DEFAULT_VIEWS = 3
"""One base camera and two wrist cameras."""

MAX_SIZE = 2**20
"""The largest size that a configuration may state: four times Gemma's vocabulary, far beyond anything that is built."""

MAX_DEPTH, MAX_VIEWS = 1000, 64
"""The same for layers and cameras, of which each takes a part of the graph."""

TIME_MIN_PERIOD = 4e-3
TIME_MAX_PERIOD = 4.0
"""Shortest and longest period of the sinusoidal time embedding, in units of flow-matching time (openpi)."""


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of the SigLIP image encoder. `image_size` and `patch_size` in pixels."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    image_size: int
    patch_size: int

    @property
    def tokens(self) -> int:
        """Image tokens of one view."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class GemmaSizes:
    """Sizes of one Gemma transformer."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class LanguageSizes(GemmaSizes):
    """Sizes of the Gemma that reads images and prompt; the expert has no vocabulary of its own."""

    vocab_size: int


@dataclass(frozen=True)
class Architecture:
    """Sizes of the three transformers.

    Raises (on construction):
        ValueError: the sizes contradict each other; the message says which.
    """

    vision: VisionSizes
    llm: LanguageSizes
    expert: GemmaSizes

    def __post_init__(self) -> None:
        contradictions = [
            message
            for holds, message in (
                (
                    all(value > 0 for part in asdict(self).values() for value in part.values()),
                    "every size must be positive",
                ),
                (
                    all(value <= MAX_SIZE for part in asdict(self).values() for value in part.values()),
                    f"no size may be beyond {MAX_SIZE}",
                ),
                (
                    max(self.vision.depth, self.llm.depth) <= MAX_DEPTH,
                    f"there may be no more than {MAX_DEPTH} layers",
                ),
                (self.llm.depth == self.expert.depth, "llm and expert differ in depth"),
                (self.llm.num_kv_heads == self.expert.num_kv_heads, "llm and expert differ in num_kv_heads"),
                (self.llm.head_dim == self.expert.head_dim, "llm and expert differ in head_dim"),
                (self.llm.head_dim % 2 == 0, "head_dim is odd, but RoPE rotates halves"),
                (self.expert.width % 2 == 0, "the expert's width is odd, but the time embedding has halves"),
                (
                    self.vision.image_size % max(self.vision.patch_size, 1) == 0,
                    "image_size is not a multiple of patch_size",
                ),
                (
                    self.vision.width % max(self.vision.num_heads, 1) == 0,
                    "the vision width is not a multiple of num_heads",
                ),
                *(
                    (
                        sizes.num_heads % max(sizes.num_kv_heads, 1) == 0,
                        "num_heads is not a multiple of num_kv_heads",
                    )
                    for sizes in (self.llm, self.expert)
                ),
            )
            if not holds
        ]
        if contradictions:
            raise ValueError("; ".join(dict.fromkeys(contradictions)))


@dataclass(frozen=True)
class Pi05Config:
    """Everything that fixes the graph: the network's sizes and the static dimensions of inputs and output.

    Attributes:
        name: the named configuration it comes from, or the checkpoint's folder name.
        architecture: sizes of the network.
        action_dim: padded dimension D of states and actions.
        horizon: number H of actions in a chunk.
        prompt_length: number L of text tokens, padding included.
        views: number V of camera images.
        steps: number of flow-matching steps.
        batch: number B of observations.
        state_in_prompt: whether the prompt spells out the discretized robot state; None where nothing says so.
    """

    name: str
    architecture: Architecture
    action_dim: int = DEFAULT_ACTION_DIM
    horizon: int = DEFAULT_HORIZON
    prompt_length: int = DEFAULT_PROMPT_LENGTH
    views: int = DEFAULT_VIEWS
    steps: int = DEFAULT_STEPS
    batch: int = 1
    state_in_prompt: bool | None = None

    def __post_init__(self) -> None:
        for field in ("action_dim", "horizon", "prompt_length", "views", "steps", "batch"):
            largest = {"views": MAX_VIEWS, "steps": MAX_DEPTH}.get(field, MAX_SIZE)
            if getattr(self, field) < 1:
                raise UsageError(
                    f"{field.replace('_', ' ')} is {getattr(self, field)}: it must be at least 1"
                )
            if getattr(self, field) > largest:
                raise UsageError(
                    f"{field.replace('_', ' ')} is {getattr(self, field)}: it must be at most {largest}"
                )

    @property
    def prefix_length(self) -> int:
        """Number of prefix positions: the tokens of all views, then the prompt."""
        return self.views * self.architecture.vision.tokens + self.prompt_length

    def with_options(self, **options: int | None) -> Pi05Config:
        """A copy with those options that are not None."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]

    def to_json(self) -> str:
        """All fields as one JSON object, keys in the order of the attributes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, fields: Any) -> Pi05Config:
        """The configuration of a parsed object that `to_json` wrote.

        Raises:
            Pi05cError: it is another.
        """
        try:
            return TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            raise Pi05cError(
                f"the configuration in the model's metadata is not one of pi05c's ({error.errors()[0]['msg']}): "
                "export the model again"
            ) from error


SIGLIP_SO400M_14 = VisionSizes(
    width=1152, depth=27, mlp_dim=4304, num_heads=16, image_size=224, patch_size=14
)
"""SigLIP So400m/14 at 224 pixels, the image encoder of PaliGemma 3B."""

PALIGEMMA_VOCABULARY = 257_152
"""Entries of PaliGemma's token embedding."""

GEMMA_VARIANTS: Mapping[str, GemmaSizes] = {
    "gemma_2b": GemmaSizes(width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256),
    "gemma_300m": GemmaSizes(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256),
}
"""Variants by the names of openpi's `gemma.get_config` (its LoRA and dummy variants have no converted checkpoints)."""


def _language(sizes: GemmaSizes) -> LanguageSizes:
    return LanguageSizes(**asdict(sizes), vocab_size=PALIGEMMA_VOCABULARY)


FULL = Architecture(SIGLIP_SO400M_14, _language(GEMMA_VARIANTS["gemma_2b"]), GEMMA_VARIANTS["gemma_300m"])
"""The released pi0.5."""

TINY = Architecture(
    VisionSizes(width=64, depth=2, mlp_dim=128, num_heads=4, image_size=56, patch_size=14),
    LanguageSizes(width=128, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=32, vocab_size=512),
    GemmaSizes(width=64, depth=3, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=32),
)
"""Every part of pi0.5 at a size that exports and compiles in seconds."""

CONFIGS: Mapping[str, Pi05Config] = {
    config.name: config
    for config in (
        Pi05Config("pi05_base", FULL, horizon=50, state_in_prompt=True),
        Pi05Config("pi05_aloha", FULL, horizon=50, state_in_prompt=True),
        Pi05Config("pi05_droid", FULL, horizon=15, state_in_prompt=True),
        Pi05Config("pi05_droid_finetune", FULL, horizon=16, state_in_prompt=True),
        Pi05Config("pi05_libero", FULL, horizon=10, state_in_prompt=False),
        Pi05Config("pi05_tiny", TINY, horizon=10, prompt_length=24),
    )
}
"""openpi's released configurations by name (`action_horizon`, `discrete_state_input`), and a small one."""


def named_config(name: str) -> Pi05Config:
    """The configuration of that name, or read from a `config.json` where `name` ends in `.json`.

    Raises:
        UsageError: no such name.
        Pi05cError: the file is missing or wrong.
    """
    if name.endswith(".json"):
        return parse_config(read_json(Path(name)), Path(name).stem)
    if name not in CONFIGS:
        raise UsageError(
            f"there is no configuration {name!r}: use one of {', '.join(CONFIGS)}, or the path of a config.json"
        )
    return CONFIGS[name]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        Pi05cError: no such file, or it holds something else.
    """
    try:
        parsed = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise Pi05cError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise Pi05cError(f"{path} must hold a JSON object, not a {type(parsed).__name__}")
    return parsed


def parse_config(fields: Mapping[str, Any], name: str, defaults: Pi05Config | None = None) -> Pi05Config:
    """The configuration that a checkpoint's `config.json` describes, in openpi's or in LeRobot's field names.

    Args:
        fields: the parsed file.
        name: what to call it, in the result and in errors.
        defaults: what to take for what the file leaves open; where it states something, both must agree.

    Raises:
        Pi05cError: it describes another model, an unknown variant, contradicting sizes, or differs from `defaults`.
    """
    kind = fields.get("type", "pi05")
    if kind != "pi05" or fields.get("pi05") is False:
        raise Pi05cError(
            f"the configuration of {name} describes a {kind if kind != 'pi05' else 'pi0'} model: "
            "pi05c compiles pi0.5 only"
        )
    for field, expected in (("min_period", TIME_MIN_PERIOD), ("max_period", TIME_MAX_PERIOD)):
        if fields.get(field, expected) != expected:
            raise Pi05cError(
                f"the configuration of {name} sets {field} to {fields[field]}, but pi0.5's time embedding is "
                f"defined with {expected}"
            )
    base = defaults or Pi05Config(name, FULL)
    architecture = _architecture(fields, name, base)
    size = architecture.vision.image_size
    resolution = fields.get("image_resolution", [size, size])
    if not isinstance(resolution, list) or resolution != [size, size]:
        raise Pi05cError(
            f"the configuration of {name} feeds images of {resolution}, but its image encoder takes {size} x {size}"
        )
    state_in_prompt = fields.get("discrete_state_input", base.state_in_prompt)
    if state_in_prompt is None and "type" in fields:
        state_in_prompt = True  # LeRobot's pi0.5 preprocessor has no other mode
    config = Pi05Config(
        name=name,
        architecture=architecture,
        action_dim=_integer(fields, ("action_dim", "max_action_dim"), base.action_dim, name),
        horizon=_integer(fields, ("action_horizon", "chunk_size"), base.horizon, name),
        prompt_length=_integer(fields, ("max_token_len", "tokenizer_max_length"), base.prompt_length, name),
        views=len(camera_names(fields)) or base.views,
        steps=_integer(fields, ("num_inference_steps",), base.steps, name),
        state_in_prompt=state_in_prompt,
    )
    if defaults is not None:
        differences = [
            f"{field} {getattr(config, field)} instead of {getattr(defaults, field)}"
            for field in ("architecture", "action_dim", "horizon", "prompt_length", "steps")
            if getattr(config, field) != getattr(defaults, field)
        ]
        if differences:
            raise Pi05cError(
                f"{name} states {'; '.join(differences)} as in {defaults.name}: leave --config out, or name the one "
                "that the checkpoint was trained with"
            )
    return config


def camera_names(fields: Mapping[str, Any]) -> list[str]:
    """The cameras that a LeRobot `config.json` lists, in the order in which the policy stacks them.

    The policy appends `empty_cameras` features for absent cameras when it is made; they count as views.
    """
    prefix = "observation.images."
    features = fields.get("input_features") or {}
    if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
        raise Pi05cError(
            "input_features in the configuration is no object of objects: fetch the checkpoint again"
        )
    count = fields.get("empty_cameras") or 0
    if type(count) is not int or not 0 <= count <= MAX_VIEWS:
        raise Pi05cError(
            f"empty_cameras in the configuration is {count!r}: it must be a number from 0 to {MAX_VIEWS}"
        )
    names = [key.removeprefix(prefix) for key, feature in features.items() if feature.get("type") == "VISUAL"]
    empty = [f"empty_camera_{index}" for index in range(count)]
    return names + [name for name in empty if name not in names] if names else []


def _architecture(fields: Mapping[str, Any], name: str, base: Pi05Config) -> Architecture:
    if "architecture" in fields:
        try:
            return TypeAdapter(Architecture).validate_python(fields["architecture"])
        except ValidationError as error:
            reasons = "; ".join(
                f"{'.'.join(str(part) for part in problem['loc']) or 'architecture'}: {problem['msg']}"
                for problem in error.errors()
            )
            raise Pi05cError(
                f"the architecture in the configuration of {name} is wrong: {reasons}"
            ) from error
    if "paligemma_variant" not in fields and "action_expert_variant" not in fields:
        return base.architecture
    variants = {
        field: fields.get(field, default)
        for field, default in (("paligemma_variant", "gemma_2b"), ("action_expert_variant", "gemma_300m"))
    }
    unknown = [
        f"{field} {variant!r}" for field, variant in variants.items() if str(variant) not in GEMMA_VARIANTS
    ]
    if unknown:
        raise Pi05cError(
            f"the configuration of {name} names unknown variants ({', '.join(unknown)}): known are "
            f"{', '.join(GEMMA_VARIANTS)}; state other sizes in its `architecture`"
        )
    return Architecture(
        SIGLIP_SO400M_14,
        _language(GEMMA_VARIANTS[variants["paligemma_variant"]]),
        GEMMA_VARIANTS[variants["action_expert_variant"]],
    )


def _integer(fields: Mapping[str, Any], names: tuple[str, ...], default: int, config: str) -> int:
    for name in names:
        if name in fields:
            value = fields[name]
            if type(value) is not int or not 0 < value <= MAX_SIZE:
                raise Pi05cError(
                    f"{name} in the configuration of {config} is {value!r}: it must be an integer from 1 to {MAX_SIZE}"
                )
            return value
    return default


__all__ = [
    "CONFIGS",
    "FULL",
    "GEMMA_VARIANTS",
    "TIME_MAX_PERIOD",
    "TIME_MIN_PERIOD",
    "TINY",
    "Architecture",
    "GemmaSizes",
    "LanguageSizes",
    "Pi05Config",
    "VisionSizes",
    "camera_names",
    "named_config",
    "parse_config",
    "read_json",
]
