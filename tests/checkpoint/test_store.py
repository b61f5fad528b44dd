"""A checkpoint is used only if every byte of it is what was written. Retention, and finding one."""

import contextlib
import errno
import json
import os
import pathlib
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest

from nanollama_jax import checkpoint, sharding
from nanollama_jax.checkpoint import integrity
from nanollama_jax.checkpoint.folders import steps_in
from nanollama_jax.corpus.prepare import train_tokenizer_for
from nanollama_jax.errors import BadInput
from nanollama_jax.model import Llama, ModelConfig
from nanollama_jax.tokenizer import Tokenizer

STATE = {"weights": np.arange(6.0, dtype=np.float32), "step": np.int32(3)}
RECORD = checkpoint.Metadata(
    weights_only=True,
    phase="imported",
    step=0,
    tokens_seen=0,
    model=ModelConfig(8, 1, 4, 1, 1, 4, 4),
    rope_theta=1e4,
    context_length=8,
    tokenizer_sha256="",
    provenance={"imported_from": "a test"},
)
SHAPES = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), STATE)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> pathlib.Path:
    """A workdir with complete checkpoints at steps 10 and 20."""
    root = tmp_path_factory.mktemp("pristine")
    (root / "text.txt").write_text(
        "".join(f"some words to learn {i} pieces from\n" for i in range(500))
    )
    train_tokenizer_for([f"file://{root}/text.txt"], root / "t.model", 290, 10**6)
    tokenizer = Tokenizer(root / "t.model")
    model = ModelConfig(
        vocab_size=290,
        num_layers=2,
        d_model=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        ffn_dim=32,
    )
    ids = np.zeros((1, 2), np.int32)
    shapes = nn.meta.unbox(
        jax.eval_shape(Llama(model).init, jax.random.key(0), ids, ids, ids, np.float32(1e4))
    )["params"]
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32), shapes
    )
    metadata = checkpoint.weights_metadata(model, tokenizer, 1e4, 32, {"imported_from": "a test"})
    with contextlib.closing(checkpoint.Checkpoints(root / "run")) as checkpoints:
        for step in (10, 20):
            checkpoints.save(
                step, {"params": params}, {"batches": step}, metadata, tokenizer.model_bytes
            )
    return root / "run"


@pytest.fixture
def workdir(pristine, tmp_path) -> pathlib.Path:
    """A copy to damage."""
    return pathlib.Path(shutil.copytree(pristine, tmp_path / "run"))


def small(workdir, *steps_and_losses, **options) -> list[int]:
    """Saves checkpoints of `STATE`; returns the steps that exist in the end."""
    with contextlib.closing(checkpoint.Checkpoints(workdir, **options)) as checkpoints:
        for step, loss in steps_and_losses:
            checkpoints.save(step, STATE, {}, RECORD.to_dict(), b"", validation_loss=loss)
    return steps_in(workdir / "checkpoints")


def as_earlier_versions_wrote(folder: pathlib.Path, **changes) -> None:
    """No checksums; `changes` to the model in its metadata."""
    (folder / "checksums.json").unlink()
    path = folder / "metadata/metadata"
    metadata = json.loads(path.read_text())
    del metadata["checksums"]
    path.write_text(json.dumps(metadata | {"model": metadata["model"] | changes}))


def restore(workdir):
    checkpoint.read_metadata(workdir, 20)  # as a run does first
    with contextlib.closing(checkpoint.Checkpoints(workdir, read_only=True)) as checkpoints:
        return checkpoints.restore(20, SHAPES, jax.tree.map(lambda _: None, SHAPES))


def flip(content: bytes) -> bytes:
    return (
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 16])
        + content[len(content) // 2 + 1 :]
    )


def test_whatever_happens_to_a_file_is_found_before_it_is_used(workdir, pristine):
    folder, whole = workdir / "checkpoints/step_20", pristine / "checkpoints/step_20"
    names = json.loads((folder / "checksums.json").read_text())
    assert {name.split("/")[0] for name in names} == {
        "state",
        "data",
        "metadata",
        "tokenizer",
    } and len(names) > 8
    for name in names:
        content = (whole / name).read_bytes()
        for damaged in (flip(content), content[:-1], None):
            (folder / name).unlink()
            if damaged is not None:
                (folder / name).write_bytes(damaged)
            for read in (checkpoint.load, restore):
                with pytest.raises(
                    BadInput,
                    match=f"step_20 is damaged .{name} is .*: to go back to step 10, rename it to",
                ) as caught:
                    read(workdir)
                assert "\n" not in str(caught.value)
            (folder / name).write_bytes(content)
    assert checkpoint.load(workdir).path == folder
    # as the message says
    folder.rename(folder.with_name("damaged_step_20"))
    assert checkpoint.load(workdir).path.name == "step_10"
    with contextlib.closing(checkpoint.Checkpoints(workdir)) as checkpoints:
        assert checkpoints.latest_step() == 10


def test_files_that_do_not_belong_and_checksums_that_are_not(workdir):
    folder = workdir / "checkpoints/step_20"
    (folder / "state/d/.DS_Store").touch()
    (folder / "notes.txt").touch()  # beside the items: nothing reads it
    checkpoint.load(workdir)
    (folder / "state/d/0123").touch()
    with pytest.raises(BadInput, match="state/d/0123 is not one of its files"):
        checkpoint.load(workdir)
    (folder / "state/d/0123").unlink()
    for content in ("", "[]", "[1]", '{"metadata/metadata": 1}'):
        (folder / "checksums.json").write_text(content)
        with pytest.raises(BadInput, match="step_20 is damaged"):
            checkpoint.load(workdir)
    (folder / "checksums.json").unlink()
    with pytest.raises(BadInput, match=r"step_20 is damaged .*checksums.json is missing"):
        checkpoint.load(workdir)
    shutil.rmtree(workdir / "checkpoints/step_10")
    with pytest.raises(BadInput, match="no earlier one here: restore it from a copy"):
        checkpoint.load(workdir)


