"""Every setting of a recipe, declared once: its default, what it may be, and what it means.

`configs/common.py` builds recipes from these defaults; `check` compares a whole config with the table
before anything is allocated. Rules between settings (a batch that the devices cannot split) are in
`train/settle.py`. This module must not import jax: recipes are loaded before its environment is set.
"""

import dataclasses
import difflib
import os
import pathlib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from nanollama_jax.errors import BadInput

MAX_STEPS = 2**24  # the schedules count steps in float32, which is exact up to here
NEVER = 10**9  # the longest interval: longer than any run
ROOT = pathlib.Path(__file__).parent.parent
SOURCE_FOLDERS = (".git", "benchmarks", "configs", "docs", "nanollama_jax", "tests", "tools")

_NAME = re.compile(r"(?![.-])[\w.+-]{1,100}")
_LINE = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{0,4000}")
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 80
_TEXT = re.compile(r"[^\x00\ud800-\udfff]{0,100000}")


@dataclasses.dataclass(frozen=True)
class Form:
    """What a string or a tuple must look like: in words, and as a test."""

    words: str
    accepts: Callable[[Any], bool]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value))


def _is_gate(value: Any) -> bool:
    if (
        not isinstance(value, tuple)
        or [type(number) in (int, float) for number in value] != [True] * 3
    ):
        return False
    step, go, stop = value
    return type(step) is int and 1 <= step <= MAX_STEPS and 0 < go <= stop <= 1e12


def _is_output_folder(value: str) -> bool:
    return bool(_LINE.fullmatch(value)) and unusable_folder(value) is None


NAME = Form(
    "a plain name: at most 100 letters, digits, '_', '-', '+' and '.', not beginning with '.' or '-'",
    _is_name,
)
NAMES = Form("a tuple of names, such as ('docs', 'code')", lambda value: all(map(_is_name, value)))
SOME_NAMES = Form(
    "a tuple of at least one name, such as ('docs',)",
    lambda value: bool(value) and NAMES.accepts(value),
)
LINE = Form("one line of text", lambda value: bool(_LINE.fullmatch(value)))
PATH = Form("a path, on one line and not empty", lambda value: bool(value) and LINE.accepts(value))
URL = Form("a source's URL, on one line and not empty", PATH.accepts)
OUTPUT_FOLDER = Form(
    "a folder, on one line: not empty, not '/', not this repository or one of its source folders",
    _is_output_folder,
)
PROMPTS = Form(
    "a tuple of texts, none empty, such as ('What is 2 + 3?',)",
    lambda value: all(isinstance(x, str) and x.strip() and _TEXT.fullmatch(x) for x in value),
)
GATES = Form(
    f"a tuple of (step, go below, stop above): step a whole number from 1 to {MAX_STEPS:,}, then two "
    "perplexities above 0, the first not above the second",
    lambda value: all(map(_is_gate, value)),
)


