"""Families of tensors: groups of names with a common meaning, and how each is treated.

Besides weights, a state_dict holds the state of algorithms: statistics, codebooks, factors,
codes with their scales. The mean of such a tensor is useless without its partners. A family
is recognised by several names together, never by one common name. `FAMILIES` is the table; a
new family is a new row and a test. This module is data only: `membership` finds the families.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

BN_COUNTER = "num_batches_tracked"
BN_STATISTICS = ("running_mean", "running_var")


class Way(Enum):
    """The treatment of the members of a family."""

    BATCHNORM = "set by --bn-buffers"
    KEPT = "kept from the last checkpoint"
    SAME = "copied if all checkpoints have the same, else refused"
    AVERAGED = "averaged"


@dataclass(frozen=True, slots=True)
class Family:
    """A row of the table.

    Patterns of names are relative to a common prefix. `*` matches text between dots or a part
    of it, `#` matches a number, and `**` at the end matches the rest of the name. `*`, `#` and
    `**` match the same text in all patterns of a row as in the first of `needs`.

    Attributes:
        name: The name of the family.
        where: The library and class that define it.
        way: The treatment of its members.
        needs: Names that must all exist; the first is the most distinctive.
        also: Names that are members if they exist.
        averaged: Names in `needs` and `also` that are averaged nevertheless.
        because: The reason, in a few words.
        note: A note for the user, if any.
        remedy: What the user can do if checkpoints differ where they must be the same.
        codes: Names in `needs` that must be integers or numbers of 8 bits or fewer.
        integers: Names in `needs` that must be integers.
        single: Whether each member has one element.
    """

    name: str
    where: str
    way: Way
    needs: tuple[str, ...]
    also: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    because: str = ""
    note: str = ""
    remedy: str = ""
    codes: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    single: bool = False


def _statistics(where: str, *needs: str, also: tuple[str, ...] = ()) -> Family:
    return Family(
        name="running statistics",
        where=where,
        way=Way.KEPT,
        needs=needs,
        also=also,
        because="measured on data, not trained",
        note="match the weights of that checkpoint, not the average",
    )


def _codebook(where: str, *needs: str, also: tuple[str, ...] = ()) -> Family:
    return Family(
        name="EMA codebook",
        where=where,
        way=Way.KEPT,
        needs=needs,
        also=also,
        because="the codes are the sums divided by the counts, so all come from one checkpoint",
        note="match the encoder of that checkpoint, not the average",
    )


def _observer(
    where: str, *needs: str, also: tuple[str, ...] = (), integers: tuple[str, ...] = ()
) -> Family:
    return Family(
        name="quantisation range",
        where=where,
        way=Way.KEPT,
        needs=needs,
        also=also,
        because="scales and zero points belong together and to the observed values",
        note="match the weights of that checkpoint, not the average; if this matters, run the "
        "observers on some batches again",
        integers=integers,
    )


def _counter(where: str, *needs: str, single: bool = False, also: tuple[str, ...] = ()) -> Family:
    return Family(
        name="counter",
        where=where,
        way=Way.KEPT,
        needs=needs,
        also=also,
        because="a counter or switch, not trained",
        single=single,
    )


def _spectral(where: str, *needs: str, also: tuple[str, ...] = (), averaged: str = "") -> Family:
    return Family(
        name="spectral norm",
        where=where,
        way=Way.KEPT,
        needs=needs,
        also=also,
        averaged=(averaged,),
        because="unit vectors of one power iteration",
    )


def _quantised(
    where: str, *needs: str, also: tuple[str, ...] = (), codes: tuple[str, ...] = ()
) -> Family:
    return Family(
        name="quantised weights",
        where=where,
        way=Way.SAME,
        needs=needs,
        also=also,
        because="codes have a meaning only with their own scales",
        remedy=BEFORE_QUANTISATION,
        codes=codes,
    )


def _factors(where: str, *needs: str, also: tuple[str, ...] = ()) -> Family:
    return Family(
        name="low-rank adapter",
        where=where,
        way=Way.AVERAGED,
        needs=needs,
        also=also,
        because="each factor separately",
        note="each factor is averaged separately, and the product of the means is not the mean "
        "of the products B·A; to average the products, merge each adapter into its model first",
    )


def _weight_norm(where: str, *needs: str) -> Family:
    return Family(
        name="weight norm",
        where=where,
        way=Way.AVERAGED,
        needs=needs,
        because="g and v separately, as AveragedModel does",
        note="g and v are averaged separately, so their weight is not the mean of the weights",
    )


BEFORE_QUANTISATION = "Average the weights before they are quantised"
FAMILIES: tuple[Family, ...] = (
    # Layers that look like BatchNorm come before it.
    _statistics("rl_games RunningMeanStd", "count", "running_mean", "running_var",
                also=(BN_COUNTER,)),
    Family(
        name="BatchNorm statistics",
        where="torch.nn.modules.batchnorm, torch.nn.InstanceNorm*d, torch.nn.SyncBatchNorm",
        way=Way.BATCHNORM,
        needs=BN_STATISTICS,
        also=(BN_COUNTER,),
        because="measured on data, not trained",
    ),
    _statistics(
        "mappo ValueNorm", "running_mean_sq", "running_mean", also=("debiasing_term",)
    ),
    _statistics("skrl RunningStandardScaler", "running_variance", "running_mean",
                also=("current_count",)),
    _statistics("batch renormalisation", "running_std", "running_mean",
                also=("rmax", "dmax", "r_max", "d_max", BN_COUNTER)),
    _codebook("residual quantisers with means of codes", "code_count", "running_mean",
              also=("weight",)),
    _statistics("layers with the names of torch.nn.BatchNorm*d", "running_*",
                also=(BN_COUNTER,)),
    _statistics("layers with the names of TensorFlow", "moving_mean",
                also=("moving_var", "moving_variance")),
    _statistics("rsl_rl EmpiricalNormalization", "count", "_mean", "_var", also=("_std",)),
    _statistics("RunningMeanStd of gym and similar", "count", "mean", "var", also=("std",)),
    _statistics("RunningMeanStd of gym and similar", "count", "mean", "std"),
    _statistics("normalisers of inputs", "*_var", "*_mean", "count", also=("*_std",)),
    _statistics("normalisers of inputs", "*_std", "*_mean", "count"),
    _statistics("normalisers of inputs", "*_count", "*_mean", "*_var", also=("*_std",)),
    _statistics("normalisers of inputs", "*_count", "*_mean", "*_std"),
    _statistics("MeshGraphNets Normalizer", "_acc_sum_squared", "_acc_sum", "_acc_count",
                also=("_num_accumulations",)),
    _statistics("MeshGraphNets Normalizer", "acc_sum_squared", "acc_sum", "acc_count",
                also=("num_accumulations",)),
    _statistics("mappo PopArt", "mean_sq", "mean", also=("stddev", "debiasing_term")),
    _statistics("Welford's algorithm", "m2", "mean", also=("count", "n")),
    _statistics("Welford's algorithm", "M2", "mean", also=("count", "n")),
    # Reparametrised weights.
    _spectral("torch.nn.utils.spectral_norm", "*_u", "*_orig", also=("*_v",), averaged="*_orig"),
    _spectral(
        "torch.nn.utils.parametrizations.spectral_norm",
        "parametrizations.*.#._u",
        "parametrizations.*.#._v",
    ),
    _spectral("SpectralNorm of SAGAN", "*_u", "*_bar", also=("*_v",), averaged="*_bar"),
    _spectral("BigGAN layers.SN", "sv0", "u0", "weight",
              also=("u1", "u2", "u3", "sv1", "sv2", "sv3"), averaged="weight"),
    _spectral("SNConv2d, SNLinear of SN-GAN", "u", "weight", also=("v",), averaged="weight"),
    _spectral("SNConv2d, SNLinear of SN-GAN", "_u", "weight", also=("_v",), averaged="weight"),
    Family(
        name="pruning",
        where="torch.nn.utils.prune",
        way=Way.KEPT,
        needs=("*_mask", "*_orig"),
        averaged=("*_orig",),
        because="a mask is zero or one",
    ),
    _weight_norm("torch.nn.utils.weight_norm", "weight_g", "weight_v"),
    _weight_norm("torch.nn.utils.weight_norm", "weight_*_g", "weight_*_v"),
    _weight_norm(
        "torch.nn.utils.parametrizations.weight_norm",
        "parametrizations.*.original1",
        "parametrizations.*.original0",
    ),
    Family(
        name="orthogonal parametrization",
        where="torch.nn.utils.parametrizations.orthogonal",
        way=Way.SAME,
        needs=("parametrizations.*.#.base", "parametrizations.*.original"),
        averaged=("parametrizations.*.original",),
        because="the trained values are relative to this base",
        remedy="Apply torch.nn.utils.parametrize.remove_parametrizations before averaging",
    ),
    # Fake quantisation during training.
    Family(
        name="learned quantisation range",
        where="torch.ao.quantization _LearnableFakeQuantize",
        way=Way.KEPT,
        needs=("learning_enabled", "scale", "zero_point"),
        also=("fake_quant_enabled", "static_enabled", "observer_enabled", "eps"),
        averaged=("scale", "zero_point"),
        because="scale and zero point are trained; the rest are switches",
    ),
    _observer(
        "torch.ao.quantization FakeQuantize",
        "fake_quant_enabled",
        "scale",
        "zero_point",
        also=(
            "observer_enabled",
            *(f"activation_post_process.{name}"
              for name in ("eps", "min_val", "max_val", "histogram", "scale", "zero_point")),
        ),
    ),
    _observer("torch.ao.quantization observers", "max_val", "min_val", "eps",
              also=("histogram",)),
    _observer("torch.ao.quantization observers", "activation_post_process.max_val",
              "activation_post_process.min_val",
              also=("activation_post_process.histogram",)),
    _observer("torch.ao.quantization FixedQParamsObserver", "activation_post_process.scale",
              "activation_post_process.zero_point"),
    _observer("torch.ao.nn.quantized modules", "zero_point", "scale", integers=("zero_point",)),
    _observer("NVIDIA modelopt, pytorch-quantization TensorQuantizer", "*_quantizer._amax",
              also=("*_quantizer._pre_quant_scale",)),
    _observer("float8_experimental Float8Linear", "fp8_amax_*", "fp8_scale_*",
              also=("fp8_amax_history_*",)),
    # Codebooks updated by a moving average.
    _codebook(
        "vector-quantize-pytorch and encodec EuclideanCodebook; EmbeddingEMA",
        "embed_avg",
        "cluster_size",
        also=("embed", "weight", "initted", "inited", "batch_mean", "batch_variance",
              "codebook_mean", "codebook_variance", "codebook_mean_needs_init",
              "codebook_variance_needs_init"),
    ),
    _codebook("zalandoresearch VectorQuantizerEMA", "_ema_cluster_size", "_ema_w",
              also=("_embedding.weight",)),
    _codebook("VectorQuantizerEMA and similar", "ema_cluster_size",
              also=("ema_w", "ema_embed", "ema_dw", "embedding.weight", "embedding", "embeddings",
                    "embed", "codebook", "codebook.weight", "weight")),
    _codebook("VectorQuantizerEMA and similar", "ema_count", "ema_weight",
              also=("embedding", "embedding.weight", "codebook", "weight")),
    _codebook("VectorQuantizerEMA and similar", "embedding_avg", "cluster_size",
              also=("embedding", "embedding.weight", "codebook", "weight")),
    _codebook("VectorQuantizerEMA and similar", "ema_cluster_size_hidden", "ema_dw_hidden",
              also=("embeddings", "counter")),
    _codebook("T2M-GPT QuantizeEMAReset and similar", "code_sum", "code_count",
              also=("codebook", "initted", "inited", "initialized")),
    _codebook("VQ-VAE with SonnetExponentialMovingAverage", "N_i_ts.hidden", "m_i_ts.hidden",
              also=("N_i_ts.average", "m_i_ts.average", "N_i_ts.counter", "m_i_ts.counter",
                    "e_i_ts")),
    _codebook("VideoGPT Codebook", "z_avg", "N", also=("embeddings",)),
    _codebook("Moshi EuclideanCodebook", "embedding_sum", "cluster_usage", also=("_initialized",)),
    _codebook("transformers MimiEuclideanCodebook", "embed_sum", "cluster_usage",
              also=("initialized",)),
    _codebook("Jukebox BottleneckBlock", "k_sum", "k_elem", also=("k",)),
    # Queues of keys.
    *(
        Family(
            name="queue of keys",
            where=where,
            way=Way.KEPT,
            needs=needs,
            also=also,
            because="each row comes from one sample and has unit length",
        )
        for where, needs, also in (
            ("MoCo", ("queue_ptr", "queue"), ("queue_id", "queue_l", "queue_ptr2", "queue2")),
            ("ALBEF, BLIP", ("image_queue", "text_queue"),
             ("idx_queue", "queue_ptr", "ptr_queue")),
        )
    ),
    # Balance of experts.
    *(
        Family(
            name="expert balance",
            where=where,
            way=Way.KEPT,
            needs=needs,
            also=also,
            averaged=averaged,
            because="computed from token counts, not trained",
        )
        for where, needs, also, averaged in (
            ("torchtitan, Megatron-LM", ("tokens_per_expert",), ("expert_bias",), ()),
            ("torchtitan", ("expert_bias", "router.gate.weight"), (), ("router.gate.weight",)),
            ("Megatron-LM", ("router.expert_bias",), ("router.local_tokens_per_expert",), ()),
            ("DeepSeek-V3", ("e_score_correction_bias",), (), ()),
        )
    ),
    # Counters, switches and the state of modules.
    _counter("LitEma of Stable Diffusion", "num_updates", "decay"),
    _counter("ema_pytorch EMA", "initted", "step"),
    _counter("thop", "total_ops", "total_params"),
    _counter("batch renormalisation", "rmax", "dmax"),
    _counter("batch renormalisation", "r_max", "d_max"),
    *(
        _counter(where, name, single=True)
        for where, name in (
            ("ActNorm, codebooks", "initialized"),
            ("ActNorm, codebooks", "_initialized"),
            ("ActNorm, codebooks", "inited"),
            ("ActNorm, codebooks", "initted"),
            ("torch.optim.swa_utils.AveragedModel", "n_averaged"),
            ("moving averages", "num_updates"),
            ("training loops", "num_steps"),
            ("training loops", "global_step"),
        )
    ),
    Family(
        name="extra state",
        where="torch.nn.Module.get_extra_state, Transformer Engine",
        way=Way.KEPT,
        needs=("_extra_state",),
        because="only its module can interpret it",
    ),
    # Quantised weights.
    _quantised("GPTQ, AWQ, VPTQ", "qweight", "scales", also=("qzeros", "g_idx", "zeros")),
    _quantised("bitsandbytes Linear4bit", "*.absmax", "*",
               also=("*.quant_map", "*.nested_absmax", "*.nested_quant_map",
                     "*.quant_state.bitsandbytes__nf4", "*.quant_state.bitsandbytes__fp4"),
               codes=("*",)),
    _quantised("bitsandbytes Linear8bitLt", "SCB", "weight", also=("weight_format",),
               codes=("weight",)),
    _quantised("compressed-tensors", "*_packed", "*_scale",
               also=("*_shape", "*_zero_point", "*_g_idx", "*_global_scale")),
    _quantised("DeepSeek-V3 fp8", "*_scale_inv", "*", codes=("*",)),
    _quantised("compressed-tensors, modelopt, fp8, BitNet", "*_scale", "*",
               also=("*_scale_2", "*_zero_point", "input_scale", "output_scale"), codes=("*",)),
    _quantised("EETQ", "*_scales", "*", codes=("*",)),
    _quantised("gpt-oss MXFP4", "*_blocks", "*_scales", codes=("*_blocks",)),
    _quantised("HQQ", "W_q", also=("scale", "zero", "meta.scale", "meta.zero")),
    _quantised("optimum-quanto", "*._data", "*._scale", also=("*._shift", "*._zeropoint")),
    _quantised("torchao", "*_qdata", "*_scale", also=("*_zero_point", "*_zero")),
    _quantised("AQLM", "codebooks", "codes", "scales", codes=("codes",)),
    _quantised("QuIP#", "Qidxs", also=("SU", "SV", "Wscale")),
    # Factors whose product is the weight.
    _factors("PEFT, loralib", "lora_A**", "lora_B**", also=("lora_E**",)),
    _factors("torchtune", "lora_a**", "lora_b**"),
    _factors("PEFT", "lora_embedding_A**", "lora_embedding_B**"),
    _factors("kohya-ss", "lora_down**", "lora_up**"),
    _factors("diffusers", "lora.down**", "lora.up**"),
    _factors("diffusers", "*_lora.down**", "*_lora.up**"),
    _factors("LoHa", "hada_w1_a**", "hada_w1_b**", also=("hada_w2_a**", "hada_w2_b**")),
    _factors("LoKr", "lokr_w2_a**", "lokr_w2_b**",
             also=("lokr_w1**", "lokr_w1_a**", "lokr_w1_b**")),
    _factors("LoKr", "lokr_w1**", "lokr_w2**"),
    _factors("PEFT VeRA", "vera_lambda_b**", "vera_lambda_d**"),
)  # fmt: skip
