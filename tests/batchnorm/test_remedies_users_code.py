"""Every remedy works, where the user's code takes part: BatchNorm, searches, averages along a run.

The other ones are in `faults/test_remedies.py`; those that other tests follow are not repeated.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from remedies import (
    BN,
    MODEL,
    MODULE,
    SEARCH,
    TWO,
    Case,
    Passing,
    adding,
    check,
    of_net,
    save,
    several,
    users,
    weights,
)

import swa_avg


def cloned(folder: Path) -> None:
    """Save the last checkpoint with a clone of each tensor."""
    state = torch.load(folder / "2.pt")
    torch.save({name: value.clone() for name, value in state.items()}, folder / "2.pt")


def tied(value: float) -> dict[str, torch.Tensor]:
    one = torch.full((2,), float(value))
    return {"a": one, "b": one}


def average_with_a_link(folder: Path) -> None:
    """Average folders, and move the weights behind a link as the hub's cache has one."""
    save(folder, {"mod.py": f"{MODULE}\n{MODEL}\n"})
    for n in (1, 2):
        save(folder, {f"{n}/model.safetensors": of_net(n), f"{n}/config.json": "{}"})
    swa_avg.average([folder / "1", folder / "2"], folder / "avg")
    (folder / "avg/model.safetensors").rename(folder / "blob")
    (folder / "avg/model.safetensors").symlink_to("../blob")


def average_of_folders(folder: Path) -> None:
    save(folder, {"mod.py": f"{MODULE}\n{MODEL}\n"})
    for n in (1, 2):
        save(folder, {f"{n}/model.safetensors": of_net(n), f"{n}/config.json": "{}"})
    swa_avg.average([folder / "1", folder / "2"], folder / "a v")


def average_of_one(folder: Path) -> None:
    save(folder, users(MODEL))
    swa_avg.average(folder / "1.pt", folder / "a.pt")


def half_average(folder: Path) -> None:
    save(folder, users(MODEL, "images *= 1e6"))
    swa_avg.average([folder / "1.pt", folder / "2.pt"], folder / "avg.pt", dtype="float16")


def checkpoint_with_a_link(folder: Path) -> None:
    save(folder, {"mod.py": f"{MODULE}\n{MODEL}\n", "blob.safetensors": of_net(2)})
    (folder / "c").mkdir()
    (folder / "c/model.safetensors").symlink_to("../blob.safetensors")


NAMING = r"Name a function that passes them: def (\w+)\(\): (return \w+)\((?:\w+=\.\.\.,? ?)+\)\.$"


