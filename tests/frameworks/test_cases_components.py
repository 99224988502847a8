"""CASES.md B and C: folders of several models, as diffusers and sentence-transformers write them.

Each is averaged by itself and comes out under the names that its own library loads.
`pip install diffusers==0.42.1 sentence-transformers==5.3.0 transformers peft`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fails, run, snapshot
from safetensors.torch import load_file, save_file
from stored import content

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the libraries, not ours
    pytest.mark.frameworks,
]
Weights = dict[str, torch.Tensor]


def mean(states: list[Weights]) -> Weights:
    """Return the mean of each tensor, in float64, rounded once."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }


def assert_mean(made: Weights, states: list[Weights]) -> None:
    expected = mean(states)
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert torch.equal(made[name], value), name


def unet(seed: int) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def done(folder: Path, *arguments: str) -> str:
    """Run the command, which succeeds; return what it says on stderr."""
    ended = run(folder, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def test_diffusers_folders_keep_their_stem(tmp_path: Path) -> None:
    """`from_pretrained` takes the output: single, in shards, and of a variant."""
    models = [unet(seed) for seed in range(3)]
    states = [model.state_dict() for model in models]
    for kind, options in {
        "single": {},
        "sharded": {"max_shard_size": "20KB"},
        "fp16_sharded": {"variant": "fp16", "max_shard_size": "20KB"},
    }.items():
        for seed, model in enumerate(models):
            model.save_pretrained(tmp_path / f"{kind}-{seed}", **options)
        sizes = ["--max-shard-size", "20KB"] if "sharded" in kind else []
        inputs = [f"{kind}-{seed}" for seed in range(3)]
        done(tmp_path, *inputs, "-o", f"{kind}_avg", *sizes, "--verify")
        variant = options.get("variant")
        made, info = type(models[0]).from_pretrained(
            tmp_path / f"{kind}_avg", variant=variant, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"], kind
        assert_mean(made.state_dict(), states)
        names = {path.name for path in (tmp_path / f"{kind}_avg").iterdir()}
        assert names == {path.name for path in (tmp_path / inputs[0]).iterdir()} | {"swa_avg.json"}


def test_unet_beside_unet_ema_is_never_one_average(tmp_path: Path) -> None:
    """Of a training checkpoint the model is averaged, with --ema its average; never both."""
    training = pytest.importorskip("diffusers.training_utils")
    raw, averaged, name = [], [], "diffusion_pytorch_model.safetensors"
    for number in (500, 1000, 1500):
        model, home = unet(number), tmp_path / "out" / f"checkpoint-{number}"
        ema = training.EMAModel(
            unet(number + 1).parameters(), model_cls=type(model), model_config=model.config
        )
        ema.save_pretrained(home / "unet_ema")
        model.save_pretrained(home / "unet")
        torch.save({"state": {}}, home / "optimizer.bin")
        raw.append(load_file(home / "unet" / name))
        averaged.append(load_file(home / "unet_ema" / name))
    inputs = [f"out/checkpoint-{number}" for number in (500, 1000, 1500)]
    said = done(tmp_path, "out", "-o", "avg")
    assert (
        "also contains averaged weights, at unet_ema; not used (to average them, use --ema)" in said
    )
    made = type(model).from_pretrained(tmp_path / "avg", subfolder="unet")
    assert_mean(made.state_dict(), raw)
    assert not (tmp_path / "avg/unet_ema").exists()
    done(tmp_path, *inputs, "-o", "avg_ema", "--ema", "--verify")
    made = type(model).from_pretrained(tmp_path / "avg_ema", subfolder="unet_ema")
    assert_mean(made.state_dict(), averaged)
    assert training.EMAModel.from_pretrained(tmp_path / "avg_ema/unet_ema", type(model))
    assert not (tmp_path / "avg_ema/unet").exists()
    # A folder that is kept has room for both means: which of them is meant must be said.
    line = fails(tmp_path, *inputs, "-o", "kept", "--keep-wrapper")
    assert "raw weights at unet and an average at unet_ema" in line
    for option, place, states in (("--ema", "unet_ema", averaged), ("--no-ema", "unet", raw)):
        assert option in line
        done(tmp_path, *inputs, "-o", "kept", "--keep-wrapper", option, "--force")
        assert_mean(load_file(tmp_path / "kept" / place / name), states)
    assert torch.equal(
        load_file(tmp_path / "kept/unet_ema" / name)["conv_in.bias"], averaged[-1]["conv_in.bias"]
    )
    # One component is one model, in one file as well; our own reader finds it again.
    done(tmp_path, *inputs, "-o", "unet.safetensors", "--key", "unet_ema")
    assert_mean(load_file(tmp_path / "unet.safetensors"), averaged)
    for options in ([], ["--ema"]):
        done(tmp_path, "--start-from", "avg_ema", "-o", "again", *options, "--force")
        assert_mean(load_file(tmp_path / "again/unet_ema" / name), averaged)


def test_models_of_a_pipeline_are_averaged_each_by_itself(tmp_path: Path) -> None:
    """A pipeline comes out whole, in one file it is refused, and a part of it is one model."""
    diffusers = pytest.importorskip("diffusers")
    states: dict[str, list[Weights]] = {"unet": [], "vqvae": []}
    for seed in range(2):
        model = unet(seed)
        torch.manual_seed(seed)
        vqvae = diffusers.VQModel(
            in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(8,),
            norm_num_groups=4, num_vq_embeddings=4,
        )  # fmt: skip
        pipeline = diffusers.LDMPipeline(vqvae, model, diffusers.DDIMScheduler())
        pipeline.save_pretrained(tmp_path / f"pipeline-{seed}")
        states["unet"].append(model.state_dict())
        states["vqvae"].append(vqvae.state_dict())
    done(tmp_path, "pipeline-0", "pipeline-1", "-o", "avg", "--max-shard-size", "20KB", "--verify")
    made = diffusers.LDMPipeline.from_pretrained(tmp_path / "avg")
    for name, those in states.items():
        assert_mean(getattr(made, name).state_dict(), those)
    line = fails(tmp_path, "pipeline-0", "pipeline-1", "-o", "avg.pt")
    assert "several models (" in line and "-o swa" in line and "--key " in line
    key = line.rpartition("--key ")[2].rstrip(".")
    done(tmp_path, "pipeline-0", "pipeline-1", "-o", "one.safetensors", "--key", key)
    assert_mean(load_file(tmp_path / "one.safetensors"), states[key])
    said = done(tmp_path, "pipeline-0", "pipeline-1", "-o", "part", "--key", "unet")
    assert "vqvae: not averaged; not in the output" in said
    assert_mean(type(model).from_pretrained(tmp_path / "part/unet").state_dict(), states["unet"])
    # The old output may be replaced, whatever shards it had, and the last folder be kept.
    done(tmp_path, "pipeline-0", "pipeline-1", "-o", "avg", "--force", "--keep-wrapper")
    made = diffusers.LDMPipeline.from_pretrained(tmp_path / "avg")
    assert_mean(made.vqvae.state_dict(), states["vqvae"])
    assert_mean(made.unet.state_dict(), states["unet"])


def sentence_transformer(folder: Path, seed: int, router: bool = False) -> Any:
    """Assemble a sentence-transformer with a Dense layer, or with one for each kind of text."""
    pytest.importorskip("sentence_transformers")
    import transformers
    from sentence_transformers import SentenceTransformer, models

    torch.manual_seed(seed)
    bert = folder / f"bert-{seed}"
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(bert)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxy"]
    (bert / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(bert)
    last = models.Dense(8, 4)
    if router:
        last = models.Router.for_query_document([last], [models.Dense(8, 4)])
    return SentenceTransformer(
        modules=[models.Transformer(str(bert)), models.Pooling(8), last], device="cpu"
    )


@pytest.mark.parametrize("kind", ["dense", "router", "keep_wrapper"])
def test_sentence_transformers_average_every_module(tmp_path: Path, kind: str) -> None:
    """`SentenceTransformer(path)` takes the output: encoder and Dense layers are the mean."""
    states = []
    for seed in range(3):
        model = sentence_transformer(tmp_path, seed, router=kind == "router")
        model.save(str(tmp_path / f"checkpoint-{seed}"))
        states.append({name: value.cpu().clone() for name, value in model.state_dict().items()})
    options = ["--keep-wrapper"] if kind == "keep_wrapper" else []
    done(tmp_path, *(f"checkpoint-{seed}" for seed in range(3)), "-o", "avg", "--verify", *options)
    made = type(model)(str(tmp_path / "avg"), device="cpu")
    assert len(made) == 3
    assert_mean(made.state_dict(), states)
    task = {"task": "query"} if kind == "router" else {}
    assert made.encode("a b c", **task).shape == (4,)
    # A second time over the first output, and as a checkpoint of our own.
    shown = run(tmp_path, "--show", "avg")
    assert "average of 3 checkpoints" in shown.stdout and "BatchNorm" not in shown.stdout


def test_adapters_by_name_are_averaged_each_by_itself(tmp_path: Path) -> None:
    """PEFT saves each adapter that has a name in a folder of its own, one beside the folders."""
    peft = pytest.importorskip("peft")
    import transformers

    def gpt() -> Any:
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=32, n_positions=8)
        )

    config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
    states: dict[str, list[Weights]] = {"default": [], "style": []}
    for seed in range(2):
        torch.manual_seed(seed)
        model = peft.get_peft_model(gpt(), config)
        model.add_adapter("style", config)
        model.save_pretrained(tmp_path / f"checkpoint-{seed}")
        for name, those in states.items():
            those.append(peft.get_peft_model_state_dict(model, adapter_name=name))
    done(tmp_path, "checkpoint-0", "checkpoint-1", "-o", "avg")
    made = peft.PeftModel.from_pretrained(gpt(), tmp_path / "avg")
    made.load_adapter(tmp_path / "avg/style", "style")
    for name, those in states.items():
        assert_mean(peft.get_peft_model_state_dict(made, adapter_name=name), those)


def pair(seed: int) -> tuple[Any, Any]:
    """Two models of one architecture, so that nothing but their files tells them apart."""
    torch.manual_seed(seed)
    return tuple(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)) for _ in "ab")  # type: ignore[return-value]


