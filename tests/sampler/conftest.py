"""Lets the tests of this folder import sampling: what they ask the sampler with."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
