"""What the method guarantees, in the method's order: the name of each test is its claim.

"eq." and "Algorithm" are those of MCM's paper. No network and no GPU is needed. What needs
../shared (arrays of the authors' own code) is skipped where there is none. A few of those numbers
stand here, so that a clone guards itself.
"""
import argparse, collections, copy, functools, hashlib, json, math, os, pickle, re, shlex
import shutil, signal, struct, sys, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.linalg
import torch, torch.distributed.run
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import ect, fid, mcm, sample, train_cifar
from fid import InputError
from mcm import alpha_sigma, cosine, edm, mean_per_sample, per_sample

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "shared/fixtures"
parametrize = pytest.mark.parametrize
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="../shared is absent")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
torch.set_num_threads(1)            # for small tensors threads mostly wait for each other
train_cifar.DEVICE = torch.device("cpu")            # the tests that want a GPU say so

@pytest.fixture(autouse=True)
def each_test_for_itself(tmp_path, monkeypatch):
    """It begins in an empty folder. What it may change for all of Python is set back.
    It hears a Ctrl-C, which a job in the background, and what that starts, would ignore."""
    monkeypatch.chdir(tmp_path)
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    torch.set_default_dtype(torch.float32)
    for kind, handler in before.items():
        signal.signal(kind, handler)

def close(actual, expected, rtol=1e-6, atol=1e-8):
    """torch.testing.assert_close, also for arrays, lists and numbers, compared in float64."""
    __tracebackhide__ = True
    actual = torch.as_tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64).broadcast_to(actual.shape)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)

def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)

def load(name):
    """A fixture's arrays, as tensors."""
    arrays = np.load(FIXTURES / name).items()
    return {key: torch.tensor(array) for key, array in arrays if array.dtype.kind != "U"}

# ---- Schedules and steps -------------------------------------------------------------------------
# A schedule gives alpha and sigma at t. DDIM moves a noisy image from t to s with a guess x of the
# clean one. It must be right for a right guess, and invertible. aDDIM adds the variance that x
# lacks, and nothing else. All is computed sample by sample.

# The papers' symbols, for the tests of the first three sections. The times are all t > s >= t_step
# that are multiples of 1/16, and x and eps are data and noise, [816, 2, 3].
TIMES = (torch.combinations(torch.arange(18), 3) - torch.tensor([0, 1, 1])).double() / 16
t_step, s, t = TIMES.T.contiguous()
x, eps = randn(2, len(t), 2, 3)
on_both_schedules = parametrize("schedule", [cosine, edm])

def noisy(t, schedule=cosine):
    """x at t, on its straight path to eps."""
    alpha, sigma = alpha_sigma(schedule, t, x)
    return alpha * x + sigma * eps

def stand_in(x, sigma, w=0.7):
    """The fixtures' stand-in for a network D(x, sigma). Here it also stands for any f(z, t)."""
    scale = per_sample((sigma**2 + 0.25).rsqrt(), x)
    out = torch.tanh(w * scale * x)
    return 0.25 * scale**2 * x + 0.5 * per_sample(sigma, x) * scale * out

def gaussian(x, sigma, variance=0.3):
    """The exact denoiser D(x, sigma) of Gaussian data."""
    return x * per_sample(variance / (variance + sigma**2), x)

def test_cosine_preserves_the_variance():
    alpha, sigma = cosine(torch.linspace(0, 1, 1001))
    close(alpha**2 + sigma**2, 1.0)

@parametrize("time, level", [(0.0, 0.002), (1.0, 80.0)])
def test_cosines_noise_level_is_from_0002_to_80(time, level):
    """Also for images in bfloat16, where the last one would be 62."""
    alpha, sigma = alpha_sigma(cosine, time, torch.zeros(2, 3).bfloat16())
    close(sigma / alpha, level, rtol=1e-4)

def addim_without_variance(x, z_t, t, s, schedule):
    return mcm.addim(x, z_t, t, s, 0.0, schedule)

@on_both_schedules
@parametrize("step", [mcm.ddim, addim_without_variance])
def test_ddim_with_the_true_image_stays_on_its_path(step, schedule):
    """Eq. (4). And aDDIM is DDIM if no variance is missing."""
    close(step(x, noisy(t, schedule), t, s, schedule), noisy(s, schedule))

@on_both_schedules
def test_addim_lengthens_the_noise_by_the_missing_variance(schedule):
    """Algorithm 3 with eq. (14). Here t is also the variance that is missing."""
    alpha_t, sigma_t = alpha_sigma(schedule, t, x)
    alpha_s, sigma_s = alpha_sigma(schedule, s, x)
    missing = (alpha_s - alpha_t * sigma_s / sigma_t).flatten() ** 2 * t
    before = mean_per_sample((sigma_s * eps) ** 2)
    noise = mcm.addim(x, noisy(t, schedule), t, s, t, schedule) - alpha_s * x
    close(mean_per_sample(noise**2), before + missing)

def test_a_batch_may_be_empty():
    assert mean_per_sample(torch.zeros(0, 3, 8, 8)).shape == (0,)

# ---- Times and the loss --------------------------------------------------------------------------
# A segment has n whole teacher steps. t is the upper end of one of them, s its lower end. f must
# learn the x that jumps from z_t to where the reference's jump from z_s ends, at t_step. At the
# edge this is the data itself, with one segment a consistency model, with n = 1 a diffusion model.

def test_teacher_steps_grow_log_linearly():
    T = [mcm.teacher_steps(i) for i in (-1, 0, 50_000, 200_000)]
    close(T, [64, 64, (64 * 1280) ** 0.5, 1280])

