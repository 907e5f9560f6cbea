"""Samplers of masked models against plain loops and exact laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from _masked_models import Joint, Toy, chi_square, choice_noise, sampling_noise
from torch import Tensor

from maskaccel import methods, ops
from maskaccel.masks import unmasking
from maskaccel.masks.unmasking import NoiseSchedule
from maskaccel.methods import _masked, maskgit
from maskaccel.methods._masked import Reveal, reveal_step
from maskaccel.methods.editmgt import localize
from maskaccel.methods.uncage import contrastive_scores
from maskaccel.ops._backends import refusal

BACKENDS = [
    name for name in ("reference", "cpu") if refusal(name, torch.device("cpu"), torch.float32, "sample_logits") is None
]
V, N = 11, 24


def masked(batch: int = 2, n: int = N) -> Tensor:
    return torch.full((batch, n), V)


def free_of(tokens: Tensor) -> Tensor:
    return tokens == V


# ---------------------------------------------------------------------------------------------------------- the step
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_have_the_law_of_the_softmax(backend, temperature):
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, -0.4, 0.9])
    tokens, confidence = ops.confidence_unmask(
        logits.expand(2, 4000, 6).contiguous(), torch.full((2, 4000), 6), 6, 4000, temperature=temperature, seed=5,
        backend=backend,
    )  # fmt: skip
    assert chi_square(tokens.flatten().bincount(minlength=6), (logits / temperature).softmax(-1)) < 3.5
    assert torch.allclose(confidence, logits.softmax(-1)[tokens], atol=1e-6)


def plain_measure(order: str, logits: Tensor, ids: Tensor) -> Tensor:
    p = logits.double().softmax(-1)
    if order == "margin":
        top = p.sort(descending=True).values
        return top[..., 0] - top[..., 1]
    if order == "entropy":
        return (p * p.log()).sum(-1)
    chosen = p.gather(-1, ids[..., None])[..., 0]
    return chosen.log() if order == "log" else chosen


def plain_step(logits, tokens, measure, ids, counts, hold=None, threshold=None):
    """Selection as a loop over samples."""
    found = tokens.clone()
    for b in range(len(tokens)):
        able = [i for i in range(tokens.shape[1]) if tokens[b, i] == V and not (hold is not None and hold[b, i])]
        ranked = sorted(able, key=lambda i: -float(measure[b, i]))
        taken = ranked[: counts[b]] + [i for i in able if threshold is not None and measure[b, i] >= threshold]
        for i in taken:
            found[b, i] = ids[b, i]
    return found


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy", "log"])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.3}, {"hold": True}])
def test_orders_against_a_plain_loop(order, options):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, N, V, generator=generator) * 2
    tokens = torch.randint(0, V, (3, N), generator=generator).masked_fill(
        torch.rand(3, N, generator=generator) < 0.6, V
    )
    hold = torch.rand(3, N, generator=generator) < 0.3 if "hold" in options else None
    threshold = options.get("threshold")
    ids = (logits + sampling_noise(4, 2, (3, N, V))).argmax(-1)
    got = reveal_step(Reveal((3, 0, 50), order, threshold), logits, tokens, V, seed=4, step=2, hold=hold)
    want = plain_step(logits, tokens, plain_measure(order, logits, ids), ids, (3, 0, 50), hold, threshold)
    assert got.equal(want)


def test_scores_and_groups():
    logits = torch.randn(1, 6, V, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([[0.0, 5.0, 1.0, 4.0, 2.0, 3.0]])
    got = reveal_step(Reveal(2, "scores", scores=lambda *_: scores), logits, masked(1, 6), V, seed=0, step=0)
    assert (got != V)[0].tolist() == [False, True, False, True, False, False]
    groups = torch.tensor([0, 0, 0, 1, 1, -1])
    got, _ = ops.confidence_unmask(
        logits, masked(1, 6), V, torch.tensor([[1, 2]]), order="scores", scores=scores, groups=groups
    )
    assert (got != V)[0].tolist() == [False, True, False, True, True, False]


def test_a_random_order_is_even():
    logits = torch.zeros(3000, 4, V)
    got = reveal_step(Reveal(1, "random"), logits, masked(3000, 4), V, seed=9, step=0)
    assert ((got != V).sum(1) == 1).all()
    assert chi_square((got != V).sum(0), torch.ones(4)) < 3.5


def test_within_and_hold():
    within = torch.arange(N)[None] < 5
    hold = torch.zeros(2, N, dtype=torch.bool)
    hold[1, 2] = True
    got = reveal_step(Reveal(N, within=within), torch.randn(2, N, V), masked(), V, seed=0, step=0, hold=hold)
    assert (got != V).sum(1).tolist() == [5, 4] and got[1, 2] == V


# ----------------------------------------------------------------------------------------------------------- MaskGIT
@pytest.mark.parametrize("end", [None, 0.5])
def test_maskgit_against_a_plain_loop(end):
    """Section 3.2, with the same random numbers: sample, rank by log-probability plus noise, mask the rest again."""
    model, steps = Toy(), 5
    method = methods.MaskGIT(steps=steps, choice_temperature=3.0, choice_end=end)
    tokens, n = masked(), 2 * N // 2
    for t in range(steps):
        logits = model(tokens)
        ids = (logits + sampling_noise(7, t, (2, N, V))).argmax(-1)
        rank = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        heat = 3.0 * (1 - (t + 1) / steps) if end is None else 3.0 + (0.5 - 3.0) * t / (steps - 1)
        rank = (rank.float() + heat * choice_noise(7, t, (2, N))).masked_fill(tokens != V, math.inf)
        left = 0 if t == steps - 1 else max(1, min(n - 1, math.floor(N * math.cos((t + 1) / steps * math.pi / 2))))
        n = left
        lowest = rank.argsort(1)[:, :left]
        tokens = torch.where(tokens == V, ids, tokens).scatter(1, lowest, V)
    assert method.sample(Toy(), masked(), V, seed=7).equal(tokens)


def test_settings_of_maskgit():
    assert (maskgit.MUSE.steps, maskgit.MUSE_SUPER.steps, maskgit.MAGVIT.steps, maskgit.MEISSONIC.steps) == (
        24,
        8,
        12,
        64,
    )


def test_given_tokens_stay():
    """Interpolation of frames, a part of an image: what is not masked is what it was."""
    tokens = masked()
    tokens[:, ::3] = 4
    got = methods.MaskGIT(steps=4).sample(Toy(), tokens, V)
    assert (got[:, ::3] == 4).all() and (got != V).all()


# ------------------------------------------------------------------------------------------------- head on masked rows
SAMPLERS = [
    methods.LLaDA(steps=6, block=8),
    methods.LLaDA(threshold=0.4, block=8),
    methods.LLaDA(steps=8, block=6, order="entropy"),
    methods.DUS(block=8),
    methods.DUS(block=8, threshold=0.3),
    methods.LaViDaO((4, 6), steps=5, temperature=0.0),
    methods.MaskGIT(steps=4, temperature=0.0, choice_temperature=0.0),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda one: f"{one.name}-{getattr(one, 'order', '')}")
def test_the_head_on_masked_rows_is_exact(sampler):
    tokens = masked(3)
    tokens[1, :7] = 2  # samples with different numbers of masked tokens
    whole, rows = Toy(), Toy()
    want = sampler.sample(whole, tokens, V)
    got = sampler.sample(rows.body, tokens, V, head=rows.head)
    assert got.equal(want) and (got != V).all()
    assert rows.calls == whole.calls and rows.rows < 0.8 * whole.rows


def test_rows_put_back_where_they_were():
    needed = torch.tensor([[True, False, True, True], [False, False, True, False]])
    rows = _masked.MaskedRows(needed, 3)
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert rows.take(tokens, empty=9).tolist() == [[1, 3, 4], [7, 9, 9]]
    assert rows.put(torch.tensor([[10, 30, 40], [70, 0, 0]]), tokens).tolist() == [[10, 2, 30, 40], [5, 6, 70, 8]]
    hidden = torch.randn(2, 4, 5)
    assert rows.rows(hidden)[0].equal(hidden[0, [0, 2, 3]]) and rows.rows(hidden)[1, 0].equal(hidden[1, 2])


# ------------------------------------------------------------------------------------------------------------- LLaDA
def plain_llada(model, prompt, length, block, steps, guidance=0.0):
    """Low-confidence remasking, block by block, at temperature 0."""
    tokens = torch.cat([prompt, prompt.new_full((len(prompt), length), V)], 1)
    blocks = length // block
    for i in range(blocks):
        start, stop = prompt.shape[1] + i * block, prompt.shape[1] + (i + 1) * block
        counts = [block // (steps // blocks) + (k < block % (steps // blocks)) for k in range(steps // blocks)]
        for count in counts:
            logits = model(tokens)
            if guidance:
                bare = tokens.clone()
                bare[:, : prompt.shape[1]] = V
                logits = model(bare) + (guidance + 1) * (logits - model(bare))
            p, ids = logits.softmax(-1).max(-1)
            for b in range(len(tokens)):
                able = [j for j in range(start, stop) if tokens[b, j] == V]
                for j in sorted(able, key=lambda j: -float(p[b, j]))[:count]:
                    tokens[b, j] = ids[b, j]
    return tokens


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_llada_against_a_plain_loop(guidance):
    prompt = torch.randint(0, V, (2, 4), generator=torch.Generator().manual_seed(2))
    method = methods.LLaDA(steps=6, block=8, guidance=guidance)
    got = method.generate(Toy(tokens=20), prompt, 16, V)
    assert got.equal(plain_llada(Toy(tokens=20), prompt, 16, 8, 6, guidance)) and got[:, :4].equal(prompt)


def test_a_threshold_finishes_blocks_early():
    """Fast-dLLM: everything above the threshold and always the best; blocks from left to right."""
    model = Toy()
    want, calls = masked(1), 0
    for start in range(0, N, 8):
        while (want[:, start : start + 8] == V).any():
            p, ids = model(want).softmax(-1).max(-1)
            p = p.masked_fill(want != V, -1.0)
            p[:, :start], p[:, start + 8 :] = -1.0, -1.0
            taken = (p >= 0.45) | (torch.arange(N)[None] == p.argmax(1, keepdim=True))
            want, calls = torch.where(taken, ids, want), calls + 1
    mine = Toy()
    assert methods.LLaDA(block=8, threshold=0.45).sample(mine, masked(1), V).equal(want)
    assert mine.calls == calls < N


def test_a_learned_policy():
    model = Toy()
    seen = []

    def eager(step, confidence):
        seen.append((step, confidence))
        return torch.ones_like(confidence)

    got = methods.LearnedPolicy(eager, block=8).sample(model, masked(), V)
    assert model.calls == 3 and (got != V).all()
    first = Toy()(masked()).softmax(-1).amax(-1)
    assert torch.allclose(seen[0][1], first, atol=1e-6) and [step for step, _ in seen] == [0, 0, 0]
    slow = Toy()
    methods.LearnedPolicy(lambda _, c: torch.zeros_like(c) - 1, block=8).sample(slow, masked(), V)
    assert slow.calls == N  # one token a call


@pytest.mark.parametrize(
    "sampler",
    [
        methods.MaskGIT(steps=4),
        methods.MDLM(steps=9),
        methods.GenMD4(torch.linspace(0.5, 2, V), steps=5),
    ],
    ids=lambda one: one.name,
)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    model = Toy()
    whole = sampler.sample(model, masked(4), V, seed=3)
    parts = [sampler.sample(model, masked(2), V, seed=3, sample_offset=at) for at in (0, 2)]
    assert torch.cat(parts).equal(whole) and not whole[0].equal(whole[1])


# ----------------------------------------------------------------------------------------------- discrete diffusion
LAW = torch.tensor([[0.30, 0.02, 0.08], [0.05, 0.25, 0.05], [0.05, 0.05, 0.15]])


@pytest.mark.parametrize(
    "method", [methods.MDLM(steps=4), methods.MD4(steps=6), methods.MDLM(steps=5, schedule=NoiseSchedule("poly", 2.0))]
)
def test_ancestral_sampling_has_the_law_of_the_posterior(method):
    """Two tokens whose joint law is known: independent where revealed together, else exact."""
    model = Joint(LAW)
    got = method.sample(model, torch.full((6000, 2), 3), 3, seed=11)
    chances = [*method.probabilities()[:-1], 1.0]
    assert chi_square((got[:, 0] * 3 + got[:, 1]).bincount(minlength=9), model.ancestral(chances).flatten()) < 3.5


def test_idle_steps_do_not_call_the_model():
    model = Joint(LAW)
    got = methods.MDLM(steps=1000).sample(model, torch.full((3, 2), 3), 3, seed=2)
    assert (got != 3).all() and model.calls <= 6
    taken = []
    methods.MDLM(steps=50).sample(
        Toy(), masked(), V, on_step=lambda step, tokens: taken.append(int((tokens == V).sum()))
    )
    assert all(a > b for a, b in itertools.pairwise([2 * N, *taken]))


def test_noise_removal_takes_the_most_probable_tokens():
    got = methods.MDLM(steps=1, finish="argmax").sample(Toy(), masked(), V)
    assert got.equal(Toy()(masked()).argmax(-1))


def test_genmd4_reveals_by_what_is_predicted():
    """One step: a token takes v with probability `mu_v (1 - (s / t)^w_v)`, and stays masked otherwise."""
    mu, powers = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.5, 1.0, 3.0])
    method = methods.GenMD4(powers, steps=2)
    seen: list[Tensor] = []
    logits = mu.log().expand(4000, 2, 3).contiguous()
    got = method.sample(
        lambda _: logits, torch.full((4000, 2), 3), 3, seed=3, on_step=lambda _, tokens: seen.append(tokens.clone())
    )
    rates = 1 - 0.5**powers
    law = torch.cat([mu * rates, (1 - (mu * rates).sum())[None]])
    assert torch.allclose(method.rates(1.0, 0.5), rates)
    assert chi_square(seen[0].flatten().bincount(minlength=4), law) < 3.5 and (got != 3).all()


def test_prime_has_the_law_of_its_tokens():
    """The digits of one token: the prediction given those that are known is exact, so the law is."""
    law = torch.tensor([0.4, 0.1, 0.05, 0.25, 0.2])
    method = methods.Prime(5, parts=2, steps=6)
    assert method.base == 3
    calls = []

    def model(digits):
        calls.append(digits)
        return law.log().expand(*digits.shape[:2], 5)

    got = method.sample(model, torch.full((5000, 1, 2), 3), seed=4)
    assert chi_square(got.flatten().bincount(minlength=5), law) < 3.5
    partly = torch.cat([(d == 3).sum(-1).flatten() for d in calls])
    assert (partly == 1).any()  # states that are known in part were passed
    few = methods.Prime(5, parts=2, steps=1000)
    calls.clear()
    few.sample(model, torch.full((2, 3, 2), 3), seed=0)
    assert len(calls) <= 12


def test_prime_leaves_out_what_contradicts():
    method = methods.Prime(8, parts=3)
    digits = torch.tensor([[[1, 2, 0], [2, 2, 2]]])  # 2 is masked
    got = method.consistent(torch.zeros(1, 2, 8), digits)
    assert torch.isfinite(got[0, 0]).nonzero().flatten().tolist() == [4, 6] and torch.isfinite(got[0, 1]).all()


# ----------------------------------------------------------------------------------------------------- other orders
def test_dus_reveals_levels():
    seen = [masked()]
    model = Toy()
    methods.DUS(block=8).sample(model, masked(), V, on_step=lambda _, tokens: seen.append(tokens))
    assert model.calls == 3 * 3  # log2(8) a block
    for before, after in itertools.pairwise(seen):
        fresh = ((before == V) & (after != V))[0]
        assert fresh.any() and not (fresh[1:] & fresh[:-1]).any()
        assert after.equal(torch.where(fresh, Toy()(before).argmax(-1), before))


def test_dus_lets_unsure_tokens_wait():
    seen = []
    methods.DUS(block=8, threshold=0.5).sample(Toy(), masked(), V, on_step=lambda _, tokens: seen.append(tokens))
    p, ids = Toy()(masked()).softmax(-1).max(-1)
    level = torch.zeros(N, dtype=torch.bool)
    level[[0, 4]] = True
    assert seen[0].equal(torch.where(level & (p >= 0.5), ids, V)) and (seen[-1] != V).all()


def test_lavida_o_follows_its_order():
    place = unmasking.stratified_order((4, 6), 42)
    seen = []
    methods.LaViDaO((4, 6), steps=5).sample(Toy(), masked(), V, on_step=lambda _, tokens: seen.append(tokens))
    done = list(itertools.accumulate(unmasking.reveal_counts(N, 5)))
    for tokens, count in zip(seen, done, strict=True):
        assert (tokens != V).equal((place < count)[None].expand(2, -1))


def test_lavida_o_leaves_what_is_given():
    tokens = masked(2, 30)
    tokens[:, :6], tokens[:, 6:18] = 3, 5
    model = Toy(tokens=30)
    got = methods.LaViDaO((4, 6), steps=4).sample(model, tokens, V)
    assert model.calls == 4 and (got[:, :6] == 3).all() and (got[:, 6:18] == 5).all() and (got != V).all()


def test_maskbit():
    # So much noise on the ranks that they are even: then what is revealed has the law of what is sampled.
    method = methods.MaskBit(bits=6, groups=2, steps=4, choice_temperature=1e5)
    ids = torch.arange(64)[None]
    groups = method.split(ids)
    assert groups[0, 37].tolist() == [0b101, 0b100] and method.combine(groups).equal(ids)
    bits = method.to_bits(torch.tensor([[[5, 8]]]))
    assert bits.tolist() == [[[1.0, -1.0, 1.0, 0.0, 0.0, 0.0]]]
    law = torch.tensor([0.3, 0.05, 0.1, 0.2, 0.05, 0.1, 0.1, 0.1])
    seen = []

    def model(bits):
        seen.append((bits == 0).sum().item() // 3)
        return law.log().expand(*bits.shape[:2], 2, 8)

    got = method.generate(model, 500, 4, seed=1)
    assert got.shape == (500, 4) and seen[0] == 500 * 8 and len(seen) == 4
    assert seen[1] == 500 * (8 - unmasking.reveal_counts(8, 4, "arccos")[0])
    assert chi_square(method.split(got).flatten().bincount(minlength=8), law) < 3.5


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: methods.MaskGIT(steps=0), "steps=0"),
        (lambda: methods.MaskGIT(schedule="sine"), "schedule='sine'"),
        (lambda: methods.MaskGIT(choice_temperature=-1.0), "choice_temperature=-1.0"),
        (lambda: methods.MaskGIT(noise="white"), "noise='white'"),
        (lambda: methods.LLaDA(order="height"), "order='height'"),
        (lambda: methods.LLaDA(order="scores"), "order='scores'"),
        (lambda: methods.LLaDA(temperature=-0.1), "temperature=-0.1"),
        (lambda: methods.LLaDA(threshold=math.nan), "threshold=nan must be a number, or None"),
        (lambda: methods.MaskBit(bits=7, groups=2), "groups=2 must divide bits=7"),
        (lambda: methods.MDLM(finish="none"), "finish='none'"),
        (lambda: methods.GenMD4(torch.tensor([1.0, 0.0])), "powers"),
        (lambda: methods.Prime(1), "vocabulary=1"),
        (lambda: methods.DUS(base=1), "base=1"),
        (lambda: methods.EditMGT(threshold=2.0), "threshold=2.0"),
        (lambda: methods.LaViDaO((0, 4)), "grid=0"),
        (lambda: NoiseSchedule("square"), "kind='square'"),
        (lambda: NoiseSchedule().reveal_probability(0.2, 0.5), "0 <= s <= t <= 1"),
        (lambda: unmasking.ancestral_counts([3], [1.5], 0), r"probabilities\[0\]=1.5"),
        (lambda: unmasking.mask_ratio(1.5), "progress=1.5"),
        (lambda: Reveal(1, "height"), "order='height'"),
        (lambda: contrastive_scores(torch.rand(1, 2, 4), [[2]]), "word 2"),
        (lambda: localize(torch.rand(1, 5), (2, 2)), "grid"),
    ],
)
def test_settings_that_make_no_sense(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_calls_that_make_no_sense():
    sampler = methods.MaskGIT(steps=2)
    with pytest.raises(TypeError, match="int64"):
        sampler.sample(Toy(), masked().float(), V)
    with pytest.raises(ValueError, match=r"\(B, N\)"):
        sampler.sample(Toy(), masked()[0], V)
    with pytest.raises(ValueError, match="mask_id=-1"):
        sampler.sample(Toy(), masked(), -1)
    with pytest.raises(TypeError, match="hold must be a bool"):
        sampler.sample(Toy(), masked(), V, hold=torch.zeros(2, N))
    with pytest.raises(ValueError, match="hold has shape"):
        sampler.sample(Toy(), masked(), V, hold=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="hold leaves no masked token"):
        sampler.sample(Toy(), masked(), V, hold=torch.ones(1, N, dtype=torch.bool))
    model = Toy()
    with pytest.raises(ValueError, match="ranks by scores"):
        methods.GenMD4(torch.ones(V), steps=2).sample(model.body, masked(), V, head=model.head)
    with pytest.raises(ValueError, match="steps=2 is below the number of blocks, 3"):
        methods.LLaDA(steps=2, block=8).sample(Toy(), masked(), V)
    with pytest.raises(ValueError, match="head is given with guidance"):
        methods.LLaDA(guidance=1.0).generate(model.body, torch.zeros(1, 2).long(), 4, V, head=model.head)
    with pytest.raises(ValueError, match="scores gives"):
        methods.LLaDA(steps=2, order="scores", scores=lambda *_: torch.zeros(3)).sample(Toy(), masked(), V)
    with pytest.raises(ValueError, match="nothing would be edited"):
        methods.EditMGT().start(masked() - 1, torch.zeros(2, N), V)
    with pytest.raises(ValueError, match="hold a NaN"):
        sampler.sample(lambda tokens: torch.full((2, N, V), math.nan), masked(), V)
    assert sampler.sample(Toy(), masked() - 1, V).equal(masked() - 1)  # nothing is masked: nothing to do


def test_what_a_model_returns_is_checked():
    sampler = methods.MaskGIT(steps=2)
    for output, error, message in (
        (
            (torch.randn(2, N, V),),
            TypeError,
            "the model returned a tuple; it must be a tensor, or have one as `logits`",
        ),
        (torch.randn(2, 8, V), ValueError, r"the model's logits have shape \(2, 8, 11\); they must be \(2, 24, ...\)"),
        (torch.randn(2, V), ValueError, r"logits have shape \(2, 11\)"),
    ):
        with pytest.raises(error, match=message):
            sampler.sample(lambda tokens, output=output: output, masked(), V)
    with pytest.raises(ValueError, match=r"hidden rows have shape \(1, 24, 4\)"):
        sampler.sample(lambda tokens: torch.randn(1, N, 4), masked(), V, head=torch.nn.Linear(4, V))
