"""The destination of an average: its format, and the names and options that do not fit it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote

from swa_avg.averaging import wrapper
from swa_avg.checkpoints import StateDict, check_choice
from swa_avg.errors import OutputError
from swa_avg.formats import Components, Form, Layout, form_of, layout_for
from swa_avg.planning import Options, Plan, Rules
from swa_avg.storage import InputFile, check_target
from swa_avg.tensors import DTYPES

# Suffixes of formats that swa-avg does not write.
_OTHERS = (
    *(".onnx", ".h5", ".hdf5", ".keras", ".gguf", ".ggml", ".npz", ".npy", ".tflite", ".msgpack"),
    *(".pb", ".mlmodel", ".mlpackage", ".pdparams", ".engine", ".trt", ".mar", ".distcp"),
    *(".pt2", ".pte", ".ptl", ".torchscript", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z"),
    *(".json", ".yaml", ".yml", ".txt", ".csv", ".log", ".py", ".png", ".svg", ".html"),
)
_SINGLE = (Form.TORCH, Form.SAFETENSORS)


@dataclass(frozen=True)
class Destination:
    """Where an average is written, and in which format.

    Attributes:
        target: The path of the output.
        last: The state_dict of the last checkpoint, which decides the format if the path does not.
        options: The options of the average.
    """

    target: Path
    last: StateDict
    options: Options

    @cached_property
    def form(self) -> Form:
        """The format of the output."""
        return form_of(self.target, self.last.checkpoint, kept=self.options.keep_wrapper)

    @property
    def is_copy(self) -> bool:
        """Whether the output is a copy of the last checkpoint with other weights."""
        return self.options.keep_wrapper or self.form is Form.COPY

    @property
    def rules(self) -> Rules:
        """The rules for the treatment of tensors that follow from the options and the format."""
        strides = self.is_copy or self.form is Form.TORCH
        dtype = DTYPES.get(self.options.dtype)
        return Rules(self.options.bn_buffers, dtype, strides, self.is_copy)

    def layout(self, plan: Plan, opened: ExitStack) -> Layout:
        """Return the layout of the output.

        Args:
            plan: The plan of the average.
            opened: Closes the files that the output is copied from.

        Raises:
            OutputError: The format cannot hold a tensor, or one cannot be replaced in a copy.
        """
        last, options = self.last, self.options
        if self.is_copy:
            without = () if options.keep_wrapper else last.checkpoint.without or ()
            return wrapper.layout(last, plan, lambda file: opened.callback(file.close), without)
        shard_bytes = options.max_shard_size
        return layout_for(self.form, plan.state_dict, last.checkpoint, last.where, shard_bytes)

    def check(self, inputs: Iterable[InputFile]) -> None:
        """Refuse an output that cannot be written, or whose name does not fit its format.

        Args:
            inputs: Files that must not be overwritten.

        Raises:
            OutputError: The output is an input, exists, or does not fit the options.
            LayoutError: The last checkpoint has raw weights and an average, and it is open
                which of them the mean replaces.
        """
        if self.is_copy:
            self._check_original()
            check_choice(self.last, self.options.key, self.options.ema)
        self._check_suffix()
        self._check_form()
        self._check_shards()
        folder = self.form not in _SINGLE
        if self.is_copy:
            folder = self.last.checkpoint.path.is_dir()
        check_target(self.target, inputs, force=self.options.force, folder=folder)

    def _check_original(self) -> None:
        """Refuse to copy an average: it lacks what a checkpoint of the run has."""
        if not self.last.checkpoint.provenance:
            return
        of_form = self.form is Form.COPY
        what = "an output of its kind" if of_form else "--keep-wrapper"
        raise OutputError(
            f"is an average, but {what} needs a checkpoint to copy",
            file=self.last.checkpoint.path,
            remedy=f"Name a file, as in {self._as_file()}"
            if of_form
            else "Leave out --keep-wrapper",
        )

    def _check_suffix(self) -> None:
        """Refuse a name with the suffix of a format that swa-avg does not write."""
        target = self.target
        if self.form is Form.COPY:
            return
        if target.suffix.lower() == ".nemo":
            raise OutputError(
                "ends in .nemo, but the last checkpoint is not a .nemo archive",
                file=target,
                remedy=f"Name it {target.stem}.pt, or average .nemo archives",
            )
        if target.suffix.lower() in _OTHERS:
            name = target.name[: -len(target.suffix)]
            raise OutputError(
                f"ends in {target.suffix}, a format that swa-avg does not write",
                file=target,
                remedy=f"Name it {name}.pt or {name}.safetensors",
            )

    def _check_form(self) -> None:
        """Refuse a name or options that do not fit the format of the output."""
        checkpoint, form, single = self.last.checkpoint, self.form, self.form in _SINGLE
        if form is Form.COPY and self.options.dtype != "keep":
            raise OutputError(
                f"will be a copy of {checkpoint.path} with other weights, which keeps its dtypes",
                file=self.target,
                remedy=f"Leave out --dtype, or name a file, as in {self._as_file()}",
            )
        unlike = single and (checkpoint.is_bundle or checkpoint.path.is_dir())
        unlike |= form is Form.SAFETENSORS and checkpoint.format != "safetensors"
        if self.options.keep_wrapper and unlike:
            raise OutputError(
                f"names another format than {checkpoint.path}, which --keep-wrapper copies",
                file=self.target,
                remedy="Choose a name like that of the checkpoint, or leave out --keep-wrapper",
            )
        names = self.last.where.split(" + ")
        if isinstance(checkpoint.tree, Components) and len(names) > 1 and single:
            raise OutputError(
                f"is one file, but {checkpoint.path} has several models ({', '.join(names)})",
                file=self.target,
                remedy="Name a folder, as in -o swa, or take one model with --key "
                + quote(names[-1]),
            )

    def _check_shards(self) -> None:
        """Refuse --max-shard-size for an output that is not written in shards."""
        kept = self.options.keep_wrapper
        if not self.options.max_shard_size or (self.form is Form.FOLDER and not kept):
            return
        plain = self.target.with_suffix("")
        remedy = "Leave out --max-shard-size"
        if not kept and form_of(plain, self.last.checkpoint) is Form.FOLDER:
            remedy += f", or name a folder, as in -o {quote(str(plain))}"
        raise OutputError(
            "is no Hugging Face folder, and only those are written in shards",
            file=self.target,
            remedy=remedy,
        )

    def _as_file(self) -> str:
        """Return the options to write a file, with one model if there are several."""
        before, _, name = self.last.where.rpartition(" + ")
        one = before and isinstance(self.last.checkpoint.tree, Components)
        return f"-o swa.pt --key {quote(name)}" if one else "-o swa.pt"
