"""The words in the names of checkpoints: which say epoch, step, part, metric, average.

Tables, in lower case, and how a word is looked for in them. The sources are the
frameworks' own templates of names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_CAMEL = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A number beside one of these is an epoch. `ep` is ESPnet's and Composer's, `epo` mmengine forks'.
EPOCH = _set("epoch epochs ep epo epoche epochen")
# A number beside one of these is a step. `ba` is Composer's batch, `it` Ignite's and Keras users'.
STEP = _set(
    "step steps globalstep globalsteps gstep stp iter iters iteration iterations it itr itrs "
    "update updates upd batch batches ba minibatch episode episodes"
)
# A count that grows with the run: OLMo's tokens, Composer's samples, StyleGAN's kimg.
COUNT = _set("token tokens tok sample samples example examples images kimg mimg nimg seen")
# Single letters that say so only with a number right behind them: net-e10-it5000.
LETTERS = {"e": "epoch", "i": "step", "s": "step"}
KINDS = {
    **dict.fromkeys(EPOCH, "epoch"),
    **dict.fromkeys(STEP, "step"),
    **dict.fromkeys(COUNT, "count"),
}
# A number beside one of these says which part of a model a file holds: Megatron's, DeepSpeed's
# and NeMo's ranks, fairseq's shards, metaseq's parts, Megatron-DeepSpeed's layers and experts,
# Llama's `consolidated.00.pth`.
PARTS = _set(
    "rank shard part partition chunk slice piece pipe consolidated tp pp mp gpu cuda device proc "
    "process worker node host layer expert"
)
# What stands before `rank`: mp_rank_00, tp_rank_00_pp_rank_000, zero_pp_rank_0_mp_rank_00.
RANK_KINDS = _set("tp pp mp dp ep cp sp etp edp zero local global tensor pipeline")
# What stands before a stage that is a part of a model; others are stages of a training.
PIPES = _set("pipeline pipe pp")
# These name an average of weights. What a metric is the average of stands behind them.
AVERAGES = _set(
    "avg ave avrg average averaged averages averaging swa swag swad ema lawa polyak soup souped "
    "modelavg avgmodel emamodel modelema swamodel modelswa netema emanet"
)
# A number beside one of these says how many were averaged: avg_5, ave_10best, last10.avg.
COUNTED_AVERAGES = _set("avg ave avrg average averaged averages averaging soup")
# These say which checkpoint a file is, without a number.
LATEST = _set("last latest final newest current end finished")
ROLES = LATEST | _set("best top better optimal")
# These stand before the number of a checkpoint and say nothing themselves.
NOUNS = _set(
    "checkpoint checkpoints chkpt chkpnt chk ckpt ckpts cpt cp model models snapshot snap net "
    "network weights weight state params param save saved saves training train "
    "pytorch no nr num number n"
)
# Folders under one of these words are a run's checkpoints.
CHECKPOINT_NOUNS = _set("checkpoint checkpoints chkpt ckpt ckpts snapshot save")
# Whether a small or a large metric is good, by a word of its name.
METRICS = {
    "min": "loss nll err error wer cer ter eer ppl perplexity mae mse rmse fid",
    "max": "acc accuracy bleu chrf rouge meteor f1 auc auroc map miou iou dice top precision "
    "recall psnr ssim mrr ndcg",
}
MODES = {word: mode for mode, words in METRICS.items() for word in words.split()}
# Metrics whose names do not tell which way is good.
SCORES = _set("score metric monitor reward fitness kappa pesq stoi sdr sisdr pcc corr lpips kid")
# These say of what, or on what, a metric is: `loss` is another metric than `val_loss`.
QUALIFIERS = _set(
    "val valid validation dev test train training eval evaluation macro micro weighted mean avg "
    "ave average ema swa coco bbox segm mask kl ce l1 l2 mel gan rec reg cls box obj"
)
# Settings of a run. A run differs from another in them, no checkpoint from the next.
SETTINGS = _set(
    "lr wd bs batchsize seed dropout drop temp temperature alpha beta gamma momentum warmup rho "
    "sigma lambda tau decay width depth dim size heads layers k p scale crop fold noise ratio eta "
    "margin res ema swa hidden rate version ver run exp trial try task stage phase"
)
# The suffixes of checkpoints, and what torch users put before them.
SUFFIXES = _set(
    "pt pth ckpt bin safetensors tar pkl pickle th t7 model params pdparams weights h5 hdf5 keras "
    "nemo zip pyt torch"
)


def in_camel_case(word: str) -> list[str]:
    """Return the words in a word: `model` and `EMA` in `modelEMA`."""
    return _CAMEL.findall(word)


def said(word: str) -> str:
    """Return a word in lower case; of `modelRank` what stands at its end, if that is known."""
    pieces = in_camel_case(word)
    last = pieces[-1].lower() if len(pieces) > 1 else ""
    return last if last in KINDS or last in PARTS else word.lower()


def is_metric(word: str) -> bool:
    """Tell whether a word is the name of a metric."""
    return word in MODES or word in SCORES


def says_average(word: str) -> bool:
    """Tell whether a word says so, or one in it: modelEMA, but not avgLoss."""
    if word.lower() in AVERAGES:
        return True
    pieces = [piece.lower() for piece in in_camel_case(word)]
    return any(
        piece in AVERAGES and "".join(pieces[at + 1 :]) not in MODES
        for at, piece in enumerate(pieces)
    )


@dataclass(frozen=True)
class Label:
    """The name of a metric, as far as a path shows where it begins.

    Attributes:
        words: Its words and the numbers in it, in lower case, with what may stand before it.
        joints: What stands before each of them.
    """

    words: tuple[str, ...]
    joints: tuple[str, ...]

    def is_called(self, name: str) -> bool:
        """Tell whether a metric is meant: `loss` by `best_loss`, but not by `val_loss`."""
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