def accelerated(models: tuple[Any, ...], optimizer: bool = True) -> Any:
    """Return an Accelerator with these models, and their optimizers if wanted."""
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    for one in models:
        accelerator.prepare(one)
        if optimizer:
            accelerator.prepare(torch.optim.AdamW(one.parameters(), lr=0.1))
    return accelerator


def accelerated_run(run: Path, safe: bool = True) -> list[list[Weights]]:
    """Let accelerate save both models three times; return the states of each."""
    models = pair(0)
    accelerator = accelerated(models)
    states: list[list[Weights]] = [[], []]
    for number in range(3):
        for model, those, optimizer in zip(models, states, accelerator._optimizers, strict=True):
            accelerator.backward(model(torch.rand(4, 3)).square().mean())
            optimizer.step()
            those.append({name: value.clone() for name, value in model.state_dict().items()})
        accelerator.save_state(str(run / f"checkpoint_{number}"), safe_serialization=safe)
    return states


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_models_of_accelerate_are_averaged_each_by_itself(tmp_path: Path, safe: bool) -> None:
    """`load_state` takes the mean of either model, and the optimizers of the last checkpoint."""
    states = accelerated_run(tmp_path / "run", safe)
    inputs = [f"run/checkpoint_{number}" for number in range(3)]
    done(tmp_path, *inputs, "-o", "swa", "--keep-wrapper", "--verify")
    last, suffix = tmp_path / "run/checkpoint_2", "safetensors" if safe else "bin"
    names = [f"model{n}.{suffix}" if safe else f"pytorch_model{n}.{suffix}" for n in ("", "_1")]
    found, expected = content(tmp_path / "swa"), content(last)
    assert {name for name in found if found[name] != expected.get(name)} == {
        *names, "swa_avg.json"
    }  # fmt: skip
    fresh = pair(9)
    accelerator = accelerated(fresh)
    accelerator.load_state(str(tmp_path / "swa"))
    for model, those, optimizer in zip(fresh, states, accelerator._optimizers, strict=True):
        assert_mean(model.state_dict(), those)
        assert optimizer.state_dict()["state"][0]["step"] == 3
    # Without the state of the run, as safetensors; also from the run folder, and once more.
    said = done(tmp_path, "run", "-o", "bare", "--verify")
    assert "not read" not in said and "left out" not in said
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {
        "model.safetensors", "model_1.safetensors", "swa_avg.json"
    }  # fmt: skip
    done(tmp_path, "--start-from", "bare", "-o", "again")
    for folder in ("bare", "again"):
        fresh = pair(9)
        accelerated(fresh, optimizer=False).load_state(str(tmp_path / folder))
        for model, those in zip(fresh, states, strict=True):
            assert_mean(model.state_dict(), those)
    # One model, in one file or in a folder of its own; each remedy works.
    line = fails(tmp_path, *inputs, "-o", "swa.pt")
    assert "several models (model, model_1)" in line and "--key model_1" in line
    done(tmp_path, *inputs, "-o", "one.safetensors", "--key", "model_1")
    said = done(tmp_path, *inputs, "-o", "one", "--key", "model_1")
    assert "model: not averaged; not in the output" in said
    assert_mean(load_file(tmp_path / "one.safetensors"), states[1])
    assert_mean(load_file(tmp_path / "one/model.safetensors"), states[1])
    line = fails(tmp_path, *inputs, "-o", "small", "--max-shard-size", "1KB")
    assert "accelerate loads each from one file" in line


