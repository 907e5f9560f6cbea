"""Streams and stacks of real models, against their forwards."""

from __future__ import annotations

import pkgutil
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers.models import transformers
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from zoo import dit_original, flux, qwen, sd3, wan
from zoo.all_models import MODELS
from zoo.common import run

import maskaccel
from maskaccel.methods import FusedAdaLN
from maskaccel.models import stack_of, streams_of

# Lists of blocks that are not of the main stack, by class.
APART = {
    "BriaFibo2Transformer2DModel": {"noise_refiner"},
    "BriaFiboTransformer2DModel": {"caption_projection"},
    "ConsisIDTransformer3DModel": {"perceiver_cross_attention"},
    "Flux3Transformer2DModel": {"txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond"},
    "HiDreamImageTransformer2DModel": {"caption_projection"},
    "Kandinsky5Transformer3DModel": {"text_transformer_blocks"},
    "Kandinsky6Transformer3DModel": {"video_text_transformer_blocks", "audio_text_transformer_blocks"},
    "Lumina2Transformer2DModel": {"noise_refiner", "context_refiner"},
    "MiniMaxMusic3RVQDepthDecoder": {"audio_heads"},
    "WanAnimateTransformer3DModel": {"face_adapter"},
    "WanVACETransformer3DModel": {"vace_blocks"},
    "ZImageTransformer2DModel": {"noise_refiner", "context_refiner"},
}
# Inputs that another value must not be seen through, where they are not called `hidden_states`.
VARIED = {
    "Cosmos3OmniTransformer": ["vision_tokens"],
    "Kandinsky6Transformer3DModel": ["hidden_states", "audio_hidden_states"],
    "LTX2VideoTransformer3DModel": ["hidden_states", "audio_hidden_states"],
    "MiniMaxH3Transformer3DModel": ["hidden_states", "audio_hidden_states"],
    "MiniMaxMusic3RVQDepthDecoder": ["inputs_embeds"],
    "T5FilmDecoder": ["decoder_input_tokens"],
    "ZImageTransformer2DModel": ["x"],
}
# Models that add their input to what comes after the stack.
ADD_THEIR_INPUT = ["DreamLiteTransformer2DModel", "Transformer2DModel", "TransformerTemporalModel"]
NOT_SKIPPED = {
    "AnyFlowFARTransformer3DModel": "key-value cache",
    "DualTransformer2DModel": "no loop over a list of blocks",
    "RFD4ProteinaTransformer": "more than once",
    "WanAnimate2Transformer3DModel": "key-value cache",
}
# Other configurations and inputs, by class.
VARIANTS = {
    "sd35": sd3.sd35,
    "qwen_edit": qwen.qwen_edit,
    "wan_image_to_video": wan.wan_image_to_video,
    "wan_per_token": wan.wan_per_token,
    "skyreels_diffusion_forcing": wan.skyreels_diffusion_forcing,
    "hunyuan_token_replace": partial(MODELS["HunyuanVideoTransformer3DModel"], image_condition_type="token_replace"),
    "hunyuan_no_single": partial(MODELS["HunyuanVideoTransformer3DModel"], num_single_layers=0),
    "motif_no_decoder": partial(MODELS["MotifVideoTransformer3DModel"], num_decoder_layers=0),
    "ltx2_cross_modulation": partial(
        MODELS["LTX2VideoTransformer3DModel"], cross_attn_mod=True, audio_cross_attn_mod=True
    ),
    "audio_dit_local": partial(MODELS["LongCatAudioDiTTransformer"], adaln_type="local"),
}


@contextmanager
def replaced(forwards):
    """Modules with another forward for a while; `forwards` gives it for each."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def recorded(model, blocks, kwargs):
    """One run: the model's outputs, and each block with its arguments and its output, in the order of the calls."""
    calls = []

    def note(block):
        def forward(*args, **keywords):
            output = type(block).forward(block, *args, **keywords)
            calls.append((block, streams_of(block).take(args, keywords), output))
            return output

        return forward

    with replaced({block: note(block) for block in blocks}):
        return run(model, kwargs), calls


def other(value, seed=99):
    """Other values of the same form."""
    if isinstance(value, Tensor):
        return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value.dtype)
    return [other(item, seed + i) for i, item in enumerate(value)]


def shapes(values):
    return [None if value is None else value.shape for value in values]


def check_lists(model, apart):
    """The stack has every block of the main lists once, in segments of one set of streams."""
    stack = stack_of(model)
    modules = dict(model.named_modules())
    for segment, names in zip(stack.segments, stack.names, strict=True):
        assert segment == tuple(modules[name] for name in names)
        assert len({len(streams_of(block).inputs) for block in segment}) == 1
    lists = {name: m for name, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) and is_top(name)}
    inside = [name for names in stack.names for name in names]
    main = [f"{name}.{i}" for name, m in lists.items() if name not in apart for i in range(len(m))]
    assert sorted(inside) == sorted(main)
    assert apart <= set(lists)
    return stack


def is_top(name):
    return "." not in name.removeprefix("mode_blocks.")


