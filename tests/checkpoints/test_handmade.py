"""Families that people write by hand: words that stand beside each other, and shapes that fit."""

from __future__ import annotations

import re

import pytest

from swa_avg.checkpoints.families import Way
from swa_avg.checkpoints.membership import members
from swa_avg.tensors import DTYPES, Tensor, contiguous_stride

_WRITTEN = re.compile(r"(?P<name>\S+?):(?P<shape>[\d,]*)(?P<dtype>[ib]?)")
_DTYPES = {"": "float32", "i": "int64", "b": "bool"}


def tensors(text: str) -> dict[str, Tensor]:
    """Read tensors: `queue:128,64` is one of float32, `ptr:1i` one of integers."""
    found = {}
    for written in text.split():
        match = _WRITTEN.fullmatch(written)
        assert match, written
        shape = tuple(int(size) for size in match["shape"].split(",") if size)
        found[match["name"]] = Tensor(
            DTYPES[_DTYPES[match["dtype"]]], shape, contiguous_stride(shape)
        )
    return found


def kept(text: str) -> set[str]:
    """The tensors that are not averaged as they are."""
    return {name for name, one in members(tensors(text)).items() if one.way is not Way.AVERAGED}


# Of each: what is kept together, and what is trained beside it.
KEPT = {
    "a mean and a spread called alike": ("n.ema_mean:4 n.ema_std:4", "n.weight:4 n.bias:4"),
    "the word behind": ("n.mu_ema:4 n.var_ema:4", "n.weight:4"),
    "run": ("n.run_mean:4 n.run_var:4", "n.gamma:4 n.beta:4"),
    "camel case": ("n.movingMean:4 n.movingVar:4", "n.weight:4"),
    "statistics of all": ("n.glob_mean:80 n.glob_std:80", "n.weight:80"),
    "of the batch": ("head.batch_mean:1 head.batch_std:1", "head.kernel:8,10"),
    "a moving average alone": ("n.moving_avg:4", "n.weight:4"),
    "extremes": ("a.tracked_min:1 a.tracked_max:1 a.iter_count:1", "a.weight:3,3"),
    "with a counter": ("n.mean:4 n.var:4 n.num_batches:", "n.weight:4"),
    "with BatchNorm's counter": ("n.mean:4 n.var:4 n.num_batches_tracked:i", "n.weight:4"),
    "with a switch": ("n.mean:4 n.std:4 n.initialized:b", "n.weight:4"),
    "sums": ("n._sum:4 n._sumsq:4 n._count:", "n.weight:4"),
    "sums and squares": ("n.x_sum:4 n.x_sq_sum:4 n.n:", "n.weight:4"),
    "Welford by letters": ("rs._M:4 rs._S:4 rs._n:i", "a.weight:4"),
    "Welford with a spread": ("rs.mean:4 rs.S:4 rs.std:4 rs.n:", "a.weight:4"),
    "torchrl PopArt": ("v.mu:1 v.sigma:1 v.count:", "a.weight:4"),
    "complex BatchNorm": (
        "b.RMr:4 b.RMi:4 b.RVrr:4 b.RVri:4 b.RVii:4 b.num_batches_tracked:i",
        "b.Wrr:4 b.Wri:4 b.Br:4",
    ),
    "complex BatchNorm, other names": ("b.moving_mean_real:4 b.moving_Vrr:4", "b.gamma_rr:4"),
    "a queue without a pointer": ("queue:2,100,16", "prototypes.weight:30,16"),
    "queues of what belongs together": ("queue_feats:64,100 queue_probs:100,10", "w:3,3"),
    "a bank of features": ("m.feature_bank:100,64 m.label_bank:100i", "w:3,3"),
    "CrossBatchMemory": ("loss.embedding_memory:9,4 loss.label_memory:9i loss.queue_idx:1i", "w:3"),
    "noise by other names": ("l.eps_w:3,3 l.eps_b:3", "l.mu_w:3,3 l.sigma_w:3,3 l.sigma_b:3"),
    "factorised noise": ("l.epsilon_input:1,3 l.epsilon_output:3,1", "l.sigma_weight:3,3"),
    "amax": ("l.amax_history:16,1 l.scale:1", "l.weight:3,3"),
    "an observer within": (
        "a.observer.max_val:1 a.observer.min_val:1 a.scale:1 a.zero_point:1 a.eps:1",
        "a.weight:3,3",
    ),
    "I-BERT": ("q.weight_integer:4,4 q.fc_scaling_factor:4 q.bias_integer:4", "q.weight:4,4"),
    "SN-GAN": ("c.u:1,4 d._u:4 d._v:5", "c.weight:4,5 d.weight:4,5"),
    "a vector with a number": ("c.weight_u0:4 c.weight_v0:36", "c.weight:4,4,3,3"),
    "sn_u and sn_v": ("c.sn_u:1,4 c.sn_v:1,5", "c.weight:4,5"),
    "power iteration in words": ("c.power_iter_u:4 c.spectral_norm_v:5", "c.weight:4,5"),
    "ASP": ("c.__weight_mma_mask:4,4", "c.weight:4,4"),
    "FakeSparsity": (
        "c.parametrizations.weight.0.mask:4,4",
        "c.parametrizations.weight.original:4,4",
    ),
    "clusters": ("k.cluster_centers:16,4 k.counts:16", "w:3"),
    "centroids": ("centroids:16,4 cluster_size:16", "w:16"),
    "classes": ("class_centroid:10,4 class_count:10", "w:3"),
    "counters": ("step_counter: frames_seen:1 n_seen: a.num_calls:", "temperature: log_alpha: w:3"),
    "an EMA's own": ("ema_decay: ema_updates: e.ema_step:1", "ema_scale: e.gain:1 e.num:4 e.n:3"),
    "load of experts": ("moe.expert_load:8 moe.expert_counts:8", "moe.gate.weight:8,4"),
    "balance without a loss": ("moe.aux_free_bias:8", "moe.gate.weight:8,4"),
}  # fmt: skip