def test_files_of_the_models_of_accelerate(tmp_path: Path) -> None:
    """Given as files, those of one model are averaged, and those of two are refused.

    In a folder, as in a run of files of such names, no file of another model is a checkpoint.
    """
    states = accelerated_run(tmp_path / "run")
    files = [f"run/checkpoint_{number}/model_1.safetensors" for number in range(3)]
    done(tmp_path, *files, "-o", "one.safetensors")
    assert_mean(load_file(tmp_path / "one.safetensors"), states[1])
    line = fails(tmp_path, *files, "run/checkpoint_0/model.safetensors", "-o", "two.safetensors")
    assert "expected the same model of each checkpoint" in line
    done(tmp_path, "run/checkpoint_1", "-o", "single")
    assert_mean(load_file(tmp_path / "single/model_1.safetensors"), states[1][1:2])
    # Two of three models are no checkpoint of accelerate.
    for number in range(2):
        home = tmp_path / f"three/checkpoint_{number}"
        home.mkdir(parents=True)
        for name in ("model", "model_1", "model_2"):
            save_file(states[0][number], home / f"{name}.safetensors", {"format": "pt"})
        (home / "random_states_0.pkl").write_bytes(b"random")
    line = fails(tmp_path, "three", "-o", "two", "--key", "model", "--key", "model_2")
    assert "accelerate loads all of them" in line
    done(tmp_path, "three", "-o", "two", "--key", "model")
    done(tmp_path, "three", "-o", "three_avg")
    # Without the state of a run, files of such names are the checkpoints of one model.
    epochs = tmp_path / "epochs"
    epochs.mkdir()
    for number in (1, 2, 3):
        save_file(states[0][number - 1], epochs / f"model_{number}.safetensors", {"format": "pt"})
    done(tmp_path, "epochs", "-o", "epochs.safetensors")
    assert_mean(load_file(tmp_path / "epochs.safetensors"), states[0])


