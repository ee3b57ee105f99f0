"""`scripts/train.py` for DeepSpeed on a CPU: without its shared-memory kernel, which would need a C++ compiler.

Launched by test_sharding.py. DeepSpeed then communicates through gloo; numbers do not change.
"""

import deepspeed.ops

from alignment.errors import run_or_exit
from alignment.launched import main

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
run_or_exit(main)
