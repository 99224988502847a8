"""The conductor: from the names of checkpoints to one averaged file and a report."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from swa_avg.formats import is_safetensors, layout_for, open_checkpoint
from swa_avg.layout import find_state_dict
from swa_avg.output import AtomicFile, check_target
from swa_avg.plan import Plan, Rules, Treatment, make_plan
from swa_avg.select import Selection, expand, select
from swa_avg.tensors import DTYPES

