"""Where training frameworks store the weights of a model and the averages of a run.

A row of the table has the places that a framework uses, which of the two its loader takes,
and whether the loader needs the whole file. Each row was checked against the source of the
framework, both where it saves and where it loads. Names inside a state_dict are the subject
of `halves`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Loads(Enum):
    """The weights that a framework's loader takes from a file that has both."""

    AVERAGE = "the average"
    WEIGHTS = "the raw weights"
    EITHER = "either, depending on its options"


@dataclass(frozen=True)
class Framework:
    """A kind of file that a framework writes.

    Attributes:
        name: The framework, or the part of it that writes such files.
        weights: The dotted path of the raw weights; `*` matches one name.
        average: The dotted path of the average, likewise; empty if there is none.
        sign: A path that only files of this kind have; empty if the other paths are enough.
        loads: Which of the two the framework's loader takes.
        needs: The loader that needs the whole file; empty if it accepts a bare state_dict.
        alone: How its loader takes the weights alone, if its optimizer state has a copy of the
            weights, which the loader prefers; empty otherwise.
        running: Whether the average is an equal-weight mean since a fixed start, so that each
            average includes the earlier ones.
        count: The dotted path of the number of models or steps in a running average; if it
            starts with a dot, it is beside the average.
        period: The dotted path of the number of steps between the models of a running average,
            if `count` counts all steps.
    """

    name: str
    weights: str
    average: str = ""
    sign: str = ""
    loads: Loads = Loads.WEIGHTS
    needs: str = ""
    alone: str = ""
    running: bool = False
    count: str = ""
    period: str = ""


_LIGHTNING = "LightningModule.load_from_checkpoint"

