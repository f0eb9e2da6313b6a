"""PTQ4DM: quantisers against brute force, calibration sets against trajectories, hosts, execution in integers."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise

import diffusers
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from steersman.diffusion import (
    ClassConditionalPipeline,
    DDIMScheduler,
    DPMSolverPPScheduler,
    installed,
    integrate,
    load_steered,
    save_steered,
)
from steersman.diffusion.classical import DDIM
from steersman.diffusion.ptq4dm import (
    PTQ4DM,
    Activation,
    Calibration,
    Call,
    QuantisedLayer,
    affine,
    collect,
    kernels,
    quantisable,
    quantise,
    quantised_weight,
    quantize_ptq4dm,
    search,
    search_affine,
)
from steersman.diffusion.ptq4dm.apply import apply
from steersman.diffusion.ptq4dm.layers import bytes_of, pack, unpack
from steersman.diffusion.ptq4dm.quantisers import METRICS
from steersman.diffusion.solver import LinearVP, Prediction
from steersman.errors import InputError
from tests.diffusion import tiny

SMALL = Calibration(size=24, batch=12)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def classes(**unet) -> ClassConditionalPipeline:
    """A class-conditional network with random weights: three classes and the null label."""
    net = tiny.unconditional(num_class_embeds=4, **unet).unet.eval()
    pipe = ClassConditionalPipeline(net, diffusers.DDIMScheduler(clip_sample=False), null_label=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, steps: int = 4, scale: float = 1.0) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(
            labels=[0, 1, 2],
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=generator(5),
            output_type="latent",
        ).images


@pytest.fixture(scope="module")
def small():
    """A pipeline and its W8A8 network."""
    pipe = classes()
    return pipe, quantize_ptq4dm(pipe, calibration=SMALL, steps=4)


# ------------------------------------------------------------------ quantisers


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("span", [(-3.0, 3.0), (0.0, 2.0), (-2.0, 0.0), (-1.0, 4.0)])
def test_a_quantiser_is_idempotent_keeps_zero_and_errs_by_half_a_step(bits, span):
    delta, zero = affine(*span, bits)
    x = torch.empty(20_000).uniform_(*span, generator=generator())
    y = quantise(x, delta, zero, bits)
    assert torch.equal(quantise(y, delta, zero, bits), y)
    assert len(y.unique()) <= 2**bits
    # An affine range moves by up to half a step when its zero point is rounded.
    slack = 1.0 if 0 not in span and span[0] != -span[1] else 0.5
    assert float((x - y).abs().max()) <= slack * delta * (1 + 1e-5)
    assert float(quantise(torch.zeros(1), delta, zero, bits)) == 0.0


def test_a_channel_times_a_number_has_steps_and_values_times_it():
    w = normal(6, 3, 3, 3)
    q, delta = quantised_weight(w, 4)
    for c in (0.25, 8.0):
        q2, delta2 = quantised_weight(w * c, 4)
        assert torch.equal(q2, q)
        assert torch.equal(delta2, delta * c)
    q3, delta3 = quantised_weight(w * 3.7, 4)
    torch.testing.assert_close(
        q3 * delta3[:, None, None, None], 3.7 * q * delta[:, None, None, None], rtol=1e-6, atol=0
    )


def brute_force(x: torch.Tensor, bits: int, power: float) -> float:
    """The best of a hundred ranges, written out."""
    peak = x.abs().max().item()
    losses = []
    for k in range(1, 101):
        step = 2 * (k / 100) / (2**bits - 1)
        u = (x / peak).div(step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
        losses.append(((x / peak - u).abs() ** power).mean().item())
    return peak * (losses.index(min(losses)) + 1) / 100


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("metric", "power"), [("l2.4", 2.4), ("mse", 2.0), ("l1", 1.0)])
def test_the_search_finds_what_brute_force_finds(bits, metric, power):
    rows = torch.stack([normal(500, seed=i) * (i + 1) for i in range(4)])
    found = search(rows, bits, metric)
    assert found.tolist() == pytest.approx([brute_force(row, bits, power) for row in rows], rel=1e-6)


@pytest.mark.parametrize(
    ("bits", "metric", "range_"), [(4, "mse", 2.54), (4, "l2.4", 2.71), (8, "mse", 3.93), (8, "l2.4", 4.17)]
)
def test_ranges_of_normal_numbers(bits, metric, range_):
    assert float(search(normal(1, 400_000), bits, metric)) == pytest.approx(range_, rel=0.04)


def test_ranges_of_uniform_numbers():
    u = torch.empty(1, 100_000).uniform_(-1, 1, generator=generator())
    peak = float(u.abs().max())
    assert float(search(u, 8)) == pytest.approx(peak)
    assert 0.975 < float(search(u, 4)) / peak < 1.005  # three neighbours on the grid differ by 0.3%


@pytest.mark.parametrize("metric", METRICS)
def test_all_metrics_clip_outliers_but_not_much_else(metric):
    x = normal(1, 4000)
    x[0, 0] = 40.0
    r = float(search(x, 4, metric))
    assert 1.5 < r < 32
    assert float(search(x.abs(), 4, metric, "positive")) < 32
    assert search(torch.zeros(2, 5), 4, metric).tolist() == [0, 0]


def test_two_dimensional_search_beats_the_symmetric_one_on_skewed_values():
    x = F.silu(normal(2000) * 2)
    low, high = search_affine(x, 4)
    assert low > -1 and high > 3
    r = float(search(x[None], 4))
    errors = [(x - quantise(x, *affine(*span, 4), 4)).abs().pow(2.4).mean() for span in ((low, high), (-r, r))]
    assert errors[0] < errors[1] / 2


def test_erratum_the_zero_point_of_a_symmetric_range_is_set_not_rounded():
    """round(2^(b-1) - 1/2) falls to either side with the last bit of Δ; the level below costs half a step."""
    flipped = 0
    for r in torch.linspace(0.5, 8, 400).tolist():
        assert affine(-r, r, 4)[1] == 8
        step = torch.tensor(2 * r) / 15
        flipped += int(torch.round(torch.tensor(r) / step)) != 8
    assert flipped > 20


def test_quantisation_noise_is_white():
    x = torch.empty(200_000).uniform_(-0.9, 0.9, generator=generator())
    delta, zero = affine(-1, 1, 8)
    error = x - quantise(x, delta, zero, 8)
    assert float(error.var()) == pytest.approx(delta**2 / 12, rel=0.05)


def test_ranges_are_running_means_over_batches():
    act = Activation(8)
    batches = [normal(2000, seed=i) * (i + 1) for i in range(4)]
    for batch in batches:
        act.observe(batch)
    r = [float(search(batch[None], 8)) for batch in batches]
    expected = 0.9**3 * r[0] + 0.1 * sum(0.9 ** (3 - j) * r[j] for j in range(1, 4))
    assert act.ranges[0.0][1] == pytest.approx(expected, rel=1e-12)
    assert act.ranges[0.0][0] == -act.ranges[0.0][1]


def test_a_range_that_starts_on_one_side_stays_there():
    act = Activation(4)
    act.observe(normal(500).abs())
    act.observe(normal(500))
    low, high = act.ranges[0.0]
    assert low == 0 and high > 0
    assert affine(low, high, 4)[1] == 0
    assert float(act(torch.tensor([-1.0]))) == 0
    other = Activation(4)
    other.observe(-normal(500).abs())
    assert affine(*other.ranges[0.0], 4)[1] == 15


def test_errors_add_up_along_ddim_as_the_linear_recursion_says():
    """For data N(0, s²) the exact network is linear, ε = g_t x; quantising what it reads adds noise of Δ²/12."""
    process, s = LinearVP(), 0.3
    act = Activation(8)
    act.ranges = {0.0: (-4.5, 4.5)}
    delta, _ = act.levels()
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    quantised = QuantisedLayer(layer, 32, act, "input", Call())
    times = [0.5, 0.3, 0.15, 0.05]  # steps so long that values, and so their errors, change

    def gain(t: float) -> float:
        a, b = process.alpha(t), process.sigma(t)
        return b / (a * a * s * s + b * b)

    def sampled(read) -> torch.Tensor:
        def denoiser(x: torch.Tensor, t: float) -> Prediction:
            eps = gain(t) * read(x)
            return Prediction(x, process.alpha(t), process.sigma(t), eps=eps)

        with torch.no_grad():
            return integrate(DDIM(process), denoiser, normal(60_000, 1, 1, 1), times).x

    variance = 0.0
    for t, u in pairwise(times):
        a, b = process.transfer(t, u)
        variance = (a - b * gain(t)) ** 2 * variance + (b * gain(t)) ** 2 * delta**2 / 12
    error = sampled(quantised) - sampled(lambda x: x)
    assert float(error.var()) == pytest.approx(variance, rel=0.05)


def test_a_state_that_is_clipped_grows():
    """Why the network's own input is not quantised: of a state beyond the range it takes too little away."""
    process, s = LinearVP(), 0.3
    act = Activation(8)
    act.ranges = {0.0: (-3.0, 3.0)}

    def denoiser(x: torch.Tensor, t: float) -> Prediction:
        a, b = process.alpha(t), process.sigma(t)
        return Prediction(x, a, b, eps=b / (a * a * s * s + b * b) * act(x))

    start = torch.tensor([2.9, 3.5]).reshape(2, 1, 1, 1)
    inside, beyond = integrate(DDIM(process), denoiser, start, torch.linspace(1.0, 0.01, 50).tolist()).x.flatten()
    assert float(inside) < 2.9 * s * 1.1  # quantiles go to quantiles
    assert float(beyond) > 10


