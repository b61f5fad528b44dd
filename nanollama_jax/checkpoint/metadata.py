"""What a checkpoint says about itself: one typed record, read by training, inference and exports.

It is stored as JSON in the checkpoint's `metadata` item, under the names of its fields.
"""

import dataclasses
import types
import typing
from typing import Any

from nanollama_jax.errors import BadInput
from nanollama_jax.model import ModelConfig
from nanollama_jax.tokenizer import Tokenizer

TASKS = ("pretrain", "sft", "dpo")  # in curriculum order; each counts its own steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """The record of one checkpoint. Optional fields that do not apply are not written."""

    phase: str  # the stage's name; "imported" for weights from elsewhere
    step: int
    tokens_seen: int  # by this stage and, in pre-training, those before it
    model: ModelConfig
    rope_theta: float  # in force after `step` updates
    context_length: int  # tokens of the longest row trained on, or as an import's config states
    tokenizer_sha256: str
    # Training
    data_sha256: str = ""  # over the manifests of the sources
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # the recipe, as JSON
    git_commit: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)  # library -> version
    corpora: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # name -> licence; all that were read
    shuffle_windows: dict[str, int] = dataclasses.field(default_factory=dict)  # source -> rows
    lowest_loss: dict[str, float] = dataclasses.field(default_factory=dict)  # kind -> nats a token
    reference_weights: str | None = None  # DPO: checksum of the reference model's parameters
    # `provenance()` of the initial weights; None for random ones
    provenance: dict[str, Any] | None = None
    # Imports
    weights_only: bool = False  # no optimizer state and no data position
    chat_template: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> Jinja
    # The name of the file of checksums; None in checkpoints of earlier versions, which have none.
    checksums: str | None = None

    @property
    def task(self) -> str:
        """One of TASKS."""
        return self.config.get("task", "pretrain")

    @property
    def tokens_seen_is_exact(self) -> bool:
        """False where an earlier version counted every step with this stage's tokens per step."""
        return self.checksums is not None or not self.config.get("start_step")

    def to_dict(self) -> dict[str, Any]:
        """The JSON object on disk."""
        found = dataclasses.asdict(self)
        return {name: value for name, value in found.items() if name in _REQUIRED or value}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Metadata":
        """The record in a JSON object, of this version or an earlier one; unknown keys are ignored.

        Raises KeyError, TypeError or ValueError for a key that is missing or has another type.
        """
        known = {
            name: value for name, value in found.items() if name in _TYPES and value is not None
        }
        of_kind = {"provenance"} if known.get("weights_only") else _REQUIRED_IN_TRAINING
        if missing := sorted((_REQUIRED | of_kind) - known.keys()):
            raise KeyError(f"{', '.join(missing)}: not in the metadata")
        _check_types(known["model"], typing.get_type_hints(ModelConfig), "model.")
        _check_types(known, _TYPES | {"model": dict})
        try:
            known["model"] = ModelConfig(**known["model"])
        except BadInput as error:
            raise ValueError(f"metadata describes no model: {error}") from error
        if not (known.get("weights_only") or "corpora" in known):
            known["corpora"] = _corpora_of(known["config"])
        metadata = cls(**known)
        if metadata.task not in TASKS:
            raise ValueError(f"metadata has the unknown task {metadata.task!r:.80}")
        return metadata


_TYPES = typing.get_type_hints(Metadata)
_REQUIRED = {
    field.name
    for field in dataclasses.fields(Metadata)
    if field.default is field.default_factory is dataclasses.MISSING
}
_REQUIRED_IN_TRAINING = {"data_sha256", "config", "git_commit"}


def has_separate_projections(found: dict[str, Any]) -> bool:
    """Whether metadata is from before queries, keys and values were one array: those checkpoints
    cannot be read any more."""
    return "packed_documents" not in found["model"]


def _corpora_of(config: dict[str, Any]) -> dict[str, str]:
    """The corpora that a recipe names. Earlier versions recorded them nowhere else."""
    tuning = config.get("task", "pretrain") != "pretrain"
    named = config["tuning"] if tuning else config.get("corpora", {})
    return {name: named[name]["licence"] for name in config["data"]["sources"] if name in named}


def _check_types(found: dict[str, Any], hints: dict[str, Any], prefix: str = "") -> None:
    for name, value in dict(found).items():
        if name in hints and not _is_a(value, hints[name]):
            wanted = getattr(hints[name], "__name__", hints[name])
            raise TypeError(f"metadata has {prefix}{name}={value!r:.80}, not {wanted}")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has the type of a field."""
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        of = typing.get_args(hint)[1]
        return isinstance(value, dict) and all(_is_a(item, of) for item in value.values())
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def weights_metadata(
    model: ModelConfig,
    tokenizer: Tokenizer,
    rope_theta: float,
    context_length: int,
    provenance: dict[str, Any],
    chat_template: dict[str, str] | None = None,
) -> Metadata:
    """The record of weights that come from elsewhere."""
    return Metadata(
        weights_only=True,
        phase="imported",
        step=0,
        tokens_seen=0,
        model=model,
        rope_theta=rope_theta,
        context_length=context_length,
        tokenizer_sha256=tokenizer.sha256,
        provenance=provenance,
        chat_template=chat_template or {},
    )


def provenance(metadata: Metadata) -> dict[str, Any]:
    """Where a model comes from, as exports state it. An import keeps what its folder stated.

    Contains no paths and no addresses, which may be private.
    """
    if metadata.weights_only:
        return metadata.provenance
    origin = {"started_from": metadata.provenance} if metadata.provenance else {}
    stated = {name: getattr(metadata, name) for name in _STATED}
    return origin | stated | {"corpora": dict(sorted(metadata.corpora.items()))}


_STATED = (
    "phase",
    "step",
    "tokens_seen",
    "corpora",
    "tokenizer_sha256",
    "data_sha256",
    "git_commit",
)


def parse_provenance(found: Any) -> dict[str, Any] | None:
    """What `provenance` wrote, read from a file that is not trusted; None for anything else."""
    if not isinstance(found, dict):
        return None
    rest = {key: value for key, value in found.items() if key != "started_from"}
    kinds = {name: _TYPES[name] for name in _STATED}
    if rest.keys() == {"imported_from"}:
        kinds = {"imported_from": str}
    if rest.keys() != kinds.keys() or not all(_is_a(rest[key], kinds[key]) for key in kinds):
        return None
    texts = [*rest.values(), *(part for item in rest.get("corpora", {}).items() for part in item)]
    if not all(text.isprintable() for text in texts if isinstance(text, str)):
        return None
    if "started_from" in found and parse_provenance(found["started_from"]) is None:
        return None
    return found
