"""How much GPU memory a training step needs, computed from its shape alone, and the remat policy
that fits. tests/planning/test_memory.py compares it with the compiler's figures; `tools/plan.py
--compile` prints both.
"""

import dataclasses

from nanollama_jax.errors import BadInput
from nanollama_jax.model.config import REMAT_POLICIES, ModelConfig


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step."""

    state: int  # parameters and both moments of Adam, float32
    copy: int  # the layers' matrices in the compute dtype
    gradients: int  # of one micro-batch, and with several the float32 sums over them
    kept: int  # by the layers for their backward pass; depends on remat
    working: int  # in one layer's backward pass or in the loss, whichever is more
    workspace: int  # of cuDNN's backward pass, unknown to a compiler without the GPU

    @property
    def compiled(self) -> int:
        """What the compiler counts."""
        return self.total - self.workspace

    @property
    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


def kept_bytes(model: ModelConfig) -> int:
    """Bytes per token and layer that are kept for the backward pass. All but the softmax statistics
    are in the compute dtype."""
    D, F, N, K, H = (
        model.d_model,
        model.ffn_dim,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
    )
    size = 2 if model.dtype == "bfloat16" else 4
    if model.remat == "none":
        # Six of F, five of D, keys and values; in the norms four of D in float32
        return size * (6 * F + 3 * D + 2 * N * H + 2 * K * H) + 16 * D + 4 * N
    of = {
        "attention": size * N * H + 4 * N,
        "qkv": size * (N + 2 * K) * H,
        "gate_up": size * 2 * F,
        "o": size * D,
    }
    # The layer's input is always kept.
    return size * D + sum(of[name] for name in REMAT_POLICIES[model.remat])


def step_memory(
    model: ModelConfig,
    *,
    rows: int,
    seq_len: int,
    accumulation: int,
    fsdp: int,
    data: int,
    chunk_tokens: int,
) -> Memory:
    """The memory of a step over `rows` rows in total, in `accumulation` micro-batches, on fsdp x
    data devices. Includes the scores of dense attention."""
    D, F, N, H, V, L = (
        model.d_model,
        model.ffn_dim,
        model.num_heads,
        model.head_dim,
        model.vocab_size,
        model.num_layers,
    )
    size = 2 if model.dtype == "bfloat16" else 4
    own_rows = rows / (accumulation * fsdp * data)
    tokens = own_rows * seq_len
    in_layers = model.matmul_params - D * V
    copy = 0 if size == 4 else size * in_layers / fsdp
    gradients = (
        size * in_layers / fsdp
        + 4 * 2 * D * V / fsdp
        + (4 * model.num_params / fsdp if accumulation > 1 else 0)
    )
    kept = tokens * L * kept_bytes(model)
    if model.remat == "none":
        kept += size * in_layers  # the gathered weights
    # Backward through the FFN: gradients of gate and up, their product, gate and up themselves
    # unless they are kept; six arrays of the model's width
    has_gate_up = model.remat in ("gate_up", "products", "none")
    layer = tokens * size * (F * (3 if has_gate_up else 5) + 6 * D) + 2 * size * in_layers / L
    layer += 4 * D * V  # the embedding's gradient, unsharded
    chunk = min(chunk_tokens, tokens)
    loss = chunk * V * (4 + size) + D * V * (4 + size) + 2 * size * tokens * D
    # Dense attention takes blocks of queries, each with the keys up to its end. Weights exist in
    # float32 and in the compute dtype.
    block = min(max(64, seq_len // 8), 512)
    scores = (
        own_rows * N * seq_len * (seq_len + block) / 2 * (4 + size)
        if model.attention == "xla"
        else 0
    )
    if model.remat == "none":
        kept += scores * L
    room = {"cudnn": own_rows, "cudnn_packed": own_rows * max(2, model.packed_documents)}.get(
        model.attention, 0
    )
    # Query gradients and sums, float32, for each slot of a document
    workspace = room * seq_len * N * 4 * (H + 1)
    statistics = 0
    if model.attention == "cudnn_packed":  # spread over the slots
        statistics = 2 * (room - own_rows) * seq_len * N * 4
    figures = dict(state=12 * model.num_params / fsdp, copy=copy, gradients=gradients, kept=kept)
    figures |= dict(
        working=max(layer + scores, layer - tokens * size * 2 * F + statistics, loss),
        workspace=workspace,
    )
    return Memory(**{name: int(value) for name, value in figures.items()})


def fastest_remat(model: ModelConfig, limit: float, **step) -> str:
    """The fastest of REMAT_POLICIES (ordered from slowest to fastest) whose step fits into `limit`
    bytes per device. Raises BadInput if none does."""
    fitting = [
        remat
        for remat in REMAT_POLICIES
        if step_memory(dataclasses.replace(model, remat=remat), **step).total <= limit
    ]
    if not fitting:
        needed = step_memory(dataclasses.replace(model, remat="full"), **step).total
        raise BadInput(
            f"a step needs {needed / 1e9:.1f} GB per device even with model.remat=full, and "
            f"{limit / 1e9:.1f} are available: raise accumulation (now {step['accumulation']}), or "
            "use more devices"
        )
    return fitting[-1]
