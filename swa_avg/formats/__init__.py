"""Checkpoint formats: one module for each, with its reader and its writer.

In: a path. Out: a `Checkpoint`, of which only the headers are read; and the `Layout` of
an output. The content decides which format a file has, never its suffix. Knows nothing
of what the tensors are for.
"""

from swa_avg.formats.checkpoint import (
    PROVENANCE,
    Checkpoint,
    Components,
    Layout,
    OutputStateDict,
    OutputStorage,
    OutputTensor,
    Splice,
)
from swa_avg.formats.components import ROOT, averages, component_of
from swa_avg.formats.dcp_layout import DcpLayout
from swa_avg.formats.headers import Headers
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
    "form_of",
    "is_checkpoint",
    "layout_for",
    "leaves",
    "links_note",
    "open_checkpoint",
    "patch",
    "with_provenance",
]
