"""Every setting of a recipe, declared once: its type, its default, its meaning, and its bounds.

The classes are the sections of a config; `Resolved` is the whole config of one stage. This module
must not import jax: recipes are loaded before its environment is set.
"""

# ruff: noqa: RUF009  setting, section and entries return dataclasses.field
import dataclasses
from typing import TYPE_CHECKING, Any

from nanollama_jax.config.fields import (
    GATES,
    LINE,
    MAX_STEPS,
    NAME,
    NAMES,
    NEVER,
    OUTPUT_FOLDER,
    PATH,
    PROMPTS,
    SOME_NAMES,
    TEXT,
    URL,
    entries,
    section,
    setting,
)

if TYPE_CHECKING:
    from nanollama_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The model's shape and how it is computed. `ModelConfig` is the same with `auto` resolved."""

    vocab_size: int = setting(
        int,
        "Tokens in the vocabulary; 0: as many as the tokenizer has.",
        choices=(0,),
        ge=2,
        le=2**20,
    )
    num_layers: int = setting(int, "Transformer layers.", ge=1, le=1024)
    d_model: int = setting(int, "Width of the model.", ge=1, le=2**16)
    num_heads: int = setting(
        int, "Query heads of a layer; a multiple of num_kv_heads.", ge=1, le=1024
    )
    num_kv_heads: int = setting(int, "Key and value heads of a layer.", ge=1, le=1024)
    head_dim: int = setting(int, "Width of a head; even.", ge=2, le=1024)
    ffn_dim: int = setting(int, "Width of the feed-forward layers.", ge=1, le=2**18)
    norm_eps: float = setting(1e-5, "Added to the mean square in RMSNorm.", ge=1e-12, le=0.01)
    dtype: str = setting(
        "auto",
        "Type of activations and matrix products; parameters are float32. auto: bfloat16 on a GPU, "
        "float32 on a CPU.",
        choices=("auto", "float32", "bfloat16"),
    )
    attention: str = setting(
        "auto",
        "The attention kernel. auto: the fastest for the device (docs/recipe.md).",
        choices=("auto", "xla", "cudnn", "cudnn_packed"),
    )
    document_mask: bool = setting(
        True, "Whether attention stays inside a document; if not, it is causal over the row."
    )
    packed_documents: int = setting(
        8,
        "Documents a row that cudnn_packed has room for, on average over a device's rows.",
        ge=1,
        le=4096,
    )
    remat: str = setting(
        "auto",
        "What layers keep for the backward pass, from the least memory to the most speed. "
        "auto: the fastest that fits the device.",
        choices=("auto", "full", "attention", "qkv", "gate_up", "products", "none"),
    )
    scan_layers: bool = setting(
        True, "Whether layers are scanned: compiles faster, runs slower for a few layers."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    data: int = setting(1, "Devices that the model is replicated over.", ge=1, le=2**16)
    fsdp: int = setting(
        -1,
        "Devices that parameters are sharded over; -1: as many as mesh.data leaves.",
        choices=(-1,),
        ge=1,
        le=2**16,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    z_loss: float = setting(1e-4, "Weight of the z-loss, log(Z)^2; 0: none.", ge=0.0, le=1.0)
    chunk_tokens: int = setting(
        8192, "Tokens whose logits are in memory at a time.", ge=1, le=2**24
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW."""

    peak_lr: float = setting(6e-4, "Learning rate after warm-up.", ge=1e-12, le=1.0)
    b1: float = setting(0.9, "Adam's decay of the mean gradient.", ge=0.0, le=0.9999)
    b2: float = setting(0.95, "Adam's decay of the mean squared gradient.", ge=0.0, le=0.99999)
    # The square of a gradient below 1e-19 is 0 in float32: a smaller eps would make a huge update
    eps: float = setting(1e-8, "Adam's epsilon.", ge=1e-15, le=1.0)
    weight_decay: float = setting(
        0.1, "Decoupled weight decay of matrices; 0: none.", ge=0.0, le=1.0
    )
    clip_norm: float = setting(
        1.0,
        "Gradients are scaled down to this global norm; 0: never.",
        choices=(0,),
        ge=1e-6,
        le=1e6,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate, by global step: warm-up, constant, linear decay to 0."""

    warmup_steps: int = setting(
        2000, "Steps over which the learning rate rises to its peak.", ge=0, le=MAX_STEPS
    )
    decay_start: int = setting(
        int, "Step from which the learning rate falls to 0.", ge=0, le=MAX_STEPS
    )
    total_steps: int = setting(int, "Step at which the learning rate is 0.", ge=1, le=MAX_STEPS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    schedule: str = setting(
        "ramp",
        "How RoPE theta goes from start to end: log-linearly over the stage, or at once.",
        choices=("ramp", "jump"),
    )
    start_theta: float = setting(10_000.0, "RoPE theta where the stage starts.", ge=1.0, le=1e12)
    end_theta: float = setting(10_000.0, "RoPE theta where the stage ends.", ge=1.0, le=1e12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    path: str = setting(
        "data/tokenizer.model",
        "The SentencePiece model; trained or extended if missing.",
        form=PATH,
    )
    vocab_size: int = setting(
        int, "Pieces of the tokenizer; follows model.vocab_size.", choices=(0,), ge=2, le=2**20
    )
    base: str = setting(
        "", "sft, dpo: the tokenizer that `path` extends by the chat tokens.", form=LINE
    )
    training_bytes: int = setting(
        1_000_000_000, "Bytes of text that it is trained on.", ge=1000, le=10**12
    )
    sources: tuple = setting(
        ("fineweb_edu",), "The corpora that it is trained on.", form=SOME_NAMES
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text to prepare."""

    url: str = setting(
        str, "Where the text is: nanollama_jax/corpus/sources.py lists the forms.", form=URL
    )
    licence: str = setting("", "The text's licence, for the model card.", form=LINE)
    max_tokens: int = setting(0, "Tokens to prepare; 0: all.", ge=0, le=10**14)
    keep: str = setting(
        "",
        "A filter of documents (nanollama_jax/corpus/filters.py); empty: keep all.",
        choices=("", "stem"),
    )
    contaminated: str = setting(
        "drop",
        "What happens to a document that quotes a benchmark: drop it, or cut the passage.",
        choices=("drop", "cut"),
    )
    leave_out: str = setting(
        "",
        "A report of tools/near_duplicates.py whose documents are left out; empty: none.",
        form=LINE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Conversations or pairs to prepare."""

    url: str = setting(
        str, "Where the conversations or pairs are: nanollama_jax/corpus/sources.py.", form=URL
    )
    licence: str = setting("", "Their licence, for the model card.", form=LINE)
    kind: str = setting(str, "What the rows are.", choices=("conversations", "preferences"))
    bad_rows: str = setting(
        "stop", "At a bad row: stop, or skip and count it.", choices=("stop", "skip")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    dir: str = setting("data", "The folder of prepared corpora.", form=OUTPUT_FOLDER)
    prepare_tasks: int = setting(256, "Parts that a corpus is prepared in.", ge=1, le=100_000)
    validation_fraction: float = setting(
        0.0005, "Share of the documents kept for validation.", ge=0.0, lt=1.0
    )
    tuning_validation_fraction: float = setting(
        0.01, "Share of conversations and pairs kept for validation.", ge=0.0, lt=1.0
    )
    max_segments: int = setting(
        64, "Documents kept apart in a row; dpo: even, two to a pair.", ge=1, le=2**16
    )
    validation: tuple = setting(
        (), "Corpora to measure perplexity on; empty: those of data.sources.", form=NAMES
    )
    benchmarks: dict[str, str] = entries(
        str,
        "A benchmark kept out of all training data, by its URL; empty: not searched for.",
        form=LINE,
    )
    sources: dict[str, float] = entries(
        float,
        "Share of the rows that come from this corpus; shares need not add up to 1.",
        ge=1e-6,
        le=1e6,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
    beta: float = setting(
        0.1, "DPO's beta: how strongly the policy is held to its reference.", ge=1e-6, le=100.0
    )
    label_smoothing: float = setting(0.0, "DPO: the assumed share of wrong labels.", ge=0.0, lt=0.5)
    length_normalised: bool = setting(
        False, "DPO: whether log-probabilities are divided by the answer's tokens."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    every: int = setting(
        0, "sft, dpo: steps between sampled replies in the log; 0: none.", ge=0, le=NEVER
    )
    prompts: tuple = setting((), "sft, dpo: what to reply to.", form=PROMPTS)
    max_new_tokens: int = setting(200, "Tokens of a sampled reply, at most.", ge=1, le=2**20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    every: int = setting(2000, "Steps between validations.", ge=1, le=NEVER)
    tokens: int = setting(
        2_097_152, "Tokens of each corpus that a validation reads, at most.", ge=1, le=10**12
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every: int = setting(1000, "Steps between checkpoints.", ge=1, le=NEVER)
    keep_last: int = setting(2, "The latest checkpoints to keep.", ge=1, le=10**6)
    keep_every: int = setting(
        10_000,
        "Checkpoints at multiples of this many steps are never deleted; 0: none.",
        ge=0,
        le=NEVER,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wandb:
    mode: str = setting(
        "disabled", "Whether to log to Weights & Biases.", choices=("online", "offline", "disabled")
    )
    project: str = setting("nanollama", "The Weights & Biases project.", form=NAME)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gates:
    enforce: bool = setting(True, "Whether a failed gate stops the run.")
    perplexity: tuple = setting(
        (),
        "(step, go below, stop above): at the step, a validation perplexity above the last figure "
        "stops the run.",
        form=GATES,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved:
    """A stage's whole config, derived values filled in."""

    scale: str = setting(str, "The scale that the recipe was made for.", form=NAME)
    name: str = setting(str, "The stage's name: it labels checkpoints and metrics.", form=NAME)
    task: str = setting(
        "pretrain",
        "What the stage trains on: text, conversations (sft) or preference pairs (dpo).",
        choices=("pretrain", "sft", "dpo"),
    )
    seed: int = setting(
        0, "Seed of the initial weights and of the order of the data.", ge=0, lt=2**31
    )
    init_from: str = setting(
        "",
        "A workdir whose latest checkpoint to start from; empty: from scratch. Pre-training takes "
        "parameters, optimizer and step from it, sft and dpo parameters only.",
        form=LINE,
    )
    start_step: int = setting(
        int,
        "The step that the stage starts at, counted over all of pre-training.",
        ge=0,
        lt=MAX_STEPS,
    )
    end_step: int = setting(int, "The step that the stage ends at.", ge=1, le=MAX_STEPS)
    tokens_per_step: int = setting(
        int, "Tokens of a step; derived: batch_size x seq_len.", ge=1, le=2**30
    )
    seq_len: int = setting(int, "Tokens of a row.", ge=2, le=2**20)
    batch_size: int = setting(
        int, "Rows of a step, over all devices and micro-batches.", ge=1, le=2**20
    )
    accumulation: int = setting(
        int, "Micro-batches of a step: more take less memory and more time.", ge=1, le=2**16
    )
    log_every: int = setting(10, "Steps between lines in the log.", ge=1, le=NEVER)
    model: "ModelConfig" = section(Model)
    mesh: Mesh = section(Mesh)
    loss: Loss = section(Loss)
    optimizer: Optimizer = section(Optimizer)
    schedule: Schedule = section(Schedule)
    rope: Rope = section(Rope)
    tokenizer: TokenizerSettings = section(TokenizerSettings)
    corpora: dict[str, Corpus] = section(Corpus, each=True)
    tuning: dict[str, Tuning] = section(Tuning, each=True)
    data: Data = section(Data)
    preference: Preference = section(Preference)
    samples: Samples = section(Samples)
    validation: Validation = section(Validation)
    checkpoint: Checkpoint = section(Checkpoint)
    wandb: Wandb = section(Wandb)
    gates: Gates = section(Gates)

    def to_dict(self) -> dict[str, Any]:
        """The values as nested dicts, as `config.json` has them."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnText:
    """What only configs/own.py has. nanollama_jax/own.py derives a stage's config from it."""

    text: str = setting(str, "The text to train on: a path, a glob or a URL.", form=TEXT)
    epochs: float = setting(float, "How many times the text is read.", ge=0.001, le=1000.0)
    warmup_fraction: float = setting(
        float, "Share of the steps over which the learning rate rises.", ge=0.0, le=0.5
    )
    decay_fraction: float = setting(
        float, "Share of the steps, at the end, over which it falls to 0.", ge=0.0, le=0.5
    )
