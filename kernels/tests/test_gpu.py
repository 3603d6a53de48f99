"""Triton reads TRITON_INTERPRET when imported, and torch.compile imports it: so its tests have their own process."""

import os
import subprocess
import sys
from pathlib import Path


def test_triton_kernels_under_the_interpreter():
    cases = Path(__file__).with_name("gpu_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=cases.parents[2], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert "5 passed" in run.stdout
