"""Checkpoints as GGUF files for llama.cpp.

f32, f16 and bf16 are written here, a tensor at a time. llama.cpp's own quantizer makes q8_0 and
q4_k_m from a temporary f32 file.
"""

import os
import pathlib
import shutil

import gguf
import ml_dtypes
import numpy as np

from nanollama_jax.checkpoint import Loaded, provenance
from nanollama_jax.errors import BadInput
from nanollama_jax.export.layout import check_consistent, finite, hf_names, to_hf
from nanollama_jax.export.tokenizer_json import (
    CHAT_TEMPLATE,
    PLAIN_CHAT_TEMPLATE,
    chat_templates,
    read_model,
)
from nanollama_jax.files import output_path
from nanollama_jax.model import ModelConfig
from nanollama_jax.tokenizer import TURN_END, Tokenizer

FLOATS = {
    "f32": (np.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (np.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (ml_dtypes.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
QUANTIZED = {  # llama.cpp's number for it, and how many weights of a row are packed together
    "q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, 32),
    "q4_k_m": (gguf.LlamaFileType.MOSTLY_Q4_K_M, 256),
}
TYPES = (*FLOATS, *QUANTIZED)

# Hugging Face's names -> GGUF's, of a layer's tensors and of the others
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def export(loaded: Loaded, path: str | os.PathLike, kind: str, *, overwrite: bool = False) -> None:
    """Writes `path`, complete or not at all; `kind` is one of TYPES.

    Raises BadInput if the file exists (and is not to be overwritten), the tokenizer cannot be
    expressed, a weight is not finite, the model's widths do not fit the blocks of a quantized
    type, or the disk is full.
    """
    path = output_path(path)
    if os.path.lexists(path) and not (overwrite and path.is_file()):
        raise BadInput(f"{path} exists: remove it, choose another file, or overwrite it")
    if kind in QUANTIZED:
        _check_blocks(loaded.model, kind)
    check_consistent(loaded)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir()
        finished = temporary / "float"
        write(loaded, finished, kind if kind in FLOATS else "f32")
        if kind in QUANTIZED:
            finished = temporary / "quantized"
            quantize(temporary / "float", finished, kind)
        os.replace(finished, path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        # This is how numpy and llama.cpp report a full disk.
        raise BadInput(f"{path} could not be written ({error}): is the disk full?") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_blocks(model: ModelConfig, kind: str) -> None:
    block = QUANTIZED[kind][1]
    widths = {
        "d_model": model.d_model,
        "num_heads x head_dim": model.num_heads * model.head_dim,
        "ffn_dim": model.ffn_dim,
    }
    for name, width in widths.items():
        if width % block:
            raise BadInput(
                f"{kind} packs {block} weights together and {name}={width} is not a multiple of "
                "that: export as q8_0 or f16 instead"
            )


def quantize(source: pathlib.Path, target: pathlib.Path, kind: str) -> None:
    """Runs llama.cpp's quantizer, on all cores."""
    from cyllama.llama import llama_cpp  # the float types do not need it

    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype = int(QUANTIZED[kind][0])
    llama_cpp.set_log_callback(lambda level, text: None)  # it logs every tensor
    llama_cpp.model_quantize(str(source), str(target), params)


def write(loaded: Loaded, path: pathlib.Path, kind: str) -> None:
    """Writes all matrices in one float type. Norms stay float32, as llama.cpp requires."""
    m, (dtype, raw_dtype, file_type) = loaded.model, FLOATS[kind]
    writer = gguf.GGUFWriter(path, "llama")
    stage = provenance(loaded.metadata).get("phase", "imported")
    writer.add_type("model")
    writer.add_name(f"nanollama {m.num_params / 1e6:,.1f}M {stage}")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(m.vocab_size)
    writer.add_context_length(loaded.context_length)
    writer.add_embedding_length(m.d_model)
    writer.add_block_count(m.num_layers)
    writer.add_feed_forward_length(m.ffn_dim)
    writer.add_head_count(m.num_heads)
    writer.add_head_count_kv(m.num_kv_heads)
    writer.add_key_length(m.head_dim)
    writer.add_value_length(m.head_dim)
    writer.add_rope_dimension_count(m.head_dim)
    writer.add_rope_freq_base(loaded.rope_theta)
    writer.add_layer_norm_rms_eps(m.norm_eps)
    templates = chat_templates(loaded.tokenizer, loaded.metadata.chat_template)
    add_tokenizer(writer, loaded.tokenizer, templates)

    float32 = np.dtype(np.float32), gguf.GGMLQuantizationType.F32
    names = {gguf_name(name): place for name, place in hf_names(m).items()}
    for name, place in names.items():
        value = to_hf(loaded.params, place)
        stored, raw = (np.dtype(dtype), raw_dtype) if value.ndim > 1 else float32
        writer.add_tensor_info(
            name, value.shape, stored, value.size * stored.itemsize, raw_dtype=raw
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"attn_q": m.num_heads, "attn_k": m.num_kv_heads}
    for name, place in names.items():
        value = to_hf(loaded.params, place)
        if (count := heads.get(name.split(".")[-2])) is not None:
            value = interleave_pairs(value, count)
        with np.errstate(over="ignore"):  # `finite` reports a float16 that overflows
            value = np.ascontiguousarray(value, dtype if value.ndim > 1 else np.float32)
        writer.write_tensor_data(finite(value, name))
    writer.close()


def gguf_name(hf_name: str) -> str:
    if hf_name in _MODEL:
        return _MODEL[hf_name]
    _, _, layer, tensor = hf_name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_LAYER[tensor]}.weight"


def interleave_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighboring rows of a head, (2i, 2i + 1). We and Hugging Face rotate
    (i, i + H/2)."""
    out, width = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, templates: dict[str, str]) -> None:
    """BOS is added to every text, even if a chat template writes one: llama.cpp then removes the
    template's. Its built-in rendering of a template that it knows (ChatML) writes none."""
    proto = read_model(tokenizer, "GGUF")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in proto.pieces])
    writer.add_token_scores([piece.score for piece in proto.pieces])
    # GGUF's numbers for types of pieces are SentencePiece's.
    writer.add_token_types([piece.type for piece in proto.pieces])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    # Without this llama.cpp assumes true.
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.is_chat:
        writer.add_eot_token_id(tokenizer.control_id(TURN_END))
    templates = {
        name: PLAIN_CHAT_TEMPLATE if template == CHAT_TEMPLATE else template
        for name, template in templates.items()
    }
    if "default" in templates:
        writer.add_chat_template(templates["default"])
    # GGUFWriter's own method for several templates writes their names in random order.
    if named := [name for name in templates if name != "default"]:
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, named)
        for name in named:
            writer.add_string(
                gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), templates[name]
            )
