"""The example model and the demo: data, classifier, pipeline, training, evaluation."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the example is built on diffusers")
ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "fashion"
sys.path.insert(0, str(EXAMPLE))

from classifier import FashionClassifier, load_classifier, save_classifier  # noqa: E402
from data import CLASSES, DEFAULT_ROOT, load_split, to_float  # noqa: E402
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler  # noqa: E402
from evaluate import frechet_distance, parse_call, parse_methods, score  # noqa: E402
from pipeline import FashionPipeline  # noqa: E402

from maskaccel.cli import demo  # noqa: E402
from maskaccel.state import Damped, Taylor  # noqa: E402

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 2,
    "patch_size": 8,
    "sample_size": 32,
    "num_embeds_ada_norm": 10,
}


def tiny_pipeline(seed: int = 0) -> FashionPipeline:
    torch.manual_seed(seed)
    pipe = FashionPipeline(DiTTransformer2DModel(**TINY).eval(), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_idx(folder: Path, prefix: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, count, dtype=np.uint8)
    header = b"\0\0\x08\x03" + np.array([count, 28, 28], ">i4").tobytes()
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    header = b"\0\0\x08\x01" + np.array([count], ">i4").tobytes()
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    return images, labels


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A pipeline folder as `train.py --export` writes it, untrained and tiny, with an untrained classifier."""
    folder = tmp_path / "weights"
    tiny_pipeline().save_pretrained(folder)
    torch.manual_seed(0)
    save_classifier(FashionClassifier(), folder / "classifier.safetensors", {"test_accuracy": 0.1})
    return folder


# ---------------------------------------------------------------- data and classifier


def test_data_is_padded_and_scaled(tmp_path):
    images, labels = write_idx(tmp_path, "train", 7)
    loaded, loaded_labels = load_split("train", tmp_path)
    assert loaded.shape == (7, 1, 32, 32)
    assert np.array_equal(loaded[:, 0, 2:-2, 2:-2].numpy(), images)
    assert loaded.sum() == images.sum(dtype=np.int64)
    assert loaded_labels.tolist() == labels.tolist()
    scaled = to_float(loaded)
    assert scaled.min() == -1
    assert scaled.max() <= 1


def test_missing_data_says_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_split("test", tmp_path)


def test_classifier_on_real_images():
    judge, facts = load_classifier()
    if (DEFAULT_ROOT / "t10k-images-idx3-ubyte.gz").is_file():
        images, labels = load_split("test")
    else:
        stored = np.load(ROOT / "tests" / "data" / "fashion_test_200.npz")
        images, labels = torch.from_numpy(stored["images"])[:, None], torch.from_numpy(stored["labels"]).long()
    accuracy = (judge.judge(to_float(images))[0] == labels).double().mean().item()
    assert accuracy >= 0.90
    if len(labels) == facts["test_images"]:
        assert accuracy == pytest.approx(facts["test_accuracy"], abs=0.002)


def test_classifier_reads_the_middle_window_and_refuses_other_shapes():
    judge, _ = load_classifier()
    images = torch.rand(3, 1, 32, 32)
    torch.testing.assert_close(judge(images), judge(images[..., 2:-2, 2:-2]))
    assert judge.judge(images[:0])[1].shape == (0, 128)
    with pytest.raises(ValueError, match=r"\(3, 3, 32, 32\)"):
        judge(torch.rand(3, 3, 32, 32))


def test_missing_classifier_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_classifier\.py"):
        load_classifier(tmp_path / "no.safetensors")


# ---------------------------------------------------------------- pipeline


class _StraightFlow(torch.nn.Module):
    """Stands in for the transformer: the exact velocity towards `target[label]`, and a record of its calls."""

    def __init__(self, inner: DiTTransformer2DModel, target: torch.Tensor) -> None:
        super().__init__()
        self.config, self.dtype, self.device = inner.config, torch.float32, torch.device("cpu")
        self.target, self.calls = target, []

    def forward(self, hidden_states, timestep, class_labels):
        self.calls.append((timestep.clone(), class_labels.clone()))
        t = (timestep / 1000)[:, None, None, None]
        x = self.target[class_labels][:, None, None, None]
        return type("Output", (), {"sample": (hidden_states - x) / t})