@pytest.mark.parametrize(
    "name",
    [
        "open_clip_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "model.fp16.safetensors",
        "adapter_model.safetensors",
    ],
)
def test_any_stem_of_weights_is_kept(tmp_path: Path, name: str) -> None:
    """A folder whose weights have this name gives a folder whose weights have it."""
    states = [{"w": torch.randn(9), "b": torch.randn(3)} for _ in range(2)]
    for number, state in enumerate(states):
        (tmp_path / f"step_{number}").mkdir()
        save_file(state, tmp_path / f"step_{number}" / name, {"format": "pt"})
    done(tmp_path, "step_0", "step_1", "-o", "avg")
    assert {path.name for path in (tmp_path / "avg").iterdir()} == {name, "swa_avg.json"}
    assert_mean(load_file(tmp_path / "avg" / name), states)
    done(tmp_path, "step_0", "step_1", "-o", "avg", "--force", "--max-shard-size", "13")
    index = name.replace(".fp16.safetensors", ".safetensors.index.fp16.json")
    index = index if index != name else f"{name}.index.json"
    weight_map = json.loads((tmp_path / "avg" / index).read_text())["weight_map"]
    made = {key: load_file(tmp_path / "avg" / part)[key] for key, part in weight_map.items()}
    assert len(set(weight_map.values())) == 2
    assert_mean(made, states)
    before = snapshot(tmp_path / "avg")
    done(tmp_path, "--start-from", "avg", "-o", "again.safetensors")
    assert_mean(load_file(tmp_path / "again.safetensors"), states)
    assert snapshot(tmp_path / "avg") == before
