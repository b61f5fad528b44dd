"""Memory by arithmetic against the compiler, what `auto` picks by it, and the tool that prints it.

The compiler's figures are of jax 0.11.2 for H100s, bytes of one device without cuDNN's workspace, each by

    python tools/plan.py --config configs/phase1.py:SCALE --devices N --compile h100_sxm.txtpb --remat POLICY
        --config.seq_len=T --config.batch_size=ROWS --config.accumulation=A --config.model.attention=ATTENTION
"""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys

import jax
import pytest

from configs import phase1
from nanollama_jax import sharding
from nanollama_jax.errors import BadInput
from nanollama_jax.model import ModelConfig
from nanollama_jax.model.config import REMAT_POLICIES
from nanollama_jax.planning import memory, plan
from nanollama_jax.planning.compile_for import compile_for
from nanollama_jax.recipes import MODELS
from nanollama_jax.train import settle, step
from tests.conftest import ROOT

COMPILED = [  # scale, devices, rows, tokens, remat, accumulation, attention, GB
    ("1b", 2, 32, 4096, "full", 1, "cudnn_packed", 20.76),
    ("1b", 2, 32, 4096, "attention", 1, "cudnn_packed", 26.74),
    ("1b", 2, 32, 4096, "qkv", 1, "cudnn_packed", 33.92),
    ("1b", 2, 32, 4096, "gate_up", 1, "cudnn_packed", 64.78),
    ("1b", 2, 32, 4096, "gate_up", 1, "cudnn", 64.77),
    ("1b", 2, 32, 4096, "products", 1, "cudnn_packed", 69.69),
    ("1b", 2, 32, 4096, "none", 4, "cudnn_packed", 58.99),
    ("1b", 2, 8, 16_384, "qkv", 1, "cudnn_packed", 33.92),
    ("1b", 2, 8, 16_384, "products", 1, "cudnn_packed", 69.69),
    ("1b", 1, 32, 4096, "qkv", 2, "cudnn_packed", 46.59),
    ("1b", 1, 32, 4096, "full", 8, "cudnn_packed", 25.16),
    ("1b", 8, 32, 4096, "qkv", 1, "cudnn_packed", 9.13),
    ("1b", 2, 32, 4096, "full", 4, "xla", 22.28),
    ("300m", 1, 32, 4096, "gate_up", 1, "cudnn_packed", 57.48),
    ("300m", 2, 32, 4096, "attention", 8, "cudnn_packed", 5.15),
    ("300m", 2, 32, 4096, "full", 8, "xla", 5.55),
    ("60m", 1, 32, 4096, "full", 1, "cudnn_packed", 5.75),
    ("60m", 1, 32, 4096, "none", 2, "cudnn_packed", 28.62),
]


def model_of(scale, remat="full", attention="cudnn_packed"):
    return ModelConfig(
        **MODELS[scale],
        dtype="bfloat16",
        attention=attention,
        document_mask=attention != "cudnn",
        remat=remat,
    )


STEP = dict(rows=32, seq_len=4096, accumulation=1, fsdp=2, data=1, chunk_tokens=8192)


@pytest.mark.parametrize(
    ("scale", "devices", "rows", "seq_len", "remat", "accumulation", "attention", "gigabytes"),
    COMPILED,
)
def test_arithmetic_is_within_a_tenth_of_the_compiler(
    scale, devices, rows, seq_len, remat, accumulation, attention, gigabytes
):
    shape = STEP | dict(rows=rows, seq_len=seq_len, accumulation=accumulation, fsdp=devices)
    took = memory.step_memory(model_of(scale, remat, attention), **shape)
    assert took.compiled / 1e9 == pytest.approx(gigabytes, rel=0.1)


@pytest.mark.parametrize("scale", ["nano", "1b"])
def test_state_and_checkpoint_are_what_the_real_state_takes(scale):
    config = phase1.get_config(scale)
    with sharding.use_mesh(mesh := sharding.make_mesh(1, 2, devices=jax.devices()[:2])):
        shapes = step.program(config, model_of(scale, attention="xla"), mesh).state_shapes
    bytes_of_state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert plan.checkpoint_bytes(model_of(scale)) == pytest.approx(
        bytes_of_state, abs=100
    )  # counters
    assert memory.step_memory(model_of(scale), **STEP).state == pytest.approx(
        bytes_of_state / 2, abs=100
    )


def test_more_kept_is_more_memory_and_auto_takes_the_most_that_fits():
    totals = {
        remat: memory.step_memory(model_of("1b", remat), **STEP).total for remat in REMAT_POLICIES
    }
    assert list(totals.values()) == sorted(totals.values())
    for remat, total in totals.items():
        assert memory.fastest_remat(model_of("1b"), total, **STEP) == remat
        assert memory.fastest_remat(model_of("1b"), total + 1e8, **STEP) == remat
    with pytest.raises(
        BadInput,
        match=r"needs 24\.8 GB per device even with model.remat=full, and 20\.0 are available: raise accumulation \(now 1\)",
    ):
        memory.fastest_remat(model_of("1b"), 20e9, **STEP)