def test_integers_are_stored_in_as_many_bits_as_they_have():
    for bits in range(2, 9):
        q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 5, 2), generator=generator(), dtype=torch.int8)
        packed = pack(q, bits)
        assert packed.numel() == math.ceil(30 * bits / 8)
        assert torch.equal(unpack(packed, bits, (3, 5, 2)), q)


# ------------------------------------------------------------------ calibration


def recorded(pipe, run):
    """What a run tells the network, call by call."""
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return calls


@pytest.mark.parametrize("scale", [None, 2.0])
def test_items_are_states_of_the_trajectory_at_their_own_time(scale):
    pipe, found = classes(), None

    def go():
        nonlocal found
        found = collect(pipe, Calibration(size=40), steps=8, guidance=scale, generator=generator(1))

    calls = recorded(pipe, go)[1:]  # the first one lays the schedule out
    assert found.T == len(calls) == 8 and len(found) == 40
    order = found.k.argsort(descending=True, stable=True).tolist()  # of the rows, like times together
    for row, i in enumerate(order):
        j = found.T - 1 - int(found.k[i])
        (x, t), told = calls[j][0][:2], calls[j][1]
        row += 40 * (scale is not None and i % 2)  # items alternate between the branches
        assert torch.equal(found.items[i]["sample"], x[row : row + 1])
        assert float(found.timesteps[i]) == float(t) == found.schedule[j]
        assert torch.equal(found.items[i]["class_labels"], told["class_labels"][row : row + 1])
    asked = {int(item["class_labels"]) for item in found.items}
    assert asked == {0, 1, 2, 3}
    null = sum(int(item["class_labels"]) == 3 for item in found.items)
    assert null == (10 if scale is None else 20)


