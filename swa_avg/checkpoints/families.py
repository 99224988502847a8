"""Families of tensors: groups of names with a common meaning, and how each is treated.

Besides weights, a state_dict holds the state of algorithms: statistics, codebooks, factors,
codes with their scales. The mean of such a tensor is useless without its partners. A family
is recognised by several names together, or by a name that nothing else has. `FAMILIES` is the
table; a new family is a new row and a test. `membership` finds the families.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from swa_avg.tensors import COUNTERS

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


def _rows(kind: Family, *rows: tuple[str, ...]) -> tuple[Family, ...]:
    """Return rows of the table.

    Args:
        kind: What the rows have in common.
        rows: For each row where it is defined, the names that must exist, and the names that
            are members if they exist. A name with `~` is averaged nevertheless, one with `!`
            must be codes, and one with `:int` must be integers.
    """
    made = []
    for where, needs, *also in rows:
        names = " ".join((needs, *also)).split()
        plain = [name.rstrip("~!").removesuffix(":int") for name in names]
        count = len(needs.split())
        marked = {mark: tuple(one for name, one in zip(names, plain, strict=True)
                              if name.endswith(mark)) for mark in ("~", "!", ":int")}  # fmt: skip
        made.append(
            replace(
                kind,
                where=where,
                needs=tuple(plain[:count]),
                also=tuple(plain[count:]),
                averaged=marked["~"],
                codes=marked["!"],
                integers=marked[":int"],
            )
        )
    return tuple(made)


def _kind(name: str, way: Way, because: str, note: str = "", remedy: str = "") -> Family:
    """Return what the rows of one kind have in common."""
    return Family(name, "", way, (), because=because, note=note, remedy=remedy)


BEFORE_QUANTISATION = "Average the weights before they are quantised"
_BATCHNORM = _kind("BatchNorm statistics", Way.BATCHNORM, because="measured on data, not trained")
STATISTICS = _kind(
    "running statistics",
    Way.KEPT,
    because="measured on data, not trained",
    note="match the weights of that checkpoint, not the average",
)
CODEBOOK = _kind(
    "EMA codebook",
    Way.KEPT,
    because="the codes are the sums divided by the counts, so all come from one checkpoint",
    note="match the encoder of that checkpoint, not the average",
)
OBSERVER = _kind(
    "quantisation range",
    Way.KEPT,
    because="scales and zero points belong together and to the observed values",
    note="match the weights of that checkpoint, not the average; if this matters, run the "
    "observers on some batches again",
)
_LEARNED_RANGE = _kind(
    "learned quantisation range",
    Way.KEPT,
    because="scale and zero point are trained; the rest are switches",
)
COUNTER = _kind("counter", Way.KEPT, because="a counter or switch, not trained")
SPECTRAL = _kind("spectral norm", Way.KEPT, because="unit vectors of one power iteration")
_PRUNING = _kind("pruning", Way.KEPT, because="a mask is zero or one")
NOISE = _kind("noise", Way.KEPT, because="a random sample, not trained")
QUEUE = _kind(
    "queue of keys", Way.KEPT, because="each row comes from one sample and has unit length"
)
BALANCE = _kind("expert balance", Way.KEPT, because="computed from token counts, not trained")
_METRIC = _kind("state of a metric", Way.KEPT, because="counts of samples, not trained")
_EXTRA = _kind("extra state", Way.KEPT, because="only its module can interpret it")
_MOMENTS = _kind(
    "moments of the run's weights",
    Way.SAME,
    because="they include the models of earlier checkpoints",
    remedy="Use only the last (--last 1), which includes the models of the earlier checkpoints",
)
_BASE = _kind(
    "orthogonal parametrization",
    Way.SAME,
    because="the trained values are relative to this base",
    remedy="Apply torch.nn.utils.parametrize.remove_parametrizations before averaging",
)
QUANTISED = _kind(
    "quantised weights",
    Way.SAME,
    because="codes have a meaning only with their own scales",
    remedy=BEFORE_QUANTISATION,
)
_WEIGHT_NORM = _kind(
    "weight norm",
    Way.AVERAGED,
    because="g and v separately, as AveragedModel does",
    note="g and v are averaged separately, so their weight is not the mean of the weights",
)
_FACTORS = _kind(
    "low-rank adapter",
    Way.AVERAGED,
    because="each factor separately",
    note="each factor is averaged separately, and the product of the means is not the mean "
    "of the products B·A; to average the products, merge each adapter into its model first",
)
_ROTATION = _kind(
    "orthogonal adapter",
    Way.AVERAGED,
    because="the numbers that a rotation is computed from",
    note="the rotation that belongs to the mean is not the mean of the rotations; to average "
    "the weights, merge each adapter into its model first",
)

# In each group: where it is defined, the names that must exist, names that also belong to it.
FAMILIES: tuple[Family, ...] = (
    # Layers that look like BatchNorm come before it.
    *_rows(STATISTICS, ("rl_games RunningMeanStd", "count running_mean running_var", BN_COUNTER)),
    *_rows(_BATCHNORM, (
        "torch.nn.modules.batchnorm, torch.nn.InstanceNorm*d, torch.nn.SyncBatchNorm",
        " ".join(BN_STATISTICS), BN_COUNTER)),
    *_rows(
        STATISTICS,
        ("mappo ValueNorm", "running_mean_sq running_mean", "debiasing_term"),
        ("skrl RunningStandardScaler", "running_variance running_mean", "current_count"),
        ("batch renormalisation", "running_std running_mean",
         f"rmax dmax r_max d_max {BN_COUNTER}"),
        ("PowerNorm", "running_phi ema_gz"),
    ),
    *_rows(CODEBOOK, ("quantisers with means of codes", "code_count running_mean", "weight")),
    *_rows(
        STATISTICS,
        ("layers with the names of torch.nn.BatchNorm*d", "running_*", BN_COUNTER),
        ("BigGAN layers.bn, layers.ccbn", "stored_mean stored_var", "accumulation_counter"),
        ("layers with the names of TensorFlow", "moving_*"), ("root mean squares", "rms count"),
        ("ComplexBatchNorm of DCCRN", "RVrr RMr RMi", f"RVri RVii {BN_COUNTER}"),
        ("StyleGAN3 SynthesisLayer", "magnitude_ema weight~"),
        ("brax running_statistics", "summed_variance mean", "std count"),
        ("EMA", "prototypes counts"), ("PyG TGNMemory", "last_update memory"),
        ("normalisers", "*_count *_mean *_var", "*_std"), ("normalisers", "*_count *_mean *_std"),
        ("sklearn", "n_samples_seen_ mean_ var_", "scale_"),
        ("torchrl VecNorm", "*_ssq *_sum *_count"), ("torchrl VecNormV2", "_loc _var _count"),
        ("nerfacc OccGridEstimator", "occs binaries"), ("SNGP", "covariance precision"),
        ("SNGP", "covariance_matrix precision_matrix"), ("DUQ", "N m", "sigma"),
        ("torch-ngp, ngp_pl", "density_grid density_bitfield", "mean_density iter_density"),
        ("MeshGraphNets Normalizer", "_acc_sum_squared _acc_sum _acc_count", "_num_accumulations"),
        ("MeshGraphNets Normalizer", "acc_sum_squared acc_sum acc_count", "num_accumulations"),
        ("mappo PopArt", "mean_sq mean", "stddev debiasing_term"),
        ("PopArt layers", "mu sigma weight~ bias~"), ("mmdet SeesawLoss", "cum_samples"),
        ("DINO, DINOv2, iBOT", "*_loss.center", "*_loss.center2"),
    ),
    # The mean of running means counts the early models more often than the late ones.
    *_rows(_MOMENTS, ("SWAG of swa_gaussian", "*_cov_mat_sqrt *_sq_mean *_mean")),
    *_rows(STATISTICS, ("means and means of squares", "*_sq_mean *_mean")),
    # Reparametrised weights.
    *_rows(
        SPECTRAL,
        ("torch.nn.utils.spectral_norm", "*_u *_orig~", "*_v *_sigma"),
        ("torch.nn.utils.parametrizations.spectral_norm",
         "parametrizations.*.#._u parametrizations.*.#._v"),
        ("SpectralNorm of SAGAN", "*_u *_bar~", "*_v"),
        ("spectral norm beside its weight", "weight_u weight~", "weight_v weight_sigma"),
        ("BigGAN layers.SN", "sv0 u0 weight~", "u1 u2 u3 sv1 sv2 sv3"),
        ("torch-mimicry SpectralNorm", "sn_u weight~", "sn_sigma"),
    ),
    *_rows(
        _PRUNING,
        ("torch.nn.utils.prune", "*_mask *_orig~"),
        ("sparse training", "weight_mask weight~"), ("masked layers", "mask weight~"),
        ("torch.ao.pruning FakeSparsity", "parametrizations.*.#.mask parametrizations.*.original~"),
        ("apex ASP", "__*_mma_mask *~"),
    ),
    *_rows(
        NOISE,
        ("NoisyLinear of NoisyNet", "*_epsilon *_mu~ *_sigma~"),
        ("performer-pytorch", "fast_attention.projection_matrix"),
        ("Performer", "projection_matrix calls_since_last_redraw"),
    ),
    *_rows(
        _WEIGHT_NORM,
        ("torch.nn.utils.weight_norm", "weight_g weight_v"),
        ("torch.nn.utils.weight_norm", "weight_*_g weight_*_v"),
        ("torch.nn.utils.parametrizations.weight_norm",
         "parametrizations.*.original1 parametrizations.*.original0"),
    ),
    *_rows(_BASE, ("torch orthogonal", "parametrizations.*.#.base parametrizations.*.original~")),
    # Fake quantisation during training.
    *_rows(_LEARNED_RANGE, (
        "torch.ao.quantization _LearnableFakeQuantize", "learning_enabled scale~ zero_point~",
        "fake_quant_enabled static_enabled observer_enabled eps")),
    *_rows(
        OBSERVER,
        ("torch.ao.quantization FakeQuantize", "fake_quant_enabled scale zero_point",
         "observer_enabled activation_post_process.eps activation_post_process.min_val "
         "activation_post_process.max_val activation_post_process.histogram "
         "activation_post_process.scale activation_post_process.zero_point"),
        ("torch.ao.quantization observers", "max_val min_val eps", "histogram"),
        ("torch.ao.quantization observers",
         "activation_post_process.max_val activation_post_process.min_val",
         "activation_post_process.histogram"),
        ("torch.ao.quantization FixedQParamsObserver",
         "activation_post_process.scale activation_post_process.zero_point"),
        ("torch.ao.nn.quantized modules", "zero_point:int scale"),
        ("NVIDIA modelopt, pytorch-quantization TensorQuantizer", "*_quantizer._amax",
         "*_quantizer._pre_quant_scale"),
        ("float8_experimental Float8Linear", "fp8_amax_* fp8_scale_*", "fp8_amax_history_*"),
        ("Transformer Engine before extra state", "fp8_amax_history fp8_scale", "fp8_scale_inv"),
        ("I-BERT QuantAct", "x_max x_min", "act_scaling_factor pre_weight_integer"),
        ("I-BERT QuantLinear, QuantEmbedding", "weight_integer", "bias_integer fc_scaling_factor "
         "weight_scaling_factor conv_scaling_factor convbn_scaling_factor"),
        ("quantisers with an observer", "*.max_val *.min_val scale zero_point", "eps"),
        ("observers with moving averages", "ema_max ema_min"),
    ),
    # Codebooks updated by a moving average.
    *_rows(
        CODEBOOK,
        ("vector-quantize-pytorch and encodec EuclideanCodebook; EmbeddingEMA",
         "embed_avg cluster_size",
         "embed weight initted inited batch_mean batch_variance codebook_mean codebook_variance "
         "codebook_mean_needs_init codebook_variance_needs_init"),
        ("zalandoresearch VectorQuantizerEMA", "_ema_cluster_size _ema_w", "_embedding.weight"),
        ("VectorQuantizerEMA and similar", "ema_cluster_size",
         "ema_w ema_embed ema_dw embedding.weight embedding embeddings embed codebook "
         "codebook.weight weight"),
        *(("VectorQuantizerEMA and similar", two, "embedding embedding.weight codebook weight")
          for two in ("ema_count ema_weight", "embedding_avg cluster_size")),
        ("Sonnet's VectorQuantizerEMA", "ema_cluster_size_hidden ema_dw_hidden",
         "embeddings counter"),
        ("VectorQuantizerEMA and similar", "embed_ema cluster_size_ema", "embed weight"),
        ("BEiT v2 NormEMAVectorQuantizer", "cluster_size embedding.cluster_size"),
        ("VectorQuantizerEMA and similar", "cluster_size dw", "embedding embedding.weight"),
        ("T2M-GPT QuantizeEMAReset and similar", "code_sum code_count",
         "codebook initted inited initialized"),
        ("VQ-VAE with SonnetExponentialMovingAverage", "N_i_ts.hidden m_i_ts.hidden",
         "N_i_ts.average m_i_ts.average N_i_ts.counter m_i_ts.counter e_i_ts"),
        ("VideoGPT Codebook", "z_avg N", "embeddings"),
        ("Moshi EuclideanCodebook", "embedding_sum cluster_usage", "_initialized"),
        ("transformers MimiEuclideanCodebook", "embed_sum cluster_usage", "initialized"),
        ("codebooks with sums", "embed_sum cluster_size", "embed initialized inited"),
        ("Jukebox BottleneckBlock", "k_sum k_elem", "k"),
    ),
    # Queues of keys.
    *_rows(
        QUEUE,
        ("MoCo", "queue_ptr queue", "queue_id queue_l queue_y queue_ptr2 queue2"),
        ("ALBEF, BLIP", "image_queue text_queue", "idx_queue queue_ptr ptr_queue"),
        ("CMC", "memory_l memory_ab", "params"), ("NCEAverage", "memory params"),
        ("banks of features", "*_bank bank_ptr:int", "bank_labels"),
        *(("queues with labels", f"queue {what}") for what in ("queue_labels", "queue_pseudo")),
        ("SimMatch", "bank labels"),
        ("pytorch-metric-learning", "embedding_memory label_memory", "queue_idx"),
        ("lightly MemoryBankModule, DenseCL and similar", "*_ptr:int *", "*_y *_id *_label"),
    ),
    # Balance of experts.
    *_rows(
        BALANCE,
        ("torchtitan, Megatron-LM", "tokens_per_expert", "expert_bias"),
        ("torchtitan, AFMoE", "expert_bias router.gate.weight~"),
        ("LFM2", "expert_bias gate.weight~"), ("Ling", "expert_bias weight~"),
        ("Megatron-LM", "router.expert_bias",
         "router.local_tokens_per_expert router.global_tokens_per_expert"),
        ("OLMo-core", "router.score_bias", "router.batch_size_per_expert"),
        ("DeepSeek-V3", "e_score_correction_bias"), ("ZAYA1", "balancing_biases"),
        ("experts by hand", "load_balance_bias"), ("experts by hand", "routing_bias"),
    ),
    *_rows(_METRIC, ("torchmetrics StatScores", "tp fp tn fn"), ("torchmetrics", "confmat")),
    # Counters, switches and the state of modules.
    *_rows(
        COUNTER,
        ("LitEma of Stable Diffusion", "num_updates decay"),
        ("ema_pytorch EMA", "initted step"), ("thop", "total_ops total_params"),
        ("batch renormalisation", "rmax dmax"), ("batch renormalisation", "r_max d_max"),
    ),
    *_rows(
        replace(COUNTER, single=True),
        *(("ActNorm, codebooks", name)
          for name in ("initialized", "_initialized", "inited", "initted")),
        ("torch.optim.swa_utils.AveragedModel", "n_averaged"),
        ("moving averages", "num_updates"),
        *(("training loops", name) for name in COUNTERS),
    ),
    *_rows(_EXTRA, ("torch.nn.Module.get_extra_state, Transformer Engine", "_extra_state")),
    # Quantised weights.
    *_rows(
        QUANTISED,
        ("GPTQ, AWQ, VPTQ", "qweight scales", "qzeros g_idx zeros"),
        ("bitsandbytes Linear4bit", "*.absmax *!",
         "*.quant_map *.nested_absmax *.nested_quant_map *.quant_state.bitsandbytes__nf4 "
         "*.quant_state.bitsandbytes__fp4"),
        ("bitsandbytes Linear8bitLt", "SCB weight!", "weight_format"),
        ("compressed-tensors", "*_packed *_scale", "*_shape *_zero_point *_g_idx *_global_scale"),
        ("DeepSeek-V3 fp8", "*_scale_inv *!"), ("DeepSeek-V3 fp8", "scale weight!"),
        ("compressed-tensors, modelopt, fp8, BitNet", "*_scale *!",
         "*_scale_2 *_zero_point input_scale output_scale"),
        ("ComfyUI scaled fp8", "scale_weight weight!", "scale_input"),
        ("EETQ", "*_scales *!"), ("gpt-oss MXFP4", "*_blocks! *_scales"),
        ("HQQ", "W_q", "scale zero meta.scale meta.zero"),
        ("optimum-quanto", "*._data *._scale", "*._shift *._zeropoint"),
        ("torchao", "*_qdata *_scale", "*_zero_point *_zero"),
        ("AQLM", "codebooks codes! scales"), ("QuIP#", "Qidxs", "SU SV Wscale"),
    ),
    # Factors whose product is the weight.
    *_rows(
        _FACTORS,
        ("PEFT, loralib", "lora_A** lora_B**", "lora_E**"),
        ("torchtune", "lora_a** lora_b**"), ("PEFT", "lora_embedding_A** lora_embedding_B**"),
        ("kohya-ss", "lora_down** lora_up**", "lora_mid**"),
        *(("LoRA", f"{a}** {b}**") for a, b in (("lora.A", "lora.B"), ("loraA", "loraB"),
            ("w_lora_A", "w_lora_B"), ("lora_*_A", "lora_*_B"))),
        ("NeMo", "adapter.linear_in** adapter.linear_out**"),
        ("NeMo", "lora_*_adapter.linear_in** lora_*_adapter.linear_out**"),
        *(("diffusers", f"{name}.down** {name}.up**") for name in ("lora", "*_lora", "lora_layer")),
        ("x-flux", "*_lora#.down** *_lora#.up**"),
        ("LoHa", "hada_w1_a** hada_w1_b**", "hada_w2_a** hada_w2_b**"),
        ("LoKr", "lokr_w2_a** lokr_w2_b**", "lokr_w1** lokr_w1_a** lokr_w1_b**"),
        ("LoKr", "lokr_w1** lokr_w2**"), ("PEFT VeRA", "vera_lambda_b** vera_lambda_d**"),
        *((f"PEFT {name}", f"{stem}_A** {stem}_B**") for name, stem in (
            ("Poly", "poly_lora"), ("DeLoRA", "delora"), ("GraLoRA", "gralora"), ("HiRA", "hira"),
            ("PEANuT", "peanut"), ("AdaMSS", "adamss"), ("GLoRA", "glora"),
            ("SuperTuning", "supertuning_lora"), ("VB-LoRA", "vblora_logits"))),
        *((f"PEFT {name}", two) for name, two in (
            ("pVeRA", "pvera_lambda_b** pvera_lambda_d**"), ("DEFT", "deft_P** deft_R**"),
            ("RandLora", "randlora_lambda** randlora_gamma**"), ("UniLoRA", "unilora_theta_d**"))),
        ("PEFT OSF", "osf_svd_params.U_low** osf_svd_params.V_low**", "osf_svd_params.S_low**"),
    ),
    *_rows(
        _ROTATION,
        ("PEFT OFT", "oft_r**"), ("PEFT OFT", "oft_R**"), ("PEFT BOFT", "boft_R**", "boft_s**"),
        ("LyCORIS Diag-OFT", "oft_blocks**"), ("PEFT HRA", "hra_u**"), ("PEFT PSOFT", "psoft_R**"),
    ),
)  # fmt: skip