def test_pipeline_integrates_the_flow_it_was_trained_for():
    pipe = tiny_pipeline()
    target = torch.linspace(-0.9, 0.9, 11)
    flow = _StraightFlow(pipe.transformer, target)
    # A plain attribute, because diffusers only registers its own classes.
    pipe.transformer = flow
    steps = []
    original = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: steps.append(1) or original(*args, **kwargs)
    images = pipe([2, 9], guidance_scale=1.0, num_inference_steps=5, seeds=[0, 1], output_type="pt").images
    expected = (target[[2, 9]] / 2 + 0.5)[:, None, None, None].expand(2, 1, 32, 32)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert len(steps) == 5
    torch.testing.assert_close(
        torch.stack([t[0] for t, _ in flow.calls]), torch.tensor([1000.0, 800.0, 600.0, 400.0, 200.0])
    )
    assert all(labels.tolist() == [2, 9] for _, labels in flow.calls)


def test_guidance_runs_both_branches_in_one_call():
    pipe = tiny_pipeline()
    target = torch.linspace(-0.2, 0.2, 11)
    flow = _StraightFlow(pipe.transformer, target)
    pipe.transformer = flow
    images = pipe([2, 9], guidance_scale=3.0, num_inference_steps=4, seeds=[0, 1], output_type="pt").images
    assert [labels.tolist() for _, labels in flow.calls] == [[2, 9, 10, 10]] * 4
    # Both velocities are straight, so guidance moves the end point: null + 3 (class - null).
    end = target[10] + 3.0 * (target[[2, 9]] - target[10])
    expected = (end / 2 + 0.5)[:, None, None, None].expand(2, 1, 32, 32)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_images_do_not_depend_on_the_batch_split():
    pipe = tiny_pipeline()
    whole = pipe([0, 5, 9], seeds=[3, 1, 4], num_inference_steps=3, output_type="pt").images
    parts = [
        pipe(label, seeds=[seed], num_inference_steps=3, output_type="pt").images
        for label, seed in ((0, 3), (5, 1), (9, 4))
    ]
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-5, rtol=0)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 1, 4)]
    again = pipe([0, 5, 9], generator=generators, num_inference_steps=3, output_type="pt").images
    assert torch.equal(whole, again)
    assert not torch.equal(whole[0], pipe(0, seeds=[4], num_inference_steps=3, output_type="pt").images[0])


def test_output_types_agree():
    pipe = tiny_pipeline()
    args = {"seeds": [1, 2], "num_inference_steps": 2}
    tensor = pipe([1, 2], output_type="pt", **args).images
    array = pipe([1, 2], output_type="np", **args).images
    (pictures,) = pipe(torch.tensor([1, 2]), return_dict=False, **args)
    assert array.shape == (2, 32, 32, 1)
    assert np.array_equal(array[..., 0], tensor[:, 0].numpy())
    assert [picture.mode for picture in pictures] == ["L", "L"]
    assert np.array_equal(np.asarray(pictures[1]), (tensor[1, 0] * 255).round().byte().numpy())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_labels": [10]}, "class_labels must be ints from 0 to 9, got 10"),
        ({"class_labels": [True]}, "class_labels"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": 1, "num_inference_steps": 0}, "num_inference_steps must be an int of at least 1, got 0"),
        ({"class_labels": 1, "guidance_scale": -1.0}, "guidance_scale must be 0 or more"),
        ({"class_labels": 1, "guidance_scale": float("nan")}, "guidance_scale"),
        ({"class_labels": 1, "output_type": "jpg"}, "output_type must be one of pil, pt, np"),
        ({"class_labels": [1, 2], "seeds": [1]}, "seeds must hold one int for each of the 2"),
        ({"class_labels": [1, 2], "generator": [torch.Generator()]}, "a list of 2"),
        ({"class_labels": 1, "seeds": [1], "generator": torch.Generator()}, "not both"),
    ],
)
def test_pipeline_refuses_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**kwargs)