@dataclasses.dataclass(frozen=True)
class Field:
    """A setting. Numbers must be inside the bounds (`ge` at least, `gt` above, `le` at most, `lt` below)
    or one of `choices`; strings and tuples must be one of `choices` or have the `form`."""

    default: Any  # or, of a setting that each recipe, stage or corpus must state, its type
    meaning: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple = ()
    form: Form | None = None

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return isinstance(self.default, type)

    @property
    def type(self) -> type:
        """bool, int, float (which takes an int, too), str or tuple."""
        return self.default if self.required else type(self.default)

    @property
    def bounded(self) -> bool:
        return any(bound is not None for bound in (self.ge, self.gt, self.le, self.lt))

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, (int, float) if self.type is float else self.type):
            return False
        if self.type is not bool and isinstance(value, bool):
            return False
        if self.form:
            return self.form.accepts(value)
        if value in self.choices or self.type is bool:
            return True
        return (
            self.bounded
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    @property
    def allowed(self) -> str:
        """What it may be, in words: "a number above 0 and at most 1"."""
        if self.form:
            return self.form.words
        if self.type is bool:
            return "True or False"
        options = [_shown(choice) for choice in self.choices]
        if self.bounded:
            bounds = (
                ("at least", self.ge),
                ("above", self.gt),
                ("at most", self.le),
                ("below", self.lt),
            )
            limits = " and ".join(f"{words} {_shown(x)}" for words, x in bounds if x is not None)
            if None not in (self.ge, self.le):
                limits = f"from {_shown(self.ge)} to {_shown(self.le)}"
            options.append(f"{'a whole number' if self.type is int else 'a number'} {limits}")
        return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else value or "''"


# In names, `*` stands for a corpus, a set of conversations or a benchmark.
FIELDS: dict[str, Field] = {
    "scale": Field(str, "The scale's name: what the recipe was made for.", form=NAME),
    "name": Field(str, "The stage's name: it labels checkpoints and metrics.", form=NAME),
    "task": Field(
        "pretrain",
        "What the stage trains on: text, conversations (sft) or preference pairs (dpo).",
        choices=("pretrain", "sft", "dpo"),
    ),
    "seed": Field(0, "Seed of the initial weights and of the order of the data.", ge=0, lt=2**31),
    "init_from": Field(
        "",
        "A workdir whose latest checkpoint to start from; empty: from scratch. Pre-training takes "
        "parameters, optimizer and step from it, sft and dpo parameters only.",
        form=LINE,
    ),
    "start_step": Field(
        int,
        "The step that the stage starts at, counted over all of pre-training.",
        ge=0,
        lt=MAX_STEPS,
    ),
    "end_step": Field(int, "The step that the stage ends at.", ge=1, le=MAX_STEPS),
    "tokens_per_step": Field(int, "Tokens of a step: batch_size x seq_len.", ge=1, le=2**30),
    "seq_len": Field(int, "Tokens of a row.", ge=2, le=2**20),
    "batch_size": Field(int, "Rows of a step, over all devices and micro-batches.", ge=1, le=2**20),
    "accumulation": Field(
        int, "Micro-batches of a step: more take less memory and more time.", ge=1, le=2**16
    ),
    "model.vocab_size": Field(int, "Tokens in the vocabulary.", ge=2, le=2**20),
    "model.num_layers": Field(int, "Transformer layers.", ge=1, le=1024),
    "model.d_model": Field(int, "Width of the model.", ge=1, le=2**16),
    "model.num_heads": Field(
        int, "Query heads of a layer; a multiple of num_kv_heads.", ge=1, le=1024
    ),
    "model.num_kv_heads": Field(int, "Key and value heads of a layer.", ge=1, le=1024),
    "model.head_dim": Field(int, "Width of a head; even.", ge=2, le=1024),
    "model.ffn_dim": Field(int, "Width of the feed-forward layers.", ge=1, le=2**18),
    "model.norm_eps": Field(1e-5, "Added to the mean square in RMSNorm.", ge=1e-12, le=0.01),
    "model.dtype": Field(
        "auto",
        "Of activations and matrix products; parameters are float32. auto: bfloat16 on a GPU, "
        "float32 on a CPU.",
        choices=("auto", "float32", "bfloat16"),
    ),
    "model.attention": Field(
        "auto",
        "The attention kernel. auto: the fastest for the device (docs/recipe.md).",
        choices=("auto", "xla", "cudnn", "cudnn_packed"),
    ),
    "model.document_mask": Field(
        True, "Whether attention stays inside a document; if not, it is causal over the row."
    ),
    "model.packed_documents": Field(
        8,
        "Documents a row that cudnn_packed has room for, on average over a device's rows.",
        ge=1,
        le=4096,
    ),
    "model.remat": Field(
        "auto",
        "What layers keep for the backward pass, from the least memory to the most speed. "
        "auto: the fastest that fits the device.",
        choices=("auto", "full", "attention", "qkv", "gate_up", "products", "none"),
    ),
    "model.scan_layers": Field(
        True, "Whether layers are scanned: compiles faster, runs slower for a few layers."
    ),
    "mesh.data": Field(1, "Devices that the model is replicated over.", ge=1, le=2**16),
    "mesh.fsdp": Field(
        -1,
        "Devices that parameters are sharded over; -1: as many as mesh.data leaves.",
        choices=(-1,),
        ge=1,
        le=2**16,
    ),
    "loss.z_loss": Field(1e-4, "Weight of the z-loss, log(Z)^2; 0: none.", ge=0.0, le=1.0),
    "loss.chunk_tokens": Field(
        8192, "Tokens whose logits are in memory at a time.", ge=1, le=2**24
    ),
    "optimizer.peak_lr": Field(6e-4, "Learning rate after warm-up.", ge=1e-12, le=1.0),
    "optimizer.b1": Field(0.9, "Adam's decay of the mean gradient.", ge=0.0, le=0.9999),
    "optimizer.b2": Field(0.95, "Adam's decay of the mean squared gradient.", ge=0.0, le=0.99999),
    # The square of a gradient below 1e-19 is 0 in float32: with a smaller eps its update would be huge
    "optimizer.eps": Field(1e-8, "Adam's epsilon.", ge=1e-15, le=1.0),
    "optimizer.weight_decay": Field(
        0.1, "Decoupled weight decay of matrices; 0: none.", ge=0.0, le=1.0
    ),
    "optimizer.clip_norm": Field(
        1.0,
        "Gradients are scaled down to this global norm; 0: never.",
        choices=(0,),
        ge=1e-6,
        le=1e6,
    ),
    "schedule.warmup_steps": Field(
        2000, "Steps over which the learning rate rises to its peak.", ge=0, le=MAX_STEPS
    ),
    "schedule.decay_start": Field(
        int, "Step from which the learning rate falls to 0.", ge=0, le=MAX_STEPS
    ),
    "schedule.total_steps": Field(int, "Step at which the learning rate is 0.", ge=1, le=MAX_STEPS),
    "rope.schedule": Field(
        "ramp",
        "How RoPE theta goes from start to end: log-linearly over the stage, or at once.",
        choices=("ramp", "jump"),
    ),
    "rope.start_theta": Field(10_000.0, "RoPE theta where the stage starts.", ge=1.0, le=1e12),
    "rope.end_theta": Field(10_000.0, "RoPE theta where the stage ends.", ge=1.0, le=1e12),
    "tokenizer.path": Field(
        "data/tokenizer.model",
        "The SentencePiece model; trained or extended if missing.",
        form=PATH,
    ),
    "tokenizer.vocab_size": Field(
        int, "Pieces of the tokenizer; follows model.vocab_size.", ge=2, le=2**20
    ),
    "tokenizer.base": Field(
        "", "Of sft and dpo: the tokenizer that `path` extends by the chat tokens.", form=LINE
    ),
    "tokenizer.training_bytes": Field(
        1_000_000_000, "Bytes of text that it is trained on.", ge=1000, le=10**12
    ),
    "tokenizer.sources": Field(
        ("fineweb_edu",), "The corpora that it is trained on.", form=SOME_NAMES
    ),
    "corpora.*.url": Field(
        str, "Where the text is: nanollama_jax/corpus/sources.py lists the forms.", form=URL
    ),
    "corpora.*.licence": Field(str, "The text's licence, for the model card.", form=LINE),
    "corpora.*.max_tokens": Field(int, "Tokens to prepare; 0: all there are.", ge=0, le=10**14),
    "corpora.*.keep": Field(
        str,
        "A filter of documents (nanollama_jax/corpus/filters.py); empty: keep all.",
        choices=("", "stem"),
    ),
    "corpora.*.contaminated": Field(
        str,
        "What happens to a document that quotes a benchmark: drop it, or cut the passage.",
        choices=("drop", "cut"),
    ),
    "corpora.*.leave_out": Field(
        str,
        "A report of tools/near_duplicates.py whose documents are left out; empty: none.",
        form=LINE,
    ),
    "tuning.*.url": Field(
        str, "Where the conversations or pairs are: nanollama_jax/corpus/sources.py.", form=URL
    ),
    "tuning.*.licence": Field(str, "Their licence, for the model card.", form=LINE),
    "tuning.*.kind": Field(str, "What the rows are.", choices=("conversations", "preferences")),
    "tuning.*.bad_rows": Field(
        str, "At a bad row: stop, or skip and count it.", choices=("stop", "skip")
    ),
    "data.dir": Field("data", "The folder of prepared corpora.", form=OUTPUT_FOLDER),
    "data.prepare_tasks": Field(256, "Parts that a corpus is prepared in.", ge=1, le=100_000),
    "data.validation_fraction": Field(
        0.0005, "Share of the documents kept for validation.", ge=0.0, lt=1.0
    ),
    "data.tuning_validation_fraction": Field(
        0.01, "Share of conversations and pairs kept for validation.", ge=0.0, lt=1.0
    ),
    "data.benchmarks.*": Field(
        str,
        "A benchmark kept out of all training data, by its URL; empty: not searched for.",
        form=LINE,
    ),
    "data.max_segments": Field(
        64, "Documents kept apart in a row; dpo: even, two to a pair.", ge=1, le=2**16
    ),
    "data.sources.*": Field(
        float,
        "Share of the rows that come from this corpus; shares need not add up to 1.",
        ge=1e-6,
        le=1e6,
    ),
    "data.validation": Field(
        (), "Corpora to measure perplexity on; empty: those of data.sources.", form=NAMES
    ),
    "preference.beta": Field(
        0.1, "DPO's beta: how strongly the policy is held to its reference.", ge=1e-6, le=100.0
    ),
    "preference.label_smoothing": Field(
        0.0, "DPO: the assumed share of wrong labels.", ge=0.0, lt=0.5
    ),
    "preference.length_normalised": Field(
        False, "DPO: whether log-probabilities are divided by the answer's tokens."
    ),
    "samples.every": Field(
        0, "sft, dpo: steps between sampled replies in the log; 0: none.", ge=0, le=NEVER
    ),
    "samples.prompts": Field((), "sft, dpo: what to reply to.", form=PROMPTS),
    "samples.max_new_tokens": Field(200, "Tokens of a sampled reply, at most.", ge=1, le=2**20),
    "log_every": Field(10, "Steps between lines in the log.", ge=1, le=NEVER),
    "validation.every": Field(2000, "Steps between validations.", ge=1, le=NEVER),
    "validation.tokens": Field(
        2_097_152, "Tokens of each corpus that a validation reads, at most.", ge=1, le=10**12
    ),
    "checkpoint.every": Field(1000, "Steps between checkpoints.", ge=1, le=NEVER),
    "checkpoint.keep_last": Field(2, "The latest checkpoints to keep.", ge=1, le=10**6),
    "checkpoint.keep_every": Field(
        10_000,
        "Checkpoints at multiples of so many steps are kept for good; 0: none.",
        ge=0,
        le=NEVER,
    ),
    "wandb.mode": Field(
        "disabled", "Whether to log to Weights & Biases.", choices=("online", "offline", "disabled")
    ),
    "wandb.project": Field("nanollama", "The project there.", form=NAME),
    "gates.enforce": Field(True, "Whether a gate that says stop stops the run."),
    "gates.perplexity": Field(
        (),
        "At the step named first, validation perplexity below the second figure goes on, above the "
        "third it stops.",
        form=GATES,
    ),
}


def defaults() -> ConfigDict:
    """A config of all settings that have a default."""
    nested: dict[str, Any] = {}
    for name, field in FIELDS.items():
        if not field.required:
            *sections, key = name.split(".")
            at = nested
            for section in sections:
                at = at.setdefault(section, {})
            at[key] = field.default
    return ConfigDict(nested)


def check(config: ConfigDict) -> None:
    """Raises BadInput, one line that names every value that FIELDS refuses. `config`: a stage's or a curriculum's."""
    everything = config.to_dict()
    stages = everything.pop("stages", None)
    shared = dict(leaves(everything))
    wrong = [_mistake("", path, value) for path, value in shared.items()]
    for stage, settings in (stages or {"": {}}).items():
        own, prefix = dict(leaves(settings)), f"stages.{stage}." if stages else ""
        present = {".".join(path) for path in (*shared, *own)}
        if stages and not NAME.accepts(stage):
            wrong.append(f"stages.{stage}: {stage!r} must be {NAME.words}")
        wrong += [_mistake(prefix, path, value) for path, value in own.items()]
        missing = [name for name in FIELDS if "*" not in name and name not in present]
        wrong += [
            f"{prefix}{name} is missing: it must be {FIELDS[name].allowed}" for name in missing
        ]
    if mistakes := list(filter(None, wrong)):
        raise BadInput("; ".join(mistakes))


def leaves(settings: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Any]]:
    """Each value, after the path of keys to it."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


def declared_name(path: tuple[str, ...]) -> str | None:
    """The key in FIELDS of a setting: "corpora.*.url" of ("corpora", "docs", "url"). None: not declared."""
    if ".".join(path) in FIELDS:
        return ".".join(path)
    for name in (name for name in FIELDS if "*" in name):
        parts = name.split(".")
        if len(parts) == len(path) and all(map(lambda part, key: part in ("*", key), parts, path)):
            return name
    return None


def _mistake(prefix: str, path: tuple[str, ...], value: Any) -> str | None:
    """What is wrong with a setting's value, or None."""
    name = declared_name(path)
    shown = lambda: f"{prefix}{'.'.join(path)}={_brief.repr(value)}"  # noqa: E731
    if name is None:
        return f"{shown()}: there is no such setting{did_you_mean('.'.join(path))}"
    for part, key in zip(name.split("."), path, strict=True):
        if part == "*" and not NAME.accepts(key):
            return f"{shown()}: {key!r} must be {NAME.words}"
    return None if FIELDS[name].accepts(value) else f"{shown()}: must be {FIELDS[name].allowed}"


