"""Families that people write by hand: found by words in names, and by shapes.

Running statistics, codebooks, queues and the vectors of a power iteration are often written
anew, with names of their own. What the pieces have in common are words (`ema`, `mean`, `var`)
that stand beside each other in one module, and shapes that belong together. One such word
alone is no sign. This module does not read tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from enum import Enum
from functools import lru_cache

from swa_avg.tensors.tensor import Kind, Tensor

_Shape = tuple[int, ...]
_Words = tuple[str, ...]
_Leaves = Mapping[str, Tensor]


class Group(Enum):
    """What tensors that belong together are."""

    CODEBOOK = "counts and sums for each code"
    CENTROIDS = "counts and centres of clusters"
    STATISTICS = "statistics written by hand"
    VECTORS = "vectors beside their weight"
    QUEUE = "queues written by hand"
    NOISE = "noise beside its sigma"
    COUNTER = "counters written by hand"
    LARGEST = "largest values seen"
    EXPERTS = "balance written by hand"


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The parts of a name within its module: `running` and `mean` of running_mean, runningMean.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
_CENTRE = _set("mean mu avg average loc sum total")
_SPREAD = _set("var variance std stdev stddev sigma sq sqr squared squares sumsq ssq cov invstd")
_EXTREMES = _set("min max")
_STATISTIC = _CENTRE | _SPREAD | _EXTREMES
# Something tracked while the run goes on; nobody trains a moving mean.
_PAST = _set("running run moving mov mvg ma ema ewma tracked smoothed")
# These say so where both a mean and a spread are called so.
_LOOSE = _PAST | _set("global glob pop population batch stats stat avg acc r")
# A float of one element under one of these names counts; nobody trains it.
_NAMES_OF_COUNTERS = (
    "num_steps global_step current_step iteration current_epoch steps total_steps global_steps "
    "train_steps step_count epoch epochs iter iters n_iter num_iter num_iters iterations "
    "num_iterations iter_num global_iter counter count n_updates update_count n_calls num_batches "
    "tokens_seen num_tokens samples_seen num_samples itr niter cur_iter current_iter batch_idx "
    "iter_count"
)
COUNTERS = tuple(_NAMES_OF_COUNTERS.split())
# Other counts, and switches, that a normaliser may have.
_COUNTED = frozenset(COUNTERS) | _set(
    "initialized initialised inited initted is_initialized is_init num_batches num_updates step n "
    "nu num_batches_tracked"
)
_COUNTING = _set("count counts counter seen updates")
_OF_EMA = _set("decay step steps update updates iter momentum")
_TRAINED = _set("weight weights bias gamma beta logit")
_QUEUES = _set("queue queues fifo")
_OF_SAMPLES = _set("feature features feat feats key keys negative negatives label labels")
_EXPERTS = _set("expert experts")
_LOADS = _set("count counts load usage tokens freq hits")
_BALANCED = _set("correction balance balancing free")
_CENTROID = _set("centroid centroids center centers centre centres prototype prototypes means")
_CLUSTER = _set("count counts size sizes usage hits")
_WEIGHTS = _set("weight kernel")
_AROUND_VECTORS = _WEIGHTS | _set(
    "sn spectral norm power iter iteration iterations buffer buf vec vector singular orig left "
    "right"
)
_SIGN = _set("bank eps epsilon amax u v m s num n").union(
    *(_PAST, _SPREAD, _EXTREMES, _QUEUES, _EXPERTS, _CENTROID, _BALANCED, _COUNTING)
)

# People write no longer names within a module; what is done with words grows with their square.
_LONGEST = 200

# The count for each code: ema_cluster_size, cluster_counts, ema_vocab_hit, running_size.
_COUNTS = re.compile(
    r"(?=.*(?:cluster|code|ema|embed|vocab|running))(?=.*(?:size|count|usage|hit|freq))"
)
# The sum of vectors for each code: embed_avg, ema_w, ema_embedding, running_sum, dw.
_SUMS = re.compile(r"ema|avg|sum|dw|(?:^|_)[wm]$")
# The submodule that holds the codes, in an `nn.Embedding`.
_CODES = re.compile(r"emb|code|cent|^_?(?:w|cb)$")


def by_hand(tensors: Mapping[str, Tensor], known: Container[str]) -> Iterator[tuple[str, Group]]:
    """Yield the tensors of families that people write by hand, each with its family.

    Args:
        tensors: The tensors of a state_dict by name.
        known: The names whose family is known. They still say what is beside them.
    """
    signs = {
        name[: name.rfind(".") + 1]: None
        for name in tensors
        if _is_sign(name[name.rfind(".") + 1 :], name in known)
    }
    if not signs:
        return
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        at = name.rfind(".") + 1
        modules.setdefault(name[:at], {})[name[at:]] = tensor
    children: dict[str, list[str]] = {}
    for module in modules:
        parent = module[: module[:-1].rfind(".") + 1]
        children.setdefault(parent, []).append(module)
    for before in signs:
        for leaf, group in _of_module(modules[before]):
            yield before + leaf, group
        inner = {child: modules[child] for child in children.get(before, ()) if child != before}
        yield from ((name, Group.CODEBOOK) for name in _codebooks(before, modules[before], inner))


def _of_module(leaves: _Leaves) -> Iterator[tuple[str, Group]]:
    """Yield the members of families among the tensors of one module."""
    floats = {leaf: tensor for leaf, tensor in leaves.items() if tensor.dtype.kind is Kind.FLOAT}
    words = {leaf: _words_of(leaf) for leaf in floats}
    yield from ((leaf, Group.STATISTICS) for leaf in _statistics(leaves, floats))
    yield from ((leaf, Group.CENTROIDS) for leaf in _centroids(leaves))
    yield from ((leaf, Group.VECTORS) for leaf in _vectors(floats))
    yield from ((leaf, Group.QUEUE) for leaf, tensor in leaves.items() if _is_queue(leaf, tensor))
    every = set().union(*words.values())
    for leaf, tensor in floats.items():
        own = frozenset(words[leaf])
        if tensor.numel > 1 and own & {"eps", "epsilon"} and "sigma" in every:
            yield leaf, Group.NOISE
        if tensor.numel == 1 and _counts(words[leaf]):
            yield leaf, Group.COUNTER
        if "amax" in own or (own == {"scale"} and "amax_history" in leaves):
            yield leaf, Group.LARGEST
        if _is_of_experts(words[leaf], tensor):
            yield leaf, Group.EXPERTS


def _is_queue(leaf: str, tensor: Tensor) -> bool:
    """Return whether a tensor has a row of each of many samples."""
    own = frozenset(_words_of(leaf))
    called = own & _QUEUES or ("bank" in own and own & _OF_SAMPLES)
    return bool(called) and tensor.numel > 1 and not own & _TRAINED


def _is_of_experts(words: _Words, tensor: Tensor) -> bool:
    """Return whether a tensor balances experts: their load, or a bias computed from it."""
    own = frozenset(words)
    if own & _EXPERTS and own & _LOADS:
        return True
    row = tensor.numel > 1 and tensor.numel == tensor.shape[-1]
    balance = own & _BALANCED and ("free" not in own or own & {"aux", "loss"})
    return row and words[-1:] == ("bias",) and bool(balance or words == ("expert", "bias"))


def _statistics(leaves: _Leaves, floats: _Leaves) -> Iterator[str]:
    """Yield running statistics: what is tracked, or a mean with its spread and a count."""
    counts = [leaf for leaf, tensor in leaves.items() if _is_count(leaf, tensor)]
    lower: dict[_Words, str] = {}
    upper: dict[_Words, str] = {}
    named, alike = [], set()
    for leaf in floats:
        words = _words_of(leaf)
        if not words or words[-1] in _TRAINED:
            continue
        own = frozenset(words)
        if own & _PAST and (own - _PAST) & _STATISTIC:
            yield leaf
        if own & _STATISTIC or words in (("m",), ("s",), ("m", "2")):
            named.append(leaf)
        lower.update(dict.fromkeys(_keys(words, _CENTRE, "mean", ("m",)), leaf))
        lower.update(dict.fromkeys(_keys(words, {"min"}, "min"), leaf))
        upper.update(dict.fromkeys(_keys(words, _SPREAD, "mean", ("s",), ("m", "2")), leaf))
        upper.update(dict.fromkeys(_keys(words, {"max"}, "min"), leaf))
        if own & _CENTRE:  # avg and avg_sq
            lower.setdefault(("mean", *words), leaf)
    for key in lower.keys() & upper.keys():
        low, high = lower[key], upper[key]
        tracked = counts or (key[0] == "mean" and _LOOSE.intersection(key[1:]))
        if low != high and tracked and floats[low].shape == floats[high].shape:
            yield from (low, high)
            alike.add(floats[low].shape)
    if counts and alike:
        yield from (*counts, *(leaf for leaf in named if floats[leaf].shape in alike))


def _keys(words: _Words, among: Container[str], kind: str, *alone: _Words) -> Iterator[_Words]:
    """Yield the rest of a name without each word for a statistic, after the kind of statistic."""
    if words in alone:
        yield (kind,)
    for at, word in enumerate(words):
        if word in among:
            yield (kind, *words[:at], *words[at + 1 :])


def _is_count(leaf: str, tensor: Tensor) -> bool:
    """Return whether a tensor counts samples, or says that a statistic has its first value."""
    called = leaf.strip("_").lower()
    return tensor.numel == 1 and (called in _COUNTED or _counts(_words_of(leaf)))


def _counts(words: _Words) -> bool:
    """Return whether the words of a single number are those of a count or of an EMA's decay."""
    if not words:
        return False
    own = frozenset(words)
    last, several = own & frozenset(words[-1:]), len(words) > 1
    of_ema = own & {"ema", "ewma"} and own & _OF_EMA
    of_many = words[0] in ("num", "n") and words[-1].endswith("s") and not last & _TRAINED
    return several and bool(last & _COUNTING or of_many or of_ema)