@pytest.mark.parametrize("text", KEPT.values(), ids=list(KEPT))
def test_state_under_names_of_its_own_is_kept_together(text: tuple[str, str]) -> None:
    """Below a module or at the top; what is trained beside it is averaged."""
    together, trained = text
    every = f"{together} {trained}"
    assert kept(every) == set(tensors(together))
    below = " ".join(f"net.0.{one}" for one in every.split())
    assert kept(below) == {f"net.0.{name}" for name in tensors(together)}


# Trained, although some words are those of statistics, vectors or queues.
TRAINED = {
    "Bayesian layer": "l.weight_mu:4,4 l.weight_sigma:4,4 l.bias_mu:4 l.bias_sigma:4",
    "switchable norm": "n.mean_weight:3 n.var_weight:3 n.weight:4",
    "a prior": "prior_mean:4 prior_std:4 vamp.means:4,3",
    "a mean and a spread without a count": "g.mean:4 g.std:4 g.mu:4 g.sigma:4",
    "MEGA": "m.ema_expansion_matrix:4,2,1 m.damping_factor:4,2,1 m.residual_weight:4",
    "Transformer-XL": "a.pos_bias_u:4,8 a.pos_bias_v:4,8 a.linear_pos.weight:8,8",
    "weight norm with one output": "c.weight_g:1,1 c.weight_v:1,8 c.bias:1",
    "low-rank factors": "l.u:4,2 l.v:2,4 l.weight:4,4 l.weight_left:4,2 l.kernel:4,4",
    "EvoNorm": "n.v:4 n.weight:4 n.bias:4",
    "centres without a count": "loss.centers:10,4 head.prototypes:10,4 p.prototype_vectors:5,4,1,1",
    "a filter bank": "f.filter_bank:40,400 f.kernel_bank:4,4",
    "an expert's bias": "experts.gate_up_proj_bias:8,64 experts.expert_bias:8,64 router.bias:8",
    "epsilon of a norm": "n.eps:1 n.sigma:4 n.epsilon:",
    "limits": "q.lower:1 q.upper:1 act.clip_min:1 act.clip_max:1",
    "single weights": "num_weight: n_scale:1 count_scale: num_weights:1",
    "a bias called free": "crf.free_bias:8 crf.start_transitions:8",
}


@pytest.mark.parametrize("text", TRAINED.values(), ids=list(TRAINED))
def test_one_such_word_alone_is_no_sign(text: str) -> None:
    """A trained tensor is averaged, whatever word its name has."""
    assert not kept(text)
