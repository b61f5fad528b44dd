"""The loss curve cannot move unnoticed: 50 steps at nano's shape, then SFT and DPO, are compared with
the figures recorded in tests/golden.json.
"""

import json

import pytest

from tests import golden

# Rounding differs between CPUs, and 50 steps carry it on.
TOLERANCE = {
    "loss": 2e-3,
    "z": 5e-3,
    "grad_norm": 5e-2,
    "lr": 1e-6,
    "rope_theta": 0,
    "batch_crc32": 0,
}


def test_curve_is_the_recorded_one(lab, tmp_path):
    expected, found = json.loads(golden.FILE.read_text()), golden.run(lab, tmp_path)
    for task, recorded in expected.items():
        assert found[task]["steps"].keys() == recorded["steps"].keys()
        for step, row in recorded["steps"].items():
            for name, tolerance in TOLERANCE.items():
                if name in row:
                    assert found[task]["steps"][step][name] == pytest.approx(
                        row[name], rel=tolerance, abs=1e-7
                    ), (task, step, name)
