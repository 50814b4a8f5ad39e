"""Tests import flexidepth.py from the folder above, however pytest is started."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # on a busy machine two threads wait for each other 40 times longer