def test_erratum_the_published_pairing_mirrors_states_and_times():
    pipe, found = classes(), None

    def go(pairing):
        nonlocal found
        found = collect(pipe, Calibration(size=32, pairing=pairing), steps=6, generator=generator(1))

    calls = recorded(pipe, lambda: go("mirrored"))[1:]
    seen = {int(k) for k in found.k}
    assert {0, 5} <= seen
    for item, k, t in zip(found.items, found.k.tolist(), found.timesteps.tolist(), strict=True):
        assert t == found.schedule[5 - k]  # the time of k calls from the end ...
        if k < 5:  # ... with the state after loop index k, that is of time 4 - k
            assert any(torch.equal(item["sample"], x[None]) for x in calls[k + 1][0][0])
    last = collect(pipe, Calibration(size=32, pairing="mirrored", times="last"), steps=6, generator=generator(1))
    final = collect(pipe, Calibration(size=32, times="one"), steps=6, generator=generator(1))
    assert not torch.equal(last.items[0]["sample"], final.items[0]["sample"])  # the sample itself, after all calls
    go("published")
    assert found.timesteps.tolist() == found.k.tolist()  # indices of 6 calls, to a network of 1000 timesteps
    assert max(found.schedule) > 500


def test_times_are_a_clipped_normal_law():
    T, m, s, n = 250, 0.4, 0.4, 4000
    k = Calibration(size=n, mean=m, std=s).draw(T, generator(7))
    edges = torch.tensor([0, 1, *range(31, T - 1, 31), T - 1, T])
    counts = torch.histogram(k.double(), edges.double()).hist
    cdf = stats.norm(m, s).cdf
    ends = [cdf(float(e) / T) for e in edges]
    ends[0], ends[-1] = 0.0, 1.0
    expected = torch.tensor([(b - a) * n for a, b in pairwise(ends)])
    assert stats.chisquare(counts, expected).pvalue > 0.01
    assert counts[0] / n == pytest.approx(stats.norm.cdf((1 / T - m) / s), abs=0.02)  # an atom at the clean end
    assert counts[-1] / n == pytest.approx(stats.norm.sf((1 - 1 / T - m) / s), abs=0.02)


def test_the_other_laws_of_time():
    def draw(times):
        return Calibration(size=500, times=times).draw(100, generator())

    assert draw("one").unique().tolist() == [1]
    assert draw("last").unique().tolist() == [99]
    assert draw("mean").unique().tolist() == [50]
    assert draw("tenth").unique().tolist() == [10]
    assert draw("uniform").bincount().tolist() == [5] * 100
    assert int(draw("random").max()) == 79
    poisson = draw("poisson").double()
    assert float(poisson.mean()) == pytest.approx(40, abs=1) and float(poisson.var()) == pytest.approx(40, rel=0.2)


def test_erratum_no_item_is_dropped_and_batches_mix_times():
    found = collect(classes(), Calibration(size=50), steps=5, generator=generator())
    batches = list(found.batches(16, generator()))
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert sorted(map(len, batches)) == [12, 12, 13, 13]
    assert all(len(found.timesteps[batch].unique()) > 2 for batch in batches)


def test_states_that_are_not_sampled():
    pipe = classes()
    images = normal(6, 1, 8, 8, seed=3).clamp(-1, 1)
    raw = collect(pipe, Calibration("raw", "uniform", size=20), steps=5, latents=images, labels=[0, 1, 2, 0, 1, 2])
    for item in raw.items:
        (j,) = [j for j in range(6) if torch.equal(images[j : j + 1], item["sample"])]
        assert int(item["class_labels"]) == j % 3  # an image's own label
    noisy = collect(pipe, Calibration("raw_forward_t", "last", size=64), steps=50, latents=images)
    x = torch.cat([item["sample"] for item in noisy.items])
    abar = float(pipe.scheduler.alphas_cumprod[int(noisy.timesteps[0])])
    assert float(x.std()) == pytest.approx(math.sqrt(abar * float(images.var()) + 1 - abar), rel=0.05)
    noise = collect(pipe, Calibration("random", size=64), steps=5)
    assert float(torch.cat([item["sample"] for item in noise.items]).std()) == pytest.approx(1, rel=0.05)
    assert len(noise.timesteps.unique()) > 2


def test_the_same_seed_gives_the_same_calibration():
    a, b, c = (quantize_ptq4dm(classes(), calibration=SMALL, steps=4, generator=generator(s)) for s in (3, 3, 4))
    assert a.record == b.record
    assert a.record != c.record


