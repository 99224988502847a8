"""What a path says of a checkpoint: names of real frameworks, and laws of the reading."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_avg.checkpoints.names import Name, read, read_all

# Names as the frameworks write them, and what they say; what is not named is not said.
SAID: dict[str, dict[str, Any]] = {
    # Lightning, with auto_insert_metric_name and without, and with its version counter
    "epoch=2-step=300-val_loss=0.12.ckpt": {"epoch": 2, "step": 300, "val_loss": 0.12},
    "epoch=2-val_loss=0.12-v1.ckpt": {"epoch": 2, "version": 1, "val_loss": 0.12},
    "02-0.12.ckpt": {"number": 2},
    "epoch_02-val_loss_0.12.ckpt": {"epoch": 2, "val_loss": 0.12},
    "epoch=1-val_loss=-1.5e-03.ckpt": {"epoch": 1, "val_loss": -0.0015},
    "last-v1.ckpt": {"version": 1, "role": "last"},
    # timm, fairseq, ESPnet, icefall, wenet, OpenNMT
    "checkpoint-17.pth.tar": {"number": 17},
    "model_best.pth.tar": {"role": "best"},
    "checkpoint17.pt": {"number": 17},
    "checkpoint_3_500.pt": {"epoch": 3, "step": 500},
    "checkpoint.best_loss_1.23.pt": {"role": "best", "loss": 1.23},
    "checkpoint_1_500-rank-0-shard3.pt": {
        "epoch": 1, "step": 500, "parts": (("rank", 0), ("shard", 3)),
    },
    "12epoch.pth": {"epoch": 12},
    "valid.acc.ave_10best.pth": {"average": "ave", "role": "best"},
    "snapshot.ep.10": {"epoch": 10},
    "epoch-30-avg-9.pt": {"epoch": 30, "average": "avg"},
    "avg_5.pt": {"average": "avg"},
    "demo_step_5000.pt": {"step": 5000},
    # mmengine, detectron2, Composer, Ignite, Keras, Catalyst
    "iter_4000.pth": {"step": 4000},
    "best_coco_bbox_mAP_epoch_12.pth": {"epoch": 12, "role": "best"},
    "model_0004999.pth": {"number": 4999},
    "ep1-ba100-rank0.pt": {"epoch": 1, "step": 100, "parts": (("rank", 0),)},
    "best_model_12_acc=0.9300.pt": {"number": 12, "role": "best", "acc": 0.93},
    "weights.02-1.23.hdf5": {"number": 2},
    "train.12.pth": {"number": 12},
    # transformers, DCP, Megatron, NeMo, DeepSpeed, Llama, OLMo, nanoGPT, StyleGAN, diffusion
    "checkpoint-500": {"number": 500},
    "step-1000": {"step": 1000},
    "iter_0001000/mp_rank_00/model_optim_rng.pt": {"step": 1000, "parts": (("mp_rank", 0),)},
    "mp_rank_01_003/model_rng.pt": {"parts": (("mp_rank", 1), ("mp_rank", 3))},
    "tp_rank_00_pp_rank_001/model_weights.ckpt": {"parts": (("tp_rank", 0), ("pp_rank", 1))},
    "global_step20/mp_rank_00_model_states.pt": {"step": 20, "parts": (("mp_rank", 0),)},
    "consolidated.00.pth": {"parts": (("consolidated", 0),)},
    "model.split1.step200.pt": {"step": 200, "parts": (("split", 1),)},
    "step200/dp0.pt": {"step": 200, "parts": (("dp", 0),)},
    "model-00001-of-00002.safetensors": {"parts": (("part", 1),)},
    "step1000-tokens4B": {"step": 1000, "count": 4_000_000_000},
    "ckpt.pt": {},
    "network-snapshot-000200.pkl": {"number": 200},
    "ema_0.9999_500000.pt": {"number": 500000, "average": "ema"},
    "model500000.pt": {"number": 500000},
    # What scripts write
    "gpt--val_loss=1.10-step=200.pt": {"step": 200, "val_loss": 1.1},
    "unet_dice0.91_epoch1.pth": {"epoch": 1, "dice": 0.91},
    "net-acc0.83-e10-it5000.pt": {"epoch": 10, "step": 5000, "acc": 0.83},
    "top1_76.3_epoch_3.pth": {"epoch": 3, "top1": 76.3, "role": "top"},
    "swa_model_3.pth": {"number": 3, "average": "swa"},
    "modelEMA.pt": {"average": "modelEMA"},
    "model_no_ema.pt": {},
    "avg_loss_0.31_epoch_3.pt": {"epoch": 3, "avg_loss": 0.31},
    "resnet50_best.pth": {"role": "best"},
    "yolov8n.pt": {},
    "llama-7b-100.pt": {"number": 100},
    "e2e_asr_3.pt": {"number": 3},
    "ckpt_100k.pt": {"number": 100_000},
    "model_batch_size_32_epoch_3.pt": {"epoch": 3},
    "1000/model.pt": {"number": 1000},
    "best-epoch=05-f1=0.87.ckpt": {"epoch": 5, "role": "best", "f1": 0.87},
    "ep_3_val_f1_0.7.pt": {"epoch": 3, "val_f1": 0.7},
    "unet_hd95_4.2_epoch_3.pt": {"epoch": 3, "hd95": 4.2},
    "model_f1.pt": {"number": 1},
    "round_3/global.pt": {"step": 3},
    "round_3_client_2.pt": {"step": 3},
    "ppo_5000_timesteps.pt": {"step": 5000},
    "agent_frames_2M.pt": {"count": 2_000_000},
    "run_3/epoch_2.pt": {"epoch": 2},
}  # fmt: skip
FACTS = ("epoch", "step", "count", "number", "version", "parts", "average", "role")


def of(text: str) -> Name:
    return read(Path(text), 1 + text.count("/"))


@pytest.mark.parametrize("text", SAID)
def test_names_of_frameworks(text: str) -> None:
    """What a name says is read, and nothing that it does not say."""
    name, said = of(text), SAID[text]
    found = {fact: value for fact in FACTS if (value := getattr(name, fact)) or value == 0}
    found = {fact: value for fact, value in found.items() if fact != "version" or value}
    assert found == {fact: value for fact, value in said.items() if fact in FACTS}
    for metric in said.keys() - set(FACTS):
        assert name.metric(metric) == said[metric]
    for metric in ("loss", "acc"):
        if metric not in said:
            assert name.metric(metric) is None


# What numbers are put into: the words as somebody would write them, none of which says anything.
WORDS = st.text(string.ascii_letters, min_size=2, max_size=8).filter(
    lambda word: of(f"{word}_1.pt").number == 1 and not of(word).average and not of(word).role
)
JOINT = st.sampled_from(["_", "-", "=", ""])
EPOCH = st.sampled_from(["epoch", "ep", "Epoch"])
STEP = st.sampled_from(["step", "iter", "it", "global_step", "iteration"])
METRIC = st.sampled_from(["val_loss", "acc", "mAP", "top1", "dev.wer"])
NUMBER = st.integers(0, 10**7)
VALUE = st.decimals(0, 1000, places=3, allow_nan=False).map(str)


@st.composite
def templates(draw: st.DrawFn) -> tuple[str, str]:
    """Draw a template of names with {epoch}, {step} and {value}, and its metric."""
    metric = draw(METRIC)
    fields = [
        f"{draw(EPOCH)}{draw(JOINT)}{{epoch}}",
        f"{draw(STEP)}{draw(JOINT)}{{step}}",
        f"{metric}{draw(st.sampled_from(['=', '_']))}{{value}}",
    ]
    fields = draw(st.permutations(fields))
    middle = draw(st.sampled_from(["-", "_", "--"])).join([draw(WORDS), *fields])
    return middle + draw(st.sampled_from([".pt", ".ckpt", ".pth.tar", ""])), metric


@given(templates(), NUMBER, NUMBER, VALUE)
def test_numbers_that_are_put_in_come_out(
    template: tuple[str, str], epoch: int, step: int, value: str
) -> None:
    """In whatever order they stand, epoch, step and metric are what was put in."""
    text, metric = template
    name = of(text.format(epoch=epoch, step=step, value=value))
    assert (name.epoch, name.step, name.number, name.parts) == (epoch, step, None, ())
    assert name.metric(metric) == float(value)


@given(templates(), st.tuples(NUMBER, NUMBER, VALUE), st.tuples(NUMBER, NUMBER, VALUE))
def test_series_does_not_depend_on_the_numbers(
    template: tuple[str, str], one: tuple[int, int, str], other: tuple[int, int, str]
) -> None:
    """Checkpoints of one template are one series, and its pattern matches them all."""
    text, _ = template
    paths = [
        text.format(epoch=epoch, step=step, value=value) for epoch, step, value in (one, other)
    ]
    first, second = map(of, paths)
    assert (first.series, first.pattern, first.whole) == (
        second.series,
        second.pattern,
        second.whole,
    )
    assert all(Path(path).match(first.pattern) for path in paths)


@given(templates(), NUMBER, NUMBER, VALUE, st.integers(0, 99), st.integers(0, 99))
def test_parts_are_no_place(
    template: tuple[str, str], epoch: int, step: int, value: str, rank: int, shard: int
) -> None:
    """Ranks and shards are told apart from the place, and the whole does without them."""
    stem = template[0].format(epoch=epoch, step=step, value=value)
    stem = stem.removesuffix(".tar").rpartition(".")[0] if stem.endswith((".pt", ".tar")) else "m_1"
    plain, part = of(f"{stem}.pt"), of(f"{stem}-rank{rank:02}-shard_{shard}.pt")
    assert part.parts == (("rank", rank), ("shard", shard))
    assert (part.place, part.whole) == (plain.place, plain.whole)


@given(st.text(st.characters(exclude_characters="\0/"), min_size=1, max_size=40))
def test_any_name_is_read(text: str) -> None:
    """No name fails, and the pattern of a name matches it."""
    path = Path(text)
    if path.name:
        name = read(path)
        assert name.metric("loss") is None or isinstance(name.metric("loss"), float)
        assert all(number >= 0 for _, number in name.parts)


def test_shared_folders_say_nothing() -> None:
    """What all paths have in common is no part of the series: only what sets them apart."""
    paths = [Path(f"/data/ema_run7/epoch_3/{n}/model.pt") for n in (1, 2)]
    names = read_all(paths)
    assert [name.number for name in names] == [1, 2]
    assert {(name.series, name.average, name.epoch) for name in names} == {("#/model", "", None)}
    (alone,) = read_all([Path("a/step_3/model.pt")])
    assert alone.series == "model"
