"""Checkpoint formats: one module for each format, with its reader and its writer.

In: a path. Out: a `Checkpoint`, of which only the headers are read; and the `Layout` of an
output. The format of a file is detected from its content, never from its suffix. Does not
interpret the tensors.
"""

from swa_avg.formats.bundles import numbers_in_yaml
from swa_avg.formats.checkpoint import (
    PROVENANCE,
    Checkpoint,
    Components,
    Headers,
    Layout,
    OutputStateDict,
    OutputStorage,
    OutputTensor,
    Splice,
)
from swa_avg.formats.components import (
    ROOT,
    averages,
    component_of,
    configuration,
    is_weights_name,
)
from swa_avg.formats.dcp import DISTRIBUTED
from swa_avg.formats.dcp_layout import DcpLayout
from swa_avg.formats.opening import (
    Form,
    checksum_places,
    form_of,
    is_checkpoint,
    layout_for,
    open_checkpoint,
    patch,
    with_provenance,
)
from swa_avg.formats.sharded_layout import FolderLayout, leaves, links_note

__all__ = [
    "DISTRIBUTED",
    "PROVENANCE",
    "ROOT",
    "Checkpoint",
    "Components",
    "DcpLayout",
    "FolderLayout",
    "Form",
    "Headers",
    "Layout",
    "OutputStateDict",
    "OutputStorage",
    "OutputTensor",
    "Splice",
    "averages",
    "checksum_places",
    "component_of",
    "configuration",
    "form_of",
    "is_checkpoint",
    "is_weights_name",
    "layout_for",
    "leaves",
    "links_note",
    "numbers_in_yaml",
    "open_checkpoint",
    "patch",
    "with_provenance",
]
