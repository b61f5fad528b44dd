"""The same model and update in transformers + torch: the baseline of our training step.

On a GPU: float32 master weights, bfloat16 autocast and residual stream, torch.compile and fused
AdamW, with and without gradient checkpointing, in the largest micro-batch that fits. Causal
attention is SDPA, in torch's choice of kernel or cuDNN's; attention within documents is
FlexAttention or torch's varlen flash attention. transformers' model gets them as attention
functions of ours or as a block mask: compiled, its own mask creation materializes a dense mask.
"""

import contextlib
import inspect
import time
from collections.abc import Callable

import numpy as np

from benchmarks.cases import Case, Row
from benchmarks.documents import draw_batches
from benchmarks.timing import median_and_spread
from benchmarks.train import TOKENS, case_of_ours
from nanollama_jax.recipes import MODELS

CAUSAL = ("sdpa", "sdpa_cudnn")
MASKED = ("varlen", "flex_attention")
OUR_SETTINGS = (("products", 2), ("none", 4))  # remat, micro-batches: the fastest two by estimate
COLUMNS = {
    "tokens_per_second": ("tokens/s/GPU", ",.0f"),
    "spread": ("+-", ".1%"),
    "step_seconds": ("step s", ".3f"),
    "peak_gb": ("peak GB", ".1f"),
    "compile_seconds": ("compile s", ".0f"),
    "micro_tokens": ("at a time", ",.0f"),
    "loss": ("loss", ".3f"),
}


def gpu_cases(scale: str, seq_len: int, rounds: int, steps: int) -> list[Case]:
    """Ours and torch's, documents masked and plain causal, the most important first.

    Without checkpointing, micro-batches have at most 32,768 tokens.
    """

    def torch_case(attention: str, checkpointing: bool, whole: bool) -> Case:
        sizes = (65_536, 32_768, 16_384) if checkpointing else (32_768, 16_384, 8192)
        sizes = [size for size in sizes if size >= seq_len] or [seq_len]
        about = dict(
            scale=scale,
            seq_len=seq_len,
            attention=attention,
            checkpointing=checkpointing,
            whole=whole,
            rounds=rounds,
            steps=steps,
        )
        attempts = tuple(about | dict(micro_tokens=size) for size in sizes)
        name = f"torch, {attention}{', checkpointing' * checkpointing}{', compiled whole' * whole}"
        return Case(name, measure_torch, attempts)

    def ours(attention: str, remat: str, accumulation: int) -> Case:
        settings = [(attention, remat, accumulation), (attention, "qkv", accumulation)]
        return case_of_ours(scale, seq_len, settings, rounds, steps)

    first, second = OUR_SETTINGS
    return [
        ours("cudnn_packed", *first),
        torch_case("varlen", False, False),
        torch_case("flex_attention", False, False),
        ours("cudnn", *first),
        torch_case("sdpa_cudnn", False, False),
        torch_case("sdpa", False, False),
        ours("cudnn_packed", *second),
        torch_case("varlen", True, False),
        torch_case("sdpa_cudnn", True, False),
        torch_case("varlen", False, True),
        torch_case("sdpa_cudnn", False, True),
        torch_case("flex_attention", True, False),
    ]


def ratios(rows: list[Row]) -> list[str]:
    """Our fastest over torch's fastest, with documents masked and plain causal.

    A side that was not measured is named.
    """
    lines = []
    for kind, ours, theirs in (
        ("within documents", ("cudnn_packed",), MASKED),
        ("plain causal", ("cudnn",), CAUSAL),
    ):
        best = []
        for prefix, backends in (("ours", ours), ("torch", theirs)):
            measured = [
                row
                for row in rows
                if row["case"].startswith(prefix)
                and row.get("attention") in backends
                and "error" not in row
            ]
            best.append(max(measured, key=lambda row: row["tokens_per_second"], default=None))
        if None in best:
            missing = "ours" if best[0] is None else "torch"
            lines.append(f"{kind}: no ratio, because {missing} was not measured")
        else:
            ratio = best[0]["tokens_per_second"] / best[1]["tokens_per_second"]
            lines.append(
                f"{kind}: {ratio:.2f}x as fast as torch's fastest ({best[0]['case']} against "
                f"{best[1]['case']})"
            )
    return lines


