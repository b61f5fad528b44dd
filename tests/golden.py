"""A golden run: 50 steps of pre-training at nano's shape on generated text, then SFT and DPO from it,
as main.py runs them.

    python -m tests.golden --write tests/golden.json   records each step's figures, and checksums of
                                                       the final parameters
    python -m tests.golden --exact tests/golden.json   compares this machine's figures, bit for bit

tests/end_to_end/test_golden.py compares with a tolerance, because CPUs round differently. A change
that is meant to move the curve records it again and says why in its commit.
"""

import argparse
import hashlib
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from nanollama_jax import checkpoint
from tests.end_to_end.conftest import Lab, fill, rows

FILE = pathlib.Path(__file__).with_name("golden.json")
STEPS = 50
NANO = dict(num_layers=4, d_model=256, num_heads=8, num_kv_heads=2, head_dim=32, ffn_dim=768)
THETA = ("--config.rope.start_theta=10000.0", "--config.rope.end_theta=10000.0")
LOGGED = ("loss", "grad_norm", "lr", "rope_theta", "batch_crc32", "margin", "accuracy", "kl", "z")


def run(lab: Lab, root: pathlib.Path) -> dict[str, Any]:
    """task -> {"steps": each step's figures, "params_sha256": of the final float32 parameters}."""
    model = [f"--config.model.{key}={value}" for key, value in NANO.items()]
    pretrain = [
        f"--config.end_step={STEPS}",
        f"--config.schedule.total_steps={STEPS}",
        "--config.schedule.decay_start=40",
    ]
    lab.run("phase1", root / "phase1", *model, *pretrain)
    for task in ("sft", "dpo"):
        lab.tool("prepare_data", task, root)
    lab.run("sft", root / "sft", *model, *THETA, f"--config.init_from={root / 'phase1'}")
    lab.run("dpo", root / "dpo", *model, *THETA, f"--config.init_from={root / 'sft'}")
    return {task: _figures(root / task) for task in ("phase1", "sft", "dpo")}


def _figures(workdir: pathlib.Path) -> dict[str, Any]:
    steps = {
        str(step): {key: row[key] for key in LOGGED if key in row}
        for step, row in rows(workdir).items()
    }
    digest = hashlib.sha256()
    for path, leaf in sorted(
        jax.tree.leaves_with_path(checkpoint.load(workdir).params),
        key=lambda found: jax.tree_util.keystr(found[0]),
    ):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return {"steps": steps, "params_sha256": digest.hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", metavar="FILE", type=pathlib.Path)
    what.add_argument("--exact", metavar="FILE", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(pathlib.Path(folder) / "data")
        lab.root.mkdir()
        fill(lab.root)
        found = run(lab, pathlib.Path(folder))
    if arguments.write:
        arguments.write.write_text(json.dumps(found, indent=1) + "\n")
    elif (expected := json.loads(arguments.exact.read_text())) != found:
        for task in expected:
            differing = [
                step
                for step, row in expected[task]["steps"].items()
                if found[task]["steps"].get(step) != row
            ]
            same = expected[task]["params_sha256"] == found[task]["params_sha256"]
            print(f"{task}: steps that differ: {', '.join(differing) or 'none'}")
            print(f"{task}: final parameters {'are the same' if same else 'differ'}")
        sys.exit(1)


if __name__ == "__main__":
    main()
