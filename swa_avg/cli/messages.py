"""The text of results and plans, as lines. Does not print."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from swa_avg.errors import counted, in_bytes, listed

if TYPE_CHECKING:
    from swa_avg.averaging import Averaging, Distances, Report
    from swa_avg.batchnorm import BatchNormReport
    from swa_avg.checkpoints import Provenance, Score
    from swa_avg.search import SweepReport, WindowScores

_BATCHNORM = "BatchNorm statistics"


def of_plan(averaging: Averaging, tensors: bool) -> Iterator[str]:
    """Yield the plan of a dry run; with `tensors`, also a line for each tensor."""
    yield f"{counted(len(averaging.inputs), 'checkpoint')}, in this order:"
    for number, source in enumerate(averaging.inputs, 1):
        details = [f"{name} {value}" for name, value in source.recorded.items()]
        details += [f"{source.score.name} {source.score.value:.6g}"] if source.score else []
        details += [f"counts as {source.count}"] if source.count > 1 else []
        details += [f"subtracted, counts as {-source.count}"] if source.count < 0 else []
        details += [f"at {source.where}"] if source.where else []
        details += [f"prefix {source.prefix} stripped"] if source.prefix else []
        yield f"{number:6}  {source.path}  {', '.join(details)}".rstrip()
    if tensors:
        yield from of_tensors(averaging)
    plan = averaging.plan
    yield f"would read {in_bytes(plan.bytes_to_read)}: {_treatments(plan.counts, plan.families)}"
    yield f"would write {in_bytes(averaging.layout.size)} to {averaging.output}"
    yield f"would use {in_bytes(averaging.buffer_bytes)} of memory for buffers"


def of_tensors(averaging: Averaging) -> Iterator[str]:
    """Yield a line for each tensor: dtype, shape, treatment, reason."""
    tensors = averaging.plan.tensors
    width = max((len(tensor.name) for tensor in tensors), default=0)
    for tensor in tensors:
        what = f"{tensor.dtype} {list(tensor.shape)}"
        yield f"  {tensor.name:<{width}}  {what:<28} {tensor.treatment.value}: {tensor.reason}"


def of_average(report: Report) -> Iterator[str]:
    """Yield the checkpoints that were averaged, and counts of tensors by treatment."""
    first, last = report.inputs[0].path, report.inputs[-1].path
    of = first if len(report.inputs) == 1 else f"{first} … {last}"
    if scores := [source.score for source in report.inputs if source.score]:
        of = listed([source.path for source in report.inputs], 8) + _span(scores)
    count = sum(source.count for source in report.inputs)
    if count == len(report.inputs) == 1:
        yield f"took the weights of the only checkpoint: {of}"
        return
    if report.inputs[0].count < 0:
        part, whole = report.inputs
        of = f"{whole.path} ({whole.count}) minus {part.path} ({-part.count})"
        yield f"mean of {counted(count, 'checkpoint')}: {of}"
    else:
        yield f"averaged {counted(count, 'checkpoint')}: {of}"
    yield f"tensors: {_treatments(report.counts, report.families)}"


def _span(scores: Sequence[Score]) -> str:
    """Return the range of the metric by which checkpoints were chosen, as text."""
    low, high = (f"{end(score.value for score in scores):.6g}" for end in (min, max))
    return f" ({scores[0].name} {low if low == high else f'{low} to {high}'})"


def of_distances(report: Report, distances: Distances, modules: bool) -> Iterator[str]:
    """Yield each checkpoint's distance from the mean; with `modules`, also by module."""
    yield "distance from the mean, relative to the norm of the mean:"
    cosines = [None, *distances.cosines, None]
    for number, (source, distance) in enumerate(zip(report.inputs, distances.overall, strict=True)):
        turn = cosines[number] if 0 < number < len(report.inputs) - 1 else None
        cosine = "" if turn is None else f"  cosine of the steps before and after {turn:+.2f}"
        yield f"{_ratio(distance):>10}  {source.path}{cosine}"
    if modules:
        width = max(map(len, distances.modules), default=0)
        for module, found in distances.modules.items():
            yield f"  {module:<{width}}  {' '.join(map(_ratio, found))}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def of_provenance(path: str, made: Provenance) -> Iterator[str]:
    """Yield how an average was made."""
    yield f"{path}: average of {counted(made.count, 'checkpoint')}, by swa-avg {made.version}"
    for source in made.sources:
        recorded = {"epoch": source.epoch, "step": source.step}
        details = [f"{name} {value}" for name, value in recorded.items() if value is not None]
        details += [f"counts as {source.count}"] if source.count > 1 else []
        details += [in_bytes(source.size), f"fingerprint {source.fingerprint}"]
        yield f"  {source.name}  {', '.join(details)}"
    for name, value in made.options.items():
        yield f"option {name}: {value}"
    if isinstance(made.batchnorm, dict):
        described = ", ".join(f"{name} {value}" for name, value in made.batchnorm.items())
        yield f"BatchNorm: recomputed ({described})"
    elif made.batchnorm:
        yield f"BatchNorm: {made.batchnorm}"


