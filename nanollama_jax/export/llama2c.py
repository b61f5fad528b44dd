"""llama2.c's checkpoints (github.com/karpathy/llama2.c, version 0: stories15M.bin and the like)
and tokenizer files, as ours.
"""

import os
import pathlib
import struct
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as spm

from nanollama_jax.checkpoint import Loaded, weights_metadata
from nanollama_jax.errors import BadInput
from nanollama_jax.model import ModelConfig
from nanollama_jax.tokenizer import Tokenizer

_HEADER_BYTES = 28
_BYTES = 256
_CONTROL = {
    0: ("<unk>", spm.ModelProto.SentencePiece.UNKNOWN),
    1: ("<s>", spm.ModelProto.SentencePiece.CONTROL),
    2: ("</s>", spm.ModelProto.SentencePiece.CONTROL),
}


def read(path: str | os.PathLike, tokenizer_path: str | os.PathLike) -> Loaded:
    """A llama2.c checkpoint, in memory. `tokenizer_path` is a SentencePiece model, or llama2.c's
    tokenizer.bin.

    Raises BadInput for a file of another kind or length, and for a vocabulary that does not match.
    """
    path = pathlib.Path(path)
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}: give a llama2.c .bin file") from error
    model, tied, context_length = _read_header(path, blob)
    params = _read_params(np.frombuffer(blob, np.float32, offset=_HEADER_BYTES), model, tied)
    tokenizer = read_tokenizer(tokenizer_path, model.vocab_size)
    metadata = weights_metadata(
        model, tokenizer, 10_000.0, context_length, {"imported_from": path.name}
    )
    return Loaded(model, params, tokenizer, metadata, path)


def _read_header(path: pathlib.Path, blob: bytes) -> tuple[ModelConfig, bool, int]:
    """The model, whether its head is the embedding, and the context length: seven int32 (dim,
    hidden_dim, layers, heads, kv_heads, vocabulary, negative if the head is a separate weight;
    context length)."""
    if len(blob) < _HEADER_BYTES or blob[:4] == b"24ka":
        raise BadInput(f"{path} is not llama2.c's version 0: write it with `export.py --version 0`")
    D, F, L, N, K, V, context_length = struct.unpack("7i", blob[:_HEADER_BYTES])
    tied, V = V > 0, abs(V)
    if (
        min(D, F, L, N, K, context_length) < 1
        or max(D, F, V) > 2**20
        or L > 1000
        or D % N
        or N % K
        or (D // N) % 2
    ):
        raise BadInput(
            f"{path} is not a llama2.c checkpoint: its header says dim={D}, hidden_dim={F}, "
            f"layers={L}, heads={N}, kv_heads={K}, vocabulary={V}"
        )
    H = D // N
    layer = 2 * D + 2 * D * N * H + 2 * D * K * H + 3 * D * F
    size = L * layer + D + V * D * (1 if tied else 2) + context_length * H
    expected = _HEADER_BYTES + 4 * size
    if len(blob) != expected:
        raise BadInput(
            f"{path} has {len(blob):,} bytes and its header asks for {expected:,}: it is "
            "truncated, or of another kind"
        )
    model = ModelConfig(
        vocab_size=V,
        num_layers=L,
        d_model=D,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        ffn_dim=F,
        norm_eps=1e-5,
        scan_layers=False,
    )
    return model, tied, context_length


def _read_params(weights: np.ndarray, model: ModelConfig, tied: bool) -> dict[str, Any]:
    """Our parameters from the float32 values after the header.

    llama2.c's RoPE rotates neighboring pairs, so the rows of q and k are put into rotate-half
    order.
    """
    V, L, D, N, K, H, F = (
        model.vocab_size,
        model.num_layers,
        model.d_model,
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        model.ffn_dim,
    )
    offset = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal offset
        offset += int(np.prod(shape))
        return weights[offset - int(np.prod(shape)) : offset].reshape(shape)

    def rotate_half(w_LOD: np.ndarray, heads: int) -> np.ndarray:
        return w_LOD.reshape(L, heads, H // 2, 2, D).swapaxes(2, 3).reshape(L, heads, H, D)

    embedding = take(V, D)
    attention_norm = take(L, D)
    q, k, v = take(L, N * H, D), take(L, K * H, D), take(L, K * H, D)
    o = take(L, D, N * H)
    ffn_norm = take(L, D)
    gate, down, up = take(L, F, D), take(L, D, F), take(L, F, D)
    final_norm = take(D)
    # Cosines and sines follow, which are computed here. A separate head is last.
    head = embedding if tied else weights[-V * D :].reshape(V, D)
    q, k, v = rotate_half(q, N), rotate_half(k, K), v.reshape(L, K, H, D)

    params: dict[str, Any] = {
        "embedding": {"kernel": embedding},
        "head": {"kernel": head.T.copy()},
        "final_norm": {"scale": final_norm},
    }
    for i in range(L):
        qkv = np.concatenate([q[i], k[i], v[i]]).transpose(2, 0, 1)
        attention = {"qkv": qkv, "o": o[i].reshape(D, N, H).transpose(1, 2, 0)}
        ffn = {"gate_up": np.stack([gate[i], up[i]]).transpose(2, 0, 1), "down": down[i].T}
        params[f"layers_{i}"] = {
            "attention_norm": {"scale": attention_norm[i]},
            "attention": {
                name: {"kernel": np.ascontiguousarray(value)} for name, value in attention.items()
            },
            "ffn_norm": {"scale": ffn_norm[i]},
            "ffn": {name: {"kernel": np.ascontiguousarray(value)} for name, value in ffn.items()},
        }
    return params


def read_tokenizer(path: str | os.PathLike, vocab_size: int) -> Tokenizer:
    path = pathlib.Path(path)
    tokenizer = Tokenizer(
        path, sentencepiece_of(path, vocab_size) if path.suffix == ".bin" else None
    )
    if tokenizer.vocab_size != vocab_size:
        raise BadInput(
            f"{path} has {tokenizer.vocab_size} pieces and the model's vocabulary is {vocab_size}: "
            "they must agree"
        )
    return tokenizer


def sentencepiece_of(path: pathlib.Path, vocab_size: int) -> bytes:
    """A SentencePiece model from llama2.c's tokenizer.bin: an int32 (the longest piece), then the
    score (float32), length (int32) and bytes of each piece."""
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise BadInput(
            f"{path}: {error.strerror}: give llama2.c's tokenizer.bin, or a SentencePiece .model"
        ) from error
    piece = spm.ModelProto.SentencePiece
    proto = spm.ModelProto()
    offset = 4
    try:
        for i in range(vocab_size):
            score, length = struct.unpack_from("<fi", blob, offset)
            text = blob[offset + 8 : offset + 8 + length].decode()
            offset += 8 + length
            kind = piece.BYTE if 3 <= i < 3 + _BYTES else piece.NORMAL
            name, kind = _CONTROL.get(i, (text.replace(" ", "▁"), kind))
            proto.pieces.add(piece=name, score=score, type=kind)
    except (struct.error, UnicodeDecodeError) as error:
        raise BadInput(
            f"{path} is not a tokenizer of {vocab_size} pieces in llama2.c's format: {error}"
        ) from error
    if offset != len(blob):
        raise BadInput(
            f"{path} holds more than the {vocab_size} pieces of the model's vocabulary: it belongs "
            "to another model"
        )
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = spm.TrainerSpec.BPE
    trainer.byte_fallback = True
    trainer.vocab_size = vocab_size
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return proto.SerializeToString()
