"""Runs: who begins, moves and ends them, and what a patch does to copies of a model."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import pickle

import diffusers
import pytest
import torch
from torch import nn
from zoo import pipelines as zoo
from zoo.pipelines import dit, sample

import maskaccel
from maskaccel.methods import FORA, PAB, SCM, FusedAdaLN, SpeCa
from maskaccel.state.generation import Generation, Run


class Block(nn.Module):
    """A block that no adapter knows, with children of the usual names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class Model(nn.Module):
    """Two lists of blocks."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.more = nn.ModuleList(Block(width) for _ in range(1))
        self.fail = False

    def forward(self, x):
        for block in (*self.blocks, *self.more):
            x = block(x)
        if self.fail:
            raise RuntimeError("out of memory, say")
        return x


def _x(seed: int, n: int = 4) -> torch.Tensor:
    return torch.randn(2, n, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    with torch.no_grad():
        yield Model()


def test_a_run_of_ones_own(model):
    exact = [model(_x(i)) for i in range(6)]
    with maskaccel.patch(model, FORA(interval=3)) as patch:
        with patch.generation(num_steps=6) as run:
            for i in range(6):
                assert (run.index, run.num_steps) == (i, 6)
                out = model(_x(i))
                assert torch.equal(out, exact[i]) == (i % 3 == 0)
                run.step()
        assert torch.equal(model(_x(1)), exact[1]), "outside a run nothing is reused"
        activity = patch.report().activity["FORA"]
        assert (activity["computed"], activity["reused"]) == (6 * 2 + 6, 6 * 4)
        assert activity["bytes held"] == 0
        assert activity["peak bytes"] == 6 * exact[0].nbytes


def test_branches_have_memories_of_their_own_in_any_order(model):
    """Classifier-free guidance in two calls whose order changes from step to step."""

    def batched(i):  # what each branch reuses is its own value of step 0
        with maskaccel.patch(model, FORA(interval=4)) as patch, patch.generation(4) as run:
            for step in range(i + 1):
                out = model(torch.cat([_x(step), -_x(step)]))
                run.step()
        return out.chunk(2)

    with maskaccel.patch(model, FORA(interval=4)) as patch, patch.generation(4) as run:
        for i in range(4):
            out = {}
            for name, sign in (("cond", 1), ("uncond", -1))[:: 1 if i % 2 else -1]:
                with run.branch(name):
                    out[name] = model(sign * _x(i))
            run.step()
            last = out
        assert patch.report().activity["FORA"]["reused"] == 3 * 2 * 6
    cond, uncond = batched(3)
    torch.testing.assert_close(last["cond"], cond)
    torch.testing.assert_close(last["uncond"], uncond)
    assert (last["cond"] - last["uncond"]).abs().max() > 0.1


@pytest.mark.parametrize("twice_from", [0, 1, 2])
def test_unnamed_calls_are_never_mistaken_for_one_another(model, twice_from):
    """A model called twice a step without names, from the first step on or later: nothing tells the calls apart."""
    with maskaccel.patch(model, FORA(interval=4)) as patch, patch.generation(6) as run:
        for i in range(6):
            first = model(_x(i))
            if i >= twice_from:
                second = model(-_x(i))
                assert torch.equal(second, Model()(-_x(i))), f"step {i}: the second call took the first one's features"
                if i > twice_from:
                    assert torch.equal(first, Model()(_x(i))), f"step {i}"
            run.step()
        assert "name the branches" in patch.report().activity["FORA"]["warning"]


def test_after_an_exception_the_run_is_over(model):
    exact = model(_x(1))
    with maskaccel.patch(model, FORA(interval=4)) as patch, patch.generation(4) as run:
        model(_x(0))
        run.step()
        model.fail = True
        with pytest.raises(RuntimeError, match="out of memory"):
            model(_x(1))
        model.fail = False
        assert patch.report().activity["FORA"]["bytes held"] == 0
        assert torch.equal(model(_x(1)), exact)


def test_a_body_that_raises_ends_the_run(model):
    with maskaccel.patch(model, FORA(interval=4)) as patch:
        with pytest.raises(KeyError), patch.generation(4) as run:
            model(_x(0))
            run.step()
            raise KeyError
        assert torch.equal(model(_x(1)), Model()(_x(1)))


def test_another_shape_resets(model):
    with maskaccel.patch(model, FORA(interval=4)) as patch, patch.generation(8) as run:
        for i, n in enumerate((4, 4, 6, 6)):
            out = model(_x(i, n))
            assert torch.equal(out, Model()(_x(i, n))) == (i in (0, 2))
            run.step()
        assert patch.report().activity["FORA"]["resets"] > 0


def test_nothing_is_reused_while_autograd_is_on(model):
    with maskaccel.patch(model, FORA(interval=4)) as patch, patch.generation(4) as run:
        for i in range(3):
            with torch.enable_grad():
                x = _x(i).requires_grad_()
                out = model(x)
                assert torch.equal(out, Model()(_x(i)))
                (grad,) = torch.autograd.grad(out.sum(), x)
                assert grad.abs().min() > 0
            run.step()
        assert patch.report().activity["FORA"]["reused"] == 0


def test_results_are_not_aliased(model):
    """A caller that writes into what a remembered module gave must not change the memory."""
    with maskaccel.patch(model, FORA(interval=4)) as patch, patch.generation(4) as run:
        attn = model.blocks[0].attn
        first = attn(_x(0)).clone()
        for _ in range(3):
            run.step()
            again = attn(_x(1))
            assert torch.equal(again, first)
            again.zero_()


def test_a_run_that_can_reuse_nothing_warns(model):
    with maskaccel.patch(model, FORA(interval=4, first=3)) as patch:
        with pytest.warns(UserWarning, match="FORA can never reuse anything in 3 steps"), patch.generation(3) as run:
            for i in range(3):
                model(_x(i))
                run.step()
        assert patch.report().activity["FORA"]["warning"] == "never reused anything"


def test_a_model_without_blocks():
    with pytest.raises(maskaccel.PatchError, match="no list of blocks"):
        maskaccel.patch(nn.Sequential(nn.Linear(2, 2)), FORA())


def test_a_deepcopy_has_a_run_and_a_patch_of_its_own(model):
    patch = maskaccel.patch(model, FORA(interval=4))
    with patch.generation(4) as run:
        model(_x(0))
        run.step()
        other = copy.deepcopy(model)
        assert torch.equal(other(_x(1)), Model()(_x(1))), "the copy took features of the original"
        assert not torch.equal(model(_x(1)), Model()(_x(1)))
    own = maskaccel.patch(other, FORA(interval=4))  # the one that is there
    assert own is not patch
    own.remove()
    assert other.__dict__.keys() == Model().__dict__.keys()
    assert not any("forward" in module.__dict__ for module in other.modules())
    assert "forward" in model.__dict__, "removing the copy's patch touched the original"
    patch.remove()


def test_report_after_remove_tells_what_was_done(model):
    with maskaccel.patch(model, FORA(interval=2)) as patch, patch.generation(4) as run:
        for i in range(4):
            model(_x(i))
            run.step()
    assert patch.report().activity["FORA"]["reused"] == 12


def test_pickling_is_refused_with_a_way_out(model):
    patch = maskaccel.patch(model, FORA(interval=2))
    with pytest.raises(maskaccel.PatchError, match=r"remove\(\) the patch first"):
        pickle.dumps(model)
    patch.remove()
    assert torch.equal(pickle.loads(pickle.dumps(model))(_x(0)), model(_x(0)))


def test_compiled_models_are_refused(model):
    with pytest.raises(maskaccel.PatchError, match="patch first, compile after"):
        maskaccel.patch(torch.compile(model), FORA())
    model.blocks[0].compile()
    with pytest.raises(maskaccel.PatchError, match="patch first, compile after"):
        maskaccel.patch(model, FORA())


def test_a_run_moves_all_its_members_and_a_skipped_start_shortens_it():
    members = [Generation(), Generation()]
    run = Run(members)
    for one in members:
        one.begin(10)
        one.shorten(4)
    assert run.num_steps == 6
    with run.branch("cond"):
        assert {one.branch_key for one in members} == {"cond"}
    for _ in range(6):
        run.step()
    assert [one.active for one in members] == [False, False]


# ------------------------------------------------------------------------------------------- pipelines
@pytest.fixture
def pipe():
    return zoo.dit()


def test_scheduler_methods_keep_their_signatures_and_come_back(pipe):
    pipeline, kwargs = pipe
    before = {id(owner): dict(owner.__dict__) for owner in (pipeline, pipeline.scheduler, pipeline.transformer)}
    signatures = [inspect.signature(getattr(pipeline.scheduler, name)) for name in ("set_timesteps", "step")]
    with maskaccel.patch(pipeline, [FORA(), FusedAdaLN()]):
        assert [inspect.signature(getattr(pipeline.scheduler, n)) for n in ("set_timesteps", "step")] == signatures
        sample(pipeline, kwargs, steps=2)
    for owner in (pipeline, pipeline.scheduler, pipeline.transformer):
        old = before[id(owner)]
        assert set(owner.__dict__) - set(old) <= {"num_inference_steps", "_guidance_scale"}, owner
        assert not any(key.startswith("_maskaccel") for key in owner.__dict__)


def test_an_interrupted_pipeline_leaves_nothing_behind(pipe):
    """The loop breaks outside the model: its features must not serve a later direct call of the model."""
    pipeline, kwargs = pipe
    model = pipeline.transformer
    given = {"timestep": torch.tensor([7, 7]), "class_labels": torch.tensor([1, 2])}
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        exact = model(x, **given).sample
    before = sample(pipeline, kwargs)
    with maskaccel.patch(pipeline, FORA(interval=5)) as patch:
        ours = sample(pipeline, kwargs)
        assert not torch.equal(ours, before)
        scheduler, steps = pipeline.scheduler, []
        hooked = scheduler.__dict__["step"]

        def interrupted(*args, **keywords):
            steps.append(1)
            if len(steps) == 3:
                raise KeyboardInterrupt
            return hooked(*args, **keywords)

        scheduler.__dict__["step"] = interrupted
        with contextlib.suppress(KeyboardInterrupt):  # not pytest.raises: it would keep the frames alive
            sample(pipeline, {**kwargs, "class_labels": [1]}, guidance_scale=4.0)
        scheduler.__dict__["step"] = hooked
        gc.collect()
        assert patch.report().activity["FORA"]["bytes held"] == 0
        with torch.no_grad():
            assert torch.equal(model(x, **given).sample, exact)
        assert torch.equal(sample(pipeline, kwargs), ours), "a run after an interrupted one differs"


def test_a_replaced_scheduler_is_never_followed_wrongly(pipe):
    pipeline, kwargs = pipe
    patch = maskaccel.patch(pipeline, FORA(interval=3))
    old = pipeline.scheduler
    sample(pipeline, kwargs, steps=4)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(old.config)
    with pytest.warns(UserWarning, match="scheduler was replaced after the patch"):
        ours = sample(pipeline, kwargs)
    assert any("scheduler was replaced" in note for note in patch.report().notes)
    patch.remove()
    assert not any(key.startswith("_maskaccel") or key == "step" for key in old.__dict__)
    assert torch.equal(ours, sample(pipeline, kwargs)), "without a scheduler to follow, every step is computed"
    with maskaccel.patch(pipeline, FORA(interval=3)) as again:
        sample(pipeline, kwargs)
        assert again.report().activity["FORA"]["reused"] > 0


def test_a_copy_of_the_scheduler_does_not_move_the_run(pipe):
    """Some pipelines step a copy of their scheduler for a second modality."""
    pipeline, kwargs = pipe
    with maskaccel.patch(pipeline, FORA(interval=3)):
        ours = sample(pipeline, kwargs)
        hooked = pipeline.scheduler.__dict__["step"]

        def step(*args, **keywords):
            second = copy.deepcopy(pipeline.scheduler)
            second.__dict__.pop("step")
            type(second).step(second, *args, **keywords)
            copied = copy.deepcopy(pipeline.scheduler)
            copied.set_timesteps(6)
            return hooked(*args, **keywords)

        pipeline.scheduler.__dict__["step"] = step
        assert torch.equal(sample(pipeline, kwargs), ours)
        pipeline.scheduler.__dict__["step"] = hooked


def test_a_deepcopied_pipeline_works_like_the_original(pipe):
    pipeline, kwargs = pipe
    patch = maskaccel.patch(pipeline, [FORA(interval=3), FusedAdaLN()])
    ours = sample(pipeline, kwargs)
    other = copy.deepcopy(pipeline)
    assert torch.equal(sample(other, kwargs), ours)
    own = maskaccel.patch(other, [FORA(interval=3), FusedAdaLN()])
    assert own is not patch
    assert own.report().activity["FORA"]["reused"] == 2 * patch.report().activity["FORA"]["reused"]
    own.remove()
    assert "set_timesteps" not in other.scheduler.__dict__
    assert torch.equal(sample(pipeline, kwargs), ours), "removing the copy's patch touched the original"
    patch.remove()
    assert torch.equal(sample(pipeline, kwargs), sample(other, kwargs))


def test_a_deepcopy_of_the_model_alone_leaves_the_pipeline_behind(pipe):
    pipeline, _ = pipe
    with maskaccel.patch(pipeline, [FORA(interval=3), FusedAdaLN()]):
        other = copy.deepcopy(pipeline.transformer)
        own = other.__dict__["_maskaccel_patch"]
        assert own.target is other
        own.remove()
        assert not any("forward" in module.__dict__ for module in other.modules())
        assert "forward" in pipeline.transformer.__dict__


def test_pipelines_that_share_a_scheduler(pipe):
    pipeline, kwargs = pipe
    other, _ = zoo.dit()
    other.scheduler = pipeline.scheduler
    with maskaccel.patch(pipeline, FORA(interval=3)) as one:
        alone = sample(pipeline, kwargs)
        with maskaccel.patch(other, FORA(interval=3)) as two:
            assert torch.equal(sample(other, kwargs), alone)
            assert torch.equal(sample(pipeline, kwargs), alone)
            assert two.report().activity["FORA"]["reused"] == one.report().activity["FORA"]["reused"] / 2
        assert torch.equal(sample(pipeline, kwargs), alone)
    assert "step" not in pipeline.scheduler.__dict__


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        (PAB(), "PAB needs the timesteps of the run; pass them to generation"),
        (SCM(), "SCM: .* needs the number of steps; pass it to generation"),
        (FORA(last=1), "FORA: last=1 needs the number of steps; pass it to generation"),
        (SpeCa(), "SpeCa: SpeCa needs the number of steps; pass it to generation"),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_a_run_that_does_not_tell_what_a_method_needs_does_not_begin(method, needs):
    model = dit()[0].transformer
    inputs = {"timestep": torch.tensor([5]), "class_labels": torch.tensor([1])}
    with torch.no_grad(), maskaccel.patch(model, method) as patch:
        with pytest.raises(ValueError, match=needs), patch.generation():
            raise AssertionError("the run began")
        model(torch.ones(1, 4, 8, 8), **inputs)  # outside a run, as ever
        assert patch.report().activity[method.name]["bytes held"] == 0


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, "8", True])
def test_a_run_of_no_number_of_steps_does_not_begin(model, num_steps):
    with maskaccel.patch(model, FORA(interval=2)) as patch:
        with pytest.raises(ValueError, match=f"num_steps={num_steps!r} must be an integer, 1 or more"):
            patch.generation(num_steps).__enter__()
        assert torch.equal(model(_x(1)), Model()(_x(1)))