def check_stack(model, kwargs, varied=("hidden_states",), left_out=()):
    """Skip the stack of a model; returns its outputs before and then, and the inputs then.

    `left_out` names the blocks that this call of the model does not run.
    """
    stack = stack_of(model)
    flat = [block for segment in stack.segments for block in segment]
    outputs, calls = recorded(model, flat, kwargs)
    expected = [block for block in flat if block not in {model.get_submodule(name) for name in left_out}]
    assert [block for block, _, _ in calls] == expected, "the order of execution"
    for block, taken, output in calls:
        streams = streams_of(block)
        assert all(value is None or isinstance(value, Tensor) for value in taken)
        assert isinstance(taken[0], Tensor)
        for before, after in zip(taken, streams.read(output), strict=True):
            assert after is None or after.shape == before.shape
        given = streams.give(streams.read(output))
        assert given is output or all(a is b for a, b in zip(given, output, strict=True))

    results = {block: output for block, _, output in calls}
    first = {block: taken for block, taken, _ in calls}
    last = {segment[-1] for segment in stack.segments}
    for segment in stack.segments:
        if segment[-1] not in results:
            continue
        ends = shapes(streams_of(segment[-1]).read(results[segment[-1]]))
        starts = shapes(first[segment[0]])
        assert [b for b, a in zip(starts, ends, strict=True) if a is not None] == [a for a in ends if a is not None]

    def skipped(block):
        streams = streams_of(block)
        if block in last:
            return lambda *args, **keywords: results[block]
        return lambda *args, **keywords: streams.give(streams.take(args, keywords))

    changed = {key: other(value) if key in varied else value for key, value in kwargs.items()}
    ran = []
    # DiT embeds its timestep with a module of its first block, outside of the stack.
    inner = [m for b in flat for path, m in b.named_modules() if path and not path.startswith("norm1.emb")]
    hooks = [module.register_forward_hook(lambda *_: ran.append(1)) for module in inner]
    with replaced({block: skipped(block) for block in flat}):
        again = run(model, changed)
    for hook in hooks:
        hook.remove()
    assert not ran, "a block that was skipped ran a part of itself"
    plain = run(model, changed)
    assert not all(map(torch.equal, plain, outputs)), "the other input changes nothing: the check is empty"
    return outputs, again, changed


@pytest.mark.parametrize("name", sorted(MODELS.keys() - NOT_SKIPPED.keys()))
def test_the_stack_is_all_that_the_output_depends_on(name):
    """Every block skipped, the last ones returning what they returned before: another input gives the old output."""
    model, kwargs = MODELS[name]()
    check_lists(model, APART.get(name, set()))
    before, after, changed = check_stack(model, kwargs, VARIED.get(name, ["hidden_states"]))
    if name in ADD_THEIR_INPUT:
        before, after = [before[0] - kwargs["hidden_states"]], [after[0] - changed["hidden_states"]]
        torch.testing.assert_close(before, after)
    else:
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("name", VARIANTS)
def test_other_configurations(name):
    model, kwargs = VARIANTS[name]()
    check_lists(model, APART.get(type(model).__name__, set()))
    before, after, _ = check_stack(model, kwargs, VARIED.get(type(model).__name__, ["hidden_states"]))
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("name", "arguments", "left_out"),
    [
        ("LatteTransformer3DModel", {"enable_temporal_attentions": False},
         ["temporal_transformer_blocks.0", "temporal_transformer_blocks.1", "temporal_transformer_blocks.2"]),
        ("SD3Transformer2DModel", {"skip_layers": [1]}, ["transformer_blocks.1"]),
    ],
)  # fmt: skip
def test_a_call_that_leaves_blocks_out(name, arguments, left_out):
    model, kwargs = MODELS[name]()
    before, after, _ = check_stack(model, kwargs | arguments, left_out=left_out)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("name", NOT_SKIPPED)
def test_models_that_cannot_be_skipped_say_why(name):
    with pytest.raises(LookupError, match=NOT_SKIPPED[name]):
        stack_of(MODELS[name]()[0])


def test_every_class_of_diffusers_is_here():
    classes = {
        name
        for module in pkgutil.iter_modules(transformers.__path__)
        for name, cls in vars(import_module(f"{transformers.__name__}.{module.name}")).items()
        if isinstance(cls, type) and issubclass(cls, ModelMixin) and cls.__module__.endswith(f".{module.name}")
    }
    assert classes | {"DualTransformer2DModel"} == MODELS.keys()


def test_the_page_of_models_says_the_same():
    page = Path(__file__).parents[1].joinpath("docs", "models.md").read_text()
    rows = {}
    for line in page.partition("## Stacks")[2].splitlines():
        if line.startswith("| ") and not line.startswith("| transformer"):
            name, segments, streams, reason = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name] = segments, streams, reason
    assert rows.keys() == MODELS.keys()
    for name, (segments, streams, reason) in rows.items():
        if name in NOT_SKIPPED:
            assert not segments and not streams and reason
            continue
        stack = stack_of(MODELS[name]()[0])
        lists = [" + ".join(dict.fromkeys(f"`{n.rpartition('.')[0]}`" for n in names)) for names in stack.names]
        inputs = [", ".join(f"`{i}`" for i in streams_of(segment[0]).inputs) for segment in stack.segments]
        assert segments == ", then ".join(lists), name
        assert streams == ", then ".join(inputs if len(set(inputs)) > 1 else inputs[:1]), name
        assert not reason
    skipped = [len(stack_of(MODELS[name]()[0]).segments) for name in MODELS.keys() - NOT_SKIPPED.keys()]
    assert f"{len(skipped)} of {len(rows)} classes have a stack: {skipped.count(1)} of one segment, " in page


def test_blocks_without_diffusers():
    model, kwargs = dit_original.dit()
    assert streams_of(model.blocks[0]).inputs == ("x",)
    check_lists(model, set())
    before, after, _ = check_stack(model, kwargs, ["x"])
    assert all(map(torch.equal, before, after))


def test_a_patched_model_has_the_same_stack():
    model, _ = flux.flux()
    before = stack_of(model)
    with maskaccel.patch(model, FusedAdaLN()):
        assert stack_of(model) == before
        assert streams_of(model.transformer_blocks[0]).outputs == (1, 0)