def test_a_checkpoint_without_checksums_opens_with_a_warning(workdir, monkeypatch):
    as_earlier_versions_wrote(workdir / "checkpoints/step_20")
    warnings = []
    monkeypatch.setattr(
        integrity.log, "warning", lambda form, *values: warnings.append(form % values)
    )
    assert checkpoint.load(workdir).model.num_layers == 2
    assert (
        len(warnings) == 1
        and "step_20 is from an earlier version and has no checksums" in warnings[0]
    )
    checkpoint.load(workdir / "checkpoints/step_10")
    assert len(warnings) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 1},
        {"num_layers": 3},
        {"d_model": 32},
        {"num_kv_heads": 2},
        {"vocab_size": 291},
    ],
)
def test_metadata_that_disagrees_with_the_arrays(workdir, changes):
    as_earlier_versions_wrote(workdir / "checkpoints/step_20", **changes)
    with pytest.raises(BadInput, match="metadata describes another model than state holds"):
        checkpoint.load(workdir)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": "20"}, "metadata has step='20', not int"),
        ({"model": {"packed_documents": 8}}, "missing 7 required"),
        ({"rope_theta": None}, "rope_theta: not in the metadata"),
        ({"config": [], "weights_only": False}, "data_sha256, git_commit: not in the metadata"),
    ],
)
def test_metadata_of_wrong_types_is_damage_in_one_line(workdir, changes, reason):
    folder = workdir / "checkpoints/step_20"
    as_earlier_versions_wrote(folder)
    path = folder / "metadata/metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for read in (checkpoint.load, lambda workdir: checkpoint.read_metadata(workdir, 20)):
        with pytest.raises(
            BadInput, match=f"step_20 is damaged .*{reason}.*: to go back"
        ) as caught:
            read(workdir)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_is_opened_inside_a_mesh(pristine):
    """As where fine-tuning starts from it."""
    with sharding.use_mesh(sharding.make_mesh(1, 2, devices=jax.devices()[:2])):
        assert checkpoint.load(pristine).metadata.step == 0


def test_a_tokenizer_that_is_not_the_models(workdir):
    folder = workdir / "checkpoints/step_20"
    as_earlier_versions_wrote(folder)
    text = (folder / "tokenizer/metadata").read_text()
    (folder / "tokenizer/metadata").write_text(
        text[:200] + ("A" if text[200] != "A" else "B") + text[201:]
    )
    with pytest.raises(BadInput, match="is not the tokenizer of metadata's tokenizer_sha256"):
        checkpoint.load(workdir)


def test_a_checkpoint_has_its_checksums_before_it_has_its_name(tmp_path, monkeypatch):
    assert small(tmp_path, (1, None)) == [1]

    def fails(folder, names):
        if folder.name == "step_1":
            return digests(folder, names)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    digests = integrity._sha256_of
    monkeypatch.setattr(integrity, "_sha256_of", fails)
    with pytest.raises(BadInput, match="is full"):
        small(tmp_path, (2, None))
    assert checkpoint.find(tmp_path) == (tmp_path, 1) and checkpoint.reported_saved(tmp_path) == 1


def test_a_checkpoint_that_its_run_deletes_meanwhile(workdir, monkeypatch):
    digests = integrity._sha256_of

    def later(folder, names):
        if len(names) > 1:
            shutil.rmtree(folder)
        return digests(folder, names)

    monkeypatch.setattr(integrity, "_sha256_of", later)
    with pytest.raises(BadInput, match="step_20 was deleted while it was read"):
        checkpoint.load(workdir)


def test_the_best_validated_one_is_kept(tmp_path):
    nan = float("nan")
    assert small(
        tmp_path, (1, 3.0), (2, 1.0), (3, None), (4, nan), (5, 2.0), (6, None), keep_last=2
    ) == [2, 5, 6]
    # The best one is remembered after a restart; `keep_every` is independent of it.
    assert small(
        tmp_path, (7, None), (8, 0.5), (9, None), (10, 4.0), keep_last=1, keep_every=7
    ) == [7, 8, 10]
    (tmp_path / "checkpoints/step_8/metrics/metrics").write_text("{")
    with pytest.raises(BadInput, match="step_8 is damaged .metrics/metrics"):
        small(tmp_path)
    assert small(tmp_path / "unknown", (1, None), (2, None), (3, None), keep_last=2) == [2, 3]


@pytest.mark.parametrize(
    "place",
    [
        "checkpoints",
        "checkpoints/run1",
        "checkpoints/step_5",
        "step_5",
        "checkpoints/step_5/phase1",
        "a b/é",
    ],
)
def test_any_folder_can_be_a_workdir(pristine, tmp_path, place):
    workdir = tmp_path / place
    assert checkpoint.find(workdir) is None and checkpoint.find(tmp_path) is None
    workdir.mkdir(parents=True)
    assert checkpoint.find(workdir) is None
    shutil.copytree(pristine, workdir, dirs_exist_ok=True)
    assert (
        checkpoint.find(workdir) == (workdir, 20) == (workdir, checkpoint.reported_saved(workdir))
    )
    assert checkpoint.find(workdir / "checkpoints/step_10") == (workdir, 10)
    assert checkpoint.load(workdir).path == workdir / "checkpoints/step_20"
    assert checkpoint.find(tmp_path) is None


def test_a_checkpoint_is_found_from_within_it(pristine, monkeypatch):
    monkeypatch.chdir(pristine / "checkpoints/step_10")
    assert checkpoint.find(".") == (pristine, 10)
