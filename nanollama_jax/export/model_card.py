"""Where a model comes from, as data (`provenance`, which travels in an export's config.json) and as the page that the hub shows (`model_card`)."""

from typing import Any

from nanollama_jax.model import ModelConfig


def provenance(metadata: dict[str, Any]) -> dict[str, Any]:
    """What an export says of its training; an imported model's is that of before. No paths and no addresses: those may be private."""
    if "provenance" in metadata:
        return metadata["provenance"]
    corpora = metadata["config"].get("corpora", {})
    return {
        "phase": metadata["phase"],
        "step": metadata["step"],
        "tokens_seen": metadata["tokens_seen"],
        "corpora": {name: corpus["licence"] for name, corpus in sorted(corpora.items())},
        "tokenizer_sha256": metadata["tokenizer_sha256"],
        "data_sha256": metadata["data_sha256"],
        "git_commit": metadata["git_commit"],
    }


def model_card(model: ModelConfig, metadata: dict[str, Any], dtype: str) -> str:
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
        f"vocabulary {model.vocab_size:,}, context {metadata['context_length']:,}, RoPE theta {metadata['rope_theta']:,.0f}. Stored as {dtype}.",
        "",
    ]
    if "step" in about:
        lines += [
            f"Trained with nanollama-jax to step {about['step']:,} ({about['phase']}): {about['tokens_seen'] / 1e6:,.1f}M tokens.",
            "",
            "| corpus | licence |",
            "|---|---|",
            *(f"| {name} | {licence} |" for name, licence in about["corpora"].items()),
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
        'print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=50)[0]))',
        "```",
    ]
    return "\n".join(lines) + "\n"