# The first row that matches a file is used. Rows with an average come before rows without.
FRAMEWORKS = (
    # lightning/pytorch/callbacks/weight_averaging.py: on_save_checkpoint exchanges the two.
    Framework(
        "Lightning (WeightAveraging)",
        "current_model_state",
        "state_dict",
        sign="averaging_state",
        loads=Loads.AVERAGE,
        needs=_LIGHTNING,
    ),
    # lightning/pytorch/callbacks/stochastic_weight_avg.py: state_dict of the callback.
    Framework(
        "Lightning (StochasticWeightAveraging)",
        "state_dict",
        "callbacks.*.average_model_state",
        sign="pytorch-lightning_version",
        needs=_LIGHTNING,
        running=True,
        count=".n_averaged",
    ),
    # NVIDIA's and other EMA callbacks for Lightning before 2.0: on_save_checkpoint.
    Framework(
        "Lightning (EMA callback)",
        "state_dict",
        "callbacks.*.ema_state_dict",
        sign="pytorch-lightning_version",
        needs=_LIGHTNING,
    ),
    # mmengine/hooks/ema_hook.py: before_save_checkpoint exchanges the two.
    Framework(
        "mmengine (EMAHook)",
        "ema_state_dict",
        "state_dict",
        sign="meta.mmengine_version",
        loads=Loads.AVERAGE,
    ),
    # composer/algorithms/ema/ema.py: the model holds the EMA while a checkpoint is saved.
    Framework(
        "Composer (EMA)",
        "state.algorithms.*.1.training_model",
        "state.model",
        loads=Loads.AVERAGE,
        needs="Composer's load_path",
    ),
    # ultralytics/engine/trainer.py save_model; nn/tasks.py load_checkpoint: ema, else model.
    Framework(
        "YOLO",
        "model",
        "ema",
        sign="best_fitness",
        loads=Loads.AVERAGE,
        needs="YOLO(...)",
    ),
    # timm/models/_helpers.py load_state_dict: use_ema is true by default.
    Framework("timm", "state_dict", "state_dict_ema", loads=Loads.AVERAGE),
    # timgaripov/swa train.py: both are resumed.
    Framework(
        "timgaripov/swa",
        "state_dict",
        "swa_state_dict",
        loads=Loads.EITHER,
        needs="its --resume",
        running=True,
        count="swa_n",
    ),
    # kekmodel/FixMatch-pytorch train.py: both are resumed, the EMA is evaluated with --use-ema.
    Framework("FixMatch-pytorch", "state_dict", "ema_state_dict", loads=Loads.EITHER),
    # icefall/checkpoint.py: model_avg is the mean over all batches; decode.py's
    # --use-averaged-model, on by default, takes it.
    Framework(
        "icefall",
        "model",
        "model_avg",
        loads=Loads.AVERAGE,
        needs="icefall's load_checkpoint",
        running=True,
        count="batch_idx_train",
        period="average_period",
    ),
    # vision/references/classification/train.py: model_ema is evaluated if enabled.
    Framework("torchvision's references", "model", "model_ema", loads=Loads.EITHER),
    # fairseq/checkpoint_utils.py load_model_ensemble_and_task takes model.
    Framework("fairseq", "model", "extra_state.ema", needs="fairseq's loader"),
    # microsoft/Semi-supervised-learning eval.py: ema_model, else model.
    Framework("USB", "model", "ema_model", loads=Loads.AVERAGE),
    # facebookresearch/DiT download.py find_model; lyuwenyu/RT-DETR: ema, else model.
    Framework("DiT, RT-DETR and others", "model", "ema", loads=Loads.AVERAGE),
    # basicsr/models/base_model.py load_network: the option param_key_g selects one.
    Framework("BasicSR", "params", "params_ema", loads=Loads.EITHER, needs="BasicSR's loader"),
    # super_gradients/training/models/model_factory.py: ema_net if there is one.
    Framework("SuperGradients", "net", "ema_net", loads=Loads.AVERAGE, needs="SuperGradients"),
    # Rows without an average.
    Framework("Lightning", "state_dict", sign="pytorch-lightning_version", needs=_LIGHTNING),
    Framework("mmengine", "state_dict", sign="meta.mmengine_version"),
    Framework("timm and others", "state_dict"),
    Framework("YOLO", "model", sign="best_fitness", needs="YOLO(...)"),
    Framework("fairseq", "model", sign="extra_state.train_iterator", needs="fairseq's loader"),
    Framework("icefall", "model", sign="batch_idx_train", needs="icefall's load_checkpoint"),
    # With mixed precision, the optimizer state of these two has the weights in float32.
    Framework(
        "Megatron-LM",
        "model",
        sign="checkpoint_version",
        needs="Megatron-LM's --load",
        alone="--no-load-optim",
    ),
    Framework("nanoGPT", "model", sign="model_args", needs="nanoGPT's sample.py"),
    # fvcore/common/checkpoint.py _load_file takes a bare state_dict as well.
    Framework("torchvision's references, detectron2 and others", "model"),
    Framework("Catalyst and others", "model_state_dict"),
    Framework(
        "DeepSpeed",
        "module",
        sign="dp_world_size",
        needs="DeepSpeed's load_checkpoint",
        alone="load_checkpoint(..., load_module_only=True)",
    ),
    Framework("DeepSpeed and others", "module"),
    Framework("Composer", "state.model", needs="Composer's load_path"),
    Framework("OLMo-core and others", "app.model"),
)

# The places of raw weights in the files of all frameworks.
WEIGHTS = ("state_dict", "model", "model_state_dict", "module", "state.model", "app.model")
# Parts of the model that some frameworks save separately.
PARTNERS = {"model": "generator"}  # OpenNMT-py

# Words that mark an average in the name of an entry or a submodule.
_AVERAGE = re.compile(r"(?:^|_)(?:ema|swa|averaged?|avg|shadow|polyak)(?:s?_|\d*$)", re.IGNORECASE)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # modelEMA
# Every name that marks an average contains one of these: a fast first test.
AVERAGE_WORDS = ("ema", "swa", "avg", "average", "shadow", "polyak")
# Names that do not mark an average of weights, although they contain such a word.
_OTHER = re.compile(r"optim|sched|scaler|loss|metric|stats|config|args", re.IGNORECASE)


def marks_average(name: str) -> bool:
    """Return whether a name marks an average of weights."""
    return bool(_AVERAGE.search(name)) and not _OTHER.search(name)


def entry_marks_average(name: str) -> bool:
    """Return whether the name of an entry marks an average, also in camel case: modelEMA.

    In a submodule such a word may mean something else: globalAvgPool, swaAttention.
    """
    return marks_average(_CAMEL.sub("_", name))


def without_average(name: str) -> str:
    """Return a name without the word that marks an average: `model` for `model_ema`."""
    return _AVERAGE.sub("_", name).strip("_")