def measure_torch(
    *,
    scale: str,
    seq_len: int,
    attention: str,
    checkpointing: bool,
    whole: bool,
    micro_tokens: int,
    rounds: int,
    steps: int,
    step_tokens: int = TOKENS,
    device: str = "cuda",
    shape: dict | None = None,
) -> Row:
    """A case: steps of `step_tokens` tokens, in micro-batches of `micro_tokens`.

    `whole` compiles the model at once instead of layer by layer.
    """
    import torch

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # what autocast leaves in float32
    shape = shape or MODELS[scale]
    micro_rows = max(1, micro_tokens // seq_len)
    count = max(1, step_tokens // (micro_rows * seq_len))
    model = llama(shape, attention).to(device)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adamw = torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    (batch,) = draw_batches(1, count * micro_rows, seq_len, shape["vocab_size"])
    micro_batches = to_torch(
        [{name: x[i::count] for name, x in batch.items()} for i in range(count)], attention, device
    )

    def hidden_states(ids, **options):
        embedded = model.model.embed_tokens(ids).to(torch.bfloat16)
        return model.model(inputs_embeds=embedded, use_cache=False, **options).last_hidden_state

    def loss_of(hidden, targets):
        logits = model.lm_head(hidden).float()
        return torch.nn.functional.cross_entropy(
            logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-100
        )

    if whole:
        hidden_states = torch.compile(hidden_states, dynamic=False)
    else:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    loss_of = torch.compile(loss_of, dynamic=False)

    def step() -> float:
        adamw.zero_grad(set_to_none=True)
        total = 0.0
        for ids, targets, options in micro_batches:
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(hidden_states(ids, **options), targets) / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        return total

    with contextlib.ExitStack() as stack:
        if attention == "sdpa_cudnn":
            stack.enter_context(
                torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
            )
        started = time.perf_counter()
        float(step())
        compile_seconds = time.perf_counter() - started
        loss = float(step())
        rates = []
        for _ in range(rounds):
            started = time.perf_counter()
            for _ in range(steps):
                loss = step()
            loss = float(loss)  # waits for the device
            rates.append(steps * count * micro_rows * seq_len / (time.perf_counter() - started))
    rate, spread = median_and_spread(rates)
    row = {
        "tokens_per_second": rate,
        "spread": spread,
        "step_seconds": count * micro_rows * seq_len / rate,
        "compile_seconds": compile_seconds,
    }
    if device == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row | {"loss": loss, "micro_tokens": micro_rows * seq_len}


def llama(shape: dict, attention: str):
    """transformers' Llama of our shape.

    `attention` is transformers' `flex_attention`, or one of the functions below.
    """
    import transformers

    if attention in ("sdpa", "sdpa_cudnn", "varlen"):
        name = f"benchmark_{attention}"  # not a name that transformers makes masks for
        transformers.AttentionInterface.register(
            name, varlen_attention() if attention == "varlen" else causal_attention
        )
    else:
        name = attention
    config = llama_config(shape)
    config._attn_implementation = name
    return transformers.LlamaForCausalLM(config).float().train()


def llama_config(shape: dict):
    import transformers

    return transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["ffn_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        tie_word_embeddings=False,
        use_cache=False,
    )


def to_torch(batches: list[dict[str, np.ndarray]], attention: str, device: str) -> list[tuple]:
    """`(ids, targets, options of the model's call)` of each batch; unlearned targets are -100.

    Options have one shape, so nothing is compiled twice.
    """
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    def block_mask(segment_ids_BT):
        B, T = segment_ids_BT.shape

        def causal_within_documents(b, h, q, k):
            return (q >= k) & (segment_ids_BT[b, q] == segment_ids_BT[b, k])

        return create_block_mask(causal_within_documents, B, None, T, T, device=device)

    starts = [np.flatnonzero(batch["positions"].reshape(-1) == 0) for batch in batches]
    most = max(map(len, starts))
    offsets = [
        np.pad(s, (0, most + 1 - len(s)), constant_values=batch["positions"].size).astype(np.int32)
        for s, batch in zip(starts, batches)
    ]
    longest = int(max(np.diff(one).max() for one in offsets))
    found = []
    for batch, of_batch in zip(batches, offsets, strict=True):
        options = {}
        if attention not in CAUSAL:
            options["position_ids"] = torch.from_numpy(batch["positions"]).long().to(device)
        if attention == "flex_attention":
            segment_ids = torch.from_numpy(batch["segment_ids"]).to(device)
            options["attention_mask"] = block_mask(segment_ids)
        if attention == "varlen":
            options |= {
                "document_offsets": torch.from_numpy(of_batch).to(device),
                "longest_document": longest,
            }
        ids = torch.from_numpy(batch["tokens"]).long().to(device)
        targets = np.where(batch["loss_weights"] > 0, batch["targets"], -100)
        found.append((ids, torch.from_numpy(targets).long().to(device), options))
    return found


def causal_attention(module, q_BNTH, k_BKTH, v_BKTH, attention_mask, scaling: float, **_):
    import torch.nn.functional as F

    out_BNTH = F.scaled_dot_product_attention(
        q_BNTH, k_BKTH, v_BKTH, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out_BNTH.transpose(1, 2), None


def varlen_attention() -> Callable:
    """torch's flash attention over documents laid end to end, row after row.

    Its arguments depend on torch's version.
    """
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    grouped = {"enable_gqa": True} if "enable_gqa" in accepted else {}

    def attention(
        module, q_BNTH, k_BKTH, v_BKTH, attention_mask, document_offsets, longest_document: int, **_
    ):
        B, N, T, H = q_BNTH.shape
        q, k, v = (x.transpose(1, 2).reshape(B * T, -1, H) for x in (q_BNTH, k_BKTH, v_BKTH))
        if not grouped:
            k, v = (x.repeat_interleave(N // x.shape[1], dim=1) for x in (k, v))
        out = varlen_attn(
            q,
            k,
            v,
            document_offsets,
            document_offsets,
            longest_document,
            longest_document,
            **causal,
            **grouped,
        )
        return out.reshape(B, T, N, H), None

    return attention


def cpu_step(shape: dict, tokens: np.ndarray) -> Callable[[int], None]:
    """Runs n uncompiled float32 steps with the default attention (SDPA), plain causal.

    That is less work than a document mask.
    """
    import torch
    import transformers

    model = transformers.LlamaForCausalLM(llama_config(shape)).float()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    inputs = torch.from_numpy(tokens[:, :-1]).long()
    labels = inputs.clone()

    def run(n: int) -> None:
        for _ in range(n):
            adamw.zero_grad(set_to_none=True)
            model(input_ids=inputs, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()

    run(2)
    return run
