"""Every remedy works, where options are wrong: exit 2, and the line's advice gives the average."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from command import load, run
from remedies import MODEL, MODULE, SEARCH, Case, Then, check, of_net, save, several, weights

import swa_avg


def checkpoints(folder: Path) -> None:
    """Save two checkpoints, averages of one and of both, and functions that judge."""
    two = several(lambda n: {"model": weights(n), "val_loss": 1 / n, "x": n})
    save(folder, {**two, "mod.py": SEARCH})
    save(folder, {f"hf/{n}/model.safetensors": n for n in (1, 2)})
    for name, numbers in (("first", (1,)), ("both", (1, 2))):
        swa_avg.average([folder / f"{n}.pt" for n in numbers], folder / f"{name}.avg")


# Of each: the command, what its line tells, the commands that follow it, and their averages, or
# those at each place where the command writes several.
Usage = tuple[str, Then, float | tuple[float, ...] | dict[str, float] | None]
LEAVE_OUT = r"Leave out one of them\.$"
M = "m_{{name}}.pt"
OF_TWO = {"m_2.pt": 1.5}
USAGE: dict[str, Usage] = {
    "": (r"Give the checkpoints to average, as in: swa-avg ckpts/epoch_\*\.pt$", ("?.pt",), 1.5),
    "--show both.avg ?.pt": (f"--show cannot be combined with checkpoints. {LEAVE_OUT}",
                             ("--show both.avg", "?.pt"),
                             {"out_1.pt": 1.5}),
    "--show both.avg --force": (f"with --force. {LEAVE_OUT}",
                                ("--show both.avg", "?.pt --force"),
                                {"out_1.pt": 1.5}),
    "?.pt --report http://127.0.0.1/r.json": (
        r"--report writes to this machine: give a path, not a URL\.$", ("?.pt --report r.json",),
        1.5),
    "?.pt --distances --plot s3://bucket/p.svg": (
        r"--plot writes to this machine: give a path, not a URL\.$",
        ("?.pt --distances --plot p.svg",), 1.5),
    "?.pt --report out.pt": (r"--report and --output name the same file\. Give each its own\.$",
                             ("?.pt --report r.json",), 1.5),
    "?.pt --report p.svg --distances --plot p.svg": (
        r"--plot and --report name the same file\. Give each its own\.$",
        ("?.pt --report r.json --distances --plot p.svg",), 1.5),
    "?.pt --key a --ema": (r"Give (--key) or --ema/(--no-ema), not both\.$",
                           ("?.pt {1}", "?.pt {0} model"), 1.5),
    "?.pt --keep-wrapper --dtype float16": (
        f"--keep-wrapper cannot be combined with --dtype: .+ {LEAVE_OUT}",
        ("?.pt --dtype float16",), 1.5),
    "?.pt --dtype half": (r"is not one of 'keep', 'float32', 'bfloat16', '(float16)'\.$",
                          ("?.pt --dtype {0}",), 1.5),
    "hf/? --max-shard-size 5XB": (r"not a size such as 5GB or (500MB)\.$",
                                  ("hf/? --max-shard-size {0} -o swa",), 1.5),
    # Which checkpoints.
    "?.pt --best 1": (r"--best needs --metric NAME, as in (--metric val_loss)\.$",
                      ("?.pt --best 1 {0}",), 2),
    "?.pt --best 0 --metric val_loss": (r"--best must be at least (1), not 0\.$",
                                        ("?.pt --best {0} --metric val_loss",), 2),
    "?.pt --metric loss": (r"--metric needs --best N, or (--sweep) or --greedy\.$",
                           ("?.pt --metric acc {0} mod:both", "?.pt --metric val_loss --best 1"),
                           2),
    "?.pt --mode max": (r"--mode needs --best N, or --sweep or (--greedy)\.$",
                        ("?.pt --mode max {0} mod:judge", "?.pt --mode max --best 1 --metric x"),
                        2),
    "?.pt --best 1 --metric x": (r"give (--mode min) or (--mode max)\.$",
                                 ("?.pt --best 1 --metric x {0}", "?.pt --best 1 --metric x {1}"),
                                 (1, 2)),
    "?.pt --last 0": (r"--last must be at least (1), not 0\.$", ("?.pt --last {0}",), 2),
    "?.pt --last 1,2": (r"--last takes several numbers only with (--each)\.$",
                        ("?.pt --last 1,2 {0} -o m_{{name}}_{{last}}.pt",),
                        {"m_1_1.pt": 1, "m_2_1.pt": 2, "m_2_2.pt": 1.5}),
    "?.pt --epochs 3": (r"must be A:B or A:B:STEP, as in 10:20 or (10:), not 3\.$",
                        ("?.pt --epochs 1:2",), 1.5),
    "?.pt --epochs 2:1": (r"contains no epoch: B is below A, or STEP is 0\.$",
                          ("?.pt --epochs 1:2",), 1.5),
    "--start-from first.avg --last 1": (r"--last needs checkpoints to average\.$",
                                        ("--start-from first.avg --last 1 2.pt",), 1.5),
    # Pictures.
    "?.pt --plot p.svg": (r"--plot needs (--sweep), (--greedy) or (--distances)\.$",
                          ("?.pt --plot p.svg {2}", "?.pt --plot p.svg {1} mod:acc",
                           "?.pt --plot p.svg {0} mod:acc"), (1.5, 2, 2)),
    f"?.pt --each --last 2 --plot p.svg -o {M}": (
        r"--plot with --each needs (--sweep) MOD:ATTR\.$",
        (f"?.pt --each --last 2 --plot p.svg {{0}} mod:acc -o {M}",), OF_TWO),
    # Averages along the run.
    "?.pt --each": (r"--each needs (--last) N: the number of checkpoints to average\.$",
                    (f"?.pt --each {{0}} 2 -o {M}",), OF_TWO),
    f"?.pt --each --last 0 -o {M}": (r"--last must be at least (1)\.$",
                                     (f"?.pt --each --last {{0}} -o {M}",),
                                     {"m_1.pt": 1, "m_2.pt": 2}),
    "?.pt --each --last 2": (r"or \{{name\}}, as in ('merged/\{{step\}}\.pt')\.$",
                             (f"?.pt --each --last 2 -o {M}",), OF_TWO),
    "?.pt --each --last 1,2 -o m_{{name}}.pt": (
        r"need (\{{last\}}) in the output's name, as in",
        ("?.pt --each --last 1,2 -o m_{{name}}_{0}.pt",), {"m_1_1.pt": 1, "m_2_2.pt": 1.5}),
    "?.pt --each --last 2 -o {{nr}}.pt": (
        r"--each: the output's name has \{{nr\}}; use .*(\{{name\}})",
        ("?.pt --each --last 2 -o m_{0}.pt",), OF_TWO),
    "?.pt --each --last 2 --sweep mod:acc --force": (
        r"--force needs (-o), as in -o 'merged/\{{step\}}\.pt'\.$",
        (f"?.pt --each --last 2 --sweep mod:acc --force {{0}} {M}",), OF_TWO),
    **{
        f"?.pt --each --last 2 -o {M} {other}": (
            f"--each cannot be combined with {other.split()[0]}. {LEAVE_OUT}", then, means,
        )
        for other, then, means in (
            ("--start-from first.avg", (f"?.pt --each --last 2 -o {M}",), OF_TWO),
            ("--minus first.avg", (f"?.pt --each --last 2 -o {M}",), OF_TWO),
            ("--best 1 --metric val_loss", ("?.pt --best 1 --metric val_loss",), 2),
            ("--distances", ("?.pt --last 2 --distances",), 1.5),
            ("--greedy mod:acc", ("?.pt --last 2 --greedy mod:acc",), 2),
        )
    },
    # Searches.
    "?.pt --sweep mod:acc --greedy mod:acc": (r"Give (--sweep) or (--greedy), not both\.$",
                                              ("?.pt {0} mod:acc", "?.pt {1} mod:acc"), 2),
    "--sweep mod:acc": (r"Give the checkpoints to average|--sweep needs checkpoints to average\.$",
                        ("?.pt --sweep mod:acc",), 2),
    "?.pt --sweep mod:acc --distances": (
        f"--sweep cannot be combined with --distances. {LEAVE_OUT}",
        ("?.pt --sweep mod:acc", "?.pt --distances"), (2, 1.5)),
    "2.pt --greedy mod:acc --start-from first.avg": (
        f"--greedy cannot be combined with --start-from. {LEAVE_OUT}",
        ("2.pt --greedy mod:acc", "2.pt --start-from first.avg"), (2, 1.5)),
    "--sweep mod:acc --start-from first.avg": (  # and no checkpoints
        f"--sweep cannot be combined with --start-from. {LEAVE_OUT}",
        ("--start-from first.avg",), 1),
    "--sweep mod:acc --start-from both.avg --minus first.avg": (
        f"--sweep cannot be combined with --start-from. {LEAVE_OUT}",
        ("--start-from both.avg --minus first.avg",), 2),
    "?.pt --sweep mod:acc --minus first.avg": (
        f"--sweep cannot be combined with --minus. {LEAVE_OUT}", ("?.pt --sweep mod:acc",), 2),
    "?.pt --greedy mod:acc --bn-buffers first": (
        f"--greedy cannot be combined with --bn-buffers first: .+ {LEAVE_OUT}",
        ("?.pt --greedy mod:acc", "?.pt --bn-buffers first"), (2, 1.5)),
    # An average without another one.
    "--minus first.avg": (r"--minus needs one (--start-from): the average to subtract from\.$",
                          ("{0} both.avg --minus first.avg",), 2),
    "--minus first.avg --start-from both.avg --start-from first.avg": (
        r"--minus needs one (--start-from): ", ("{0} both.avg --minus first.avg",), 2),
    "2.pt --start-from both.avg --minus first.avg": (
        r"--minus takes no checkpoints, only --start-from\. Leave them out\.$",
        ("--start-from both.avg --minus first.avg",), 2),
    **{
        f"--start-from both.avg --minus first.avg {other}": (
            f"--minus cannot be combined with {other.split()[0]}. {LEAVE_OUT}",
            ("--start-from both.avg --minus first.avg",), 2,
        )
        for other in ("--last 1", "--bn-buffers mean", "--keep-wrapper", "--distances")
    },
}  # fmt: skip


def both_ways(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")


@pytest.mark.parametrize("given", USAGE)
def test_remedies_on_usage(given: str, tmp_path: Path) -> None:
    """Wrong usage ends with exit 2, and what its line tells gives the average."""
    says, then, means = USAGE[given]
    mean = None if isinstance(means, dict) else means
    case = Case(checkpoints, both_ways(given), both_ways(says), then, mean, exits=2)
    check(case, tmp_path)
    for name, value in (means if isinstance(means, dict) else {}).items():
        assert torch.equal(load(tmp_path / name)["a.weight"], torch.full((2, 3), float(value)))


DATA = "--data mod:loader"
RECOMPUTE = {
    "?.pt --recompute-bn": (r"--recompute-bn needs (--data) MOD:ATTR\.$",
                            "?.pt --recompute-bn {0} mod:loader"),
    f"?.pt {DATA}": (r"--data needs (--recompute-bn)\.$", f"?.pt {DATA} {{0}}"),
    f"?.pt {DATA} --amp bf16": (r"--data needs (--recompute-bn)\.$",
                                f"?.pt {DATA} --amp bf16 {{0}}"),
    "?.pt --model mod:Net": (r"--model needs (--recompute-bn --data) MOD:ATTR\.$",
                             "?.pt --model mod:Net {0} mod:loader"),
    "?.pt --bn-estimator torch": (
        r"--bn-estimator needs (--recompute-bn --data) MOD:ATTR\.$",
        "?.pt --bn-estimator torch {0} mod:loader"),
    f"--recompute-bn {DATA} --verify": (r"--verify needs checkpoints to average\.$",
                                        f"?.pt --recompute-bn {DATA} --verify"),
    f"--recompute-bn {DATA} --keep-wrapper": (r"--keep-wrapper needs checkpoints to average\.$",
                                              f"?.pt --recompute-bn {DATA} --keep-wrapper"),
}  # fmt: skip


@pytest.mark.parametrize("given", RECOMPUTE)
def test_remedies_on_usage_of_batchnorm(given: str, tmp_path: Path) -> None:
    """As above, and the statistics are those of the data."""
    says, then = RECOMPUTE[given]
    files = {**several(of_net), "mod.py": "\n".join((MODULE, MODEL, ""))}
    check(Case(files, given, says, (then,), 1.5, exits=2), tmp_path)
    alone = ("--amp", "bf16") if "--amp" in given else ()
    alone += ("--bn-estimator", "torch") if "--bn-estimator" in given else ()
    plain = ("1.pt", "2.pt", "--recompute-bn", *DATA.split(), *alone, "-o", "plain.pt")
    assert run(tmp_path, *plain).returncode == 0
    found, wanted = load(tmp_path / "out_0.pt"), load(tmp_path / "plain.pt")
    assert torch.equal(found["bn.running_mean"], wanted["bn.running_mean"])
    assert not torch.equal(found["bn.running_mean"], torch.ones(2))


@pytest.mark.parametrize(
    ("given", "outputs"),
    [
        ("--each --last 2 -o m_{name}.pt", {"m_2.pt": 1.5}),
        ("--sweep mod:acc -o out.pt", {"out.pt": 2.0}),
    ],
)
def test_one_process(given: str, outputs: dict[str, float], tmp_path: Path) -> None:
    """What runs in one process tells so under torchrun, and works without."""
    checkpoints(tmp_path)
    words = ("1.pt", "2.pt", *given.split())
    refused = run(tmp_path, *words, env=os.environ | {"WORLD_SIZE": "2", "RANK": "0"})
    assert refused.returncode == 2
    assert refused.stderr.endswith(" runs in one process: start it without torchrun.\n")
    assert run(tmp_path, *words).returncode == 0
    for name, value in outputs.items():
        assert torch.equal(load(tmp_path / name)["a.weight"], torch.full((2, 3), value))