def _centroids(leaves: _Leaves) -> Iterator[str]:
    """Yield centres of clusters and their counts: centroids and cluster_size."""
    counts: dict[_Shape, list[str]] = {}
    for leaf, tensor in leaves.items():
        if tensor.shape and _CLUSTER.intersection(_words_of(leaf)):
            counts.setdefault(tuple(tensor.shape), []).append(leaf)
    for leaf, tensor in leaves.items() if counts else ():
        if tensor.dtype.kind is Kind.FLOAT and _CENTROID.intersection(_words_of(leaf)):
            beside = tuple(tensor.shape[:-1])
            if beside in counts:
                yield from (leaf, *counts[beside])
                counts[beside] = []  # once


def _vectors(floats: _Leaves) -> Iterator[str]:
    """Yield the left and right vectors of a power iteration, beside their weight: weight_u0."""
    if any(leaf.endswith("_g") for leaf in floats):
        return  # the direction of weight norm
    weights = [
        tensor
        for leaf, tensor in floats.items()
        if len(tensor.shape) > 1 and _WEIGHTS.intersection(_words_of(leaf))
    ]
    sides = {side for tensor in weights for side in tensor.shape[:2]}
    sides |= {tensor.numel // side for tensor in weights for side in tensor.shape[:2] if side}
    for leaf, tensor in floats.items() if sides else ():
        words = _words_of(leaf)
        rest = [word for word in words if word not in ("u", "v")]
        around = {word for word in rest if not word.isdecimal()}
        size = tensor.numel
        named = len(rest) == len(words) - 1 and around <= _AROUND_VECTORS
        if named and size > 1 and size == max(tensor.shape) and size in sides:
            yield leaf


def _codebooks(before: str, leaves: _Leaves, children: Mapping[str, _Leaves]) -> Iterator[str]:
    """Yield the names of the tensors of codebooks in a module.

    Args:
        before: The module's name with a dot.
        leaves: Its tensors.
        children: The tensors of each module in it.
    """
    shapes = _float_shapes(leaves)
    sums = {shape for leaf, shape in shapes.items() if _SUMS.search(leaf)}
    for size in {shape for leaf, shape in shapes.items() if shape and _COUNTS.match(leaf)}:
        vectors = {shape for shape in sums if _is_vectors(shape, size)}
        vectors |= set(map(_turned, vectors))
        for leaf, shape in shapes.items() if vectors else ():
            if shape in vectors or shape == size or ("init" in leaf and math.prod(shape) == 1):
                yield before + leaf
        for child, inner in children.items() if vectors else ():
            called = child[len(before) : -1]
            if _CODES.search(called) and _float_shapes(inner).get("weight") in vectors:
                yield f"{child}weight"


def _float_shapes(leaves: _Leaves) -> dict[str, _Shape]:
    return {leaf: tuple(one.shape) for leaf, one in leaves.items() if one.dtype.kind is Kind.FLOAT}


def _is_vectors(shape: _Shape, size: _Shape) -> bool:
    """Return whether a shape is that of one vector for each code, in rows or in columns."""
    return len(shape) == len(size) + 1 and size in (shape[:-1], _turned(shape)[:-1])


def _turned(shape: _Shape) -> _Shape:
    return (*shape[:-2], shape[-1], shape[-2])


@lru_cache(maxsize=1024)
def _is_sign(leaf: str, known: bool) -> bool:
    """Return whether a name within a module may be one of a family written by hand."""
    if _COUNTS.match(leaf):
        return True  # the table may know the count and not the codes
    return not known and not _SIGN.isdisjoint(_words_of(leaf))


@lru_cache(maxsize=1024)
def _words_of(leaf: str) -> _Words:
    """Return the words of a name within its module, in lower case; of a very long one, none."""
    return tuple(word.lower() for word in _WORD.findall(leaf)) if len(leaf) < _LONGEST else ()