@parametrize("N, T, n", [(1, 24, 24), (2, 25, 12), (8, 22, 3), (8, 3, 1)])
def test_every_teacher_step_of_every_segment_is_drawn(N, T, n):
    """Where s is an edge, it is t_step to the last bit. With n = 1 it always is an edge, and
    the loss that of a diffusion model."""
    k = torch.arange(N * n)
    u = torch.stack([k // n / N, k % n / n]) + 1e-4
    u[:, 0] = 0
    t, s, t_step = mcm.draw_times(N * n, torch.full_like(k, N), T, u=u)
    close(t * N * n, k + 1)
    close(s * N * n, k)
    close(t_step * N, k // n)
    assert s.eq(t_step).equal(k % n == 0)

def test_times_do_not_depend_on_the_default_dtype():
    """In bfloat16, s would often be t."""
    torch.set_default_dtype(torch.bfloat16)
    t, s, t_step = mcm.draw_times(1000, 2, 1280)
    assert (s < t).all()

@parametrize("N, T", [(1, 8192), (3, 64), (8, 1280), (64, 8192)])
def test_the_network_is_told_the_segment_that_its_time_was_drawn_in(N, T):
    """Also where t is the segment's upper edge, and the noise level is rounded up."""
    t, s, t_step = mcm.draw_times(10_000, N, T)
    alpha, sigma = cosine(t)
    segment = mcm.segment_of(1.000001 * sigma / alpha, N)
    assert segment.equal((t_step * N).round().long())

@on_both_schedules
def test_at_the_edge_the_target_is_the_data(schedule):
    """Eq. (8): what a diffusion model learns. Eq. (5), inverse DDIM, finds it in z_s."""
    z_t, z_s = noisy(t, schedule), noisy(s, schedule)
    target = mcm.consistency_target(stand_in, z_s, z_t, t, s, s, schedule)
    close(target, x)

@on_both_schedules
def test_above_the_edge_the_target_lands_where_the_reference_lands(schedule):
    """For edm and t_step = 0, this is the target of a consistency model (Song et al.)."""
    above = s > t_step
    z_t, z_s = noisy(t, schedule), noisy(s, schedule)
    target = mcm.consistency_target(stand_in, z_s, z_t, t, s, t_step, schedule)
    landed = mcm.ddim(target, z_t, t, t_step, schedule)
    reference = mcm.ddim(stand_in(z_s, s), z_s, s, t_step, schedule)
    close(landed[above], reference[above])

@on_both_schedules
def test_the_loss_is_a_norm_with_snr_plus_1_as_weight(schedule):
    alpha, sigma = alpha_sigma(schedule, t, x)
    error = stand_in(noisy(t, schedule), t) - x
    square = mean_per_sample(error**2 * (alpha**2 / sigma**2 + 1))
    loss = mcm.consistency_loss(stand_in, x, eps, t, s, s, schedule, huber_eps=0.1)
    close(loss, (square + 0.1**2) ** 0.5 - 0.1)

def test_the_norm_has_a_slope_of_0_at_0():
    zero = torch.zeros(1, requires_grad=True)
    mcm.pseudo_huber(zero**2, 0.0).sum().backward()
    assert zero.grad == 0

def test_only_f_at_t_has_a_gradient():
    """So the slope is that of a loss whose reference is held fixed."""
    def loss(w, **more):
        f = mcm.conditioned(stand_in, w=w)
        return mcm.consistency_loss(f, x, eps, t, s, t_step, **more).sum()
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    rise = loss(0.7 + 1e-6, f_ref=stand_in) - loss(0.7 - 1e-6, f_ref=stand_in)
    close(torch.autograd.grad(loss(w), w)[0], rise / 2e-6)

def first_asked(**more):
    """What a loss asks of f first: z_s and a time."""
    f = Mock(side_effect=stand_in)
    mcm.consistency_loss(f, x, eps, t, s, t_step, **more)
    return f.call_args_list[0].args

def test_f_is_asked_at_s_or_where_no_jump_is_left_at_t():
    """So never at time 0, where a network would take the logarithm of 0."""
    z_s, time = first_asked()
    close(time, torch.where(s > t_step, s, t), rtol=0, atol=0)

x_hat = stand_in(noisy(t), t)
x_guided = 3 * x_hat - 2 * gaussian(noisy(t), t)
guided = mcm.guided(stand_in, gaussian, weight=2.0)
teachers = [(stand_in, x_hat), (guided, x_guided)]

@parametrize("teacher, x_teacher", teachers, ids=["unguided", "guided"])
def test_a_teacher_steps_with_three_quarters_of_its_squared_error(teacher, x_teacher):
    """The error is that of its unguided guess, x_hat, though it steps along the guided one."""
    x_var = 0.75 * mean_per_sample((x_hat - x) ** 2)
    z_s, time = first_asked(teacher=teacher)
    close(z_s, mcm.addim(x_teacher, noisy(t), t, s, x_var))

def test_a_teacher_is_asked_without_gradient():
    """Though the target would not pass it on, it would be remembered."""
    w = torch.tensor(0.7, requires_grad=True)
    z_s, time = first_asked(teacher=mcm.conditioned(stand_in, w=w))
    assert not z_s.requires_grad

# ---- ECT -----------------------------------------------------------------------------------------
# r follows t by a fixed map, which tightens stage by stage. The loss must be the authors' where
# theirs is finite, and finite everywhere. In segments (ours), r stops at the edge.

def test_r_is_that_of_the_authors():
    sigma = torch.tensor([0.198757457, 1.15992856, 6.76922660]).double()
    close(ect.t_to_r(sigma, 3), [0.14156763, 0.94900700, 6.3422669], rtol=1e-7)

def test_ects_loss_is_its_formula():
    n = 1 + 5 / (1 + (2 * t).exp())
    r = t * (1 - n / 3**2)
    difference = stand_in(noisy(t, edm), t) - stand_in(noisy(r, edm), r)
    square = (difference**2).flatten(1).sum(1)
    loss = ect.ect_loss(stand_in, x, eps, t, stage=1, q=3, k=5, b=2, c=0.06)
    close(loss, ((square + 0.06**2) ** 0.5 - 0.06) / (t - r))

@needs_fixtures
@parametrize("q, stage, c", [(2, 0, 0), (2, 8, 0.06), (4, 3, 0.06), (256, 1, 0)])
def test_ects_loss_is_the_authors(q, stage, c):
    data = load("ect_loss_standin.npz")
    images, noise, sigma = [data[name].double() for name in ("x", "eps", "t_f64")]
    loss = ect.ect_loss(stand_in, images, noise, sigma, stage, q, c=c)
    close(loss, data[f"loss_q{q}_sigmoid_s{stage}_c{c}_f64"], rtol=1e-9)

def test_the_weight_is_over_the_very_r_that_the_network_sees():
    """D = ln sigma, so the loss is (ln t - ln r) / (t - r), which is 1 / t for a small t - r."""
    sigma = torch.linspace(0.01, 80, 1000)
    zero = torch.zeros(1000, 1)
    loss = ect.ect_loss(
        lambda x, sigma: sigma.double().log()[:, None], zero, zero, sigma, stage=15)
    close(loss * sigma, 1.0, rtol=1e-4)

def test_ects_loss_is_finite_where_r_rounds_to_t():
    loss = ect.ect_loss(stand_in, x.float(), eps.float(), t.float(), stage=7, q=256)
    assert loss.isfinite().all()

def test_where_r_is_0_ects_target_is_the_data():
    loss = ect.ect_loss(stand_in, x, eps, t, stage=0, b=0)      # n = 5, and q = 2
    close(loss * t, (stand_in(noisy(t, edm), t) - x).flatten(1).norm(dim=1))

def test_in_segments_the_places_where_the_guesses_land_are_compared():
    edges = ect.segment_edges(4).double()
    edge = torch.cat([torch.zeros(1), edges])[torch.searchsorted(edges, t)]
    r = edge.maximum(ect.t_to_r(t, 3))
    def landing(sigma):
        z = noisy(sigma, edm)
        return mcm.ddim(stand_in(z, sigma), z, sigma, edge, edm)
    distance = (landing(t) - landing(r)).flatten(1).norm(dim=1)
    loss = ect.ect_loss(stand_in, x, eps, t, 3, edges=edges)
    close(loss, distance / (t - r))

def test_just_above_an_edge_ects_loss_is_bounded():
    """Though its weight 1 / (t - r) is not."""
    edges = ect.segment_edges(4).double()
    sigma = edges[0] * (1 + 10 ** (-11 * t - 1))
    assert ect.ect_loss(stand_in, x, eps, sigma, 3, edges=edges).max() < 50

# ---- Samplers ------------------------------------------------------------------------------------
# With an exact network a sampler must reach the right images: in one jump, or with its order of
# accuracy. It asks at the right noise levels. An image depends on its seed and number alone.

def gaussian_jump(x, sigma, segment, N, variance=0.3):
    """Its consistency function: a jump ends where the flow ends, x ~ (variance + sigma^2)^1/2."""
    alpha, edge = cosine((segment.double() - N * (N - 1) // 2) / N)
    edge = edge / alpha
    shrink = ((variance + edge**2) / (variance + sigma**2)) ** 0.5
    return mcm.inv_ddim(x * per_sample(shrink, x), x, sigma, edge, edm)

@parametrize("N", [1, 2, np.int64(4)])
def test_multistep_with_the_exact_f_makes_the_data(N):
    """Algorithm 2. And make_f asks at the right noise level: else a jump would end elsewhere."""
    z = randn(1000, 3)
    f = mcm.make_f(gaussian_jump, steps=N, N=N)
    close(sample.multistep(f, z, N), 0.3**0.5 * z, rtol=1e-4)

def test_ddim_keeps_of_gaussian_data_what_its_closed_form_says():
    """At any falling times of any schedule."""
    sigmas, z = torch.tensor([80, 10, 1, 0.1, 0]).double(), randn(100, 4)
    kept = (0.3 + sigmas[:-1] * sigmas[1:]) / (0.3 + sigmas[:-1] ** 2)
    made = sample.multistep(gaussian, z, sigmas.tolist(), edm)
    close(made, kept.prod() * z)

def test_of_a_samplers_steps_only_the_result_is_rounded():
    """Its state is float64. Here x is 0, so each step only shrinks the noise."""
    def black(z, t):
        return 0 * z
    z = randn(100).float()
    assert sample.multistep(black, z, 100).equal(sample.multistep(black, z.double(), 100).float())

def test_the_variance_that_addim_puts_back_is_the_papers():
    """Algorithm 3: 0.1 / (2 + SNR)."""
    close(sample.paper_x_var(torch.tensor(3.0), torch.tensor([1.0, 3.0])), [0.1 / 11, 0.1 / 3])

def test_addim_keeps_a_small_variance_ten_times_better_than_ddim():
    """With the exact posterior variance, of Gaussian data of variance 1e-4."""
    def posterior(alpha, sigma):
        return 1e-4 * sigma**2 / (alpha**2 * 1e-4 + sigma**2)
    z, f = randn(64, 10_000), mcm.make_f(gaussian, variance=1e-4)
    right = 1e-4 + mcm.SIGMA_MIN**2
    error = sample.addim(f, z, 8, posterior).var() - right
    assert abs(error) < 0.1 * abs(sample.multistep(f, z, 8).var() - right)

def test_heun_is_of_second_order():
    z = randn(100)
    truth = 80 * (0.3 / (0.3 + 80**2)) ** 0.5 * z
    errors = [abs(sample.heun(gaussian, z, steps) - truth).max() for steps in (64, 128)]
    assert 3 < errors[0] / errors[1] < 5

def test_renoise_makes_the_authors_images():
    """Three numbers of locuslab/ect's generator, in three steps."""
    latents = torch.tensor([[0.33209962, 0.6448609, 0.01571346]]).double()
    noise = torch.tensor([[[0.85046473, -0.04251268, 0.72315282]],
                          [[-0.12100735, -0.21589041, 0.46453619]]])
    made = sample.renoise(stand_in, latents, [80, 5, 0.821], noise)
    close(made, [[0.12394429, -0.10272411, 0.36355834]])

class Recorder(torch.nn.Module):
    """A network that guesses x / 1000, with label 1 twice that, and notes what it is asked."""
    image_shape = (3, 4, 4)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.001))
        self.asked, self.dtypes = [], set()

    def forward(self, x, sigma, labels, segment=torch.tensor([-1])):
        self.asked.append([sigma[0].item(), segment[0].item()])
        self.dtypes.add(x.dtype)
        return self.weight.to(x) * x * per_sample(1 + labels, x)

def batch_of_two(net, sampler, steps, dtype=torch.float64):
    noise = randn(3, 2, 3, 4, 4).to(dtype)
    return sample.sample_batch(net, sampler, steps, noise, labels=torch.tensor([0, 1]))

each_sampler = parametrize("sampler", ["multistep", "ddim", "renoise", "heun"])

@parametrize("sampler, steps, asked", [
    ("multistep", 2, [[80, 2], [0.989555, 1]]),
    ("ddim", 2, [[80, -1], [0.989555, -1]]),
    ("renoise", 2, [[80, 0], [0.821, 0]]),
    ("renoise", 3, [[80, 0], [1.701787, 0], [0.573579, 0]]),
    ("heun", 2, [[80, -1], [0.002, -1], [0.002, -1]])])
def test_a_sampler_asks_at_these_noise_levels_and_segments(sampler, steps, asked):
    """Those in between are cosine's at 1/2, 2/3 and 1/3. 0.821 is ECT's. -1: no segment."""
    net = Recorder()
    batch_of_two(net, sampler, steps)
    close(net.asked, asked, rtol=1e-5)

@parametrize("dtype", [torch.float64, torch.float32])
@each_sampler
def test_the_network_and_the_result_have_the_noises_dtype(sampler, dtype):
    net = Recorder()
    images = batch_of_two(net, sampler, 2, dtype)
    assert net.dtypes == {images.dtype} == {dtype}

def test_an_unknown_sampler_is_an_error():
    with pytest.raises(ValueError, match="euler"):
        batch_of_two(Recorder(), "euler", 2)

def generated(numbers, sampler="ddim", seed=0, labels=0):
    numbers = torch.tensor(numbers)
    return sample.generate(Recorder(), sampler, 2, numbers, labels + 0 * numbers, seed)

def test_an_image_depends_on_its_seed_and_number_alone():
    """Not on the batch that it is made in: 60 images are two batches."""
    images = generated(range(60))
    assert generated([55, 3]).equal(images[[55, 3]])
    assert generated([3], seed=1).ne(images[3]).any()
    assert len(images.unique(dim=0)) == 60

def test_an_image_that_is_too_bright_is_white_and_not_black():
    """255 is the largest byte. Here x is 80 times the noise, so half of it is too bright."""
    net = Recorder()
    net.weight.data.fill_(1)
    images = sample.generate(net, "ddim", 1, torch.arange(9), torch.zeros(9))
    close(images.eq(255).float().mean(), 0.5, atol=0.1)

@each_sampler
def test_each_image_is_made_with_its_own_label(sampler):
    told = torch.arange(60) == 55
    images = generated(range(60), sampler)
    changed = images.ne(generated(range(60), sampler, labels=told.long()))
    assert changed.flatten(1).any(1).equal(told)

# ---- The network ---------------------------------------------------------------------------------
# It is EDM's to the last key, so that the published weights give the published denoiser. What is
# new in it begins without effect. Both passes of an iteration have the same dropout mask.

def give_weights(net):
    """By the fixtures' rule for Inception, which will do for EDM's network: drawn by their keys."""
    state = net.requires_grad_(False).state_dict()
    for key, value in state.items():
        rng = np.random.default_rng([11, zlib.crc32(key.encode())])
        if re.search(r"(bn|norm\d?)\.weight|running_var", key):
            drawn = rng.uniform(0.5, 1.5, value.shape)
        elif value.ndim > 1:
            drawn = rng.standard_normal(value.shape) * (2 / value[0].numel()) ** 0.5
        else:
            drawn = rng.standard_normal(value.shape) * 0.1
        if "resample_filter" not in key:
            value.copy_(torch.as_tensor(drawn))
    return net

def small_net(**more):
    size = {"resolution": 8, "attention": (), **more}
    return give_weights(train_cifar.UNet(16, (1,), 1, **size))

def test_the_network_is_edms_in_a_few_numbers():
    """Computed when it gave all of the fixtures' numbers, see the next test."""
    images = torch.arange(6144).double().sin().view(2, 3, 32, 32)
    net = give_weights(train_cifar.UNet(32, classes=10))
    x_hat = net(images, torch.tensor([0.3, 5.0]), torch.tensor([3, -1]))
    right = [[0.879199, 0.620031, -0.038088, -0.380589],
             [0.224672, 1.059486, 0.830963, 0.658010]]
    close(x_hat[:, 0, 5, 5:9], right, rtol=0, atol=1e-4)

@needs_fixtures
def test_the_network_is_edms():
    """F, without the preconditioning. The augment layer is unused, but has a key."""
    io = load("edm_cond_ch32_io.npz")
    net = train_cifar.UNet(32, classes=10, augment_dim=9).requires_grad_(False)
    net.load_state_dict(load("edm_cond_ch32_state.npz"))
    c_in = (io["sigma"] ** 2 + 0.25).rsqrt()
    labels = io["class_labels"].argmax(1)
    raw = net.model(io["x"] * per_sample(c_in, io["x"]), io["sigma"].log() / 4, labels)
    close(raw, io["F"], rtol=0, atol=3e-5)

def test_the_norm_adds_1e_6_to_the_variance():
    """EDM's choice. torch's own is 1e-5."""
    ramp = torch.tensor([-1e-3, 1e-3]).expand(1, 16, 2)
    close(train_cifar.group_norm(16)(ramp), ramp / 2e-6**0.5, rtol=1e-4)

def test_a_norm_has_at_most_32_groups_of_at_least_4_channels():
    norms = [train_cifar.group_norm(channels) for channels in (16, 64, 128, 384)]
    assert [norm.num_groups for norm in norms] == [4, 16, 32, 32]

def test_each_block_has_a_dropout_mask_of_its_own():
    layers = [part.layer for part in small_net().modules() if hasattr(part, "layer")]
    assert layers == list(range(len(layers)))

def test_a_copy_with_classes_and_segments_gives_the_same_images():
    """New embeddings begin with zeros, so tuning begins at the trained network."""
    net, x = small_net(), randn(2, 3, 8, 8)
    copied = train_cifar.extended(net, classes=3, segments=3)
    x_hat = copied(x, 1.0, labels=torch.tensor([2, -1]), segment=torch.tensor([0, 2]))
    assert x_hat.equal(net(x, 1.0))

def test_the_segment_matters():
    net, x = small_net(segments=3), randn(1, 3, 8, 8)
    one, other = [net(x, 1.0, segment=torch.tensor([row])) for row in (0, 2)]
    assert one.ne(other).any()

def test_two_passes_share_the_dropout_mask_of_a_seed():
    """Alone or in a batch."""
    net, x, seed = small_net(dropout=0.5), randn(2, 3, 8, 8), torch.tensor([5, 6])
    close(net(x[1:], 1.0, seed=seed[1:]), net(x, 1.0, seed=seed)[1:], atol=1e-5)

def test_dropout_masks_are_fair_and_unlike_each_other():
    """Of 32 samples in 2 layers."""
    ones, seeds = torch.ones(32, 4, 32, 32), torch.arange(32)
    layers = [train_cifar.dropout(ones, 0.2, seeds, layer) for layer in (3, 4)]
    kept = torch.cat(layers).flatten(1)
    close(kept.mean(1), 1.0, atol=0.03)
    assert torch.corrcoef(kept).fill_diagonal_(0).abs().max() < 0.08

@needs_gpu
def test_half_precision_is_near():
    net, x = small_net().cuda(), randn(2, 3, 8, 8).cuda()
    right = net(x, 1.0)
    net.dtype = torch.float16
    assert 0 < (net(x, 1.0) - right).abs().max() < 0.05

# ---- One iteration -------------------------------------------------------------------------------
# What it draws depends on (seed, method, iteration) alone. It mixes no devices, and reads no
# value, so nobody waits for a GPU.

def settings_of(line):
    return train_cifar.read_settings(argparse.ArgumentParser(), line.split())

class Iterations:
    """The iterations of train_cifar.train, small, on any device."""
    def __init__(self, line, device="cpu"):
        line = "--preset shapes --batch 8 --iters 10 --stages 4 " + line
        self.settings = settings_of(line)
        self.method, self.device = self.settings.method, torch.device(device)
        images, labels, names = fid.shapes(64, 16)
        self.data = SimpleNamespace(images=images, labels=labels)
        with self.device:
            self.net = small_net(resolution=16, classes=15, segments=15, dropout=0.1)
        self.teacher = copy.deepcopy(self.net)
        self.net.requires_grad_(True)

    def draw(self, step):
        drawn = train_cifar.draw(self.data, self.settings, self.method, step)
        return {name: value.to(self.device) for name, value in drawn.items()}

    def run(self, step):
        loss = train_cifar.step_loss(
            self.net, self.teacher, self.settings, self.method, **self.draw(step))
        loss.mean().backward()
        return loss

each_method = parametrize("line", [
    "--method diffusion", "--method mct --steps 1 2 4", "--method mcd",
    "--method mcd --guidance 2", "--method ect", "--method ect-segmented --steps 4"])

def test_each_iteration_draws_its_own_noise():
    """From (seed, method, iteration) alone."""
    its = Iterations("--seed 5")
    draws = [its.draw(3), its.draw(3), its.draw(4), Iterations("--seed 6").draw(3),
             Iterations("--seed 5 --method diffusion").draw(3)]
    assert len({drawn["eps"].sum().item() for drawn in draws}) == 4

def test_one_label_in_ten_is_dropped():
    """So a teacher can be guided: it knows images without a label, too."""
    drawn = Iterations("--batch 9000").draw(0)
    close(drawn["labels"].eq(-1).float().mean(), 0.1, atol=0.01)

def test_mcm_draws_each_number_of_steps_and_T_that_grows_until_mid_run():
    its = Iterations("--steps 1 4 --T 8 64 --batch 9000")
    for step, T in [(0, 8), (5, 64), (9, 64)]:
        drawn = its.draw(step)
        close(drawn["t"].unique() * T, torch.arange(T) + 1)
    assert drawn["N"].unique().tolist() == [1, 4]

def test_ect_draws_log_normal_times():
    its = Iterations("--method ect --p-mean -1 --p-std 0.5 --batch 9000")
    close(torch.stack(torch.std_mean(its.draw(0)["t"].log())), [0.5, -1], atol=0.02)

def test_ects_stages_are_equally_long():
    its = Iterations("--method ect")                # 4 stages in 10 iterations
    assert [its.draw(step)["stage"][0].item() for step in (0, 2, 3, 9)] == [0, 0, 1, 3]

def right_loss(its, x, eps, seed, labels, t, stage=None, N=None, s=None, t_step=None):
    """What step_loss should be, for --q 3 --c 7 --huber-eps 0.3."""
    x, told = x / 127.5 - 1, dict(labels=labels, seed=seed)
    if its.method == "diffusion":
        D = mcm.conditioned(its.net, **told)
        return mcm.consistency_loss(D, x, eps, t, 0 * t, 0 * t, edm, huber_eps=1.0)
    if its.method in ("ect", "ect-segmented"):
        N = {"ect": 1, "ect-segmented": 4}[its.method]      # one segment is ECT itself
        D = mcm.conditioned(its.net, N, **told)
        return ect.ect_loss(D, x, eps, t, stage, 3, c=7, edges=ect.segment_edges(N))
    teacher = None
    if its.method == "mcd":
        teacher = mcm.make_f(its.teacher, labels=labels)
        teacher = mcm.guided(teacher, mcm.make_f(its.teacher), its.settings.guidance)
    f = mcm.make_f(its.net, steps=N, **told)
    return mcm.consistency_loss(f, x, eps, t, s, t_step, teacher=teacher, huber_eps=0.3)

@each_method
def test_the_loss_is_the_one_that_the_settings_name(line):
    """With the dropout masks that were drawn, which a teacher has not."""
    its = Iterations(line + " --q 3 --c 7 --huber-eps 0.3")
    its.teacher.model.map_layer0.bias += 1
    close(its.run(3), right_loss(its, **its.draw(3)), rtol=1e-4, atol=1e-5)

@each_method
def test_an_iteration_mixes_no_devices_and_reads_no_value(line):
    """On the meta device a CPU tensor, an .item() or a shape that depends on data raises."""
    Iterations(line, "meta").run(0)

@needs_gpu
@each_method
def test_an_iteration_does_not_wait_for_the_gpu(line):
    its = Iterations(line + " --precision fp16", "cuda")
    its.data.images, its.data.labels = its.data.images.cuda(), its.data.labels.cuda()
    its.run(0)                                      # the first one may load kernels
    try:
        torch.cuda.set_sync_debug_mode("error")
        its.run(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")

# ---- FID -----------------------------------------------------------------------------------------
# A published FID has the Inception graph of 2015, TensorFlow 1's resize, the unbiased covariance
# and n = 50,000. Each must be right to the digit, whatever precision the host has set. Images are
# read as they are: all that is in a folder, nothing else, and what cannot be used is named.

IMAGE = (torch.arange(3072) * 37 % 256).byte().view(1, 3, 32, 32)

def test_the_resize_is_tensorflows_in_a_few_numbers():
    """Those of torch-fidelity, at the lower right corner of an image."""
    image = torch.zeros(1, 1, 32, 32)
    image[0, 0, 30:, 30:] = torch.tensor([[97, 117], [107, 108]])
    found = fid.resize_tf1(image)[0, 0, [287, 287, 292], [287, 293, 292]]
    close(found, [108.738754, 110.558525, 108], atol=2e-3)

def test_inception_is_the_published_one_in_a_few_numbers():
    """Computed when it gave all of the fixtures' numbers. Folding BatchNorm changes nothing."""
    net = give_weights(fid.InceptionFID())
    features = net(IMAGE)
    close(net.fold()(IMAGE), features, rtol=0, atol=5e-4)
    right = [0.062889, 0.108475, 0.145055, 7.567828, 5.975063, 0.026454]
    close(features[0, ::400], right, rtol=0, atol=5e-4)

@needs_fixtures
def test_inception_is_the_published_one():
    data = load("fid_inception.npz")
    features = give_weights(fid.InceptionFID())(data["img64x48"])
    close(features, data["tfid_img64x48_2048"], rtol=0, atol=5e-4)

def test_random_features_are_these_even_in_autocast():
    """All distances in the README depend on them."""
    with torch.autocast("cpu"):
        features = fid.load_extractor("random", IMAGE)(IMAGE)
    close(features[0, [0, 23, 35]], [-0.01568627, -21.32518, -15.98173], rtol=1e-5)

def test_frechet_distance_is_that_of_scipys_matrix_root():
    """The published code's formula."""
    one, other = randn(2, 30, 8) * torch.arange(1, 9)
    (mean1, cov1), (mean2, cov2) = fid.moments(one), fid.moments(other.roll(1, 1))
    root = torch.tensor(scipy.linalg.sqrtm((cov1 @ cov2).numpy()).real)
    right = (mean1 - mean2).square().sum() + (cov1 + cov2 - 2 * root).trace()
    close(fid.frechet_distance(mean1, cov1, mean2, cov2), right)

def test_the_covariance_is_unbiased_and_exact_with_a_large_mean():
    features = randn(300, 5).float() + 1e4
    close(fid.moments(features)[1], np.cov(features.double().numpy().T), rtol=1e-9)

def test_the_floor_is_the_distance_of_n_real_images_from_n_others():
    features = randn(100, 3)
    one, other = features[fid.shuffled(100)[:20]].split(10)
    right = fid.frechet_distance(*fid.moments(one), *fid.moments(other))
    close(fid.floor_of(features, 10), right)

def test_only_what_papers_call_fid_is_called_so():
    asked = [("inception", 50_000), ("inception", 49_999), ("random", 50_000)]
    names = [fid.metric_name(features, n) for features, n in asked]
    assert names == ["FID", "FD(inception)@49999", "FD(random)@50000"]

def picture(name, grey=0, side=16, mode="L"):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (side, side), grey).save(name)

def test_a_folder_is_read_whole_and_nothing_else(capsys):
    """Each folder is a class. Hidden ones are passed over, links followed, but not in circles."""
    names = "a/.b/1.png __MACOSX/2.png a/3.png b/4.gif b/5.jfif ../other/6.PNG"
    for i, name in enumerate(names.split()):
        picture("data/" + name, 50 * i)
    Path("data/link").symlink_to("../other")
    Path("other/circle").symlink_to("../data")
    Path("data/notes.txt").write_text("no image")
    images, labels, classes = fid.read_images("data")
    greys = fid.batch_of(images, torch.arange(4))[:, 0, 0, 0]
    assert greys.tolist() == [100, 150, 200, 250]
    assert labels.tolist() == [0, 1, 1, 2]
    assert "1 files are no images" in capsys.readouterr().out

def test_whatever_pillow_raises_names_the_file(monkeypatch):
    monkeypatch.setattr(Image, "open", Mock(side_effect=struct.error("bad metadata")))
    with pytest.raises(InputError, match="0.png.*bad metadata"):
        fid.decode("0.png")

def test_a_bad_download_is_named_with_its_address_and_not_kept(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "cache")
    source, right = Path("file.pth").absolute(), hashlib.sha256(b"weights").hexdigest()
    source.write_bytes(b"weig")
    with pytest.raises(InputError, match=f"file.pth.*{source.as_uri()}"):
        fid.download(source.as_uri(), right)
    source.write_bytes(b"weights")
    assert fid.download(source.as_uri(), right).read_bytes() == b"weights"

# ---- EDM's files ---------------------------------------------------------------------------------
# They are pickles: programs. Genuine ones load to the bit, only as what they say they are. Of any
# other, nothing may run, and one line says which file it was.

class Asks(tuple):
    """(function, ...): when it is opened, the pickle of this calls function(...)."""
    def __reduce__(self):
        return self[0], self[1:]

def edm_pickle(offset=0, name="EDMPrecond", sigma_data=0.5, **changes):
    """A file like EDM's, with one convolution, and with source code that must not run."""
    def module(name, **state):
        state = {"_parameters": {}, "_buffers": {}, "_modules": {}, **state}
        saved = dict(module_src="open('PWNED', 'w')", class_name=name, state=state)
        return Asks([print, saved])
    storage = torch.arange(576.)._typed_storage()
    layout = [offset, (8, 8, 3, 3), (72, 9, 3, 1), False, {}]
    weight = Asks([torch._utils._rebuild_tensor_v2, storage, *layout])
    conv = module("Conv2d", _parameters=collections.OrderedDict(weight=weight, bias=None))
    settings = dict(model_channels=8, channel_mult=[1], dropout=0.1, label_dim=0)
    settings.update(img_resolution=8, **changes)
    unet = module("SongUNet", _modules=dict(conv=conv), _init_kwargs=settings)
    model = dict(model=unet)
    ema = module(name, _modules=model, sigma_data=sigma_data, gain=np.float64(1))
    made = pickle.dumps(dict(loss_fn=Asks([getattr, ema, "forward"]), ema=ema), 3)
    return made.replace(b"cbuiltins\nprint\n",
                        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n")

def load_edm(content):
    Path("net.pkl").write_bytes(content)
    return train_cifar.load_edm("net.pkl")

def test_edms_pickle_loads_without_running_its_source():
    weights, arguments = load_edm(edm_pickle())
    assert weights["model.conv.weight"].flatten().equal(torch.arange(576.))
    assert os.listdir() == ["net.pkl"]

@needs_fixtures
@parametrize("name", ["edm_uncond_small", "ect_snapshot_tiny"])
def test_published_pickles_load_to_the_bit(name):
    right = load(name.replace("small", "ch32") + "_state.npz")
    weights, arguments = train_cifar.load_edm(FIXTURES / f"{name}.pkl")
    assert all(weights[key].equal(right[key]) for key in right)

RUN = b"cposix\nsystem\n\x8c\x0btouch PWNED\x85"
HOSTILE = {
    "calls system": RUN + b"R.", "makes an object of it": RUN + b"\x81.",
    "by INST": b"(iposix\nsystem\n.",
    "by name on the stack": b"\x8c\5posix\x8c\6system\x93.",
    "getattr of getattr": 2 * b"cbuiltins\ngetattr\n" + b"\x8c\4eval\x86R.",
    "in a storage": b"ctorch.storage\n_load_from_bytes\nC\x1e" + RUN + b"R.\x85R.",
    "nothing": b"", "no dict": b"NQ.", "a deep list": b"]" * 10**5 + b"a.",
    "before the storage": edm_pickle(-2),
    "channels that are no list": edm_pickle(channel_mult=3),
    "another preconditioning": edm_pickle(name="VPPrecond"),
    "another sigma_data": edm_pickle(sigma_data=1.0)}

@parametrize("attempt", HOSTILE)
def test_a_hostile_pickle_is_refused_and_runs_nothing(attempt):
    with pytest.raises(InputError, match="^net.pkl"):
        load_edm(HOSTILE[attempt])
    assert os.listdir() == ["net.pkl"]

# ---- The programs --------------------------------------------------------------------------------
# One command does the whole job. A run that was stopped, killed or split over processes ends as one
# that was not. What a user can get wrong is one line, before any work.

TINY = ("--preset shapes --data few.npz --pretrain-iters 6 --iters 6 --batch 4 "
        "--fd-samples 16 --seed 2147483648 ")
NEW = "--init none --width 8 "

@pytest.fixture
def folder(monkeypatch):
    """Where a program runs: with 64 images of 16 pixels, and without internet."""
    no_internet = Mock(side_effect=OSError, url="u", filename="cifar")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_internet)
    monkeypatch.setattr(fid, "CIFAR10", no_internet)
    monkeypatch.setenv("TORCH_HOME", "..")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")      # for the processes of torchrun
    images = fid.shapes(64, 16)[0].permute(0, 2, 3, 1).numpy()
    np.savez("few.npz", images, 16 * ["cat", "dog", "dog", "dog"])

@pytest.fixture
def generate(monkeypatch):
    """It stands for sample.generate, makes black images and remembers what it was asked."""
    generate = Mock(return_value=torch.zeros(16, 3, 16, 16).byte())
    monkeypatch.setattr(sample, "generate", generate)
    return generate

def train(line):
    train_cifar.main((TINY + line).split())

def state_of(out):
    """The averaged weights that a run leaves, in a vector."""
    weights = train_cifar.load_checkpoint(f"{out}/tuned.pt")["ema"]
    return torch.cat([value.flatten() for value in weights.values()])

def table_of(out, *columns):
    rows = json.loads(Path(out, "result.json").read_text())
    return [tuple(row[column] for column in columns) for row in rows]

@parametrize("method", ["mcd --classes", "ect-segmented"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(method, folder, monkeypatch):
    """To the bit, and with the same table. The last time only the report is left."""
    ctrl_c = functools.partial(signal.raise_signal, signal.SIGINT)
    kill = Mock(side_effect=MemoryError)                # after this, nothing can be saved
    blows = {("diffusion", 2): ctrl_c, ("diffusion", 4): kill, (method.split()[0], 3): ctrl_c}
    draw = train_cifar.draw
    def struck(data, settings, method, step):
        if (method, step) in blows:
            blows.pop((method, step))()                 # each only once
        return draw(data, settings, method, step)

    line = NEW + f"--method {method} --dropout 0.2 --out "
    train(line + "straight")
    monkeypatch.setattr(train_cifar, "draw", struck)
    for error in (SystemExit, MemoryError, SystemExit):
        with pytest.raises(error):
            train(line + "torn")
    for _ in range(2):
        train(line + "torn")
        assert state_of("torn").equal(state_of("straight"))
        assert table_of("torn", "distance") == table_of("straight", "distance")

def test_the_table_has_the_diffusion_model_beside_the_tuned_one(folder):
    train(NEW + "--method ect --steps 2 1 --out run")
    assert table_of("run", "method", "sampler", "steps", "nfe") == [
        ("diffusion", "ddim", 1, 1), ("diffusion", "ddim", 2, 2),
        ("ect", "renoise", 1, 1), ("ect", "renoise", 2, 2),
        ("diffusion", "heun", 18, 35)]

def test_without_iterations_a_diffusion_model_is_only_measured(folder):
    """As it was beside the tuned one: by DDIM in the given steps, and by Heun."""
    train(NEW + "--steps 2 1 --out first")
    line = "--init first/diffusion.pt --method diffusion --pretrain-iters 0 --steps 2 1"
    train(line + " --out run")
    ddim1, ddim2, tuned1, tuned2, heun = table_of("first", "sampler", "steps", "distance")
    assert table_of("run", "sampler", "steps", "distance") == [ddim1, ddim2, heun]

def test_the_report_asks_for_the_labels_of_the_data_in_its_random_order(folder, generate):
    train(NEW + "--classes --iters 1 --pretrain-iters 1 --fd-samples 128")
    labels = torch.tensor(16 * [0, 1, 1, 1])[fid.shuffled(64)]
    assert generate.call_args.args[4].equal(labels.repeat(2))

def torchrun(program, line):
    """Two processes on the CPU."""
    arguments = ["--standalone", "--nproc-per-node", "2", str(program)]
    torch.distributed.run.main(arguments + (TINY + NEW + line).split())

def test_two_processes_give_what_one_gives(folder):
    """And 7 images a batch do not divide."""
    line = "--method mcd --classes --batch 7 --dropout 0.2 --out "
    train(NEW + line + "one")
    torchrun(HERE / "train_cifar.py", line + "two")
    close(state_of("two"), state_of("one"), rtol=1e-3, atol=1e-6)
    close(table_of("two", "distance"), table_of("one", "distance"), rtol=1e-2)

def test_a_ctrl_c_to_one_process_stops_both_and_they_go_on(folder):
    """To the very weights of a run that was not stopped. Iteration 3 comes only once."""
    Path("struck.py").write_text(f"""
import signal, sys
sys.path.insert(0, {str(HERE)!r})
import train_cifar
draw = train_cifar.draw
def struck(data, settings, method, step):
    if (train_cifar.RANK, method, step) == (1, "mct", 3):
        signal.raise_signal(signal.SIGINT)
    return draw(data, settings, method, step)
train_cifar.draw = struck
train_cifar.main()
""")
    with pytest.raises(ChildFailedError):
        torchrun("struck.py", "--out torn")
    assert train_cifar.load_checkpoint("torn/tuned.pt")["step"] == 4
    torchrun("struck.py", "--out torn")
    torchrun(HERE / "train_cifar.py", "--out straight")
    assert state_of("torn").equal(state_of("straight"))

def test_the_average_is_a_mean_until_its_decay_is_ema(folder, monkeypatch):
    averages = Mock(return_value=Mock())
    monkeypatch.setattr(torch.optim.swa_utils, "get_ema_multi_avg_fn", averages)
    train(NEW + "--ema 0.7")
    decays = [call.args[0] for call in averages.call_args_list]
    close(decays[:5], [0, 1 / 2, 2 / 3, 0.7, 0.7])

def test_the_learning_rate_falls_to_0(folder):
    train(NEW + "--lr 0.6 --out run")
    state = train_cifar.load_checkpoint("run/tuned.pt")
    close(state["optimizer"]["param_groups"][0]["lr"], 0.1)

def test_ctrl_c_does_what_it_did_before():
    before = signal.getsignal(signal.SIGINT)
    with train_cifar.ctrl_c():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before

def test_a_file_is_replaced_only_by_a_whole_one(folder):
    path = Path("model.pt")
    with train_cifar.atomic(path) as part:
        part.write_text("first")
    with pytest.raises(MemoryError), train_cifar.atomic(path) as part:
        part.write_text("half")
        raise MemoryError
    assert path.read_text() == "first"

def test_a_file_that_is_whole_leaves_no_part_of_it(folder):
    with train_cifar.atomic(Path("model.pt")) as part:
        part.write_text("first")
    assert not part.exists()

def test_a_mistake_in_the_code_keeps_its_traceback(folder, monkeypatch):
    """Only what the user can mend is said in one line."""
    monkeypatch.setattr(train_cifar.UNet, "__init__", Mock(side_effect=NameError))
    with pytest.raises(NameError):
        train(NEW)

def test_main_runs_in_a_thread(folder):
    """Where Ctrl-C cannot be caught."""
    with ThreadPoolExecutor() as pool:
        pool.submit(train, NEW + "--iters 0 --pretrain-iters 1").result()

def refusal(program, line, capsys):
    """The one line that a program says before it ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sys.modules[program].main(line.split())
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1
    return error

@parametrize("setting", ["--steps 4", "--classes", "--data labels.npz"])
def test_a_run_does_not_go_on_with_other_settings_or_data(setting, folder, capsys):
    train(NEW + "--out run")
    np.savez("labels.npz", np.load("few.npz")["arr_0"], 32 * ["cat", "dog"])
    error = refusal("train_cifar", TINY + NEW + "--out run " + setting, capsys)
    assert setting.split()[0] + ":" in error

def test_a_model_is_known_by_its_weights_not_its_path(folder, capsys):
    train(NEW + "--out run")
    shutil.copy("run/diffusion.pt", "moved.pt")
    train("--init run/diffusion.pt --out tuned")
    train("--init moved.pt --out tuned")
    state = train_cifar.load_checkpoint("moved.pt")
    state["ema"]["model.map_layer0.bias"] += 1
    torch.save(state, "moved.pt")
    assert "--init" in refusal("train_cifar", TINY + "--init moved.pt --out tuned", capsys)

def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(folder, monkeypatch):
    monkeypatch.setattr(mcm, "pseudo_huber", lambda square, c: math.nan * square)
    with pytest.raises(SystemExit, match="iteration 6: .*not finite"):
        train(NEW + "--out run")
    assert not Path("run/diffusion.pt").exists()

REFUSED = [
    ("train_cifar --steps 0", "--steps"), ("train_cifar --lr nan", "--lr"),
    ("train_cifar --method dog", "--method"), ("train_cifar --what", "--what"),
    ("train_cifar --method ect-segmented --steps 1 2", "ect-segmented"),
    ("train_cifar --guidance 1", "--guidance"),
    ("train_cifar --init shapes --width 8", "--width"),
    ("train_cifar --init shapes", "--init"), ("train_cifar --init nowhere", "nowhere"),
    ("train_cifar --init text.pt", "text.pt"), ("train_cifar --init conv.pkl", "conv.pkl"),
    ("train_cifar --out text.pt/x", "text.pt/x"), ("train_cifar --data odd.npz", "odd"),
    ("train_cifar --data large.npz --classes", "--classes"),
    ("train_cifar --data nowhere", "nowhere"), ("train_cifar --data float.npz", "float"),
    ("train_cifar --data cifar10", "cifar"), ("train_cifar --data mixed", "larger.png"),
    ("train_cifar --data deep", "deep.png"), ("train_cifar --features inception", "inception"),
    ("sample text.pt", "text.pt"), ("sample --n 0", "--n"), ("sample --steps 3", "--steps 3"),
    ("sample --out no/x.png", "no/x.png"), ("sample --prompt dog", "--prompt dog"),
    ("fid few.npz --n 1", "--n 1"), ("fid few.npz --features no", "no"),
    ("fid large.npz", "sizes"), ("fid short.npz", "short.npz: needs")]
BASE = {"train_cifar": TINY, "sample": "", "fid": "--features random few.npz "}

@pytest.fixture
def useless(folder):
    """Files that no program can use."""
    images = np.load("few.npz")["arr_0"]
    np.savez("large.npz", np.zeros((8, 32, 32, 3), np.uint8))
    np.savez("odd.npz", images[:, 1:, 1:])
    np.savez("float.npz", images / 255)
    np.savez("short.npz", images, ["cat", "dog"])       # not a label for each image
    picture("mixed/0.png")
    picture("mixed/larger.png", side=32)
    picture("deep/deep.png", mode="I;16")
    Path("conv.pkl").write_bytes(edm_pickle())          # it lacks all other layers
    Path("text.pt").write_text("nothing of the kind")

@parametrize("command, named", REFUSED)
def test_a_mistake_is_refused_in_one_line_before_any_work(command, named, useless, capsys):
    program, _, line = command.partition(" ")
    before = sorted(Path().rglob("*"))
    assert named in refusal(program, BASE[program] + line, capsys)
    assert sorted(Path().rglob("*")) == before          # nothing was written

def test_without_a_gpu_the_preset_is_shapes(capsys):
    assert settings_of("").preset == "shapes"
    assert "no GPU" in capsys.readouterr().out

def test_fid_measures_n_images(folder, capsys):
    fid.main("few.npz few.npz --features random --n 50".split())
    found = re.match(r"FD\(random\)@50 (\d+\.\d+), floor", capsys.readouterr().out)
    assert float(found[1]) > 0                          # all 64 would have distance 0

def test_a_result_reaches_a_terminal_that_lacks_a_letter(folder, capsys):
    shutil.copy("few.npz", "f\u00e9w.npz")
    fid.main("few.npz f\u00e9w.npz --features random".split())
    assert capsys.readouterr().out.isascii()

def test_a_torchscript_file_gives_features():
    torch.jit.trace(torch.nn.Flatten(), IMAGE).save("net.ts")
    extractor = fid.load_extractor("net.ts", IMAGE)
    assert extractor(IMAGE).equal(IMAGE.flatten(1))

@parametrize("line, labels", [("", [0, 1, 0]), ("--prompt dog", [1, 1, 1])])
def test_sample_makes_all_classes_in_turn_or_the_prompt(line, labels, folder, generate):
    train(NEW + "--classes --out run")
    sample.main(f"run/tuned.pt --n 3 --out x.npz {line}".split())
    assert generate.call_args.args[4].tolist() == labels

def judge(images):
    """Which class of shapes each picture shows: the colour, and the form that fills its box so."""
    saturation = images.amax(1).float() - images.amin(1)
    inside = saturation > saturation.flatten(1).quantile(0.95, 1)[:, None, None] / 2
    area = inside.sum((1, 2))
    colour = (images * inside[:, None]).sum((2, 3)) / area[:, None]
    hue = torch.cdist(colour, fid.RGB.float()).argmin(1)
    box = inside.any(1).sum(1) * inside.any(2).sum(1)
    fills = torch.tensor([math.pi / 4, 1, 1 / 2])       # disc, square, triangle
    return 3 * hue + ((area / box)[:, None] - fills).abs().argmin(1)

def test_the_labels_of_the_shapes_are_what_a_judge_sees():
    images, labels, names = fid.shapes(300)
    assert judge(images).eq(labels).float().mean() > 0.98

@parametrize("steps, least", [(2, 0.8), (8, 0.9)])
def test_the_model_that_comes_with_the_code_draws_what_it_is_told(steps, least):
    """In 2 and in 8 steps, colour and form are right in 91% and 97% of 500. (By chance: 7%.)"""
    net = train_cifar.load_network(train_cifar.load_checkpoint(HERE / "assets/dial.pt"))
    told = torch.arange(150) % 15
    seen = judge(sample.generate(net, "multistep", steps, torch.arange(150), told))
    right = (seen == told).float().mean()
    print(f"{steps} steps: colour and form right in {right:.0%} of 150")
    assert right > least

# ---- The README ----------------------------------------------------------------------------------
# What it shows runs. Loops of hundreds are cut short, and of the commands it is read what they ask.

README = (HERE / "README.md").read_text()
SNIPPETS = re.findall("```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"(?:^|`)(?:python|torchrun .*?) (\w+)\.py ?([^`#\n]*)", README, re.MULTILINE)

@parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number):
    names = {}
    exec(re.sub(r"range\(\d{3,}\)", "range(20)", SNIPPETS[number]), names)
    assert torch.as_tensor(names.get("loss", 0)).isfinite().all()

@parametrize("program, line", COMMANDS)
def test_a_command_is_understood(program, line, generate, monkeypatch):
    shapes = fid.shapes(15)
    state = dict(class_names=shapes[2], steps=[1, 2, 4, 8], method="mct")
    monkeypatch.setattr(train_cifar, "load_checkpoint", Mock(return_value=state))
    monkeypatch.setattr(train_cifar, "load_network", Mock())
    monkeypatch.setattr(fid, "read_images", Mock(return_value=shapes))
    monkeypatch.setattr(fid, "load_extractor", Mock(return_value=fid.random_features))
    if program == "train_cifar":
        settings_of(line)
    else:
        sys.modules[program].main(shlex.split(line))
