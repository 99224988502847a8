"""The words in the names of checkpoints that mark an epoch, step, part, metric or average.

The module has tables of words in lower case, and functions that look words up in them. The
words come from the name templates of frameworks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_CAMEL = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A number next to one of these is an epoch. ESPnet and Composer use `ep`, mmengine forks `epo`.
EPOCH = _set("epoch epochs ep epo epoche epochen")
# A number next to one of these is a step. Composer uses `ba` for batch, Ignite uses `it`.
STEP = _set(
    "step steps globalstep globalsteps gstep stp iter iters iteration iterations it itr itrs "
    "update updates upd batch batches ba minibatch episode episodes timestep timesteps rollout "
    "round rounds cycle cycles generation"
)
# A number next to one of these counts data: tokens (OLMo), samples (Composer), kimg (StyleGAN).
COUNT = _set(
    "token tokens tok sample samples example examples images kimg mimg nimg seen frame frames"
)
# Single letters have a meaning only directly before a number: net-e10-it5000.
LETTERS = {"e": "epoch", "i": "step", "s": "step"}
KINDS = {
    **dict.fromkeys(EPOCH, "epoch"),
    **dict.fromkeys(STEP, "step"),
    **dict.fromkeys(COUNT, "count"),
}
# A number next to one of these is a part of a model: ranks of Megatron, DeepSpeed and NeMo,
# shards of fairseq and fairseq2 (sdp), parts of metaseq, layers and experts of
# Megatron-DeepSpeed, and `consolidated.00.pth` of Llama.
PARTS = _set(
    "rank shard part partition chunk slice split piece pipe consolidated tp pp mp dp gpu cuda "
    "device proc process worker node host layer expert vpp sdp mpu parallel experts "
    "blocks submodel section"
)
# Those of them that name a machine or a process: the one that saved a checkpoint.
MACHINES = _set("gpu cuda device proc process worker node host")
# Words before `rank`: mp_rank_00, tp_rank_00_pp_rank_000, zero_pp_rank_0_mp_rank_00.
RANK_KINDS = _set("tp pp mp dp ep cp sp etp edp zero local global tensor pipeline")
# Words before a stage that is a part of a model; others are stages of a training.
PIPES = _set("pipeline pipe pp")
# These mark an average of weights, unless a metric follows (avg_loss).
AVERAGES = _set(
    "avg ave avrg average averaged averages averaging swa swag swad ema lawa polyak soup souped "
    "modelavg avgmodel emamodel modelema swamodel modelswa netema emanet"
)
# A number next to one of these counts averaged checkpoints: avg_5, ave_10best, last10.avg.
COUNTED_AVERAGES = _set("avg ave avrg average averaged averages averaging soup")
# These mark a checkpoint without a number.
LATEST = _set("last latest final newest current end finished")
ROLES = LATEST | _set("best top better optimal")
# These come before the number of a checkpoint and have no meaning.
NOUNS = _set(
    "checkpoint checkpoints chkpt chkpnt chk ckpt ckpts cpt cp model models snapshot snap net "
    "network weights weight state params param save saved saves training train "
    "pytorch no nr num number n"
)
# These are models of one checkpoint that may have the same tensors. They are never one run.
MODELS = _set(
    "generator discriminator gen disc netg netd actor critic policy value q qf qnet target encoder "
    "decoder student teacher online momentum prior posterior"
)
# A folder with one of these words in its name is a checkpoint of a run.
CHECKPOINT_NOUNS = _set("checkpoint checkpoints chkpt ckpt ckpts snapshot save")
# Whether a lower or a higher value is better, by a word in the name of the metric.
METRICS = {
    "min": "loss nll err error wer cer ter eer ppl perplexity mae mse rmse fid",
    "max": "acc accuracy bleu chrf rouge meteor f1 auc auroc map miou iou dice top precision "
    "recall psnr ssim mrr ndcg",
}
MODES = {word: mode for mode, words in METRICS.items() for word in words.split()}
# With one of these the value is not the metric itself: sklearn's neg_log_loss, acc_std, f1_gap.
DERIVED = _set("neg negative minus inv inverse gap drop delta diff std stdev var variance scale")
# Metrics whose names do not show whether a lower or a higher value is better.
SCORES = _set(
    "score metric monitor reward rewards rew return returns profit elo fitness kappa pesq stoi sdr "
    "sisdr pcc corr spearman pearson lpips kid ap mcc cider spice elbo bpc bpd epe hausdorff "
    "jaccard r2 hd95 d1"
)
# These qualify a metric: `val_loss` is a different metric from `loss`.
QUALIFIERS = _set(
    "val valid validation dev test train training eval evaluation macro micro weighted mean avg "
    "ave average ema swa coco bbox segm mask kl ce l1 l2 mel gan rec reg cls box obj"
)
# Settings of a run. They are the same for all checkpoints of a run.
SETTINGS = _set(
    "lr wd bs batchsize seed dropout drop temp temperature alpha beta gamma momentum warmup rho "
    "sigma lambda tau decay width depth dim size heads layers k p scale crop fold noise ratio eta "
    "margin res ema swa hidden rate version ver run exp trial try task stage phase cv kfold member "
    "client replica site"
)
# The suffixes of checkpoints, and words that users put before them.
SUFFIXES = _set(
    "pt pth ckpt bin safetensors tar pkl pickle th t7 model params pdparams weights h5 hdf5 keras "
    "nemo zip pyt torch"
)


def in_camel_case(word: str) -> list[str]:
    """Return the parts of a word in camel case: `model` and `EMA` for `modelEMA`."""
    return _CAMEL.findall(word)


def said(word: str) -> str:
    """Return a word in lower case, or the known word at its end: `rank` of `modelRank`."""
    pieces = in_camel_case(word)
    last = pieces[-1].lower() if len(pieces) > 1 else ""
    return last if last in KINDS or last in PARTS else word.lower()


def is_metric(word: str) -> bool:
    """Return whether a word is the name of a metric."""
    return word in MODES or word in SCORES


def marks_average(word: str) -> bool:
    """Return whether a word or a part of it marks an average: modelEMA, but not avgLoss."""
    if word.lower() in AVERAGES:
        return True
    pieces = [piece.lower() for piece in in_camel_case(word)]
    return any(
        piece in AVERAGES and "".join(pieces[at + 1 :]) not in MODES
        for at, piece in enumerate(pieces)
    )


@dataclass(frozen=True)
class Label:
    """The name of a metric in a path, possibly with unrelated words before it.

    Attributes:
        words: The words and numbers of the name in lower case.
        joints: The separator before each of them.
    """

    words: tuple[str, ...]
    joints: tuple[str, ...]

    def is_called(self, name: str) -> bool:
        """Return whether the label names a metric: `best_loss` is `loss`, but `val_loss` is not."""
        wanted = tuple(
            token[0].lower() for token in re.findall(r"([^\W\d_]+|[0-9]+(\.\d+)?)", name)
        )
        start = len(self.words) - len(wanted)
        if not wanted or start < 0 or self.words[start:] != wanted:
            return False
        if start == 0 or self.joints[start] not in ("_", ".", "/"):
            return True
        before = self.words[start - 1]
        known = before in NOUNS or before in ROLES
        return known or (start == 1 and before not in QUALIFIERS)
