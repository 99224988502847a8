"""What a tensor is: the state of algorithms beside weights, quantised weights, stand-ins.

Torch's own modules are used where there are such; else the names that a library's own
definition gives.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from command import OUT, Averaged, fails, refused, run
from command import averaged as averaged_anew
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import swa_avg

State = dict[str, Any]


def saved(folder: Path, states: Sequence[object], suffix: str = ".pt") -> list[str]:
    """Save checkpoints; return their names."""
    names = [f"{number}{suffix}" for number in range(len(states))]
    for name, state in zip(names, states, strict=True):
        if suffix == ".pt":
            torch.save(state, folder / name)
        else:
            assert isinstance(state, dict)
            save_file(state, folder / name)
    return names


def averaged(folder: Path, *arguments: str) -> Averaged:
    """Average; an output that is there from before is removed first."""
    (folder / OUT).unlink(missing_ok=True)
    return averaged_anew(folder, *arguments)


def trained(network: nn.Module, steps: int = 3, *, width: int = 4) -> list[State]:
    """Train a network for a few epochs; return the state_dict after each."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    states = []
    for _ in range(steps):
        network.train()
        loss = (network(torch.randn(8, width)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        states.append(copy.deepcopy(network.state_dict()))
    return states


def assert_last_and_mean(found: Mapping[str, Any], states: Sequence[State], *kept: str) -> None:
    """What is named is that of the last checkpoint; all else is the mean."""
    assert list(found) == list(states[-1])
    for name, value in found.items():
        inputs = [state[name] for state in states]
        exact = inputs[-1] if name in kept else oracle.mean(inputs)
        assert oracle.same_bits(value, exact), name
    assert set(kept) <= set(found)


def noted(done: Averaged, *words: str) -> list[str]:
    """Return the notes that have all of some words."""
    return [note for note in done.notes if all(word in note for word in words)]


# Spectral norm.


class Spectral(nn.Module):
    """Both ways of torch to divide by the largest singular value."""

    def __init__(self) -> None:
        super().__init__()
        self.hook = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.parametrized = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.plain = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(self.parametrized(self.hook(x).relu()).relu())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm`:FutureWarning")
def test_spectral_norm_as_hook_and_as_parametrization(tmp_path: Path) -> None:
    """u and v are the last one's, the weights are means; the plan says why; torch loads it."""
    states = trained(Spectral())
    done = averaged(tmp_path, *saved(tmp_path, states), "-v")
    at = "parametrized.parametrizations.weight.0."
    vectors = ("hook.weight_u", "hook.weight_v", f"{at}_u", f"{at}_v")
    assert_last_and_mean(done.tensors, states, *vectors)
    assert not torch.equal(states[0]["hook.weight_u"], states[-1]["hook.weight_u"])
    assert "4 kept from the last (spectral norm)" in done.stdout and done.notes == ()
    reason = "spectral norm (torch.nn.utils.spectral_norm) of 2.pt: unit vectors of one power"
    assert done.stdout.count(reason) == 2
    network = Spectral()
    network.load_state_dict(done.tensors, strict=True)
    network.eval()
    network(torch.zeros(1, 4))
    mean, u, v = (done.tensors[f"hook.weight_{name}"] for name in ("orig", "u", "v"))
    assert torch.allclose(network.hook.weight, mean / torch.dot(u, mean @ v))
    mean = done.tensors["parametrized.parametrizations.weight.original"]
    u, v = done.tensors[f"{at}_u"], done.tensors[f"{at}_v"]
    assert torch.allclose(network.parametrized.weight, mean / torch.dot(u, mean @ v))


def test_spectral_norm_over_another_parametrization(tmp_path: Path) -> None:
    """The vectors are the last one's, whatever the weight is made of before."""
    layers = nn.Sequential(
        parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(4, 4)))
    )
    states = trained(layers)
    done = averaged(tmp_path, *saved(tmp_path, states))
    at = "0.parametrizations.weight.1."
    assert_last_and_mean(done.tensors, states, f"{at}_u", f"{at}_v")


def test_spectral_norm_of_other_authors(tmp_path: Path) -> None:
    """Those of SAGAN, BigGAN and SN-GAN, and torch's of before v was kept."""
    names = (
        *("a.weight_bar", "a.weight_u", "a.weight_v", "b.weight", "b.u0", "b.sv0", "b.bias"),
        *("c.weight_orig", "c.weight_u", "d.weight", "d.u", "e.weight", "e._u", "e._v"),
    )
    weights = ("weight", "weight_bar", "weight_orig")
    states = [
        {name: torch.randn([4] * (2 if name[2:] in weights else 1)) for name in names}
        for _ in range(3)
    ]
    done = averaged(tmp_path, *saved(tmp_path, states))
    kept = ("a.weight_u", "a.weight_v", "b.u0", "b.sv0", "c.weight_u", "d.u", "e._u", "e._v")
    assert_last_and_mean(done.tensors, states, *kept)


# The state of algorithms.

# Library and class: what is kept together, what is beside it and averaged.
KEPT_TOGETHER = {
    "encodec EuclideanCodebook": ("inited cluster_size embed embed_avg", "proj.weight"),
    "lucidrains affine codebook": (
        "initted cluster_size embed_avg embed codebook_mean codebook_variance "
        "codebook_mean_needs_init",
        "proj.weight",
    ),
    "EmbeddingEMA of BEiT-2": (
        "embedding.weight embedding.cluster_size embedding.embed_avg embedding.initted",
        "proj.weight",
    ),
    "zalandoresearch": ("_ema_cluster_size _ema_w _embedding.weight", "conv.weight"),
    "VideoGPT": ("N z_avg embeddings", "conv.weight"),
    "VectorQuantizerEMA as in Sonnet": (
        "embeddings ema_cluster_size_hidden ema_dw_hidden counter",
        "conv.weight",
    ),
    "T2M-GPT": ("q.codebook q.code_sum q.code_count", "conv.weight"),
    "means of codes": ("q.weight q.running_mean q.code_count", "conv.weight"),
    "VQ-VAE of a blog": ("e_i_ts N_i_ts.hidden N_i_ts.average m_i_ts.hidden", "conv.weight"),
    "Mimi": ("initialized cluster_usage embed_sum", "proj.weight"),
    "Jukebox": ("k k_sum k_elem", "proj.weight"),
    "rl_games RunningMeanStd": ("rms.running_mean rms.running_var rms.count", "a.weight"),
    "skrl": ("s.running_mean s.running_variance s.current_count", "a.weight"),
    "rsl_rl": ("n._mean n._var n._std n.count", "a.weight"),
    "gym": ("obs_rms.mean obs_rms.var obs_rms.count", "a.weight"),
    "inputs": ("input_mean input_var count", "a.weight"),
    "mappo": ("v.running_mean v.running_mean_sq v.debiasing_term", "a.weight"),
    "batch renorm": ("n.running_mean n.running_std n.rmax", "n.weight n.bias"),
    "by hand": ("n.running_mean m.running_max", "n.weight"),
    "TensorFlow names": ("n.moving_mean n.moving_variance", "n.gamma n.beta"),
    "MeshGraphNets": ("_acc_count _acc_sum _acc_sum_squared _num_accumulations", "e.weight"),
    "observer": ("o.eps o.min_val o.max_val o.histogram", "a.weight"),
    "modelopt": ("a.weight_quantizer._amax a.input_quantizer._amax", "a.weight"),
    "PopArt": ("v.mean v.mean_sq v.stddev v.debiasing_term", "v.weight v.bias"),
    "Welford": ("n.mean n.m2 n.count", "n.weight"),
    "Float8Linear": ("l.fp8_amax_input l.fp8_scale_input l.fp8_amax_history_input", "l.weight"),
    "BatchNorm with limits": ("n.rmax n.dmax", "n.weight"),
    "MoCo": ("queue queue_ptr", "encoder_q.weight"),
    "ALBEF": ("image_queue text_queue idx_queue queue_ptr", "a.weight"),
    "torchtitan": ("moe.expert_bias moe.tokens_per_expert", "moe.router.gate.weight"),
    "torchtitan, bias alone": ("moe.expert_bias", "moe.router.gate.weight"),
    "Megatron-LM": ("mlp.router.expert_bias", "mlp.router.weight"),
    "DeepSeek-V3": ("mlp.gate.e_score_correction_bias", "mlp.gate.weight"),
    "LitEma": ("decay num_updates", "w"),
    "thop": ("total_ops total_params", "w"),
    "ActNorm": ("flow.initialized", "flow.loc flow.scale"),
    "pruning": ("a.weight_mask", "a.weight_orig"),
    "sparse training": ("a.weight_mask", "a.weight"),
    "spectral norm of SNGP": ("c.weight_u c.weight_v c.weight_sigma", "c.weight_orig"),
    "torch-mimicry": ("c.sn_u c.sn_sigma", "c.weight"),
    "NoisyNet": (
        "n.weight_epsilon n.bias_epsilon",
        "n.weight_mu n.weight_sigma n.bias_mu n.bias_sigma",
    ),
    "torchrl VecNorm": ("obs_sum obs_ssq obs_count", "a.weight"),
    "torchrl VecNormV2": ("n._loc n._var n._count", "a.weight"),
    "brax": ("n.mean n.std n.summed_variance n.count", "a.weight"),
    "another counter": ("n.steps n.mean n.var", "a.weight"),
    "sums": ("n.sum n.sumsq n.count", "a.weight"),
    "moments": ("obs_mean obs_sq_mean", "a.weight"),
    "moving averages": ("n.ema_mean n.ema_var", "n.weight"),
    "StyleGAN3": ("l.magnitude_ema", "l.weight"),
    "lightly": ("m.bank m.bank_ptr", "a.weight"),
    "DenseCL": ("queue queue_ptr queue2 queue2_ptr", "a.weight"),
    "CMC": ("m.memory_l m.memory_ab m.params", "a.weight"),
    "Ling": ("mlp.gate.expert_bias", "mlp.gate.weight"),
    "LFM2": ("feed_forward.expert_bias", "feed_forward.gate.weight"),
    "OLMo-core": ("moe.router.score_bias", "moe.router.weight"),
    "torchmetrics": ("acc.tp acc.fp acc.tn acc.fn", "a.weight"),
    "a confusion matrix": ("val.confmat", "a.weight"),
    "codebook with an EMA of its own": ("q.embed q.embed_ema q.cluster_size_ema", "a.weight"),
    "codebook with sums": ("q.embed q.embed_sum q.cluster_size", "a.weight"),
    "nerfacc": ("grid.occs grid.binaries", "mlp.weight"),
    "torch-ngp": ("density_grid density_bitfield mean_density", "mlp.weight"),
    "I-BERT": ("q.x_min q.x_max q.act_scaling_factor", "a.weight"),
    "training loops": ("iteration current_epoch", "a.weight"),
    "Transformer Engine": ("attn._extra_state", "attn.weight"),
    "BigGAN": ("bn.stored_mean bn.stored_var bn.accumulation_counter", "bn.gain.weight"),
    "Chainer names": ("n.avg_mean n.avg_var", "n.gamma"),
    "statistics of a population": ("n.pop_mean n.pop_var m.mean_running m.var_running", "n.weight"),
    "statistics over all": ("n.global_mean n.global_var", "n.weight"),
    "moving averages in words": ("n.moving_average_mean n.moving_average_var", "n.weight"),
    "PowerNorm": ("n.running_phi n.ema_gz", "n.weight n.bias"),
    "RQ-VAE": ("q.weight q.embed_ema q.cluster_size_ema", "a.weight"),
    "NormEMAVectorQuantizer": (
        "q.cluster_size q.embedding.weight q.embedding.cluster_size q.embedding.embed_avg",
        "a.weight",
    ),
    "Performer": ("attn.fast_attention.projection_matrix", "attn.to_q.weight"),
    "Performer that counts": ("a.projection_matrix a.calls_since_last_redraw", "a.weight"),
    "masked layers": ("l.mask", "l.weight l.bias"),
    "PopArt by mu and sigma": ("v.mu v.sigma", "v.weight v.bias"),
    "DINOv2": ("dino_loss.center", "student.weight"),
    "StandardScaler": ("s.mean_ s.var_ s.scale_ s.n_samples_seen_", "a.weight"),
    "running moments, private": ("r._mean r._var r._count", "a.weight"),
    "SNGP": ("gp.precision gp.covariance", "gp.beta.weight"),
    "prototypes of classes": ("p.prototypes p.counts", "p.fc.weight"),
    "ZAYA1": ("mlp.router.balancing_biases", "mlp.router.weight"),
    "balance of hand-written experts": ("m.routing_bias n.load_balance_bias", "m.gate.weight"),
    "SeesawLoss": ("head.cum_samples", "head.weight"),
    "spectral norm beside its weight": ("c.weight_u c.weight_v", "c.weight"),
    "InstDisc": ("lemniscate.memory lemniscate.params", "a.weight"),
    "queues with labels": ("queue queue_labels m.feature_bank m.bank_ptr", "a.weight"),
    "counts of tokens": ("tokens_seen samples_seen n_updates steps m.count", "a.weight"),
}


def test_state_of_algorithms_is_kept_together(tmp_path: Path) -> None:
    """Each family is the last one's as a whole, integers, too; what is trained is the mean."""
    integers = (
        "queue_ptr",
        "idx_queue",
        "num_updates",
        "codebook_mean_needs_init",
        "bank_ptr",
        "queue2_ptr",
        "confmat",
        "tp",
        "fp",
        "tn",
        "fn",
    )
    single = (
        "inited",
        "initted",
        "initialized",
        "count",
        "_count",
        "decay",
        "num_updates",
        "iteration",
        "current_epoch",
        "tokens_seen",
        "samples_seen",
        "n_updates",
        "steps",
    )
    states: list[State] = [{} for _ in range(3)]
    kept = []
    for number, (together, beside) in enumerate(KEPT_TOGETHER.values()):
        for name in f"{together} {beside}".split():
            leaf = name.rpartition(".")[2]
            shape = (1,) if leaf in single else (2, 3)
            for state in states:
                value = torch.randn(shape)
                # An extra state may have another size each time.
                if leaf == "_extra_state":
                    value = torch.randint(256, (50 + states.index(state),), dtype=torch.uint8)
                if leaf in integers:
                    value = torch.randint(1000, shape)
                state[f"m{number}.{name}"] = value
        kept += [f"m{number}.{name}" for name in together.split()]
    done = averaged(tmp_path, *saved(tmp_path, states), "-v")
    assert_last_and_mean(done.tensors, states, *kept)
    assert all(" kept: " in line for line in done.stdout.splitlines() if "_avg " in line)
    (note,) = noted(done, "EMA codebook")
    assert "taken from 2.pt; they match the encoder" in note
    assert len(noted(done, "running statistics")) == len(noted(done, "quantisation range")) == 1
    assert not noted(done, "differs between")


# Hand-written codebooks: count and sum of vectors for each of 5 codes, and the codes.
CODEBOOKS = {
    "counts and sums": ("q.ema_count:5 q.ema_sum:5,3 q.codebook:5,3", "q.proj.weight:3,3"),
    "codes in a submodule": (
        "ema_cluster_count:5 ema_weight:5,3 embedding.weight:5,3",
        "a.weight:5,3",
    ),
    "other words": ("q.ema_vocab_hit:5 q.ema_embedding:5,3 q.w.weight:5,3", "b.weight:5,3"),
    "codes in columns": ("q.cluster_size:5 q.embed_avg:3,5 q.cb:5,3 q.is_init:1", "q.bias:3"),
    "running": ("q.running_size:5 q.running_sum:5,3 q.embedding.weight:5,3", "q.norm.weight:3"),
    "several": ("q.cluster_size:2,5 q.embed_avg:2,5,3 q.embedding:2,5,3", "q.mix:5,2"),
    "used codes": ("q.ema_cluster_size:5 q.ema_embed_sum:5,3 q.usage_count:5", "q.scale:3"),
}


def test_codebooks_under_any_name_are_kept_together(tmp_path: Path) -> None:
    """A count and a sum of vectors for each code mark a codebook, whatever the codes are called."""
    states: list[State] = [{} for _ in range(3)]
    kept = []
    for number, (together, trained) in enumerate(CODEBOOKS.values()):
        for text in f"{together} {trained}".split():
            name, _, sizes = text.partition(":")
            for state in states:
                state[f"m{number}.{name}"] = torch.randn([int(size) for size in sizes.split(",")])
            kept += [f"m{number}.{name}"] * (text in together)
    done = averaged(tmp_path, *saved(tmp_path, states))
    assert_last_and_mean(done.tensors, states, *kept)


def test_counts_without_vectors_are_no_codebook(tmp_path: Path) -> None:
    """A trained weight beside a count of another size, or beside no sums, is averaged."""
    states = [
        {
            "a.code_size": torch.randn(4),
            "a.weight": torch.randn(4, 3),
            "b.ema_count": torch.randn(5),
            "b.ema_w": torch.randn(4, 3),
            "b.embedding.weight": torch.randn(5, 3),
        }
        for _ in range(3)
    ]
    assert_last_and_mean(averaged(tmp_path, *saved(tmp_path, states)).tensors, states)


class Quantised(nn.Module):
    """A network that learns with fake quantisation, and observes what comes in."""

    def __init__(self) -> None:
        super().__init__()
        from torch.ao import quantization as q

        self.fake = q.FakeQuantize()
        self.fused = q.FusedMovingAvgObsFakeQuantize()
        self.per_channel = q.default_per_channel_weight_fake_quant()
        self.observer = q.MovingAverageMinMaxObserver()
        self.channels = q.PerChannelMinMaxObserver()
        self.histogram = q.HistogramObserver()
        self.fixed = q.default_fixed_qparams_range_0to1_fake_quant()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.observer(x), self.histogram(x), self.channels(x), self.per_channel(self.linear.weight)
        return self.fixed(self.fused(self.linear(self.fake(x))).sigmoid())


@pytest.mark.filterwarnings("ignore")
def test_fake_quantisation_and_observers_of_torch(tmp_path: Path) -> None:
    """Scales, zero points, ranges and switches are the last one's; the weights are means."""
    network = Quantised()
    empty = copy.deepcopy(network.state_dict())  # per-channel ranges without a channel, inf
    states = [empty, *trained(network, 2)]
    done = averaged(tmp_path, *saved(tmp_path, states), "--json")
    weights = ("linear.weight", "linear.bias")
    assert_last_and_mean(done.tensors, states, *(n for n in states[-1] if n not in weights))
    found = json.loads(done.stdout)
    assert found["families"]["quantisation range"] == len(states[-1]) - 2
    network.load_state_dict(done.tensors)
    shown = json.loads(run(tmp_path, "0.pt", "1.pt", "-o", "x.pt", "--dry-run", "--json").stdout)
    reasons = {tensor["name"]: tensor["reason"] for tensor in shown["tensors"]}
    assert "FakeQuantize) of 1.pt: scales and zero points" in reasons["fake.scale"]


def test_learned_quantisation_is_averaged(tmp_path: Path) -> None:
    """LSQ trains scale and zero point, which are parameters then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import MovingAverageMinMaxObserver
        from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

        states = []
        for number in range(3):
            layer = _LearnableFakeQuantize(MovingAverageMinMaxObserver, 0, 255)
            nn.init.constant_(layer.scale, 1 + number)
            states.append(dict(layer.state_dict()))
    done = averaged(tmp_path, *saved(tmp_path, states))
    assert done.tensors["scale"].item() == 2 and list(done.tensors) == list(states[0])


def test_common_names_alone_are_weights(tmp_path: Path) -> None:
    """One name of a family, without the others, is a weight like any other."""
    names = (
        "a.scale b.embed c.count d.weight_scale d.weight e.decay f.bank g.codes h.zero_point "
        "i.weight_g j.embed_avg k.min_val l.base m.mean m.var n.weight_u n.weight_v o.absmax "
        "p.lora_A.weight q.scales q.weight r.histogram s.expert_bias t.weight_orig u.k u.N "
        "v.mask w.cluster_size x.step x.original0 y.codebooks z.initialized logit_scale logit"
    )
    states = [{name: torch.randn(2, 3) for name in names.split()} for _ in range(3)]
    done = averaged(tmp_path, *saved(tmp_path, states), "-v")
    assert_last_and_mean(done.tensors, states)
    assert done.notes == () and f"tensors: {len(names.split())} averaged\n" in done.stdout


def test_float_buffers_of_whole_modules_as_averaged_model(tmp_path: Path) -> None:
    """Where the file says what is a buffer, what is averaged is what AveragedModel averages."""
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    network.register_buffer("input_mean", torch.zeros(3))
    theirs = AveragedModel(network)
    for number in range(2):
        trained(network, 1)
        network.input_mean += 1
        theirs.update_parameters(network)
        torch.save(network, tmp_path / f"{number}.pt")
    states = [torch.load(tmp_path / f"{n}.pt", weights_only=False).state_dict() for n in (0, 1)]
    done = averaged(tmp_path, "0.pt", "1.pt", "-v")
    assert done.tensors["input_mean"].tolist() == [2, 2, 2]
    assert "buffer of 1.pt: not trained" in done.stdout
    for name, value in theirs.module.state_dict().items():
        assert torch.allclose(done.tensors[name], value), name
    # A state_dict does not say it.
    bare = averaged(tmp_path, *saved(tmp_path, states))
    assert bare.tensors["input_mean"].tolist() == [1.5, 1.5, 1.5]
    # DeepSpeed's file does.
    wrapped = [{"module": state, "buffer_names": ["input_mean"]} for state in states]
    deepspeed = averaged(tmp_path, *saved(tmp_path, wrapped))
    assert deepspeed.tensors["input_mean"].tolist() == [2, 2, 2]


def test_batchnorm_of_a_kind_is_kept_as_bn_buffers_says(tmp_path: Path) -> None:
    """InstanceNorm with running statistics and SyncBatchNorm have the names of BatchNorm."""
    network = nn.Sequential(
        nn.Unflatten(1, (2, 2)),
        nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        nn.SyncBatchNorm(2),
        nn.Flatten(),
    ).eval()
    states = []
    for _ in range(3):
        states.append({name: torch.rand_like(t) if t.is_floating_point() else t
                       for name, t in network.state_dict().items()})  # fmt: skip
    done = averaged(tmp_path, *saved(tmp_path, states), "--bn-buffers", "first")
    kept = [name for name in states[0] if "running" in name or "tracked" in name]
    assert len(kept) == 6
    assert_last_and_mean(done.tensors, [*states[::-1]], *kept)
    assert "6 BatchNorm buffers not averaged" in done.stdout
    network.load_state_dict(done.tensors, strict=True)


# Quantised weights.


def codes(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.randint(0, 100, shape).to(dtype)


def fp8(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn)


QUANTISED: dict[str, Callable[[], State]] = {
    "bitsandbytes int8": lambda: {
        "weight": codes(4, 4, dtype=torch.int8),
        "SCB": torch.rand(4),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    },
    "bitsandbytes nf4": lambda: {
        "weight": codes(8, 1, dtype=torch.uint8),
        "weight.absmax": torch.rand(1),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.quant_state.bitsandbytes__nf4": torch.arange(30, dtype=torch.uint8),
    },
    "GPTQ": lambda: {
        "qweight": codes(2, 4),
        "qzeros": codes(1, 1),
        "scales": torch.rand(1, 4).half(),
        "g_idx": torch.zeros(4, dtype=torch.int32),
    },
    "AWQ": lambda: {"qweight": codes(4, 2), "qzeros": codes(1, 2), "scales": torch.rand(1, 4)},
    "compressed-tensors": lambda: {
        "weight_packed": codes(4, 2),
        "weight_scale": torch.rand(4, 1),
        "weight_shape": torch.tensor([4, 16]),
    },
    "compressed-tensors, int8": lambda: {
        "weight": codes(4, 2, dtype=torch.int8),
        "weight_scale": torch.rand(4, 1),
    },
    "fp8 of DeepSeek-V3": lambda: {"weight": fp8(4, 4), "weight_scale_inv": torch.rand(1, 1)},
    **{
        f"fp8 with {scale}": lambda scale=scale: {"weight": fp8(4, 4), scale: torch.rand(1)}
        for scale in ("scales", "w_scale", "scale_inv", "dequant_scale", "scaling_factor")
    },
    "fp8, a tensor subclass": lambda: {"weight": fp8(4, 4), "weight.scale": torch.rand(1)},
    "fp8, one scale": lambda: {"weight": fp8(4, 4), "weight_scale": torch.rand(())},
    "HQQ": lambda: {"W_q": codes(4, 2, dtype=torch.uint8), "scale": torch.rand(4),
                    "zero": torch.rand(4)},
    "MXFP4 of gpt-oss": lambda: {
        "gate_up_proj_blocks": codes(2, 4, dtype=torch.uint8),
        "gate_up_proj_scales": codes(2, dtype=torch.uint8),
    },
    "quanto": lambda: {"weight._data": codes(4, dtype=torch.int8), "weight._scale": torch.rand(1)},
    "fp8 of DeepSeek-V3's own": lambda: {"weight": fp8(4, 4), "scale": torch.rand(1, 1)},
    "scaled fp8 of ComfyUI": lambda: {"weight": fp8(4, 4), "scale_weight": torch.rand(())},
    "torchao": lambda: {"_weight_qdata": codes(4, 2, dtype=torch.int8),
                        "_weight_scale": torch.rand(4)},
    "EETQ": lambda: {"weight": codes(4, 2, dtype=torch.int8), "weight_scales": torch.rand(2)},
    "AQLM": lambda: {"codes": codes(4, 2, dtype=torch.int16), "codebooks": torch.rand(1, 4),
                     "scales": torch.rand(4)},
    "codes of one dimension": lambda: {"q": codes(8, dtype=torch.int8), "q_scale": torch.rand(8)},
    "packed codes alone": lambda: {"weight": codes(8, dtype=torch.uint8)},
    "codes by any name": lambda: {"kernel": codes(4, 4, dtype=torch.int8)},
}  # fmt: skip


def test_quantised_weights_that_differ_are_refused(tmp_path: Path) -> None:
    """Codes and scales of two checkpoints fit no network."""
    for name, make in QUANTISED.items():
        states = [{f"l.{key}": value for key, value in make().items()} for _ in range(2)]
        states[0]["w"], states[1]["w"] = torch.zeros(2), torch.ones(2)
        # Without checksums in the headers the tensors are looked at.
        suffix = ".safetensors" if name == "AWQ" else ".pt"
        names = saved(tmp_path, states, suffix)
        says = ("1" + suffix, "l.", "differs between checkpoints", "verage the weights before")
        refused(tmp_path, *names, says=says)
        if name in ("GPTQ", "AWQ"):
            fails(tmp_path, *names, "--dry-run")
    # Codes that begin alike are told apart while averaging.
    long = torch.zeros(2, 20_000, dtype=torch.int8)
    states = [{"weight": long, "SCB": torch.ones(2)} for _ in range(2)]
    states[1]["weight"] = torch.cat([long[:1], long[:1] + 1])
    refused(tmp_path, *saved(tmp_path, states, ".safetensors"), says="quantised weights")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_quantised_weights_that_are_the_same_are_copied(tmp_path: Path, suffix: str) -> None:
    """Frozen ones under trained adapters, say: to the bit, whatever --dtype says of the rest."""
    frozen = {f"{number}.{key}": value for number, make in enumerate(QUANTISED.values())
              for key, value in make().items()}  # fmt: skip
    states = [{**frozen, "w": torch.tensor([float(number)])} for number in range(3)]
    done = averaged(tmp_path, *saved(tmp_path, states, suffix), "--dtype", "bfloat16")
    for key, value in frozen.items():
        assert oracle.same_bits(done.tensors[key], value), key
    assert done.notes == () and done.tensors["w"].item() == 1


def test_weights_averaged_before_quantisation(tmp_path: Path) -> None:
    """What the refusal says works: the mean of the weights is quantised afterwards."""
    weights = [torch.randn(4, 4) for _ in range(2)]
    done = averaged(tmp_path, *saved(tmp_path, [{"weight": weight} for weight in weights]))
    mean = done.tensors["weight"]
    scale = mean.abs().amax() / 127
    quantised = (mean / scale).round().to(torch.int8)
    assert (quantised * scale - mean).abs().max() <= scale / 2


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_of_torch_are_refused(tmp_path: Path) -> None:
    """Their weights are packed where no name shows them."""
    states = []
    for _ in range(2):
        layer = torch.ao.nn.quantized.Linear(4, 4)
        states.append(layer.state_dict())
    says = ("quantised weights (torch.ao.nn.quantized)", "Average the weights before")
    refused(tmp_path, *saved(tmp_path, states), says=says)


def test_float8_without_scales_is_averaged(tmp_path: Path) -> None:
    """Weights that were only cast, also beside CLIP's logit_scale."""
    states = [{"text_projection": fp8(4, 4), "logit_scale": torch.randn(()), "l.weight": fp8(4),
               "l.zero_init_gate": torch.randn(4), "l.layer_scale": torch.randn(4),
               "m.weight": fp8(4), "m.gate_scale": fp8(4), "n.up_scale": torch.randn(4)}
              for _ in range(2)]  # fmt: skip
    assert_last_and_mean(averaged(tmp_path, *saved(tmp_path, states)).tensors, states)


def test_integers_of_one_dimension_beside_a_scale_are_no_codes(tmp_path: Path) -> None:
    """Counts have 64 bits, and the scale of CLIP's logits belongs to no codes."""
    states = [{"q.usage": codes(4, dtype=torch.int64), "q.scale": torch.randn(4), "w": fp8(2),
               "rng_state": codes(99, dtype=torch.uint8), "logit_scale": torch.randn(())}
              for _ in range(2)]  # fmt: skip
    done = averaged(tmp_path, *saved(tmp_path, states))
    assert_last_and_mean(done.tensors, states, "q.usage", "rng_state")
    assert len(noted(done, "differs between checkpoints")) == 2


def test_moments_of_weights_are_refused(tmp_path: Path) -> None:
    """SWAG's moments include all earlier models: the last ones are the run's, as the line says."""
    names = ("l.weight_mean", "l.weight_sq_mean", "l.weight_cov_mat_sqrt")
    states = [{name: torch.randn(3) for name in names} for _ in range(3)]
    names_of_files = saved(tmp_path, states)
    refused(tmp_path, *names_of_files, says=("moments of the run's weights", "(--last 1)"))
    done = averaged(tmp_path, *names_of_files, "--last", "1")
    assert_last_and_mean(done.tensors, states, *names)


def test_tables_of_integers_that_differ_are_refused(tmp_path: Path) -> None:
    """No one knows what a mean of them is; left out of the files, the rest is averaged."""
    states = [{"table": torch.full((3, 2), n), "pad": torch.eye(2, dtype=torch.bool) * n > 0,
               "position_ids": torch.arange(4)[None], "w": torch.randn(2)}
              for n in range(2)]  # fmt: skip
    for suffix in (".pt", ".safetensors"):
        saved(tmp_path, states, suffix)
        line = fails(tmp_path, f"0{suffix}", f"1{suffix}", "-o", "x.pt")
        assert f"1{suffix}: table: differs between checkpoints" in line
        assert line.endswith("If it is a table, remove it from the files.")
    without = [{n: v for n, v in state.items() if n != "table"} for state in states]
    done = averaged(tmp_path, *saved(tmp_path, without))
    assert noted(done, "pad: differs") and torch.equal(done.tensors["pad"], states[1]["pad"])


# Stand-ins without elements.


def test_zero_3_stand_ins_are_refused(tmp_path: Path) -> None:
    """Parameters are partitioned, buffers whole. What zero_to_fp32.py makes is averaged."""
    shapes = {"a.weight": torch.Size([2, 3]), "a.bias": torch.Size([2])}
    stand_ins = {name: torch.empty(0) for name in shapes}
    partitioned = {"module": {**stand_ins, "rope": torch.ones(9)}, "param_shapes": [shapes]}
    for tree in (partitioned, {**stand_ins, "rope": torch.ones(9)}):
        names = saved(tmp_path, [tree, tree, tree])
        refused(tmp_path, *names[1:], says=("empty placeholders for 2 tensors", "zero_to_fp32.py"))
        fails(tmp_path, names[0], "-o", "x.pt")
    whole = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]
    assert_last_and_mean(averaged(tmp_path, *saved(tmp_path, whole)).tensors, whole)
    # ZeRO-1 and 2 write the shapes beside whole parameters.
    beside = [{"module": state, "param_shapes": [shapes]} for state in whole]
    assert_last_and_mean(averaged(tmp_path, *saved(tmp_path, beside)).tensors, whole)


# Products of several tensors.

FACTORS = {
    "PEFT": ("q.lora_A.weight", "q.lora_B.weight"),
    "PEFT, an adapter by name": ("q.lora_A.default.weight", "q.lora_B.default.weight"),
    "PEFT, embeddings": ("e.lora_embedding_A.default", "e.lora_embedding_B.default"),
    "loralib": ("attn.lora_A", "attn.lora_B"),
    "torchtune": ("q.lora_a.weight", "q.lora_b.weight"),
    "kohya-ss": ("lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight"),
    "diffusers": ("to_q.lora.down.weight", "to_q.lora.up.weight"),
    "diffusers, old": ("to_q_lora.down.weight", "to_q_lora.up.weight"),
    "LoHa": ("l.hada_w1_a", "l.hada_w1_b", "l.hada_w2_a", "l.hada_w2_b"),
    "LoKr": ("l.lokr_w1", "l.lokr_w2_a", "l.lokr_w2_b"),
    "PEFT Poly": ("l.poly_lora_A.default", "l.poly_lora_B.default"),
    "PEFT RandLora": ("l.randlora_lambda.default", "l.randlora_gamma.default"),
    "PEFT VB-LoRA": ("l.vblora_logits_A.default", "l.vblora_logits_B.default"),
    "x-flux": ("b.qkv_lora1.down.weight", "b.qkv_lora1.up.weight"),
    "diffusers, ControlNet": ("to_q.lora_layer.down.weight", "to_q.lora_layer.up.weight"),
}


def test_lora_factors_are_averaged_and_said(tmp_path: Path) -> None:
    """One note: the mean of B·A is not the product of the means. One checkpoint has no note."""
    names = [f"m{number}.{name}" for number, many in enumerate(FACTORS.values()) for name in many]
    states = [{name: torch.randn(2, 2) for name in names} for _ in range(2)]
    done = averaged(tmp_path, *saved(tmp_path, states), "-v")
    assert_last_and_mean(done.tensors, states)
    (note,) = done.notes
    assert "the product of the means is not the mean of the products B·A" in note
    assert f" and {len(names) - 1} more (low-rank adapter)" in note
    assert done.stdout.count("each factor separately") == len(names)
    assert not noted(averaged(tmp_path, "0.pt"), "low-rank")


def test_rotations_are_averaged_and_said(tmp_path: Path) -> None:
    """OFT, BOFT and HRA train what a rotation is computed from."""
    names = ("q.oft_r.default", "k.oft_R.default.weight", "v.boft_R.default", "v.boft_s.default",
             "o.oft_blocks", "u.hra_u.default")  # fmt: skip
    states = [{name: torch.randn(2, 2) for name in names} for _ in range(2)]
    done = averaged(tmp_path, *saved(tmp_path, states))
    assert_last_and_mean(done.tensors, states)
    (note,) = done.notes
    assert "and 5 more (orthogonal adapter)" in note and "merge each adapter" in note


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_adapters_merged_before_have_the_mean_of_the_products(tmp_path: Path) -> None:
    """What the note says works: merged into the model by PEFT, the products are averaged."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(4, 4))
    products, merged, adapters = [], [], []
    for _ in range(2):
        config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        adapters.append(peft.get_peft_model_state_dict(model))
        layer = model.base_model.model[0]
        products.append(layer.get_delta_weight("default").detach().clone())
        merged.append(model.merge_and_unload().state_dict())
    assert len(noted(averaged(tmp_path, *saved(tmp_path, adapters)), "B·A")) == 1
    done = averaged(tmp_path, *saved(tmp_path, merged))
    expected = base[0].weight + (products[0] + products[1]) / 2
    assert torch.allclose(done.tensors["0.weight"], expected, atol=1e-6) and done.notes == ()


# What some of PEFT's adapters need besides the module that they adapt.
ADAPTERS = {
    "BOFT": {"boft_block_size": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
    "C3A": {"block_size": 4},
    "ADALORA": {"total_step": 10},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": []},
}


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_adapters_whose_mean_is_not_the_mean_of_the_weights_are_said(tmp_path: Path) -> None:
    """Of each adapter of PEFT: merged, the mean is the mean of both, or a note says it is not."""
    peft = pytest.importorskip("peft")
    judged = {True: 0, False: 0}
    for kind, configuration in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        known = inspect.signature(configuration).parameters
        usual = {"target_modules": ["0"], "r": 2, "init_weights": False} | {
            "init_lora_weights": False, **ADAPTERS.get(kind.name, {})}  # fmt: skip
        options = {name: value for name, value in usual.items() if name in known}
        models = []
        try:
            for seed in (1, 2, 2):
                torch.manual_seed(0)  # one base and one projection
                model = peft.get_peft_model(
                    nn.Sequential(nn.Linear(16, 16)), configuration(**options)
                )
                torch.manual_seed(seed)
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        nn.init.normal_(parameter, 0.5, 0.3)
                models.append(model)
            states = [peft.get_peft_model_state_dict(model) for model in models[:2]]
            save = [{name: value.contiguous() for name, value in state.items()} for state in states]
            names = [str(tmp_path / name) for name in saved(tmp_path, save)]
            copy.deepcopy(models[0]).merge_and_unload()
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            continue  # prompts, and adapters of whole models
        report = swa_avg.average(names, tmp_path / OUT, force=True)
        peft.set_peft_model_state_dict(models[2], torch.load(tmp_path / OUT))
        one, other, mean = (model.merge_and_unload()[0].weight.detach() for model in models)
        linear = torch.allclose(mean, (one + other) / 2, atol=1e-5)
        assert linear == (not any("separately" in n or "rotation" in n for n in report.notes)), kind
        judged[linear] += 1
    assert judged[True] > 3 and judged[False] > 5


class Reparametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.new = parametrizations.weight_norm(nn.Linear(4, 4))
        self.rnn = nn.utils.weight_norm(nn.RNN(4, 4), "weight_hh_l0")
        self.old = nn.utils.weight_norm(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.old(self.rnn(self.new(x))[0])


@pytest.mark.filterwarnings("ignore")
def test_weight_norm_is_averaged_and_said(tmp_path: Path) -> None:
    """g and v are means, as AveragedModel has them; the note says what that is not."""
    states = trained(Reparametrized())
    done = averaged(tmp_path, *saved(tmp_path, states))
    assert_last_and_mean(done.tensors, states)
    (note,) = done.notes
    assert "and 5 more (weight norm)" in note and "not the mean of the weights" in note
    Reparametrized().load_state_dict(done.tensors, strict=True)


def test_pruned_weights_have_the_mask_of_the_last(tmp_path: Path) -> None:
    """A mask of halves prunes nothing."""
    network = nn.Linear(4, 4)
    states = []
    for amount in (0.25, 0.25):
        prune.random_unstructured(network, "weight", amount=amount)
        states.append(copy.deepcopy(network.state_dict()))
    done = averaged(tmp_path, *saved(tmp_path, states))
    assert_last_and_mean(done.tensors, states, "weight_mask")
    assert not torch.equal(states[0]["weight_mask"], states[1]["weight_mask"])


def test_orthogonal_parametrization_needs_one_base(tmp_path: Path) -> None:
    """What is trained counts from the base: one base is copied, several are refused."""

    def orthogonal() -> nn.Linear:
        return parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley")

    network = orthogonal()
    network.weight = torch.eye(3)
    base = "parametrizations.weight.0.base"
    states = trained(network, 2, width=3)
    done = averaged(tmp_path, *saved(tmp_path, states))
    assert oracle.same_bits(done.tensors[base], states[0][base])
    network.load_state_dict(done.tensors, strict=True)
    assert torch.allclose(network.weight @ network.weight.T, torch.eye(3), atol=1e-5)
    states[1][base] = -states[1][base]
    refused(tmp_path, *saved(tmp_path, states), says=(base, "remove_parametrizations"))
    plain = []
    for state in states:
        single = orthogonal()
        single.weight = torch.eye(3)
        single.load_state_dict(state)
        nn.utils.parametrize.remove_parametrizations(single, "weight")
        plain.append(single.state_dict())
    assert_last_and_mean(averaged(tmp_path, *saved(tmp_path, plain)).tensors, plain)


# Extra state.


class Extra(nn.Linear):
    """Keeps its extra state as Transformer Engine does: in a stream, a dict or a tensor."""

    def __init__(self, kind: str, value: int = 0) -> None:
        super().__init__(2, 2)
        self.kind, self.value = kind, value

    def get_extra_state(self) -> object:
        made = io.BytesIO()
        torch.save({"scale": torch.full((2,), float(self.value))}, made)
        raw = made.getvalue()[: 900 + self.value]
        dictionary = {"fp8": True, "history": [self.value], "state": io.BytesIO(b"a")}
        tensor = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return {"stream": io.BytesIO(raw), "dict": dictionary, "tensor": tensor}[self.kind]

    def set_extra_state(self, state: Any) -> None:
        self.loaded = state


def test_extra_state_of_transformer_engine(tmp_path: Path) -> None:
    """It is that of the last, wherever the format can hold it; and what is said is true."""
    networks = [
        nn.ModuleDict({kind: Extra(kind, n) for kind in ("stream", "dict", "tensor")})
        for n in range(3)
    ]
    states = [network.state_dict() for network in networks]
    names = saved(tmp_path, [{"state_dict": state} for state in states])
    for arguments in ([], ["--keep-wrapper"]):
        ended = run(tmp_path, *names, "-o", "x.pt", "--force", *arguments)
        assert ended.returncode == 0 and "left out" not in ended.stderr
        kept = "weights_only=False" in ended.stderr
        assert kept == (not arguments)
        found = torch.load(tmp_path / "x.pt", weights_only=False)
        found = found["state_dict"] if arguments else found
        network = nn.ModuleDict({kind: Extra(kind) for kind in ("stream", "dict", "tensor")})
        network.load_state_dict(found, strict=True)
        last = networks[-1]
        assert network["stream"].loaded.getvalue() == last["stream"].get_extra_state().getvalue()
        assert network["dict"].loaded["history"] == [2]
        assert network["dict"].loaded["state"].getvalue() == b"a"
        assert torch.equal(network["tensor"].loaded, last["tensor"].get_extra_state())
        assert oracle.same_bits(
            found["stream.weight"], oracle.mean([s["stream.weight"] for s in states])
        )
    # What holds foreign objects stays with the file only.
    foreign = [
        {"l._extra_state": {"recipe": Recipe()}, "l.w": torch.tensor([n])} for n in (1.0, 2.0)
    ]
    (note,) = noted(averaged(tmp_path, *saved(tmp_path, foreign)), "_extra_state")
    assert note == (
        "l._extra_state: neither a tensor nor a plain value; left out "
        "(to keep it, use --keep-wrapper)"
    )
    names = saved(tmp_path, [{"state_dict": state} for state in states])
    ended = run(tmp_path, *names, "-o", "x.safetensors")
    assert "stream._extra_state, dict._extra_state: not a tensor; left out" in ended.stderr


class Recipe:
    """An object of the user's own class in an extra state."""


class Nested(nn.Linear):
    """Keeps tensors in the containers of its extra state, one of them twice."""

    def __init__(self, value: int = 0) -> None:
        super().__init__(2, 2)
        self.value = float(value)

    def get_extra_state(self) -> object:
        scale = torch.full((2,), self.value)
        history = OrderedDict(amax=[torch.eye(2).T * self.value, scale], steps=self.value)
        return {"scale": scale, "history": (history, None), "none": [], "t": torch.ones(())}

    def set_extra_state(self, state: Any) -> None:
        self.loaded = state


def test_extra_state_with_tensors_is_that_of_the_last(tmp_path: Path) -> None:
    """A strict load of the bare file gives the last one's, in the same containers; nothing runs."""
    states = [nn.Sequential(nn.Linear(2, 2), Nested(n)).state_dict() for n in range(3)]
    names = saved(tmp_path, states)
    for arguments in (["--verify"], ["--keep-wrapper"]):
        done = averaged(tmp_path, *names, *arguments)  # loads it with weights_only
        assert not noted(done, "left out")
        assert len(noted(done, "1._extra_state: differs between checkpoints; taken from 2.pt")) == 1
        network = nn.Sequential(nn.Linear(2, 2), Nested())
        network.load_state_dict(done.tensors, strict=True)
        last, loaded = states[-1]["1._extra_state"], network[1].loaded
        assert str(loaded) == str(last) and list(done.tensors) == list(states[-1])
        assert loaded["history"][0]["amax"][0].stride() == (1, 2)
        assert oracle.same_bits(
            done.tensors["0.weight"], oracle.mean([s["0.weight"] for s in states])
        )
    again = averaged_anew(tmp_path, "1.pt", "2.pt", out="again.pt")
    assert str(again.tensors["1._extra_state"]) == str(last)
    ended = run(tmp_path, *names, "-o", "x.safetensors")
    assert "1._extra_state: not a tensor; left out" in ended.stderr
    # Equal ones have no note.
    equal = [{"l._extra_state": {"scale": torch.ones(2)}, "l.w": torch.randn(2)} for _ in range(2)]
    assert averaged(tmp_path, *saved(tmp_path, equal)).notes == ()


def test_extra_state_that_grows_is_refused(tmp_path: Path) -> None:
    """Five kilobytes that hold one tensor half a million times would give an output of 65 MB."""
    many = [[torch.ones(2)] * 700] * 700
    states = [{"l._extra_state": many, "l.w": torch.ones(2) * n} for n in range(2)]
    refused(tmp_path, *saved(tmp_path, states), says=("holds plain values of", "hostile files"))
    states = [{**state, "l._extra_state": [torch.ones(2)] * 700} for state in states]
    found = averaged(tmp_path, *saved(tmp_path, states)).tensors["l._extra_state"]
    assert len(found) == 700 and len({one.data_ptr() for one in found}) == 1


# BatchNorm statistics that do not move.


def batchnorm(frozen: Sequence[str], number: int) -> State:
    state = {}
    for layer in ("backbone", "head"):
        seed = 0 if layer in frozen else number + 1
        torch.manual_seed(seed)
        state |= {f"{layer}.running_mean": torch.randn(3), f"{layer}.running_var": torch.rand(3),
                  f"{layer}.num_batches_tracked": torch.tensor(seed)}  # fmt: skip
    torch.manual_seed(number)
    return state | {"backbone.weight": torch.randn(3), "head.weight": torch.randn(3)}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_frozen_batchnorm_has_no_note(tmp_path: Path, suffix: str) -> None:
    """--recompute-bn would ruin what is frozen; where only some is, that is said."""
    stale = "BatchNorm statistics do not fit the average; recompute them with --recompute-bn"
    for choice, apart in (("last", 6), ("first", 6), ("mean", 2)):
        states = [batchnorm(("backbone", "head"), number) for number in range(3)]
        done = averaged(tmp_path, *saved(tmp_path, states, suffix), "--bn-buffers", choice)
        assert done.notes == ()
        assert f"{apart} BatchNorm buffers not averaged" in done.stdout
    states = [batchnorm(("backbone",), number) for number in range(3)]
    done = averaged(tmp_path, *saved(tmp_path, states, suffix), "--verify")
    mean = averaged(tmp_path, *saved(tmp_path, states, suffix), "--bn-buffers", "mean")
    assert mean.notes == done.notes
    frozen, found = done.notes
    assert found == stale and frozen.startswith("backbone: BatchNorm statistics are the same")
    done = averaged(tmp_path, *saved(tmp_path, states, suffix), "--bn-buffers", "first", "--verify")
    assert oracle.same_bits(done.tensors["head.running_mean"], states[0]["head.running_mean"])
    plain = [{"w": torch.randn(2), "n.running_max": torch.rand(2)} for _ in range(2)]
    done = averaged(tmp_path, *saved(tmp_path, plain, suffix))
    assert not noted(done, "do not fit")


def test_flat_parameters_of_fsdp_are_said(tmp_path: Path) -> None:
    """Nothing in a file tells whether a flat parameter is a rank's part; a note asks."""
    states = [{"_fsdp_wrapped_module.flat_param": torch.randn(8)} for _ in range(2)]
    done = averaged(tmp_path, *saved(tmp_path, states))
    (note,) = noted(done, "flat parameter of FSDP", "files of one rank only")
    assert note.startswith("_fsdp_wrapped_module.flat_param: ")
    states = [{"flat_parameters.weight": torch.randn(8)} for _ in range(2)]
    assert not averaged(tmp_path, *saved(tmp_path, states)).notes


@pytest.mark.parametrize("several", [False, True])
def test_schedule_free_in_train_mode_is_said(several: bool, tmp_path: Path) -> None:
    """The weights of train mode are not those that are evaluated; those of eval mode are."""
    for mode in (True, False):
        group = {"lr": 0.1, "k": 3, "train_mode": mode, "params": [0]}
        optimizer = {"state": {0: {"z": torch.randn(2)}}, "param_groups": [group]}
        states = [
            {"model": {"w": torch.randn(2)}, "opt": [optimizer] if several else optimizer}
            for _ in range(2)
        ]
        done = averaged(tmp_path, *saved(tmp_path, states))
        found = noted(done, "schedule-free", "0.pt, 1.pt", "optimizer.eval()")
        assert len(found) == len(done.notes) == int(mode)
