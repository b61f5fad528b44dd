"""What shape the model has, and what can be counted from the shape alone: parameters and FLOPs."""

import dataclasses

from nanollama_jax.errors import BadInput

ATTENTION_BACKENDS = ("xla", "cudnn", "cudnn_packed")

# What a layer keeps for its backward pass, beyond its input: `checkpoint_name`s in llama.py and
# flash_attention.py. The rest is recomputed. Ordered from least memory to most, slowest to fastest.
REMAT_POLICIES = {
    "full": (),
    "attention": ("attention",),  # attention's output and softmax statistics
    "qkv": ("attention", "qkv"),  # also attention's inputs, after RoPE
    "gate_up": ("attention", "qkv", "gate_up"),
    "products": ("attention", "qkv", "gate_up", "o"),  # all outputs of products with weights
    "none": None,  # everything is kept
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama. `dtype` is the dtype of activations and matrix products; parameters are float32."""

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float = 1e-5
    dtype: str = "float32"
    attention: str = "xla"  # one of ATTENTION_BACKENDS
    document_mask: bool = True  # False: causal over the whole row, across document boundaries
    # Documents per row that `cudnn_packed` has room for, on average over a device's rows
    packed_documents: int = 8
    remat: str = "none"  # one of REMAT_POLICIES
    scan_layers: bool = True

    def __post_init__(self):
        for name in (
            "vocab_size",
            "num_layers",
            "d_model",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_dim",
            "packed_documents",
        ):
            if getattr(self, name) < 1:
                raise BadInput(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise BadInput(
                f"model.num_heads={self.num_heads} must be a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise BadInput(f"model.head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if self.attention not in ATTENTION_BACKENDS:
            raise BadInput(
                f"model.attention={self.attention!r} is unknown: choose auto, "
                f"{', '.join(ATTENTION_BACKENDS)}"
            )
        if self.remat not in REMAT_POLICIES:
            raise BadInput(
                f"model.remat={self.remat!r} is unknown: choose auto, {', '.join(REMAT_POLICIES)}"
            )
        if self.attention == "cudnn" and self.document_mask:
            raise BadInput(
                "model.attention='cudnn' is plain causal and cannot mask documents: set "
                "model.document_mask=False, or choose cudnn_packed"
            )
        if self.attention == "cudnn_packed" and not self.document_mask:
            raise BadInput(
                "model.attention='cudnn_packed' masks documents: set model.document_mask=True, "
                "or model.attention=cudnn"
            )
        if self.attention != "xla" and (
            self.dtype == "float32" or self.head_dim % 8 or self.head_dim > 256
        ):
            raise BadInput(
                f"model.attention={self.attention!r} needs 16-bit activations and a head_dim that "
                f"is a multiple of 8 and at most 256 (model.dtype={self.dtype}, "
                f"model.head_dim={self.head_dim}): change these, or set model.attention=xla"
            )

    @property
    def matmul_params(self) -> int:
        """Parameters used in matrix products: all but the embedding table and the norms."""
        attention = self.d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return (
            self.num_layers * (attention + 3 * self.d_model * self.ffn_dim)
            + self.d_model * self.vocab_size
        )

    @property
    def num_params(self) -> int:
        embedding = self.vocab_size * self.d_model
        norms = (2 * self.num_layers + 1) * self.d_model
        return self.matmul_params + embedding + norms

    def flops_per_token(self, seq_len: float) -> float:
        """FLOPs of one training token, forward and backward.

        6 per matmul parameter, plus causal attention: 6 * L * S * N * H, half of the full square.
        PaLM's nominal count (appendix B), 6 * all parameters + 12 * L * S * D, is 1.21x as large
        for the 1B model at 4,096 tokens and 1.45x at 16,384. Recomputation (remat) is not counted.
        """
        attention = self.num_layers * seq_len * self.num_heads * self.head_dim
        return 6.0 * self.matmul_params + 6.0 * attention
