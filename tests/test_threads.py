"""Threads of torch do not spin for milliseconds when the machine has other work."""

import os
import subprocess
import sys

PRINT = "import os, core; print(os.environ.get('GOMP_SPINCOUNT'))"


def printed(**settings):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run([sys.executable, "-c", PRINT], env=environment | settings, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().strip()


def test_importing_core_shortens_the_spin_before_torch_is_loaded():
    assert printed() == "1000"


def test_the_user_s_own_setting_is_kept():
    assert printed(GOMP_SPINCOUNT="7") == "7"
    assert printed(OMP_WAIT_POLICY="ACTIVE") == "None"
