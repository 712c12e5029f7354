"""Lets the tests of this folder import scheduling: what they ask the scheduler with."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