# ------------------------------------------------------------------ the network


def test_32_bits_change_nothing_and_uninstalling_restores_everything(small):
    pipe, method = small
    before, weights = run(pipe), {n: p.clone() for n, p in pipe.unet.state_dict().items()}
    plain = quantize_ptq4dm(pipe, 32, calibration=SMALL, steps=4)
    with plain.install(pipe):
        assert torch.equal(run(pipe), before)
    with method.install(pipe):
        assert not torch.equal(run(pipe), before)
        assert installed(pipe) == (method,)
    assert torch.equal(run(pipe), before)
    after = pipe.unet.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[n], weights[n]) for n in weights)


def test_eight_bits_follow_the_network_closely_and_fewer_less(small):
    pipe, method = small
    reference, errors = run(pipe), []
    for bits in (8, 6, 4):
        with (method if bits == 8 else quantize_ptq4dm(pipe, bits, calibration=SMALL, steps=4)).install(pipe):
            errors.append(float((run(pipe) - reference).square().mean().sqrt()))
    assert errors[0] < 0.1 * float(reference.std())
    assert errors[0] < errors[1] / 2 and errors[1] < errors[2]


def test_saved_and_loaded_it_gives_the_same_bits(small, tmp_path):
    pipe, _ = small
    method = quantize_ptq4dm(pipe, 4, calibration=SMALL, steps=4, by_timestep=True)
    method.save_pretrained(tmp_path)
    with method.install(pipe):
        expected = run(pipe)
    with PTQ4DM.from_pretrained(tmp_path).install(pipe):
        assert torch.equal(run(pipe), expected)
    twin = PTQ4DM.mount(pipe, tmp_path)
    assert torch.equal(run(twin), expected)
    assert not torch.equal(run(pipe), expected)
    (tmp_path / "ptq4dm.json").write_text("{}")
    with pytest.raises(InputError, match="save_pretrained wrote"):
        PTQ4DM.from_pretrained(tmp_path)


def test_erratum_first_and_last_layers_are_told_by_their_role():
    pipe = classes()
    method = quantize_ptq4dm(pipe, 4, calibration=SMALL, steps=4)
    assert next(iter(dict(pipe.unet.named_modules()))) == "" and "time_embedding.linear_1" in method.layers
    bits = {n: (f["weight_bits"], f["activation_bits"]) for n, f in method.layers.items()}
    assert bits["conv_out"] == (8, 8) and bits["conv_in"] == (8, 32)  # what enters the network stays as it is
    assert all(b == (4, 4) for n, b in bits.items() if n not in ("conv_in", "conv_out"))
    published = quantize_ptq4dm(pipe, 4, calibration=SMALL, steps=4, activations="output")
    bits = {n: (f["weight_bits"], f["activation_bits"]) for n, f in published.layers.items()}
    order = list(bits)
    assert bits["conv_out"] == (8, 32)  # the network's output stays as it is
    assert bits[order[-2]] == (4, 8) and bits["conv_in"] == (8, 4)


def test_layers_with_bits_of_their_own(small):
    pipe, _ = small
    own = {"mid_block.*": 32, "conv_in": 6}
    method = quantize_ptq4dm(pipe, 5, calibration=SMALL, steps=4, layers=own)
    assert method.layers["conv_in"]["weight_bits"] == 6
    left = {n for n, why in method.kept.items() if "as asked" in why}
    assert left and all(n.startswith("mid_block.") for n in left)
    assert method.kept["conv_norm_out"] == "GroupNorm"
    with pytest.raises(InputError, match="did you mean 'conv_in'"):
        quantize_ptq4dm(pipe, 5, calibration=SMALL, steps=4, layers={"conv_im": 8})


def test_a_range_for_each_timestep_fits_it_alone(small):
    pipe, _ = small
    method = quantize_ptq4dm(pipe, calibration=SMALL, steps=4, by_timestep=True)
    ranges = method.layers["conv_out"]["ranges"]
    assert {t for t, _, _ in ranges} == {0.0, 250.0, 500.0, 750.0}
    act = Activation(8, by_timestep=True)
    act.ranges = {0.0: (-1.0, 1.0), 500.0: (-4.0, 4.0)}
    assert act.levels(torch.tensor(400)) == affine(-4, 4, 8)
    x = torch.full((2, 3), 3.0)
    assert act(x, torch.tensor([100, 600]))[:, 0].tolist() == pytest.approx([127 * 2 / 255, 3.0], rel=0.01)
    with pytest.raises(InputError, match="one state a call"):
        quantize_ptq4dm(pipe, calibration=SMALL, steps=30, by_timestep=True)


class Told(torch.Tensor):
    """A timestep that counts how often its number is read."""

    reads = 0

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        Told.reads += getattr(function, "__name__", "") in ("tolist", "item", "__float__", "__int__")
        return super().__torch_function__(function, types, arguments, keywords or {})