def test_pipeline_loads_from_its_folder(model_folder):
    index = json.loads((model_folder / "model_index.json").read_text())
    assert index["_class_name"] == "FashionPipeline"
    loaded = FashionPipeline.from_pretrained(model_folder, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    expected = tiny_pipeline()(3, seeds=[5], num_inference_steps=2, output_type="pt").images
    assert torch.equal(loaded(3, seeds=[5], num_inference_steps=2, output_type="pt").images, expected)


def test_stored_weights_are_small_and_readable_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = EXAMPLE / "weights"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 25e6
    pipe = FashionPipeline.from_pretrained(folder, local_files_only=True)
    assert not pipe.transformer.training
    assert pipe.num_classes == len(CLASSES)


@pytest.mark.slow
def test_stored_weights_sample_the_class_that_was_asked_for():
    pipe = FashionPipeline.from_pretrained(EXAMPLE / "weights", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(list(range(10)) * 2, seeds=range(20), num_inference_steps=8, output_type="pt").images
    assert score(images, load_classifier()[0], None)["class_accuracy"] >= 0.85


# ---------------------------------------------------------------- training


def test_resumed_training_equals_uninterrupted_training(tmp_path, monkeypatch):
    import train

    write_idx(tmp_path, "train", 32)
    monkeypatch.setattr(train, "CONFIG", TINY)

    def run(folder: str, steps: int, *flags: str) -> dict:
        command = (
            f"train.py --data {tmp_path} --run {tmp_path / folder} --steps {steps} --batch 4 --no-compile --device cpu"
        )
        monkeypatch.setattr(sys, "argv", [*command.split(), "--save-every", "2", *flags])
        train.main()
        return torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)

    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4, "--resume")
    assert resumed["step"] == whole["step"] == 4
    for part in ("model", "ema"):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, resumed[part][name]), (part, name)

    out = tmp_path / "exported"
    run("parts", 4, "--resume", "--export", "--out", str(out))
    exported = FashionPipeline.from_pretrained(out, local_files_only=True).transformer.state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in whole["ema"].items())


# ---------------------------------------------------------------- evaluation


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 4, generator=generator, dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + torch.tensor([3.0, 0, 0, 4.0])) == pytest.approx(25, abs=1e-6)
    # Covariances I and 4 I: the trace of (A - B)^2 of the square roots is 4 (1 - 2)^2.
    assert frechet_distance(a - a.mean(0), 2 * (a - a.mean(0))) == pytest.approx(4, rel=0.02)
    with pytest.raises(ValueError, match="features"):
        frechet_distance(a, a[:, :2])


def test_score_of_real_images():
    stored = np.load(ROOT / "tests" / "data" / "fashion_test_200.npz")
    by_class = [np.flatnonzero(stored["labels"] == i)[:10] for i in range(10)]
    order = np.stack(by_class, 1).reshape(-1)  # classes in turn, as samples have them
    images = torch.from_numpy(stored["images"][order])[:, None].float() / 255
    judge, _ = load_classifier()
    result = score(images, judge, judge.judge(images * 2 - 1)[1])
    assert result["class_accuracy"] >= 0.85
    assert set(result["by_class"]) == set(CLASSES)
    assert result["frechet_distance"] == pytest.approx(0, abs=1e-3)


def test_methods_are_parsed_from_text():
    fora, fused = parse_methods("FORA:interval=4+FusedAdaLN")
    assert (fora.name, fora.interval, fused.name) == ("FORA", 4, "FusedAdaLN")
    assert parse_methods("none") == []
    with pytest.raises(ValueError, match=r"'Nothing' is no method; known are .*FORA"):
        parse_methods("Nothing")
    assert parse_call("Name:a=(1, 0),b='x',c=-0.5") == ("Name", {"a": (1, 0), "b": "x", "c": -0.5})
    assert parse_call("Name:f=Damped(Taylor(2), damping=0.1)") == ("Name", {"f": Damped(Taylor(2), damping=0.1)})
    for text in ("Name:3", "Name:a", "Name:a=b", "Name:**{}"):
        with pytest.raises(ValueError, match="arguments must look like name=1"):
            parse_call(text)


