"""Makes `tests/*.py` importable, and keeps tiny models on one thread, where they are fastest."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