def did_you_mean(name: str) -> str:
    """ "; did you mean optimizer.peak_lr?", or "" where no setting is called nearly so."""
    last = {known.rpartition(".")[2]: known for known in FIELDS if "*" not in known}
    near = difflib.get_close_matches(name, last.values(), n=1, cutoff=0.8)
    if not near:
        near = [
            last[found]
            for found in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.75)
        ]
    return f"; did you mean {near[0]}?" if near else ""


def unusable_folder(path: str | os.PathLike) -> str | None:
    """Why nothing may be written into a folder, or None."""
    where = pathlib.Path(os.path.realpath(path))
    if not os.fspath(path):
        return "the path is empty"
    if where == pathlib.Path(where.anchor):
        return "it is the root of the file system"
    if where == ROOT or any(where.is_relative_to(ROOT / folder) for folder in SOURCE_FOLDERS):
        return "it is this repository or one of its source folders"
    return None


def check_workdir(path: str | os.PathLike) -> None:
    """Raises BadInput for a workdir that must not be written into, or could not be read again."""
    if why := unusable_folder(path):
        raise BadInput(f"--workdir={os.fspath(path)}: {why}; choose a folder such as runs/NAME")
    if "[" in os.path.abspath(path):
        # Orbax globs for the parts of a checkpoint with a pattern that begins with this path: it would find none
        raise BadInput(
            f"--workdir={os.fspath(path)}: checkpoints cannot be kept in a folder with '[' in its path: rename it"
        )
