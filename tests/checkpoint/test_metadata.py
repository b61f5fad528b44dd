"""The record in a checkpoint: those of today and of earlier versions are read; others are refused.

records/ has the metadata of one checkpoint of each kind. `earlier_*` were written before corpora,
shuffle windows and checksums were recorded.
"""

import dataclasses
import json
import pathlib

import pytest

from nanollama_jax.checkpoint import Metadata, provenance
from nanollama_jax.checkpoint.metadata import has_separate_projections, parse_provenance

RECORDS = pathlib.Path(__file__).parent / "records"
TODAY = ("pretrain", "sft", "dpo", "imported")
EARLIER = ("earlier_pretrain", "earlier_sft")


def stored(name: str) -> dict:
    return json.loads((RECORDS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", [*TODAY, *EARLIER])
def test_a_stored_record_is_read_and_written_as_it_was(name):
    found = stored(name)
    metadata = Metadata.from_dict(found)
    written = {
        key: value for key, value in found.items() if value or key in ("step", "tokens_seen")
    }
    if name in EARLIER:
        written["corpora"] = metadata.corpora
    assert json.loads(json.dumps(metadata.to_dict())) == written
    assert Metadata.from_dict(metadata.to_dict()) == metadata


def test_what_a_record_says():
    pretrain, sft, dpo, imported = (Metadata.from_dict(stored(name)) for name in TODAY)
    assert [record.task for record in (pretrain, sft, dpo)] == ["pretrain", "sft", "dpo"]
    assert [record.phase for record in (pretrain, sft, dpo)] == ["phase1", "sft", "dpo"]
    assert pretrain.provenance is None and pretrain.model.d_model == 256
    assert pretrain.shuffle_windows and not sft.shuffle_windows
    assert dpo.reference_weights and sft.reference_weights is None
    assert imported.weights_only and imported.chat_template.keys() == {"default"}
    assert imported.task == "pretrain" and provenance(imported) == imported.provenance
    assert provenance(dpo)["started_from"] == provenance(sft)
    assert provenance(sft)["started_from"] == provenance(pretrain)
    for record in (pretrain, sft, dpo, imported):
        assert record.tokens_seen_is_exact and not has_separate_projections(record.to_dict())
        assert parse_provenance(provenance(record)) == provenance(record)


def test_what_earlier_versions_did_not_record():
    pretrain, sft = (Metadata.from_dict(stored(name)) for name in EARLIER)
    assert pretrain.corpora.keys() == pretrain.config["data"]["sources"].keys()
    assert sft.corpora.keys() == {"math", "tools"} and sft.lowest_loss == {}
    assert pretrain.shuffle_windows == {} and pretrain.checksums is None
    assert not pretrain.tokens_seen_is_exact and sft.tokens_seen_is_exact
    found = stored("pretrain")
    del found["model"]["packed_documents"]
    assert has_separate_projections(found)


def test_a_later_versions_key_is_ignored():
    found = stored("sft")
    assert Metadata.from_dict(found | {"mood": "good"}) == Metadata.from_dict(found)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"step": "12"}, "metadata has step='12', not int"),
        ({"step": True}, "metadata has step=True, not int"),
        ({"step": None}, "step: not in the metadata"),
        ({"rope_theta": [1e4]}, r"rope_theta=\[10000.0\], not float"),
        ({"corpora": {"docs": 3}}, r"corpora=\{'docs': 3\}, not dict"),
        ({"lowest_loss": "low"}, "lowest_loss='low'"),
        ({"config": []}, r"config=\[\]"),
        ({"config": {"task": "chess"}}, "unknown task 'chess'"),
        ({"config": None, "git_commit": None}, "config, git_commit: not in the metadata"),
        ({"weights_only": True, "provenance": None}, "provenance: not in the metadata"),
        ({"model": {"vocab_size": "8"}}, "model.vocab_size='8', not int"),
        ({"model": {}}, "missing 7 required positional arguments"),
        ({"model": None}, "model: not in the metadata"),
        ({"model": []}, r"model=\[\], not dict"),
    ],
)
def test_records_that_are_refused(changes, error):
    with pytest.raises((KeyError, TypeError, ValueError), match=error):
        Metadata.from_dict(stored("pretrain") | changes)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"width": 8}, "unexpected keyword argument 'width'"),
        ({"num_heads": 7}, "describes no model: model.num_heads=7"),
        ({"d_model": 0}, "describes no model: model.d_model=0"),
    ],
)
def test_models_that_are_refused(changes, error):
    found = stored("pretrain")
    with pytest.raises((TypeError, ValueError), match=error):
        Metadata.from_dict(found | {"model": found["model"] | changes})


def test_a_record_is_not_changed_in_place():
    metadata = Metadata.from_dict(stored("sft"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        metadata.step = 3