# ---------------------------------------------------------------- demo


def test_demo_end_to_end(model_folder, tmp_path):
    result = demo.run_demo(
        model_folder, images=5, steps=6, interval=3, dtype="float32", device="cpu", batch=2, chunk=2,
        out=tmp_path / "out", progress=False,
    )  # fmt: skip
    written = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert written["speedup"] == result["speedup"] > 0
    assert {len(written["chunk_seconds"][name]) for name in demo.VARIANTS} == {3}
    assert written["psnr_db"]["lowest"] <= written["psnr_db"]["mean"]
    activity = written["report_of_last_chunk"]["activity"]["FORA"]
    # One image in the last chunk, 6 steps, 2 blocks with 2 remembered sites: steps 0 and 3 are computed.
    assert (activity["computed"], activity["reused"]) == (8, 16)
    from PIL import Image

    picture = Image.open(tmp_path / "out" / "demo.png")
    assert picture.width > 500
    assert picture.height > 250
    table = demo.format_table(written)
    assert "Lossy: FORA" in table
    assert f"{written['speedup']:.2f}x" in table


def test_demo_without_reuse_gives_the_same_images(model_folder, tmp_path):
    with pytest.warns(UserWarning, match="never reuse"):
        result = demo.run_demo(
            model_folder, images=2, steps=2, interval=1, dtype="float32", device="cpu", out=tmp_path, progress=False
        )
    assert result["psnr_db"]["lowest"] > 80


def test_demo_alternates_which_variant_goes_first():
    order = []

    class Patched:
        def __enter__(self):
            order.append("patched")
            return self

        def __exit__(self, *_):
            order.append("restored")

        def report(self):
            return self

        def as_dict(self):
            return {}

    def sample(part):
        order.append((part.start, part.stop))
        return torch.zeros(len(part), 1, 2, 2)

    runs, _ = demo._sample_in_turns(None, Patched, sample, 5, 2, "cpu", False)
    patched = ["patched", (2, 4), "restored"]
    assert order == [(0, 2), "patched", (0, 2), "restored", *patched, (2, 4), (4, 5), "patched", (4, 5), "restored"]
    assert {name: len(torch.cat(run.images)) for name, run in runs.items()} == {"original": 5, "accelerated": 5}


def test_demo_stops_when_an_exact_method_is_not_exact():
    pipe = tiny_pipeline()

    class Broken:
        def __enter__(self):
            self.bias = pipe.transformer.proj_out_2.bias.detach().clone()
            pipe.transformer.proj_out_2.bias.data += 0.1

        def __exit__(self, *_):
            pipe.transformer.proj_out_2.bias.data.copy_(self.bias)

    with pytest.raises(demo.DemoError, match="not exact"):
        demo.check_exact(pipe, Broken)


def test_demo_without_weights_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(demo.DemoError, match="--model"):
        demo.find_example(tmp_path)
    monkeypatch.setattr(demo, "EXAMPLE", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(demo.DemoError, match="clone the maskaccel repository"):
        demo.run_demo()


@pytest.mark.parametrize("name", ["images", "steps", "interval", "chunk"])
def test_demo_refuses_bad_counts(name):
    with pytest.raises(ValueError, match=f"{name} must be an int of at least 1, got 0"):
        demo.run_demo(**{name: 0})


def test_demo_dtype():
    model = tiny_pipeline().transformer
    assert demo.choose_dtype(model, "cpu", "bfloat16")[0] is torch.bfloat16
    chosen, reason = demo.choose_dtype(model, "cpu")
    assert chosen in (torch.float32, torch.bfloat16)
    assert "probe" in reason
    assert model.dtype is torch.float32
    with pytest.raises(ValueError, match="dtype must be one of auto"):
        demo.choose_dtype(model, "cpu", "int4")


def test_psnr():
    a = torch.zeros(2, 1, 4, 4)
    b = a.clone()
    b[1] += 0.1
    assert demo.psnr(a, b).tolist() == pytest.approx([99.0, 20.0], abs=1e-4)
    with pytest.raises(ValueError, match="one shape"):
        demo.psnr(a, b[:1])