@pytest.mark.parametrize("times", [500, [500, 250]])
def test_ranges_by_timestep_read_the_device_s_clock_once_a_call(small, times):
    pipe, _ = small
    method = quantize_ptq4dm(pipe, calibration=SMALL, steps=4, by_timestep=True)
    x, t, y = normal(2, 1, 8, 8), torch.tensor(times), torch.tensor([0, 1])
    with method.install(pipe), torch.no_grad():
        expected = pipe.unet(x, t, class_labels=y).sample
        for told in (t, torch.zeros_like(t), t):  # each call has its own
            Told.reads = 0
            found = pipe.unet(x, told.as_subclass(Told), class_labels=y).sample.as_subclass(torch.Tensor)
            assert Told.reads == 1
            assert torch.equal(found, expected) == (told is t)


def test_the_report_names_the_layers_with_the_most_noise(small):
    pipe, method = small
    report = method.report()
    assert report["quantised"] == len(method.layers) > 10
    worst = report["worst_layers"][0]
    assert method.layers[worst]["sqnr_db"] == report["sqnr_db"]["worst"] < report["sqnr_db"]["median"]
    assert 10 < report["sqnr_db"]["median"] < 60
    assert len(method.layers["conv_in"]["peak_by_time"]) == 10
    full = sum(p.numel() * 4 for p in pipe.unet.parameters())
    quantised = sum(p.weight.numel() for n, p in pipe.unet.named_modules() if n in method.layers)
    steps = sum(p.weight.shape[0] * 4 for n, p in pipe.unet.named_modules() if n in method.layers)
    assert method.footprint(pipe.unet) == full - 3 * quantised + steps


def test_a_module_in_two_places_is_one_quantised_layer_in_both():
    pipe = classes()
    net = pipe.unet
    net.down_blocks[0].resnets[0].conv2 = net.down_blocks[0].resnets[0].conv1
    before = run(pipe)
    method = quantize_ptq4dm(pipe, calibration=SMALL, steps=4)
    with method.install(pipe):
        block = net.down_blocks[0].resnets[0]
        assert isinstance(block.conv1, QuantisedLayer) and block.conv1 is block.conv2
        assert float((run(pipe) - before).square().mean().sqrt()) < 0.2 * float(before.std())
    assert net.down_blocks[0].resnets[0].conv1 is net.down_blocks[0].resnets[0].conv2
    assert torch.equal(run(pipe), before)


class Odd(nn.Module):
    """A network with layers that can't be quantised, one that is never called, and one whose input is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"in_channels": 1, "sample_size": 8}
        self.conv_in = nn.Conv2d(1, 4, 3, padding=1)
        self.round = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.line = nn.Conv1d(4, 4, 1)
        self.unused = nn.Linear(3, 3)
        self.silent = nn.Conv2d(4, 4, 1, bias=False)
        self.conv_out = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, sample, timestep, return_dict=True):
        h = F.relu(self.conv_in(sample)) + self.silent(0 * self.round(sample.expand(-1, 4, -1, -1)))
        h = h + self.line(h.flatten(2)).reshape(h.shape) * torch.as_tensor(timestep).float().reshape(-1, 1, 1, 1) / 1000
        return self.conv_out(h)


class Runner:
    """The least that is a pipeline."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet, self.scheduler = Odd(), diffusers.DDIMScheduler()

    def __call__(self, batch_size=1, num_inference_steps=4, generator=None):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(batch_size, 1, 8, 8, generator=generator)
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.unet(x, t), t, x).prev_sample
        return diffusers.ImagePipelineOutput(images=x)


def test_what_cant_be_quantised_is_listed_and_kept():
    pipe = Runner()
    with pytest.warns(UserWarning, match="silent stays in floating point"):
        method = quantize_ptq4dm(pipe, calibration=SMALL, steps=4)
    assert set(method.layers) == {"conv_in", "conv_out"}
    assert method.kept == {
        "line": "Conv1d",
        "round": "Conv2d with padding (1, 1), circular",
        "silent": "Conv2d with activations that are all zero",
        "unused": "Linear that no calibration state reaches",
    }
    with method.install(pipe):
        pipe(batch_size=2)
    assert method.layers["conv_out"]["ranges"][0][1] < 0


def test_activations_that_are_not_finite_are_refused():
    pipe = Runner()
    pipe.unet.conv_in.bias.data[0] = math.nan
    with pytest.raises(InputError, match="NaN or infinity in"):
        quantize_ptq4dm(pipe, calibration=SMALL, steps=4)
    assert isinstance(pipe.unet.conv_in, nn.Conv2d)


def test_a_network_without_a_timestep_is_refused():
    pipe = Runner()
    pipe.unet = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.raises(InputError, match="takes a timestep"):
        quantize_ptq4dm(pipe, calibration=SMALL, steps=4)
    pipe.unet = None
    with pytest.raises(InputError, match="unet or a transformer"):
        quantize_ptq4dm(pipe, calibration=SMALL, steps=4)


def test_fused_attention_is_refused():
    pipe = tiny.stable_diffusion()
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(InputError, match="unfuse_qkv_projections"):
        quantisable(pipe.unet)


