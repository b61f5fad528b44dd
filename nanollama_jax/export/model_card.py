"""Where a model comes from, as data (`provenance`, which travels in an export's config.json) and as the page that the hub shows (`model_card`)."""

from typing import Any

from nanollama_jax.model import ModelConfig


def provenance(metadata: dict[str, Any]) -> dict[str, Any]:
    """What an export says of its training; that of an imported model is what its folder said. No paths and no addresses: those may be private."""
    if metadata.get("weights_only"):
        return metadata["provenance"]
    origin = {"started_from": metadata["provenance"]} if metadata.get("provenance") else {}
    return origin | {
        "phase": metadata["phase"],
        "step": metadata["step"],
        "tokens_seen": metadata["tokens_seen"],
        "corpora": dict(sorted(trained_on(metadata).items())),
        "tokenizer_sha256": metadata["tokenizer_sha256"],
        "data_sha256": metadata["data_sha256"],
        "git_commit": metadata["git_commit"],
    }


def trained_on(metadata: dict[str, Any]) -> dict[str, str]:
    """Corpus -> licence, of all that a checkpoint's steps read: in fine-tuning those of its own stage, in pre-training of all before it too."""
    if metadata.get("weights_only"):
        return {}
    if "corpora" in metadata:
        return metadata["corpora"]
    config = metadata["config"]  # of before it was noted: what the recipe names
    named = (
        config.get("corpora", {})
        if config.get("task", "pretrain") == "pretrain"
        else config["tuning"]
    )
    return {name: named[name]["licence"] for name in config["data"]["sources"] if name in named}


_KINDS = {
    "phase": str,
    "step": int,
    "tokens_seen": int,
    "corpora": dict,
    "tokenizer_sha256": str,
    "data_sha256": str,
    "git_commit": str,
}


def restored_provenance(found: Any) -> dict[str, Any] | None:
    """What `provenance` once wrote, from a file that is not trusted; None for anything else."""
    if not isinstance(found, dict):
        return None
    rest = {key: value for key, value in found.items() if key != "started_from"}
    if rest.keys() == {"imported_from"}:
        good = isinstance(rest["imported_from"], str) and rest["imported_from"].isprintable()
    else:
        good = rest.keys() == _KINDS.keys() and all(
            isinstance(rest[key], kind) for key, kind in _KINDS.items()
        )
        texts = (
            [
                *(value for value in rest.values() if isinstance(value, str)),
                *(part for item in rest.get("corpora", {}).items() for part in item),
            ]
            if good
            else []
        )
        good = good and all(isinstance(text, str) and text.isprintable() for text in texts)
    if not good or ("started_from" in found and restored_provenance(found["started_from"]) is None):
        return None
    return found


def _origin(about: dict[str, Any]) -> str:
    if "imported_from" in about:
        return about["imported_from"]
    return f"step {about['step']:,} of {about['phase']} ({', '.join(about['corpora'])})"


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