USERS: dict[str, Case] = {
    "no model": Case(
        users(), BN, r"Add it, or give the model with (--model mod:Net)\.$", (f"{BN} {{0}}",), 1.5
    ),
    "a model to add": Case(
        users(), BN, r"Add it, or give the model with --model (mod:Net)\.$", (adding(MODEL), BN),
        1.5,
    ),
    "a network that needs arguments": Case(
        users("class Sized(nn.Sequential):", "    def __init__(self, width):",
              "        super().__init__(OrderedDict(a=nn.Linear(3, width), bn=nn.BatchNorm1d(2)))",
              "del Net"),
        BN, r"Add it, or give the model with --model mod:ATTR\.$",
        (adding("def model(): return Sized(2)"), BN), 1.5,
    ),
    "several networks": Case(
        users("class Other(nn.Module): pass"), BN,
        r"or give the model with (--model mod:)ATTR\.$", (f"{BN} {{0}}Net",), 1.5,
    ),
    "data that need arguments": Case(
        users(MODEL, "def load(size, shuffle): return DataLoader(images, size, shuffle)"),
        "1.pt 2.pt --recompute-bn --data mod:load", NAMING,
        (Passing("size=4, shuffle=False"), "1.pt 2.pt --recompute-bn --data mod:{0}"), 1.5,
    ),
    "a loader that needs arguments": Case(
        users(MODEL, "def loader(size): return DataLoader(images, size)"), BN, NAMING,
        (Passing("size=4"), "1.pt 2.pt --recompute-bn --data mod:{0}"), 1.5,
    ),
    "a function model that needs arguments": Case(
        users("def model(width): return Net()"), BN, NAMING,
        (Passing("width=3"), f"{BN} --model mod:{{0}}"), 1.5,
    ),
    "a model that needs arguments": Case(
        users("class Sized(Net):", "    def __init__(self, width): super().__init__()"),
        f"{BN} --model mod:Sized", NAMING, (Passing("width=3"), f"{BN} --model mod:{{0}}", BN), 1.5,
    ),
    "a misspelt loader": Case(
        users(MODEL), "1.pt 2.pt --recompute-bn --data mod:laoder", r"Did you mean (\w+)\?$",
        ("1.pt 2.pt --recompute-bn --data mod:{0}",), 1.5,
    ),
    "no attribute": Case(
        users(MODEL), "1.pt 2.pt --recompute-bn --data mod",
        r"expected MOD:ATTR, as in mod:NAME\.$", (BN,), 1.5,
    ),
    "a dot for the colon": Case(
        users(MODEL), "1.pt 2.pt --recompute-bn --data mod.loader",
        r"expected MOD:ATTR, as in (\S+)\.$", ("1.pt 2.pt --recompute-bn --data {0}",), 1.5,
    ),
    "a dot for the colon after a path": Case(
        {**several(of_net), "code/mod.py": f"{MODULE}\n{MODEL}\n"},
        "1.pt 2.pt --recompute-bn --data code/mod.loader",
        r"expected MOD:ATTR, as in (\S+)\.$", ("1.pt 2.pt --recompute-bn --data {0}",), 1.5,
    ),
    "a module elsewhere": Case(
        {**several(of_net), "code/mod.py": f"{MODULE}\n{MODEL}\n"}, BN,
        r"Give the path of the \.py file, or run the command in its folder\.$",
        ("1.pt 2.pt --recompute-bn --data code/mod.py:loader",
         "$ cp [12].pt code"), 1.5,
    ),
    "an exhausted generator": Case(
        users(MODEL, "batches = iter(())"), "1.pt 2.pt --recompute-bn --data mod:batches",
        r"pass a function that returns one\.$",
        (adding("def batches(): return iter(loader)"),
         "1.pt 2.pt --recompute-bn --data mod:batches"), 1.5,
    ),
    "batches with a name": Case(
        users(MODEL, "batches = [{'image': half, 'label': 1} for half in images.split(4)]"),
        "1.pt 2.pt --recompute-bn --data mod:batches",
        r"Add this function to the module of the data, or name it with (--forward): "
        r"(def forward\(model, batch\): return .+)\.$",
        ("$ printf '%s\\n' {1!r} > calls.py",
         "1.pt 2.pt --recompute-bn --data mod:batches {0} calls:forward",
         "$ cat calls.py >> mod.py", "1.pt 2.pt --recompute-bn --data mod:batches"), 1.5,
    ),
    "several loaders": Case(
        users(MODEL, "loaders = {'train': loader, 'val': DataLoader(images)}"),
        "1.pt 2.pt --recompute-bn --data mod:loaders",
        r"Give a function that returns the loader of the training data\.$",
        (adding("def training(): return loaders['train']"),
         "1.pt 2.pt --recompute-bn --data mod:training"), 1.5,
    ),
    "a loader of samples": Case(
        users(MODEL, "pairs = [(row, 1) for row in images]",
              "loader = DataLoader(pairs, batch_size=None)"), BN,
        r"Give its DataLoader a batch_size; if they are batches, name a function",
        (adding("loader = DataLoader(pairs, batch_size=4)"), BN), 1.5,
    ),
    "a loader of batches of one": Case(
        users(MODEL, "pairs = [(half, 0.5) for half in images.split(4)]",
              "loader = DataLoader(pairs, batch_size=None)"), BN,
        r"if they are batches, name a function that returns iter\(\) of it\.$",
        (adding("def batches(): return iter(loader)"),
         "1.pt 2.pt --recompute-bn --data mod:batches"), 1.5,
    ),
    "a scripted model": Case(
        users("model = torch.jit.script(Net())"), BN,
        r"Give the model as it is before torch\.jit\.script\.$", (f"{BN} --model mod:Net",), 1.5,
    ),
    "a checkpoint in place": Case(
        users(MODEL), "--recompute-bn --data mod:loader -o 2.pt",
        r"To replace its BatchNorm statistics anyway, add (--force)\.$",
        ("--recompute-bn --data mod:loader -o 2.pt {0}",), 2,
    ),
    "a part of an average": Case(
        average_of_folders, "--recompute-bn --data mod:loader -o 'a v/model.safetensors'",
        r"Give the whole average with (-o .+)\.$", ("--recompute-bn --data mod:loader {0}",), 1.5,
    ),
    "no BatchNorm": Case(
        users("def model(): return nn.Sequential(OrderedDict(a=nn.Linear(3, 2)))",
              **several(weights)), BN, r"leave out --recompute-bn and its options\.$",
        ("1.pt 2.pt",), 1.5,
    ),
    "one value for each channel": Case(
        users(MODEL, "loader = DataLoader(images, batch_size=7)"), BN,
        r"Use larger batches, or drop the last one \((drop_last=True)\)\.$",
        (adding("loader = DataLoader(images, batch_size=7, drop_last=True)"), BN,
         adding("loader = DataLoader(images, batch_size=8)"), BN), 1.5,
    ),
    "NaN in a batch": Case(
        users(MODEL, "images[5] = float('nan')"), BN, r"batch 1: .+Check the batch and the weights",
        (adding("images[5] = 1"), BN), 1.5,
    ),
    "a forward that trains": Case(
        users("def model():", "    made = Net()",
              "    made.drop = nn.Dropout(0.0)", "    return made",
              "def forward(model, batch):", "    model.drop.train()", "    return model(batch)"),
        BN, r"Use a forward\(model, batch\) that does not change the modes, or use the torch ",
        (f"{BN} --bn-estimator torch",
         adding("def forward(model, batch): return model(batch)"), BN),
        1.5,
    ),
    "another network": Case(
        users("class Other(Net):", "    def __init__(self):", "        super().__init__()",
              "        self.c = nn.Linear(2, 2)"),
        f"{BN} --model mod:Other", r"Check that --model is the network that was trained\.$",
        (f"{BN} --model mod:Net",), 1.5,
    ),
    "a network of another width": Case(
        users("def other(): return nn.Sequential(OrderedDict(a=nn.Linear(3, 4), "
              "bn=nn.BatchNorm1d(4)))"),
        f"{BN} --model mod:other", r"Check that --model is the network that was trained\.$",
        (f"{BN} --model mod:Net",), 1.5,
    ),
    "a model that is not that of its module": Case(
        users("def model(): return nn.Sequential(OrderedDict(a=nn.Linear(3, 4), "
              "bn=nn.BatchNorm1d(4)))"),
        BN, r"Check that --model is the network that was trained\.$",
        (f"{BN} --model mod:Net",), 1.5,
    ),
    "a device that is not there": Case(
        users(MODEL), f"{BN} --device tpu",
        r"Choose (auto), which takes one of this machine, or (cpu)\.$",
        (f"{BN} --device {{0}}", f"{BN} --device {{1}}"), 1.5,
    ),
    "no average to recompute": Case(
        users(MODEL), "--recompute-bn --data mod:loader",
        r"Give checkpoints to average, or an existing average with (-o)\.$",
        (BN, "--recompute-bn --data mod:loader {0} out_0.pt"), 1.5,
    ),
    "an average as a checkpoint": Case(
        average_of_one,
        "a.pt --recompute-bn --data mod:loader",
        r"statistics in place, give no checkpoints and (-o a\.pt)\.$",
        ("--recompute-bn --data mod:loader {0}",), 1,
    ),
    "statistics in one place": Case(
        users(MODEL, **several(lambda n: of_net(n) | dict.fromkeys(
            ("bn.running_mean", "bn.running_var"), torch.ones(2)))),
        f"{BN} -o new.pt", r"Save the checkpoint again with its clone\(\)\.$", (cloned, BN), 1.5,
    ),
    "statistics that are views": Case(
        users(MODEL, **several(lambda n: of_net(n) | {"bn.running_mean": torch.ones(4)[::2]})),
        "--recompute-bn --data mod:loader -o 2.pt --force",
        r"Save the checkpoint again with its clone\(\)\.$",
        (cloned, "--recompute-bn --data mod:loader -o 2.pt --force"), 2,
    ),
    "a statistic that float16 cannot hold in place": Case(
        half_average, "--recompute-bn --data mod:loader -o avg.pt",
        r"Average again to a new file, with a wider (--dtype)\.$",
        (f"{BN} {{0}} float32 -o new.pt",
         "--start-from avg.pt {0} float32 -o newer.pt --recompute-bn --data mod:loader"), 1.5,
    ),
    "a statistic that float16 cannot hold": Case(
        users(MODEL, "images *= 1e6"), f"{BN} --dtype float16",
        r"Average again to a new file, with a wider (--dtype)\.",
        (f"{BN} {{0}} float32",), 1.5,
    ),
    "which average in a file": Case(
        users(MODEL, **{"both.pt": {"model": of_net(9), "model_ema": of_net(1)}}),
        "--recompute-bn --data mod:loader -o both.pt --force",
        r"Choose which to replace: (--ema) \(the average\) or (--no-ema) \(the raw weights\)\.$",
        ("--recompute-bn --data mod:loader -o both.pt --force {0}",
         "--recompute-bn --data mod:loader -o both.pt --force {1}"),
    ),
    "several scores": Case(
        {**TWO, "mod.py": SEARCH}, "1.pt 2.pt --sweep mod:both",
        r"Choose one, as in (--metric acc)\.$", ("1.pt 2.pt --sweep mod:both {0}",), 2,
    ),
    "a score of no known direction": Case(
        {**TWO, "mod.py": SEARCH}, "1.pt 2.pt --sweep mod:judge",
        r"Give (--mode min) or (--mode max)\.$",
        ("1.pt 2.pt --greedy mod:judge {0}", "1.pt 2.pt --sweep mod:judge {1}"), (1, 2),
    ),
    "windows of several ties": Case(
        {"1.pt": tied(1), "2.pt": tied(2), "3.pt": {**tied(3), "b": torch.ones(2)}},
        "1.pt 2.pt 3.pt --each --last 2 -o m_{name}.pt", r"Average each window by itself",
        ("1.pt 2.pt", "2.pt 3.pt"), None,
    ),
    "links in an average": Case(
        average_with_a_link, "--recompute-bn --data mod:loader -o avg",
        r"Give it with (--start-from), and a new folder with (-o)\.$",
        ("{0} avg {1} new --recompute-bn --data mod:loader",), 1.5,
    ),
    "links in a checkpoint": Case(
        checkpoint_with_a_link, "--recompute-bn --data mod:loader -o c --force",
        r"Give it as the checkpoint, and a new folder with (-o)\.$",
        ("c {0} new --recompute-bn --data mod:loader",), 2,
    ),
    "a window that is too long": Case(
        TWO, "1.pt 2.pt --each --last 5 -o m_{name}.pt", r"Choose windows of at most (\d)\.$",
        ("1.pt 2.pt --each --last {0} -o m_{{name}}.pt",), None,
    ),
    "names without an epoch": Case(
        several(lambda n: {"model": weights(n), "global_step": 10 * n}),
        "1.pt 2.pt --each --last 2 -o m_{epoch}.pt",
        r"Use (\S+) in place of \{epoch\} in the outputs' names\.$",
        ("1.pt 2.pt --each --last 2 -o m_{0}.pt",), None,
    ),
    "names of two averages": Case(
        {"a/m_1.pt": 1, "a/m_2.pt": 2, "a/m_3.pt": 3},
        "a --each --last 2 -o m_{name:.1}.pt", r"Use (\S+) in the outputs' names\.$",
        ("a --each --last 2 -o m_{0}.pt",), None,
    ),
    "names that are alike": Case(
        {"a/x/m.pt": 1, "b/x/m.pt": 2, "c/x/m.pt": 3},
        "a/x/m.pt b/x/m.pt c/x/m.pt --each --last 2 -o m_{name}.pt",
        r"Give the checkpoints different names, and use (\{name\}) in the outputs' names\.$",
        ("$ for n in a b c; do mv $n/x/m.pt m_$n.pt; done",
         "m_a.pt m_b.pt m_c.pt --each --last 2 -o of_{0}.pt"), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", USERS)
def test_remedies_on_the_users_code(name: str, tmp_path: Path) -> None:
    check(USERS[name], tmp_path)
