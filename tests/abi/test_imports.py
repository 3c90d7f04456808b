"""The command line answers without construct: what it imports must not bring it."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["smc", "rpc", "results", "registers", "smc_operands", "rpc_operands", "terms"])
def test_construct_is_not_imported(module):
    program = f"import sys, optee.abi.{module}; print('construct' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
