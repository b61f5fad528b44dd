"""The model card of an exported folder: the page that the Hugging Face hub shows."""

from typing import Any

from nanollama_jax.checkpoint.metadata import Metadata, provenance
from nanollama_jax.model import ModelConfig


def _origin(about: dict[str, Any]) -> str:
    if "imported_from" in about:
        return about["imported_from"]
    return f"step {about['step']:,} of {about['phase']} ({', '.join(about['corpora'])})"


def model_card(model: ModelConfig, metadata: Metadata, dtype: str) -> str:
    """README.md of an exported folder, with the hub's front matter."""
    about = provenance(metadata)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [llama, nanollama-jax]",
        "---",
        "",
        f"# A Llama of {model.num_params / 1e6:,.1f}M parameters",
        "",
        f"{model.num_layers} layers, width {model.d_model}, {model.num_heads} query and {model.num_kv_heads} key/value heads, FFN {model.ffn_dim}, "
        f"vocabulary {model.vocab_size:,}, context {metadata.context_length:,}, RoPE theta {metadata.rope_theta:,.0f}. Stored as {dtype}.",
        "",
    ]
    if "step" in about:
        before = about
        corpora = dict(about["corpora"])
        while before := before.get("started_from"):
            lines += [
                f"Started from the weights of {_origin(before)}, whose licence holds for this model too.",
                "",
            ]
            corpora = before.get("corpora", {}) | corpora
        lines += [
            f"Trained with nanollama-jax to step {about['step']:,} ({about['phase']}): {about['tokens_seen'] / 1e6:,.1f}M tokens.",
            "",
            "| corpus | licence |",
            "|---|---|",
            *(f"| {name} | {licence} |" for name, licence in corpora.items()),
            "",
            f"Code: commit {about['git_commit']}. Tokenizer: sha256 {about['tokenizer_sha256']}. Data: sha256 {about['data_sha256']}.",
        ]
    else:
        lines += [f"Imported from {about['imported_from']}; what it was trained on is said there."]
    lines += [
        "",
        "A research model: it has not been tested for any use, and can say what is false or harmful.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        'prompt = tokenizer(tokenizer.bos_token + "The", add_special_tokens=False, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))",
        "```",
    ]
    return "\n".join(lines) + "\n"