def test_learnt_rounding_lowers_the_error_of_blocks(small, monkeypatch):
    pipe, _ = small
    lines = []
    monkeypatch.setattr("steersman.diffusion.ptq4dm.reconstruction.RATE", 0.03)  # far fewer steps than are usual
    method = quantize_ptq4dm(
        pipe, 3, activation_bits=32, calibration=SMALL, steps=4, adaround=40, progress=lines.append
    )
    errors = [line.rpartition("error ")[2].split(", then ") for line in lines if "rounding" in line]
    ratios = [float(after) / float(before) for before, after in errors if float(before) > 1e-6]
    assert len(ratios) > 5 and max(ratios) <= 1 and sorted(ratios)[len(ratios) // 2] < 0.9
    nearest = quantize_ptq4dm(pipe, 3, activation_bits=32, calibration=SMALL, steps=4)
    different = 0
    for name, facts in method.layers.items():
        shape = tuple(pipe.unet.get_submodule(name).weight.shape)
        a, b = (unpack(m.tensors[f"{name}.integers"], facts["weight_bits"], shape).int() for m in (method, nearest))
        assert int((a - b).abs().max()) <= 1  # to the level below or above
        different += int((a != b).sum())
    assert different > 0
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_qdrop_and_blocks_with_activations(small):
    pipe, _ = small
    lines = []
    method = quantize_ptq4dm(pipe, 4, calibration=SMALL, steps=4, adaround=12, qdrop=0.5, progress=lines.append)
    plain = quantize_ptq4dm(pipe, 4, calibration=SMALL, steps=4)
    errors = [line.rpartition("error ")[2].split(", then ") for line in lines if "rounding" in line]
    assert all(float(after) <= float(before) for before, after in errors)
    moved = [m for m in method.layers if method.layers[m]["ranges"] != plain.layers[m]["ranges"]]
    assert moved  # steps of activations are learnt, too
    with method.install(pipe):
        run(pipe)
    act = Activation(2)
    act.ranges, act.dropped = {0.0: (-1.0, 1.0)}, 0.5
    x = torch.full((10_000,), 0.55)
    assert float((act(x) == x).double().mean()) == pytest.approx(0.5, abs=0.03)
    step = act.learn()
    act.dropped = None
    (act(torch.tensor([0.3, 5.0])) - torch.tensor([0.3, 5.0])).square().sum().backward()
    assert float(step.grad) < 0  # the clipped value pulls Δ up
    step.data *= 1.5
    act.learnt()
    assert act.ranges[0.0] == pytest.approx((-1.5, 1.5))


# ------------------------------------------------------------------ integers


@pytest.fixture
def int8():
    if not kernels():
        pytest.skip("this machine's processor has no exact int8 kernels")


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(16, 8, 3, padding=1, stride=2), (3, 16, 7, 7)),
        (lambda: nn.Conv2d(8, 8, 3, groups=2, dilation=2, bias=False), (2, 8, 9, 9)),
        (lambda: nn.Linear(33, 5), (2, 7, 33)),
        (lambda: nn.Linear(8, 64, bias=False), (3, 8)),
    ],
)
@pytest.mark.parametrize("sign", [0, 1])
def test_integer_products_are_those_that_were_simulated(int8, make, shape, sign):
    torch.manual_seed(0)
    layer, x = make(), normal(*shape)
    x = x.abs() if sign else x
    act = Activation(8)
    act.observe(1.01 * x)  # the largest value itself would lie between two levels, as near to one as to the other
    quantised = QuantisedLayer(layer, 8, act, "input", Call())
    with torch.no_grad():
        simulated = quantised(x)
        quantised.execution = "int8"
        for y in (quantised(x), quantised(x[:1])):
            torch.testing.assert_close(y, simulated[: len(y)], rtol=1e-5, atol=1e-5)
    delta, zero = act.levels()
    product = copy.deepcopy(layer).double()
    steps = quantised.scale.double().reshape(-1, *[1] * (layer.weight.ndim - 1))
    product.weight.data = quantised.integers.double() * steps
    with torch.no_grad():
        exact = product((bytes_of(x, delta, zero).double() - zero) * delta)
        torch.testing.assert_close(quantised(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_codes_are_the_same_without_the_deprecated_operator(int8, monkeypatch):
    x = normal(5000) * 3
    one_pass = bytes_of(x, 0.0231, 128)
    monkeypatch.delattr(torch, "quantize_per_tensor")
    assert torch.equal(bytes_of(x, 0.0231, 128), one_pass)


def test_a_whole_network_in_integers(small):
    pipe, method = small
    x, t = normal(4, 1, 8, 8), torch.tensor(500)
    outputs = []
    for execution in ("simulated", "int8"):
        own = PTQ4DM(method.record, method.tensors, execution)
        with own.install(pipe), torch.no_grad():
            assert pipe.unet.conv_out.execution == execution
            assert "conv_in" not in own.in_integers and "conv_out" in own.in_integers
            outputs.append(pipe.unet(x, t, class_labels=torch.arange(4)).sample)
    # Sums rounded otherwise flip a code here and there.
    assert float((outputs[0] - outputs[1]).abs().max()) < 0.05 * float(outputs[0].std())


def test_integers_where_there_are_none_are_refused(small, monkeypatch):
    pipe, method = small
    four = quantize_ptq4dm(pipe, 4, calibration=SMALL, steps=4)
    with pytest.raises(InputError, match="W4A4"):
        PTQ4DM(four.record, four.tensors, "int8")
    weights = quantize_ptq4dm(pipe, activation_bits=32, calibration=SMALL, steps=4)
    with pytest.raises(InputError, match="no layer has 8 bits for both"):
        PTQ4DM(weights.record, weights.tensors, "int8")
    published = quantize_ptq4dm(pipe, calibration=SMALL, steps=4, activations="output")
    with pytest.raises(InputError, match="outputs are no integers"):
        PTQ4DM(published.record, published.tensors, "int8")
    with pytest.raises(InputError, match="simulated or int8"):
        PTQ4DM(method.record, method.tensors, "int4")
    own = PTQ4DM(method.record, method.tensors, "int8")
    monkeypatch.setattr("steersman.diffusion.ptq4dm.layers.kernels", lambda: False)
    with pytest.raises(InputError, match="no exact int8 kernels"):
        own.install(pipe)
    half = classes()
    half.unet.half()
    with pytest.raises(InputError, match="on cpu in float16"):
        own.install(half)
    assert isinstance(pipe.unet.conv_in, nn.Conv2d)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_uninstalled_it_leaves_the_network_in_its_present_precision(small, dtype):
    _, method = small
    pipe, cast = classes(), classes()
    cast.unet.to(dtype)
    expected = run(cast)
    method.install(pipe)
    pipe.unet.to(dtype)
    assert run(pipe).isfinite().all()
    method.uninstall()
    assert {p.dtype for p in pipe.unet.parameters()} == {dtype}
    assert torch.equal(run(pipe), expected)


def test_a_network_in_half_precision_is_quantised_and_installed_on(small):
    _, method = small
    half = classes()
    half.unet.half()
    plain = run(half)
    with method.install(half):
        error = (run(half) - plain).float().square().mean().sqrt()
        assert 0 < float(error) < 0.1 * float(plain.float().std())
    assert torch.equal(run(half), plain)
    own = quantize_ptq4dm(half, calibration=SMALL, steps=4)
    with own.install(half):
        assert float((run(half) - plain).float().square().mean().sqrt()) < 0.1 * float(plain.float().std())
    with pytest.raises(InputError, match="learnt in float32"):
        quantize_ptq4dm(half, calibration=SMALL, steps=4, adaround=5)


def test_integer_kernels_refuse_a_network_that_was_cast_under_them(small):
    _, method = small
    pipe = classes()
    with PTQ4DM(method.record, method.tensors, "int8").install(pipe):
        pipe.unet.half()
        with pytest.raises(InputError, match="on cpu in float16"):
            run(pipe)


# ------------------------------------------------------------------ hosts and company


def stable_diffusion(monkeypatch=None):
    pipe = tiny.stable_diffusion()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def test_with_another_solver_saved_and_loaded(small, tmp_path):
    pipe, _ = small
    own = pipe.scheduler
    method = quantize_ptq4dm(pipe, calibration=SMALL, steps=4, guidance=2.0).install(pipe)
    try:
        pipe.scheduler = DPMSolverPPScheduler.from_config(own.config)
        expected = run(pipe, 6, scale=2.0)
        save_steered(pipe, tmp_path)
        again = load_steered(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert isinstance(installed(again)[0], PTQ4DM)
        assert torch.equal(run(again, 6, scale=2.0), expected)
        plain = ClassConditionalPipeline.from_pretrained(tmp_path)
        assert not any(isinstance(m, QuantisedLayer) for m in plain.unet.modules())
    finally:
        method.uninstall()
        pipe.scheduler = own


def test_another_sampler_than_the_calibrated_one_is_told(small):
    pipe, method = small
    with method.install(pipe), pytest.warns(UserWarning, match="DDIMScheduler with 4 calls, and this run is of"):
        pipe(labels=[0], num_inference_steps=7)
    with method.install(pipe), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe(labels=[0], num_inference_steps=4)


def test_gradients_pass_through_what_was_simulated(small):
    pipe, method = small
    x = normal(2, 1, 8, 8).requires_grad_()
    y = torch.tensor([0, 1])
    slope = torch.autograd.grad(pipe.unet(x, 100, class_labels=y).sample.sum(), x)[0]
    with method.install(pipe):
        own = torch.autograd.grad(pipe.unet(x, 100, class_labels=y).sample.sum(), x)[0]
    assert float(F.cosine_similarity(own.flatten(), slope.flatten(), dim=0)) > 0.95
    with (
        PTQ4DM(method.record, method.tensors, "int8").install(pipe),
        pytest.raises(InputError, match="where gradients are taken"),
    ):
        pipe.unet(x, 100, class_labels=y)


def test_another_network_is_refused(small):
    _, method = small
    other = classes()
    with torch.no_grad():
        for p in other.unet.parameters():
            p.add_(0.1)
    with pytest.raises(InputError, match="another"):
        method.install(other)
    assert installed(other) == ()


def test_stable_diffusion_with_both_branches_of_its_guidance():
    pipe = tiny.stable_diffusion()
    pipe.scheduler = DDIMScheduler(steps_offset=1)
    kinds = {"cond": tiny.EMBEDS["prompt_embeds"], "uncond": tiny.EMBEDS["negative_prompt_embeds"]}
    pipe.encode_prompt = lambda prompt, device, n, guided, *a, **k: (
        kinds["cond"].repeat(len(prompt), 1, 1),
        kinds["uncond"].repeat(len(prompt), 1, 1),
    )
    with pytest.raises(InputError, match="prompts"):
        quantize_ptq4dm(pipe, calibration=SMALL, steps=3)
    found = collect(pipe, SMALL, steps=3, prompts=["a", "b"], guidance=3.0)
    states = torch.cat([item["encoder_hidden_states"] for item in found.items])
    for kind in kinds.values():
        assert int((states == kind).flatten(1).all(1).sum()) == len(found) // 2
    method = quantize_ptq4dm(pipe, calibration=SMALL, steps=3, prompts=["a", "b"], guidance=3.0)
    assert any("attn2.to_k" in name for name in method.layers)

    def image():
        return pipe(
            prompt=["a"], num_inference_steps=3, guidance_scale=3.0, generator=generator(), output_type="latent"
        ).images

    reference = image()
    with method.install(pipe):
        assert 0 < float((image() - reference).square().mean().sqrt()) < 0.1 * float(reference.std())


def test_sdxl_takes_its_nested_conditions_along():
    pipe = tiny.sdxl()
    found = []
    pipe.encode_prompt = lambda prompt, **k: (
        *(
            tiny.XL_EMBEDS[n].repeat(len(prompt), *[1] * (tiny.XL_EMBEDS[n].ndim - 1))
            for n in (
                "prompt_embeds",
                "negative_prompt_embeds",
                "pooled_prompt_embeds",
                "negative_pooled_prompt_embeds",
            )
        ),
    )
    found = collect(pipe, SMALL, steps=3, prompts=["a"], guidance=3.0)
    batch = found.rows([0, 1, 2])
    assert batch["added_cond_kwargs"]["text_embeds"].shape == (3, 16)
    with torch.no_grad():
        assert pipe.unet(**batch)[0].shape == (3, 4, 8, 8)


def test_a_transformer_is_quantised_too():
    from diffusers import DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, out_channels=4,
        norm_num_groups=4,
    )  # fmt: skip
    nn.init.normal_(net.proj_out_2.weight, std=0.1)
    pipe = DiTPipeline(net, tiny._vae(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    method = quantize_ptq4dm(pipe, 6, calibration=SMALL, steps=3, labels=[0, 1, 2], guidance=2.0)
    assert method.layers["pos_embed.proj"]["weight_bits"] == method.layers["proj_out_2"]["weight_bits"] == 8
    with method.install(pipe):
        assert isinstance(net.pos_embed.proj, QuantisedLayer)


# ------------------------------------------------------------------ apply and bad input


def test_apply_makes_a_folder_that_mounts(tmp_path):
    pipe = classes()
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "asked.csv").write_text("label,note\n0,a\n2,b\n")
    (tmp_path / "made").mkdir()
    facts = apply(
        tmp_path / "pipe", tmp_path / "asked.csv", tmp_path / "made", seed=1, size=24, steps=4, layers="conv_in=8"
    )
    assert facts["ratio"] > 2 and facts["kept"] == {} and facts["norms_and_embeddings"] > 5
    twin = PTQ4DM.mount(pipe, tmp_path / "made")
    assert twin.footprint() == pytest.approx(facts["megabytes"] * 1e6)
    run(twin)
    size = (tmp_path / "made" / "ptq4dm.safetensors").stat().st_size
    assert size < sum(p.numel() * 4 for p in pipe.unet.parameters())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bits": 1}, "bits=1 is not allowed"),
        ({"bits": 9}, "from 2 to 8, or 32"),
        ({"weight_bits": 4.0}, "weight_bits"),
        ({"activation_bits": 16}, "activation_bits"),
        ({"layers": {"conv_in": 1}}, "bits of conv_in"),
        ({"metric": "l3"}, "one of"),
        ({"scheme": "signed"}, "asymmetric"),
        ({"scheme": "asymmetric", "metric": "kl"}, "zero points"),
        ({"activations": "both"}, "input"),
        ({"adaround": -1}, "adaround"),
        ({"qdrop": 1.5}, "qdrop"),
        ({"calibration": Calibration("raw")}, "images"),
        ({"guidance": 0.5}, "guidance_scale"),
    ],
)
def test_bad_settings_are_refused(small, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        quantize_ptq4dm(small[0], **{"calibration": SMALL, "steps": 4, **settings})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"size": 8}, "from 16 \\(states to calibrate on\\)"),
        ({"mean": 0.6}, "0.5"),
        ({"std": 0.0}, "above 0"),
        ({"batch": 0}, "from 1"),
        ({"times": "gaussian"}, "one of"),
        ({"states": "noise"}, "one of"),
        ({"pairing": "mirrored", "states": "random"}, "true"),
    ],
)
def test_bad_calibrations_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        Calibration(**settings)


def test_a_mounted_pipeline_executes_as_its_folder_says(int8, small, tmp_path):
    pipe, method = small
    PTQ4DM(method.record, method.tensors, "int8").save_pretrained(tmp_path)
    assert installed(PTQ4DM.mount(pipe, tmp_path))[0].execution == "int8"
    assert installed(PTQ4DM.mount(pipe, tmp_path, execution="simulated"))[0].execution == "simulated"


def test_rounding_and_ranges_by_timestep_are_not_learned_together(small):
    pipe, _ = small
    with pytest.raises(InputError, match=r"by_timestep=True .* false with adaround"):
        quantize_ptq4dm(pipe, calibration=SMALL, steps=4, by_timestep=True, adaround=2)