def of_recompute(report: BatchNormReport, layers: bool) -> Iterator[str]:
    """Yield the layer whose statistics changed most, or with `layers` all layers."""
    samples = "" if report.samples is None else f" ({report.samples:,} samples)"
    yield (
        f"recomputed {counted(len(report.layers), 'BatchNorm layer')} over "
        f"{counted(report.batches, 'batch')}{samples}"
    )
    farthest = sorted(report.layers, key=lambda layer: layer.mean_shift)[-1:]
    for layer in report.layers if layers else farthest:
        yield (
            f"{'  ' if layers else 'largest change, in layer '}{layer.name}: mean by "
            f"{_figure(layer.mean_shift)} standard deviations, standard deviation by a factor of "
            f"{_figure(layer.std_ratio)}"
        )


def _figure(value: float) -> str:
    """Return a positive number with three digits, or with three decimals if it is below 1."""
    if not math.isfinite(value):
        return str(value)
    whole = len(str(int(value))) if value >= 1 else 0
    return f"{value:,.{max(0, 3 - whole)}f}"


def of_search_plan(averaging: Averaging, evaluate: str, greedy: bool) -> Iterator[str]:
    """Yield the plan of a search."""
    count = len(averaging.inputs)
    averages = "their greedy soup" if greedy else f"the averages of the last 1, 2, … {count}"
    yield f"would score with {evaluate} each checkpoint alone, and {averages}"
    room = averaging.layout.size * (2 if greedy else count)
    yield f"would need {in_bytes(room)} for temporary files beside the output"


def of_search(report: SweepReport) -> Iterator[str]:
    """Yield the scores of all candidates, with the best one marked."""
    scale, tried = report.scale, report.tried
    averages, singles = _aligned([one.score for one in tried]), _aligned(report.singles)
    joined = " with it" if report.greedy else " averaged"
    first = "" if report.greedy else f"{'last':>6} "
    yield f"{scale.name} ({scale.better} is better):"
    if report.batchnorm:
        what = "with it" if report.greedy else "averaged"
        yield f"({what}: with recomputed BatchNorm statistics; alone: with its own)"
    yield f"{first}{joined:>12}{'alone':>12}"
    for place, score in enumerate(averages):
        number = report.added(place)
        marks = ["best"] if place == report.best else []
        if report.greedy:
            marks = ["added" if number in report.winner.members else "left out"]
        count = "" if report.greedy else f"{place + 1:6} "
        line = f"{report.paths[number]}  {' '.join(marks)}".rstrip()
        yield f"{count}{score:>12}{singles[number]:>12}  {line}"


def of_window_scores(scores: WindowScores) -> Iterator[str]:
    """Yield the scores along a run: a line for each checkpoint, a column for each window."""
    scale, lasts = scores.scale, scores.lasts
    averaged = iter(_aligned([one.score for one in scores.tried]))
    at = {(one.members[-1], len(one.members)): next(averaged) for one in scores.tried}
    columns = "".join(f"  {f'last {last}':>10}" for last in lasts)
    yield f"{scale.name} ({scale.better} is better):"
    if scores.is_recomputed:
        yield "(last: with recomputed BatchNorm statistics; alone: with its own)"
    yield f"{scores.axis:>10}{columns}  {'alone':>10}"
    for number, alone in enumerate(_aligned(scores.singles)):
        columns = "".join(f"  {at.get((number, last), ''):>10}" for last in lasts)
        yield f"{scores.numbers[number]:>10}{columns}  {alone:>10}  {scores.paths[number]}"
    best = scores.winner
    score, path = _aligned([best.score])[0], scores.paths[best.members[-1]]
    yield f"best average: {score}, the last {len(best.members)} at {path}"


def _aligned(scores: Sequence[float]) -> list[str]:
    """Format numbers with the same decimals, chosen so that the largest has five digits."""
    largest = max(map(abs, scores), default=0)
    digits = math.floor(math.log10(largest)) + 1 if largest else 0
    decimals = min(max(0, 5 - digits), 12)
    return [f"{score:.{decimals}f}" for score in scores]


def of_output(path: str, size: int) -> str:
    """Return the line for a file that was written."""
    return f"wrote {path} ({in_bytes(size)})"


def _treatments(counts: Mapping[str, int], families: Mapping[str, int]) -> str:
    """Return the number of tensors by treatment, as text."""
    statistics = families.get(_BATCHNORM, 0) - counts["reset"]
    others = [name for name in families if name != _BATCHNORM and families[name]]
    kept = counts["kept"] - statistics
    by_treatment = {
        f"{counts['averaged']} averaged": counts["averaged"],
        f"{counted(statistics, 'BatchNorm buffer')} not averaged": statistics,
        f"{kept} kept from the last ({', '.join(others)})": kept,
        f"{counted(counts['reset'], 'BatchNorm buffer')} reset": counts["reset"],
        f"{counts['copied']} copied": counts["copied"],
    }
    return ", ".join(words for words, count in by_treatment.items() if count)