def test_room_for_documents_costs_workspace():
    small, large = (
        memory.step_memory(dataclasses.replace(model_of("1b"), packed_documents=room), **STEP)
        for room in (8, 64)
    )
    assert (
        small.workspace == 16 * 8 * 4096 * 32 * 65 * 4 and large.workspace == 8 * small.workspace
    )  # 35 GB


def test_auto_is_settled_for_this_machine():
    config = phase1.get_config("nano")
    config.model.remat = "auto"
    assert settle.settle(config).remat == "full"


@pytest.mark.parametrize(
    ("capability", "mask", "head_dim", "dtype", "expected"),
    [
        (9.0, True, 64, "bfloat16", "cudnn_packed"),
        (9.0, False, 64, "bfloat16", "cudnn"),
        (8.0, True, 64, "bfloat16", "xla"),
        (8.0, False, 64, "bfloat16", "cudnn"),
        (7.5, False, 64, "bfloat16", "xla"),
        (9.0, True, 20, "bfloat16", "xla"),
        (9.0, True, 64, "float32", "xla"),
        (0.0, True, 64, "float32", "xla"),
    ],
)
def test_attention_is_chosen_by_hardware(capability, mask, head_dim, dtype, expected):
    assert (
        settle.fastest_attention(
            dict(dtype=dtype, head_dim=head_dim, document_mask=mask), capability
        )
        == expected
    )


def run_plan(*flags, expect=0):
    done = subprocess.run(
        [sys.executable, "tools/plan.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expect, done.stderr
    return done.stdout if expect == 0 else done.stderr


def test_the_tool_prints_a_plan():
    text = run_plan("--config", "configs/phase1.py", "--mfu", "0.5")
    assert "1,100,048,384 parameters on 2 h100, cudnn_packed attention" in text
    assert "7.31e9, causal (8.81e9 nominal)" in text and "24.12e9 tokens in 2.1 days" in text
    assert "13.2 GB a checkpoint" in text and "remat=auto takes gate_up" in text
    assert max(len(line.rstrip()) for line in text.splitlines()[5:]) <= 90 and "…" not in text


def test_the_tool_refuses_in_one_line():
    for flags, words in (
        (("--devices", "3"), "cannot be split over 3 device(s)"),
        (("--compile", "no-such-file"), "no-such-file: No such file"),
        (("--mfu", "nan"), "--mfu=nan"),
        (
            ("--config.seq_len=0", "--config.mesh.data=0", "--config.checkpoint.every=0"),
            "seq_len=0: must be a whole number from 2",
        ),
        (("--remat", "qkv"), "--remat needs --compile"),
        (
            ("--remat", "dots", "--compile", "any"),
            "should be one of <full|attention|qkv|gate_up|products|none>",
        ),
    ):
        text = run_plan("--config", "configs/phase1.py", *flags, expect=2)
        assert text.startswith("error: ") and words in text and text.count("\n") == 1


def test_the_step_compiled_for_two_h100s_gathers_in_16_bits_and_runs_attention_once():
    """Where jax's CUDA plugin is, and XLA's description of an H100 (NANOLLAMA_H100_DESCRIPTION)."""
    description = os.environ.get("NANOLLAMA_H100_DESCRIPTION")
    if not description or not importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("needs jax's CUDA plugin, and NANOLLAMA_H100_DESCRIPTION=h100_sxm.txtpb")
    config = phase1.get_config("1b")
    compiled = compile_for(config, model_of("1b", "gate_up"), 2, description)
    assert compiled.bytes < 0.92 * 84.9e9
    assert (
        compiled.hlo.count('custom_call_target="__cudnn$fmhaSoftmax"')
        == compiled.hlo.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"')
        == 1
    )
    gathers = [
        line.split(" all-gather-start(")[0]
        for line in compiled.hlo.splitlines()
        if " all-gather-start(" in line
    ]
    assert len(gathers) >= 4 and not any("f32[" in types for types in gathers)
    scatters = [
        line.split(" reduce-scatter-start(")[0]
        for line in compiled.hlo.splitlines()
        if " reduce-scatter-start(" in line
    ]
    wide = {shape for types in scatters for shape in re.findall(r"f32\[[\d,]+\]", types)}
    assert wide <= {
        "f32[32000,2048]",
        "f32[32000,1024]",
        "f32[2048,32000]",
        "f32[1024,32000]",
    }  # the embedding's and the head's gradients
    assert not re.search(r"(f32|bf16)\[(65536|16,4096),32000\]", compiled.hlo)
    assert ".remat" not in compiled.hlo


def test_without_the_cuda_plugin_compiling_is_refused(tmp_path):
    if importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("the CUDA plugin is installed")
    description = tmp_path / "gpu.txtpb"
    description.write_text("")
    with pytest.raises(BadInput, match="needs jax 0.11 or later with its CUDA plugin"):
        compile_for(phase1.get_config("1b"), model_of("1b"), 2, description)
