"""The model card of an exported folder: the page that the Hugging Face hub shows."""

from typing import Any

from nanollama_jax.checkpoint.metadata import Metadata, provenance
from nanollama_jax.model import ModelConfig

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [llama, nanollama-jax]
---

# A Llama of {params:,.1f}M parameters

{m.num_layers} layers, width {m.d_model}, {m.num_heads} query and {m.num_kv_heads} key/value \
heads, FFN {m.ffn_dim}, vocabulary {m.vocab_size:,}, context {context_length:,}, RoPE theta \
{rope_theta:,.0f}. Stored as {dtype}.

{origin}

A research model: it has not been tested for any use, and can say what is false or harmful.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
prompt = tokenizer(tokenizer.bos_token + "The", add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```
"""


def model_card(model: ModelConfig, metadata: Metadata, dtype: str) -> str:
    """README.md of an exported folder, with the hub's front matter."""
    about = provenance(metadata)
    return _CARD.format(
        m=model,
        params=model.num_params / 1e6,
        context_length=metadata.context_length,
        rope_theta=metadata.rope_theta,
        dtype=dtype,
        origin="\n".join(_trained(about) if "step" in about else _imported(about)),
    )


def _imported(about: dict[str, Any]) -> list[str]:
    return [f"Imported from {about['imported_from']}, which states what it was trained on."]


def _trained(about: dict[str, Any]) -> list[str]:
    lines = []
    corpora = dict(about["corpora"])
    before = about
    while before := before.get("started_from"):
        lines += [
            f"Started from the weights of {_name(before)}, whose licence applies to this model "
            "too.",
            "",
        ]
        corpora = before.get("corpora", {}) | corpora
    return lines + [
        f"Trained with nanollama-jax to step {about['step']:,} ({about['phase']}): "
        f"{about['tokens_seen'] / 1e6:,.1f}M tokens.",
        "",
        "| corpus | licence |",
        "|---|---|",
        *(f"| {name} | {licence} |" for name, licence in corpora.items()),
        "",
        f"Code: commit {about['git_commit']}. Tokenizer: sha256 {about['tokenizer_sha256']}. "
        f"Data: sha256 {about['data_sha256']}.",
    ]


def _name(about: dict[str, Any]) -> str:
    if "imported_from" in about:
        return about["imported_from"]
    return f"step {about['step']:,} of {about['phase']} ({', '.join(about['corpora'])})"
