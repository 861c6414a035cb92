"""Tests: limits and closed forms, the peers' own numbers, and the programs as a user runs them.

No network and no GPU is needed. What needs ../shared or a GPU is skipped where there is none.
"""
import argparse, collections, copy, hashlib, itertools, json, math, os, pickle, re, shlex, shutil
import signal, sys, types, zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy import allclose
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ect, fid, mcm, sample, train_cifar
from fid import InputError
from mcm import alpha_sigma, mean_per_sample, per_sample

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="../shared/fixtures is absent")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
torch.set_num_threads(1)                # for small tensors threads mostly wait for each other
train_cifar.DEVICE = torch.device("cpu")            # the tests that want a GPU say so

def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()

# All times t > s >= t_step (here E, for edge) that are multiples of 1/32, with 0 and 1.
GRID = torch.combinations(torch.arange(34), 3) - torch.tensor([0, 1, 1])
E, S, T = (GRID.double() / 32).T.contiguous()
X, EPS = randn(2, len(T), 2, 3)         # data and noise
V = 0.3                                 # the variance of Gaussian data

def D(x, sigma, w=0.8):
    """The fixtures' stand-in for a network; in these tests also any f(z, t)."""
    scale = per_sample((sigma**2 + 0.25).rsqrt(), x)
    return scale**2 / 4 * x + per_sample(sigma, x) / 2 * scale * torch.tanh(w * scale * x)

def gaussian(x, sigma, V=V):
    """The denoiser of Gaussian data of variance V."""
    return x * per_sample(V / (V + sigma**2), x)

def exact(x, sigma, segment, N):
    """Its consistency function: a jump ends where the flow x ~ (V + sigma^2)^1/2 ends it."""
    step = segment.double() - N * (N - 1) // 2
    alpha, edge = mcm.cosine(step / N)
    edge = edge / alpha
    x_edge = x * per_sample((V + edge**2) / (V + sigma**2), x) ** 0.5
    return mcm.inv_ddim(x_edge, x, sigma, edge, mcm.edm)

def load(name):
    arrays = np.load(FIXTURES / name).items()
    return {key: a if a.dtype.kind == "U" else torch.tensor(a) for key, a in arrays}

def small_net(**more):
    """A network away from the zeros that it starts with, always the same."""
    torch.manual_seed(0)
    net = train_cifar.UNet(16, (1,), 1, **{"resolution": 8, "attention": (), **more})
    torch._foreach_add_([p.data for p in net.parameters()], 0.05)
    return net

# ---- The method ----------------------------------------------------------------------------------

def test_schedules_and_segments():
    alpha, sigma = mcm.cosine(torch.linspace(0, 1, 10_001))
    ratio = sigma / alpha
    assert allclose(alpha**2 + sigma**2, 1) and alpha.gt(0).all() and ratio.diff().gt(0).all()
    assert allclose(ratio[[0, -1]], [0.002, 80], rtol=1e-4)
    assert mcm.edm(T)[0].eq(1).all() and mcm.edm(T)[1].equal(T)
    for N, inside in itertools.product(range(1, 65), (1e-3, 0.5, 1.0)):
        rows = torch.arange(N) + N * (N - 1) // 2
        edges = ect.segment_edges(N)
        alpha, sigma = mcm.cosine((torch.arange(N).double() + inside) / N)
        sigma = (sigma / alpha).float()
        # An edge (inside = 1) belongs to the segment below it, also if it was rounded up.
        assert mcm.segment(sigma, N).equal(rows)
        assert mcm.segment(sigma * 1.000001, torch.full((N,), N)).equal(rows)
        assert mcm.segment(torch.tensor([0.0, 1e9]), N).equal(rows[[0, -1]])
        for up in (1, 1 + 5e-7):
            assert ect.lower_edge(sigma * up, edges).tolist() == [0, *edges.tolist()]

@pytest.mark.parametrize("N, T, n", [(1, 24, 24), (2, 25, 12), (3, 24, 8), (8, 22, 3), (8, 3, 1)])
def test_times(N, T, n):
    """A function of u: n teacher steps in each segment, and s on its edge exactly."""
    u = torch.rand(2, 4096, generator=torch.Generator().manual_seed(0))
    times = mcm.draw_times(4096, N, T, torch.Generator().manual_seed(0))
    assert torch.stack(times).equal(torch.stack(mcm.draw_times(4096, N, T, u=u)))
    u[:, 0] = 0
    t, s, t_step = mcm.draw_times(4096, torch.full((4096,), N), T, u=u)
    step, k = (u[0] * N).floor(), (u[1] * n).floor()
    assert allclose(t_step * N, step) and s.eq(t_step).equal(k == 0)
    assert allclose((t - s) * n * N, 1, atol=1e-4) and allclose((s - t_step) * n * N, k, atol=1e-4)
    T = [mcm.teacher_steps(i) for i in (-1, 0, 5e4, 2e5)]
    assert allclose(T, [64, 64, (64 * 1280) ** 0.5, 1280])

@pytest.mark.parametrize("schedule", [mcm.cosine, mcm.edm])
def test_limits(schedule):
    """x_var = 0 is DDIM; T = N is diffusion; N = 1 is Song et al.'s consistency loss."""
    alpha, sigma = alpha_sigma(schedule, T, X)
    alpha_s, sigma_s = alpha_sigma(schedule, S, X)
    alpha_e, sigma_e = alpha_sigma(schedule, E, X)
    z_t, z_s = alpha * X + sigma * EPS, alpha_s * X + sigma_s * EPS
    assert allclose(mcm.ddim(X, z_t, T, S, schedule), z_s)                          # eq. (4)
    assert allclose(mcm.inv_ddim(z_s, z_t, T, S, schedule), X, rtol=0, atol=1e-9)   # eq. (5)

    # aDDIM is DDIM if no variance is missing; else eq. (14). It is finite where eps_hat = 0.
    assert allclose(mcm.addim(X, z_t, T, S, 0.0, schedule), z_s)
    noise = mcm.addim(X, z_t, T, S, T, schedule) - alpha_s * X
    missing = (alpha_s - alpha * sigma_s / sigma).flatten() ** 2 * T
    assert allclose(mean_per_sample(noise**2), mean_per_sample((sigma_s * EPS) ** 2) + missing)
    assert mcm.addim(z_t / alpha, z_t, T, S, 1.0, schedule).isfinite().all()

    # When the data leads, the target is a mean of the reference's guess and the data. Where
    # s = t_step, it is the data. Where t_step = 0 and alpha = 1, it is the reference's guess.
    foot = sigma_e / alpha_e
    w = (1 - foot * alpha_s / sigma_s) / (1 - foot * alpha / sigma)
    target = torch.where(per_sample(S > E, X), w * D(z_s, S) + (1 - w) * X, X)
    error = (D(z_t, T) - target) * (alpha**2 + sigma**2) ** 0.5 / sigma     # the root of SNR + 1
    loss = mcm.consistency_loss(D, X, EPS, T, S, E, schedule, huber_eps=0.01)
    assert allclose(loss, (mean_per_sample(error**2) + 1e-4) ** 0.5 - 0.01)

def test_a_batch_of_two_is_two_batches_of_one():
    def run(x, z, t, s, e, N):
        steps = [mcm.ddim(x, z, t, s), mcm.inv_ddim(x, z, t, s), mcm.addim(x, z, t, s, t)]
        losses = [mcm.consistency_loss(D, x, z, t, s, e, teacher=gaussian), mcm.segment(t, N),
                  mcm.consistency_loss(D, x, z, t, s, e), ect.ect_loss(D, x, z, t, 1, c=0.06),
                  ect.ect_loss(D, x, z, t, 1, edges=E[-1:] / 2)]
        return torch.stack(losses + [mean_per_sample(step) for step in steps])
    two = [value[::4000] for value in (X, EPS, T, S, E)] + [torch.tensor([2, 4])]
    alone = [run(*[value[i:i + 1] for value in two]) for i in (0, 1)]
    assert allclose(run(*two), torch.cat(alone, 1), rtol=1e-12, atol=0)

def test_teachers_references_and_gradients():
    """Only f(z_t, t) has a gradient. The teacher leads, and f_ref guesses at s (TRACT)."""
    seen = []
    def other(z, t):
        seen.append((z, t, torch.is_grad_enabled()))
        return D(z, t)
    def loss(w, teacher=other, **more):
        f = mcm.conditioned(D, w=w)
        return mcm.consistency_loss(f, X, EPS, T, S, E, teacher=teacher, **more)

    w = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    mcd = loss(w)
    rise = loss(0.8 + 1e-6, f_ref=other) - loss(0.8 - 1e-6, f_ref=other)    # both held fixed
    assert allclose(torch.autograd.grad(mcd.sum(), w)[0], rise.sum() / 2e-6, rtol=1e-6)
    assert mcd.equal(loss(w, f_ref=other)) and not mcd.allclose(loss(w, f_ref=gaussian))
    (z_t, t, grad_t), (z_s, s, grad_s) = seen[-3:-1]
    assert t.equal(T) and s.equal(torch.where(S > E, S, T))
    assert not grad_t and not grad_s            # so that no activations are kept

    # The teacher's step is an aDDIM step with 3/4 of the guess's squared error. A guided teacher
    # leads by one guess, and the variance is that of the other.
    x_hat = D(z_t, T)
    x_var = 0.75 * mean_per_sample((x_hat - X) ** 2)
    assert allclose(z_s, mcm.addim(x_hat, z_t, T, S, x_var))
    x_guided, x_cond = mcm.guided(D, gaussian, 2.0)(z_t, T)
    assert allclose(x_guided, 3 * x_hat - 2 * gaussian(z_t, T)) and x_cond.equal(x_hat)
    assert loss(w, lambda z, t: (D(z, t), X)).equal(loss(w, x_var_frac=0.0))
    zero = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad(mcm.pseudo_huber(zero**2, 0.0), zero)[0] == 0

@pytest.mark.parametrize("N", [1, 2, 4])
def test_gaussian_data(N):
    """One DDIM step of 1/T errs by O(1/T^2), so the exact f has that loss far from the edge.

    The jump back divides by the distance to the edge: next to it, the loss is O(1/T).
    """
    f = mcm.make_f(exact, steps=N, N=N)
    far, near = [], []
    for n in (64, 256):
        k, (x, eps) = torch.arange(n * N).double(), randn(2, n * N, 64)
        t, s, t_step = (k + 1) / (n * N), k / (n * N), (k / n).floor() / N
        loss = mcm.consistency_loss(f, V**0.5 * x, eps, t, s, t_step, x_var_frac=0.0,
                                    teacher=mcm.make_f(gaussian), huber_eps=0.0)
        far.append(loss.view(N, n)[:, n // 2:].mean())
        near.append(loss[0])
    assert 14 < far[0] / far[1] < 18 and 3 < near[0] / near[1] < 5

    # It samples N(0, V), and with ECT's fresh noise it keeps the variance.
    z = randn(10_000, 3)
    assert allclose(sample.multistep(f, z, N), V**0.5 * z, rtol=1e-4)
    fresh = sample.renoise(mcm.conditioned(exact, 1, N=1), z, [80, 1])
    assert abs(fresh.var() - V) < 0.01

def test_addim_and_heun():
    """With the exact posterior variance, one aDDIM step's error is -c cot(a_t) cot(a_s) times
    DDIM's to first order (c: the data's variance, a: cosine's angles), so it pays for a small c."""
    c, z = 1e-4, randn(64, 10_000)
    f = mcm.make_f(gaussian, V=c)
    alpha, sigma = mcm.cosine(0.0)
    def posterior(a, s):
        return c * s**2 / (a**2 * c + s**2)
    errors = [abs(z_0.var() - alpha**2 * c - sigma**2)
              for z_0 in (sample.addim(f, z, 8, posterior), sample.multistep(f, z, 8))]
    assert errors[0] < 0.1 * errors[1]
    assert allclose(sample.paper_x_var(2.0, 1.0), 0.1 / 6)
    truth = 80 * (V / (V + 80**2)) ** 0.5 * z
    errors = [abs(sample.heun(gaussian, z, n) - truth).max() for n in (32, 64, 128)]
    assert 3 < errors[0] / errors[1] < 5 and 3 < errors[1] / errors[2] < 5      # second order

class Recorder(nn.Module):
    """A network that guesses x / 2 and keeps what it is asked."""
    def __init__(self):
        super().__init__()
        self.guess = nn.Parameter(torch.tensor(0.5))
        self.image_shape, self.sigmas, self.segments = (3, 4, 4), [], []

    def forward(self, x, sigma, labels=None, segment=None):
        self.sigmas.append(sigma[0].item())
        if segment is not None:
            self.segments.append(segment[0].item())
        return self.guess.to(x) * x

@pytest.mark.parametrize("sampler, steps, sigmas, segments", [
    ("heun", 3, [80, 2.515, 2.515, 0.002, 0.002], []), ("ddim", 2, [80, 1], []),
    ("renoise", 1, [80], [0]), ("renoise", 2, [80, 0.821], [0, 0]),
    ("renoise", 3, [80, 3**0.5, 3**-0.5], [0, 0, 0]), ("multistep", 2, [80, 1], [2, 1])])
def test_what_samplers_ask_and_one_noise_for_each_image(sampler, steps, sigmas, segments,
                                                        monkeypatch):
    """An image depends on (seed, number) alone, not on the batch that it is made in."""
    batches, sample_batch = [], sample.sample_batch
    def recorded(*given):
        batches.append(sample_batch(*given))
        return batches[-1]
    monkeypatch.setattr(sample, "sample_batch", recorded)
    net = Recorder()
    images = sample.generate(net, sampler, steps, 8)
    assert allclose(net.sigmas, sigmas, rtol=0.03) and net.segments == segments
    assert images.sub(batches[0].clamp(-1, 1) * 127.5 + 127.5).abs().max() <= 0.5
    assert images.shape == (8, 3, 4, 4)
    assert torch.corrcoef(batches[0].flatten(1)).fill_diagonal_(0).abs().max() < 0.7
    sample.generate(net, sampler, steps, 127)               # in two batches
    assert batches[1][:8].equal(batches[0]) and not batches[2].allclose(batches[1][:2])
    sample.generate(net, sampler, steps, 8, seed=1)
    assert not batches[3].allclose(batches[0])

def test_labels_reach_every_sampler_in_order():
    net, noise = small_net(classes=3, segments=3), randn(2, 1, 3, 8, 8).float()
    for sampler in ("multistep", "renoise", "ddim", "heun"):
        cat, dog = (sample.sample_batch(net, sampler, 2, noise, torch.eye(3)[[i]]) for i in (0, 1))
        assert not cat.allclose(dog)
    images = [sample.generate(net, "ddim", 1, 127, labels=labels)       # in two batches
              for labels in (torch.zeros(127).long(), (torch.arange(127) > 100).long())]
    assert images[0].ne(images[1]).flatten(1).any(1).equal(torch.arange(127) > 100)

def test_times_stay_exact_for_noise_in_bfloat16():
    net = Recorder()
    z = sample.multistep(mcm.make_f(net, steps=8), torch.zeros(2, 3).bfloat16(), 8)
    alpha, sigma = alpha_sigma(mcm.cosine, 1.0, z)
    assert allclose(sigma / alpha, 80, rtol=1e-4)
    assert allclose(net.sigmas[0], 80, rtol=1e-4) and z.dtype == torch.bfloat16
    assert net.segments == list(range(35, 27, -1))

@needs_fixtures
def test_ect_mapping_and_generator():
    data = load("ect_t_to_r.npz")
    t = data["t"]
    for q, (k, kind), i in itertools.product((2, 4, 256), ((8, "sigmoid"), (0, "const")), range(9)):
        r, r32 = ect.t_to_r(t, i, q, k), ect.t_to_r(t.float(), i, q, k)
        assert allclose(r, data[f"r64_q{q}_{kind}"][i], rtol=1e-12, atol=1e-12)
        assert allclose(r32, data[f"r32_q{q}_{kind}"][i], rtol=3e-7, atol=1e-6)
    data = load("ect_generator_standin.npz")
    for n in (1, 2, 3):
        sigmas = [80.0, *data[f"mid_t_{n}step"]]
        x = sample.renoise(mcm.conditioned(D, w=data["w"]), data["latents"], sigmas, data["noise"])
        assert allclose(x, data[f"out_{n}step_f64"], rtol=0, atol=1e-10)

@needs_fixtures
def test_ect_loss():
    """The authors' losses and slopes where theirs are finite. Ours are finite everywhere."""
    data = load("ect_loss_standin.npz")
    cases = re.findall(r"losshp_(q(\d+)_(\w+)_s(\d)_c(\S+))", " ".join(data))
    assert len(cases) > 20
    dtypes = torch.float64, torch.float32
    for (case, q, kind, stage, c), dtype in itertools.product(cases, dtypes):
        q, k, stage = int(q), 8 * (kind == "sigmoid"), int(stage)
        w, x, eps, t = [data[key].to(dtype) for key in ("w", "x", "eps", "t_f64")]
        denoise = mcm.conditioned(D, w=w.requires_grad_())
        loss = ect.ect_loss(denoise, x, eps, t, stage, q, k, c=float(c))
        slope = torch.autograd.grad(loss.mean(), w)[0]
        assert loss.isfinite().all() and slope.isfinite()
        if dtype == torch.float64 and q ** (stage + 1) <= 65536:
            assert allclose(loss.detach(), data[f"loss_{case}_f64"], rtol=1e-9)
            assert allclose(slope, data[f"gradw_{case}_f64"], rtol=1e-8)
        elif dtype == torch.float32 and stage == 0:
            rtol = 5e-5 if q == 2 else 1.5e-2
            assert allclose(loss.detach(), data[f"losshp_{case}"], rtol=rtol)

@needs_fixtures
def test_ect_loss_of_a_network():
    data = load("ect_loss_net.npz")
    net = train_cifar.UNet(8)
    net.load_state_dict(load("ect_snapshot_tiny_state.npz"))
    x_hat = net(data["precond_x"], data["precond_sigma"]).detach()
    assert allclose(x_hat, data["D_train"], atol=3e-5)
    weights = [net.get_parameter(name) for name in data["param_names"]]
    t = (2 * data["rnd_normal"] - 1.1).exp()        # some have r = 0, where the network is NaN
    for stage, c, rtol in [(0, "0", 2e-4), (0, "0.06", 2e-4), (3, "0", 1e-3)]:
        loss = ect.ect_loss(net, data["x"], data["eps"], t, stage, c=float(c))
        norms = [gradient.norm() for gradient in torch.autograd.grad(loss.mean(), weights)]
        assert allclose(loss.detach(), data[f"loss_s{stage}_c{c}"], rtol=rtol)
        assert allclose(norms, data[f"gradnorm_s{stage}_c{c}"], rtol=2e-3)

def test_ect_in_segments():
    """Both guesses are carried to the lower edge and compared there."""
    t, edges = ect.draw_t(len(T)).double(), ect.segment_edges(4).double()
    assert allclose(edges, np.tan(np.pi / 8 * np.arange(1, 4)), rtol=0.03)
    n = 1 + 5 / (1 + (2 * t).exp())
    assert allclose(ect.relative_gap(t, 2, 3, 5, 2), n / 27)
    n = 1 + 8 / (1 + t.exp())
    edge = ect.lower_edge(t, edges)
    r = edge.maximum(t * (1 - n / 2**4))
    z_t, z_r = X + per_sample(t, X) * EPS, X + per_sample(r, X) * EPS
    d = mcm.ddim(D(z_t, t), z_t, t, edge, mcm.edm) - mcm.ddim(D(z_r, r), z_r, r, edge, mcm.edm)
    loss = ((d**2).flatten(1).sum(1) + 0.06**2) ** 0.5 - 0.06
    assert allclose(ect.ect_loss(D, X, EPS, t, 3, c=0.06, edges=edges), loss / (t - r))
    assert ect.ect_loss(D, X, EPS, t, 3).equal(ect.ect_loss(D, X, EPS, t, 3, edges=edges[:0]))

    # So the loss stays bounded near an edge, though its weight 1 / (t - r) does not.
    near = edges[0] * (1 + torch.logspace(-12, -1, len(T)).double())
    assert ect.ect_loss(D, X, EPS, near, 3, edges=edges).max() < 50
    assert allclose(torch.std_mean(ect.draw_t(10**6).log()), [2, -1.1], rtol=0.01)

# ---- The network ---------------------------------------------------------------------------------

@pytest.mark.parametrize("device, backend, atol", [         # inductor is slow on a CPU
    ("cpu", "aot_eager", 1e-6), pytest.param("cuda", "inductor", 1e-3, marks=needs_gpu)])
def test_dropout_is_one_mask(device, backend, atol):
    """The mask is a function of (seed, layer, element), compiled or not, alone or in a batch."""
    net, x = small_net(dropout=0.5).to(device), randn(2, 3, 8, 8).to(device)
    seed = torch.tensor([5, 6], device=device)
    for run in (net, torch.compile(net, backend=backend)):
        once, again, other = (run(x, 1.0, seed=u) for u in (seed, seed, seed + 1))
        assert once.equal(again) and not once.allclose(other)
        assert once[1:].allclose(net(x[1:], 1.0, seed=seed[1:]), atol=atol)
    assert net(x, 1.0).equal(small_net()(x.cpu(), 1.0).to(device))      # no seed, no dropout
    ones, seeds = torch.ones(64, 16, 16, 16, device=device), torch.arange(64, device=device)
    kept, other = (train_cifar.dropout(ones, 0.2, seeds, layer).flatten(1) for layer in (3, 4))
    assert abs(kept.mean() - 1) < 0.01 and kept.unique().tolist() == [0.0, 1.25]
    masks = torch.cat([kept[:32], other[:32]])              # of 32 samples in 2 layers
    assert torch.corrcoef(masks).fill_diagonal_(0).abs().max() < 0.08

@needs_fixtures
@pytest.mark.parametrize("kind, classes", [("uncond", 0), ("cond", 10)])
def test_unet_is_edms(kind, classes):
    io, state = load(f"edm_{kind}_ch32_io.npz"), load(f"edm_{kind}_ch32_state.npz")
    net = train_cifar.UNet(32, classes=classes, augment_dim=9, segments=3).eval()
    net.requires_grad_(False).load_state_dict({**net.state_dict(), **state})
    x, sigma, labels = io["x"], io["sigma"], io.get("class_labels")
    raw = net.model(x * per_sample((sigma**2 + 0.25).rsqrt(), x), sigma.log() / 4, labels)
    assert allclose(raw, io["F"], atol=3e-5)
    scalar = torch.tensor(1.5)
    asked = dict(D=(sigma, labels), D_scalar_sigma=(scalar, labels), D_no_labels=(sigma,))
    for name in asked.keys() & io.keys():
        x_hat = net(x, *asked[name], segment=torch.tensor([1]))     # at first a zero embedding
        assert allclose(x_hat, io[name], atol=5e-5), name
    net.model.map_segment.weight += 1.0
    assert not allclose(net(x, sigma, labels, segment=torch.tensor([1])), io["D"], atol=3e-5)

def test_half_precision_is_near():
    net = small_net(classes=2, segments=3).requires_grad_(False)
    x = randn(2, 3, 8, 8)
    more = dict(labels=torch.eye(2), segment=torch.tensor([0, 2]))
    right = net(x, 1.0, **more)
    net.dtype = torch.float16
    error = (net(x, 1.0, **more) - right).abs().max()
    assert right.dtype == torch.float32 and 0 < error < 0.05

def test_unet_is_as_large_as_edms():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = train_cifar.UNet(augment_dim=9)
        net.model(torch.empty(1, 3, 32, 32), torch.empty(1))
    assert sum(p.numel() for p in net.parameters()) == 55_733_891 and len(net.state_dict()) == 425
    assert round(counter.get_total_flops() / 1e9, 2) == 42.38

# ---- One iteration: on the meta device, compiled, on a GPU ---------------------------------------

CASES = [("diffusion", "--classes"), ("tuned", "--steps 1 2 4"), ("tuned", "--steps 2 --method mcd "
         "--classes"), ("tuned", "--method ect"), ("tuned", "--method ect-segmented --steps 4")]

class Iterations:
    """The iterations of train_cifar.train, small, on any device."""
    def __init__(self, phase, options, device="cpu"):
        options = f"--preset shapes --batch 8 --iters 10 --stages 4 {options}"
        self.settings = train_cifar.read_settings(argparse.ArgumentParser(), options.split())
        self.phase, self.device = phase, torch.device(device)
        images, labels, names = train_cifar.shapes(64, 16)
        self.data = SimpleNamespace(images=images, labels=labels, class_names=[])
        if self.settings.classes:
            self.data.class_names = names
        with self.device:
            self.net = small_net(resolution=16, classes=len(self.data.class_names), segments=15,
                                 dropout=0.1)
        self.ema, self.teacher = copy.deepcopy(self.net), copy.deepcopy(self.net).eval()
        self.optimizer = torch.optim.RAdam(self.net.parameters(), foreach=True)

    def draw(self, step):
        drawn = train_cifar.draw(self.data, self.settings, self.phase, step)
        return {name: value.to(self.device) for name, value in drawn.items()}

    def run(self, step, drawn, step_loss=train_cifar.step_loss):
        stage = torch.full((), step * 4 // 10, device=self.device)
        loss = step_loss(self.net, self.teacher, self.settings, self.phase, stage, **drawn)
        loss.mean().backward()
        self.optimizer.step()
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        average(list(self.ema.parameters()), list(self.net.parameters()), 1)

def test_the_loss_is_what_the_settings_say():
    for phase, options in [("diffusion", "--classes"), ("tuned", "--method mcd --classes --steps 2 "
                           "--huber-eps 0.3"), ("tuned", "--method ect --q 3 --c 7"),
                           ("tuned", "--method ect-segmented --q 3 --c 7 --steps 3")]:
        its = Iterations(phase, options)
        drawn = {**its.draw(0), "seed": None}               # without dropout
        x, eps, t, labels = drawn["x"] / 127.5 - 1, drawn["eps"], drawn["t"], drawn.get("labels")
        f = mcm.make_f(its.net, steps=drawn.get("N"), labels=labels)
        if phase == "diffusion":
            right = mcm.consistency_loss(f, x, eps, t, 0 * t, 0 * t, huber_eps=1.0)
        elif its.settings.method == "ect":
            right = ect.ect_loss(mcm.conditioned(its.net, 1), x, eps, t, 2, q=3, c=7)
        elif its.settings.method == "ect-segmented":
            right = ect.ect_loss(mcm.conditioned(its.net, 3), x, eps, t, 2, q=3, c=7,
                                 edges=ect.segment_edges(3))
        else:
            right = mcm.consistency_loss(f, x, eps, t, drawn["s"], drawn["t_step"], huber_eps=0.3,
                                         teacher=mcm.make_f(its.teacher, labels=labels))
        loss = train_cifar.step_loss(its.net, its.teacher, its.settings, phase, 2, **drawn)
        torch.testing.assert_close(loss, right, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("phase, options", CASES)
def test_an_iteration_mixes_no_devices_and_waits_for_none(phase, options):
    """On the meta device a CPU tensor, an .item() or a shape that depends on data raises."""
    its = Iterations(phase, options, "meta")
    its.run(0, its.draw(0))

@pytest.mark.parametrize("phase, options", CASES)
def test_ten_iterations_compile_once(phase, options):
    """Each has other times, T and stage. A number that changes would compile again."""
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch.compiler.reset()
    its = Iterations(phase, options)
    compiled = torch.compile(train_cifar.step_loss, fullgraph=True, backend=backend)
    for step in range(10):
        its.run(step, its.draw(step), compiled)
    assert len(graphs) == 1

@needs_gpu
@pytest.mark.parametrize("phase, options", CASES)
def test_no_iteration_waits_for_the_gpu(phase, options):
    its = Iterations(phase, options + " --precision tf32", "cuda")
    its.data.images, its.data.labels = its.data.images.cuda(), its.data.labels.cuda()
    its.run(0, its.draw(0))                         # the first one may load kernels
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in range(1, 4):
            its.run(step, its.draw(step))
    finally:
        torch.cuda.set_sync_debug_mode("default")

def test_precisions(monkeypatch):
    """Gradients near the end of tuning, against those of float32: -s prints the README's table."""
    net = train_cifar.load_network(train_cifar.load_checkpoint(HERE / "assets/dial.pt"))
    x, eps = train_cifar.shapes(16)[0] / 127.5 - 1, randn(16, 3, 32, 32).float()
    g = torch.Generator().manual_seed(0)
    times, sigma = mcm.draw_times(16, 2, 1280, g), ect.draw_t(16, generator=g)

    def gradients(dtype):                           # scaled, as fp16 needs it
        monkeypatch.setattr(train_cifar.UNet, "dtype", dtype)
        mct = mcm.consistency_loss(mcm.make_f(net, steps=2), x, eps, *times)
        ect_256 = ect.ect_loss(mcm.conditioned(net, 1), x, eps, sigma, 0, q=256)
        weights = [p for name, p in net.named_parameters() if "frequencies" not in name]
        for loss in (mct, ect_256):
            slopes = torch.autograd.grad(64 * loss.mean(), weights)
            yield torch.cat([slope.flatten().double() for slope in slopes])

    right, table = list(gradients(torch.float32)), {}
    for dtype in (torch.float16, torch.bfloat16):
        table[dtype] = [torch.cosine_similarity(slope, true, 0).item()
                        for slope, true in zip(gradients(dtype), right)]
        print(f"{dtype}: MCT at T = 1280, ECT at q = 256: {table[dtype]}")
    for fp16, bf16 in zip(*table.values()):
        assert fp16 > 0.9 > bf16

# ---- FID -----------------------------------------------------------------------------------------

def distance(x, y):
    one, other = (fid.Statistics().update(torch.as_tensor(features)) for features in (x, y))
    return fid.frechet_distance(one.mean, one.cov, other.mean, other.cov)

def inception_weights(key, shape):
    """The fixtures' rule."""
    rng = np.random.default_rng([11, zlib.crc32(key.encode())])
    if key.endswith(("bn.weight", "running_var")):
        return torch.tensor(rng.uniform(0.5, 1.5, shape))
    scale = 0.1 if len(shape) < 2 else (2 / np.prod(shape[1:])) ** 0.5
    return torch.tensor(rng.standard_normal(shape) * scale)

@needs_fixtures
def test_inception_is_the_published_one():
    resize, data = load("fid_resize.npz"), load("fid_inception.npz")
    for size in ("32", "64x48"):
        ours = fid.resize_tf1(resize[f"img{size}"])
        assert allclose(ours[:, :, ::13, ::13], resize[f"tf1_{size}_stride13"], rtol=0, atol=2e-3)
        assert allclose(ours[:, :, -12:, -12:], resize[f"tf1_{size}_last12"], rtol=0, atol=2e-3)
    keys = json.loads((FIXTURES / "fid_inception_keys.json").read_text())["keys"]
    net = fid.InceptionFID().requires_grad_(False)
    net.load_state_dict({key: inception_weights(key, its["shape"]) for key, its in keys.items()})
    for net in (net, net.fold()):
        features = net(data["img64x48"])
        assert allclose(features, data["tfid_img64x48_2048"], rtol=0, atol=5e-4)

@needs_fixtures
def test_frechet_distance_is_the_published_one():
    data = load("fid_frechet.npz")
    for i in range(3):
        pair = [data[f"{name}_pair{i}"] for name in ("mu1", "sigma1", "mu2", "sigma2")]
        assert allclose(fid.frechet_distance(*pair), data[f"fd_pair{i}"], rtol=1e-9, atol=0)
    few = distance(data["x_rankdef"], data["y_rankdef"])
    assert allclose(few, data["fd_exact_rankdef"], rtol=1e-6, atol=0)

def test_fid_facts_and_grey_levels():
    assert fid.metric_name("inception", 50_000) == "FID"
    assert fid.metric_name("inception", 49_999) == "FD(inception)@49999"
    assert fid.metric_name("random", 50_000) == "FD(random)@50000"
    x, statistics = randn(300, 5) + 1e7, fid.Statistics()       # a mean that must not cancel
    for part in x.split([10, 1, 289]):
        statistics.update(part)
    assert allclose(statistics.mean, x.mean(0)) and allclose(statistics.cov, np.cov(x.T), rtol=1e-9)
    images = randn(200, 3, 1, 2).mul(50).add(128).byte()        # some rows; the floors
    rows, order = torch.arange(150, 50, -1), fid.shuffled(images)
    features = images.flatten(1).double()
    assert allclose(fid.statistics_of(images, nn.Flatten(), rows).mean, features[rows].mean(0))
    for n, half in ((10, 10), (150, 100)):
        floor = distance(features[order[:half]], features[order[half:2 * half]])
        assert allclose(fid.floor_of(images, nn.Flatten(), n), floor)
    few = randn(20, 50)                                         # n < d
    assert 0 <= distance(few, few) < 1e-6 and allclose(distance(few, few + 3), 50 * 3**2)

def picture(path, colour, size=(16, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)

def test_what_is_in_a_folder(tmp_path):
    """Images are upright, without hidden colours. What cannot be used is named."""
    turned = Image.Exif()
    turned[0x0112] = 3                                          # upside down
    half = Image.new("RGB", (16, 16))
    half.paste((200, 0, 0), (0, 0, 16, 8))
    half.save(tmp_path / "0.png", exif=turned)
    picture(tmp_path / "1.png", (255, 0, 0, 0), mode="RGBA")    # red that does not show
    picture(tmp_path / "2.png", 9, mode="L")
    picture(tmp_path / "sub/3.png", (7, 0, 0))
    (tmp_path / "notes.txt").write_text("not an image")
    files, labels, names = fid.read_images(str(tmp_path))
    images = files[torch.arange(4)]
    assert len(files) == 4 and files.shape == images.shape == (4, 3, 16, 16)
    assert files[torch.tensor([3, 1])].equal(images[[3, 1]])
    assert images[:, 0, 15, 0].tolist() == [200, 255, 9, 7] and images[0, 0, 0].eq(0).all()
    assert names == [".", "sub"] and labels.tolist() == [0, 0, 0, 1]
    for name, size, mode in [("larger.png", (32, 32), "RGB"), ("deep.png", (16, 16), "I;16")]:
        picture(tmp_path / name, 0, size, mode)
        with pytest.raises(InputError, match=name):
            fid.statistics_of(fid.read_images(str(tmp_path))[0], fid.random_features)
        os.remove(tmp_path / name)

def test_downloads(tmp_path, monkeypatch):
    """A file that is missing or wrong is named, with its address, and never left as if right."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source, path = tmp_path / "there/file.pth", tmp_path / "hub/checkpoints/file.pth"
    source.parent.mkdir()
    url, good = source.as_uri(), b"weights" * 1000
    asked = url, hashlib.sha256(good).hexdigest()
    for content in (b"", good[::-1], good[:500]):
        source.write_bytes(content)
        with pytest.raises(InputError, match=f"file.pth.*{url}"):
            fid.download(*asked)
        assert not path.exists()
    source.write_bytes(good)
    assert fid.download(*asked) == path and fid.download(*asked).read_bytes() == good
    path.write_bytes(good[1:])                                  # an interrupted copy
    with pytest.raises(InputError, match=f"{path}.*{url}"):
        fid.download(*asked)

# ---- EDM's pickles -------------------------------------------------------------------------------

def asks(function, *given):
    """Pickled, it asks that function(*given) be called."""
    return types.SimpleNamespace(__reduce_ex__=lambda protocol: (function, given))

def edm_pickle(offset=0, size=(8, 8, 3, 3), stride=(72, 9, 3, 1), **changes):
    """A file like EDM's, with one convolution and with source code that must not run."""
    def module(name, **state):
        state = {"_parameters": {}, "_buffers": {"none": None}, "_modules": {}, **state}
        return asks(print, dict(module_src="open('PWNED', 'w')", class_name=name, state=state))
    storage = torch.arange(576.)._typed_storage()
    weight = asks(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    conv = module("Conv2d", _parameters=collections.OrderedDict(weight=weight, bias=None))
    given = dict(model_channels=8, channel_mult=[1], dropout=0.1, label_dim=0, img_resolution=8)
    unet = module("SongUNet", _modules=dict(conv=conv), _init_kwargs={**given, **changes})
    ema = module("EDMPrecond", _modules=dict(model=unet), sigma_data=0.5, gain=np.float64(1))
    made = pickle.dumps(dict(loss_fn=asks(getattr, ema, "forward"), ema=ema), 3)
    return made.replace(b"cbuiltins\nprint\n",
                        b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n")

def test_edm_pickles_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.pkl").write_bytes(edm_pickle())
    weights, arguments = train_cifar.load_edm("net.pkl")
    assert list(weights) == ["model.conv.weight"] and os.listdir() == ["net.pkl"]
    assert weights["model.conv.weight"].flatten().equal(torch.arange(576.))
    given = dict(width=8, mult=(1,), blocks=4, classes=0, dropout=0.1, resolution=8)
    assert arguments == {**given, "augment_dim": 0}

@needs_fixtures
@pytest.mark.parametrize("name, state", [("edm_uncond_small", "edm_uncond_ch32_state"),
                                         ("ect_snapshot_tiny", "ect_snapshot_tiny_state")])
def test_published_pickles_load_bit_equal(name, state):
    made = load(f"{state}.npz")
    weights, arguments = train_cifar.load_edm(FIXTURES / f"{name}.pkl")
    assert weights.keys() == made.keys() and all(weights[key].equal(made[key]) for key in made)
    train_cifar.UNet(**arguments).load_state_dict(weights)

RUN = b"cposix\nsystem\n\x8c\x0btouch PWNED\x85"
HOSTILE = [
    RUN + b"R.", RUN + b"\x81.", RUN + b"}\x92.", b"(" + RUN + b"o.", b"(iposix\nsystem\n.", b"NQ.",
    b"\x8c\5posix\x8c\6system\x93.", b"\x82\1.", b"\x84\1\0\0\0.", b"Pposix\n.", b"}K\1Ns.", b"",
    b"\x8c\5numpy\x8c\7dtype.x\x93.", 2 * b"cbuiltins\ngetattr\n" + b"\x8c\4eval\x86R.",
    b"ccollections\nOrderedDict\n)\x81}\x8c\x0c__setstate__cposix\nsystem\nsb.",
    b"ctorch.storage\n_load_from_bytes\nC\x1e" + RUN + b"R.\x85R.", b"\x8b\xff\xff\xff\x7f",
    b"I" + b"9" * 10**5, b"]" * 10**5 + b"a.", edm_pickle(-2), edm_pickle(channel_mult=3),
    edm_pickle().replace(b"FloatStorage", b"EvilyStorage"), pickle.dumps({"ema": {}}),
    edm_pickle().replace(b"_init_kwargs", b"_other_names"),
    *map(Path.read_bytes, FIXTURES.glob("edm_maliciou*[!c].pkl"))]

@pytest.mark.parametrize("content", HOSTILE, ids=itertools.count())
def test_hostile_pickles_are_refused_and_run_nothing(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.pkl").write_bytes(content)
    with pytest.raises(InputError, match="^net.pkl"):
        train_cifar.load_edm("net.pkl")
    assert os.listdir() == ["net.pkl"]

# ---- The programs, as a user runs them -----------------------------------------------------------

SHAPES_NET = train_cifar.NETS["shapes"]
TINY = ("--preset shapes --data few.npz --init none --width 16 --pretrain-iters 6 --iters 6 "
        "--batch 4 --save-every 2 --fd-samples 16 --seed 2147483648 ")

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a program runs: few.npz, on which TINY takes seconds, and useless files. Offline."""
    monkeypatch.chdir(tmp_path)
    tiny = dict(mult=(1, 2), blocks=1, attention=(), patch=2)
    monkeypatch.setitem(train_cifar.NETS, "shapes", tiny)
    monkeypatch.setattr(train_cifar.UNet, "dtype", torch.float32)     # main sets it
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=ConnectionError))
    monkeypatch.setattr(fid, "CIFAR10", Mock(side_effect=OSError, url="u", filename="cifar"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path.parent))
    images = train_cifar.shapes(64, 16)[0].permute(0, 2, 3, 1).numpy()
    np.savez("few.npz", images, 16 * ["cat", "dog", "dog", "dog"])
    useless = dict(zero=images, one=images[:1], pair=images[:2], odd=images[:, 1:, 1:],
                   float=images / 255, object=np.array([{}], dtype=object), scalar=np.uint8(1),
                   hollow=images[:, :0, :0])
    for name, data in useless.items():
        np.savez(f"{name}.npz", data)
    Path("empty").mkdir()
    Path("text").mkdir()
    torch.save(torch.zeros(2), "tensor.pt")
    for name in ("text/a.png", "text.npz", "text.pkl", "text.pt"):
        Path(name).write_text("nothing of the kind")
    for i in range(64):
        picture(Path(f"FOLDER/{i % 2}/{i:02}.png"), (i, 0, 0))
    shutil.copytree("FOLDER", "mixed")
    picture(Path("mixed/larger.png"), 0, (32, 32))
    handlers = [(name, signal.getsignal(name)) for name in (signal.SIGINT, signal.SIGTERM)]
    yield
    for name, handler in handlers:
        signal.signal(name, handler)

def train(line):
    train_cifar.main((TINY + line).split())

def refusal(program, line, capsys):
    """The one line that a program says before it ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sys.modules[program].main(line.split())
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    return error

def state_of(out):
    """What a run leaves, but for its speeds: the tensors of tuned.pt, and the distances."""
    state = torch.load(f"{out}/tuned.pt", weights_only=True)
    parts = [state["net"], state["ema"], *state["optimizer"]["state"].values()]
    table = json.loads(Path(out, "result.json").read_text())
    for row in table:
        row["images_per_second"] = None
    return [[value.numpy().tobytes() for value in part.values()] for part in parts], table

@pytest.mark.parametrize("method", ["mct", "mcd --classes", "ect-segmented"])
def test_a_run_that_died_and_went_on_is_the_run_that_did_not(method, folder, monkeypatch):
    train(f"--out straight --method {method}")
    blows = {("diffusion", 3): "crash", ("diffusion", 5): signal.SIGINT,
             ("tuned", 1): "crash", ("tuned", 4): signal.SIGINT}
    draw = train_cifar.draw
    def deadly_draw(data, settings, phase, step):
        blow = blows.pop((phase, step), None)
        if blow == "crash":                             # as kill -9: nothing is saved
            raise KeyboardInterrupt
        if blow:
            signal.raise_signal(blow)
        return draw(data, settings, phase, step)
    monkeypatch.setattr(train_cifar, "draw", deadly_draw)
    for _ in range(4):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(f"--out torn --method {method}")
        Path("torn/.part-tuned.pt").write_bytes(b"half")        # as a death while saving leaves
    for _ in range(2):                                  # the second time only the report is left
        train(f"--out torn --method {method}")
        assert state_of("straight") == state_of("torn")
    rows = [(row["method"], row["steps"], row["nfe"]) for row in state_of("torn")[1]]
    tuned = method.split()[0]
    assert rows == [("diffusion", 2, 2), (tuned, 2, 2), ("diffusion", 18, 35)]
    states = [train_cifar.load_checkpoint(f"torn/{name}.pt") for name in ("diffusion", "tuned")]
    weights = [state["ema"]["model.map_layer0.weight"] for state in states]
    assert not weights[0].equal(weights[1])             # the average moves
    sample.main("torn/tuned.pt --n 5 --out x.png".split())
    assert Image.open("x.png").size == (2 * 34 + 2, 3 * 34 + 2)     # each pixel as 2x2
    sample.main("torn/diffusion.pt --n 5 --steps 3 --out x.npz".split())
    assert np.load("x.npz")["arr_0"].shape == (5, 16, 16, 3)
    made = sorted(path.name for path in Path("torn").iterdir())
    assert made == ["dial.png", "diffusion.pt", "result.json", "tuned.pt"]

def test_the_average_is_a_mean_until_its_decay_is_ema(folder, monkeypatch):
    weights, averages = [], []
    def save(path, data, settings, phase, step, parts):
        for name, seen in (("net", weights), ("ema", averages)):
            seen.append(list(parts[name].parameters())[-1].detach().clone())    # the last bias
    monkeypatch.setattr(train_cifar, "save", save)
    train("--save-every 1 --ema 0.7")
    exactly = dict(rtol=1e-4, atol=0)
    assert averages[2].allclose(sum(weights[:3]) / 3, **exactly)
    assert averages[3].allclose(0.7 * averages[2] + 0.3 * weights[3], **exactly)
    assert averages[6].equal(weights[6])                # tuning begins anew

def test_what_sample_asks_for(folder, monkeypatch, capsys):
    train("--out run --classes --steps 2 1 --method mcd")
    asked = []
    def generate(net, sampler, steps, n, seed, labels):
        asked.append((sampler, steps, n, seed, labels.tolist()))
        return torch.zeros(n, 3, 16, 16).byte()
    monkeypatch.setattr(sample, "generate", generate)
    for line in ("tuned.pt", "tuned.pt --steps 1 --seed 7", "diffusion.pt"):
        sample.main(f"run/{line} --n 4 --out x.png".split())
    assert asked == [(*case, [0, 1, 0, 1]) for case in
                     [("multistep", 2, 4, 0), ("multistep", 1, 4, 7), ("heun", 18, 4, 0)]]
    assert "cat" in capsys.readouterr().out
    assert "--steps" in refusal("sample", "run/tuned.pt --steps 4", capsys)

    # The report samples with the labels of real images, also where they are sorted by class.
    np.savez("sorted.npz", np.load("few.npz")["arr_0"], np.sort(np.load("few.npz")["arr_1"]))
    asked.clear()
    train("--out sorted --classes --data sorted.npz --fd-samples 100")
    labels = asked[-1][-1]
    assert len(labels) == 100 and 15 < 100 - sum(labels) < 35 and 1 < 16 - sum(labels[:16]) < 8

def test_what_an_iteration_draws(folder):
    """New noise each time, one in ten without its label, T from 8 to 64 in half of the run."""
    settings = train_cifar.read_settings(argparse.ArgumentParser(), (TINY + "--classes").split())
    settings.batch, settings.steps, settings.T = 9000, [1, 4], [8, 64]
    data, draws = train_cifar.load_data(settings), []
    for phase, step, T in (("diffusion", 0, None), ("diffusion", 1, None), ("tuned", 0, 8),
                           ("tuned", 3, 64)):
        drawn = train_cifar.draw(data, settings, phase, step)
        draws.append(drawn["eps"].sum().item())
        assert allclose(drawn["labels"].mean(0), [0.9 / 4, 0.9 * 3 / 4], atol=0.02)
        if T:
            t = (drawn["t"] * T).round()
            assert allclose(drawn["t"] * T, t) and len(t.unique()) == T
            assert drawn["N"].unique().tolist() == [1, 4]
            assert not drawn["t_step"][drawn["N"] == 1].any()
    settings.seed = settings.seed - 1
    draws.append(train_cifar.draw(data, settings, "tuned", 3)["eps"].sum().item())
    assert len(set(draws)) == 5

def test_another_command_is_refused_by_a_run(folder, capsys):
    """The same command goes on. Other settings or data do not, and both values are named."""
    train("--out run")
    last = torch.load("run/tuned.pt", weights_only=True)["optimizer"]["param_groups"][0]["lr"]
    assert allclose(last, 2e-3 / 6)                     # the rate has fallen
    np.savez("labels.npz", np.load("few.npz")["arr_0"], 32 * ["cat", "dog"])
    for line, before, now in [("--steps 4", "[2]", "[4]"), ("--classes", "False", "True"),
                              ("--data labels.npz", "few.npz-", "labels.npz-")]:
        error = refusal("train_cifar", TINY + "--out run " + line, capsys)
        assert line.split()[0] in error and before in error and now in error
    for line in ("--init run/tuned.pt", "--init run/diffusion.pt --classes"):       # made without
        assert "--init" in refusal("train_cifar", TINY + line, capsys)
    shutil.move("labels.npz", "few.npz")
    assert "begun with few.npz-" in refusal("train_cifar", TINY + "--out run", capsys)
    os.remove("run/tuned.pt")                           # as in the first phase
    assert "--steps" in refusal("train_cifar", TINY + "--out run --steps 4", capsys)

def test_presets(monkeypatch, capsys):
    """cifar10 where there are a GPU and its files. A preset's model fits its own data alone."""
    def read(line):
        settings = train_cifar.read_settings(argparse.ArgumentParser(), line.split())
        return settings.preset, settings.init
    assert read("") == ("shapes", "shapes") and "no GPU" in capsys.readouterr().out
    for line in ("--width 16", "--classes", "--data x"):
        assert read(line)[1] == "none" and read(line + " --init a.pt")[1] == "a.pt"
    monkeypatch.setattr(train_cifar, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(fid, "read_images", Mock())
    monkeypatch.setattr(fid, "download", Mock())
    assert read("") == ("cifar10", "edm") and read("--data x")[0] == "shapes"
    monkeypatch.setattr(fid, "download", Mock(side_effect=InputError("no file")))
    assert read("")[0] == "shapes" and "no file" in capsys.readouterr().out

def test_a_loss_that_is_not_finite_stops_the_run(folder, monkeypatch):
    """And the last good checkpoint stays. In fp16 one loss that overflows is one step skipped."""
    train("--out run")
    step_loss, factors, stages = train_cifar.step_loss, [], []
    def planted(net, teacher, settings, phase, stage, **drawn):
        stages.append(stage.item())
        return step_loss(net, teacher, settings, phase, stage, **drawn) * factors.pop(0)
    monkeypatch.setattr(train_cifar, "step_loss", planted)
    factors[:] = [1, 1, 1, math.nan]
    with pytest.raises(SystemExit, match="iteration 4: .*not finite.*is kept"):
        train("--out other --init run/diffusion.pt --stages 3")
    assert stages == [0, 0, 1, 1]                       # ECT's, though MCT has no use for it
    assert torch.load("other/tuned.pt", weights_only=True)["step"] == 2
    factors[:] = [math.inf, 1, 1, 1]
    train("--out other --init run/diffusion.pt --stages 3 --precision fp16")  # goes on
    state = torch.load("other/tuned.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["net"].values())
    assert state["optimizer"]["state"][0]["step"] == 5 and state["scaler"]["scale"] == 2**15
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 0.5)
    factors[:] = [1, 1]
    with pytest.raises(SystemExit, match="not finite"):
        train("--out less --init run/diffusion.pt --precision fp16")

def test_a_mistake_in_the_code_keeps_its_traceback(folder, monkeypatch):
    train("--out run")
    for place, name in [(train_cifar.UNet, "forward"), (train_cifar.DDPMpp, "__init__")]:
        monkeypatch.setattr(place, name, lambda self, *given, **more: misspelt)
        for program, line in [(sample, "run/tuned.pt"), (train_cifar, TINY + "--out other")]:
            with pytest.raises(NameError):
                program.main(line.split())

@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_distances_of_files(folder, capsys):
    other = torch.jit.trace(lambda x: x[:, :, 0, :12].flatten(1).float(), torch.zeros(1, 3, 16, 16))
    other.save("other.ts")
    np.savez("large.npz", np.zeros((64, 32, 32, 3), np.uint8))
    for line, right, n in [("FOLDER FOLDER", 0, 64), ("few.npz FOLDER --n 50", 1, 50)]:
        for features in ("random", "other.ts"):
            fid.main(f"{line} --features {features}".split())
            found = re.match(rf"FD\({features}\)@{n} ([\d.]+)", capsys.readouterr().out)
            assert (float(found[1]) > 0.01) == right
    assert "sizes" in refusal("fid", "large.npz FOLDER --features random", capsys)
    np.savez("small.npz", np.zeros((8, 8, 8, 3), np.uint8))          # random filters do not fit
    assert "fails on" in refusal("fid", "small.npz small.npz --features random", capsys)

# Bad command lines and, behind >, what their one line must name; else it is their last option.
BAD = {"train_cifar": """
--T 8 9000 > --T, --width 20 > --width, --fd-samples 9
--steps 0, --steps x, --steps, --method dog, --batch 0, --lr nan, --lr -1, --ema 2, --what
--iters 1.5, --precision fp8, --T 4, --seed -1, --preset big, --init nowhere > nowhere
--method ect --q 256 --stages 3 > --stages, --stages 2000 > --stages
--method ect-segmented --steps 1 2 > ect-segmented, --init text.npz > text.npz
--out text.npz/x > text.npz, --init text.pkl > text.pkl, --init text.pt > text.pt
--init edm > edm-cifar10
--features text.npz > text.npz, --features nowhere > nowhere, --data zero.npz --classes
--data nowhere > nowhere, --data empty > empty, --data text > a.png, --data text.npz > text.npz
--data mixed > larger, --data odd.npz > odd.npz, --data pair.npz > pair.npz
--data float.npz > float, --data object.npz > object.npz, --data hollow.npz > hollow
--data scalar.npz > scalar, --init tensor.pt > tensor.pt, --p-mean nan
--data cifar10 > cifar, --features inception > inception""",
       "sample": """
nowhere.pt > nowhere.pt, text.npz > text.npz, text.pt > text.pt, text.pt --steps 0, text.pt --n 0
text.pt --out x.jpg, text.pt --seed -1""",
       "fid": """
few.npz > b, few.npz few.npz --features random --n 1 > --n 1
few.npz few.npz --features random --n 0 > --n 0, few.npz one.npz --features random > one.npz
nowhere few.npz > nowhere, few.npz nowhere --features random > nowhere
few.npz few.npz > inception, few.npz few.npz --features dog > dog, few.npz few.npz --n x
few.npz few.npz --features object.npz > object.npz
text few.npz --features random > a.png, float.npz few.npz --features random > float.npz"""}

@pytest.mark.parametrize("program", BAD)
def test_bad_input_is_one_line(program, folder, capsys):
    """It names the mistake, the exit code is 2, and nothing is written."""
    before = sorted(Path().rglob("*"))
    for line in re.split(", |\n", BAD[program][1:]):
        line, _, named = line.partition(" > ")
        named = named or re.findall(r"--\S+", line)[-1]
        if program == "train_cifar":
            line = TINY + line
        assert named in refusal(program, line, capsys), line
        assert sorted(Path().rglob("*")) == before, line

README = (HERE / "README.md").read_text()

def test_readme_snippets():
    for block in re.findall("```python\n(.*?)```", README, re.DOTALL):
        names = {}
        exec(block, names)
        assert names["loss"].isfinite().all()

@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_readme_commands(folder, monkeypatch):
    """Each as it stands there, one after the other, with options behind it that make it small."""
    train("--out assets --steps 1 2 4 8 --classes")     # in place of the models with the code
    shutil.move("assets/tuned.pt", "assets/dial.pt")
    monkeypatch.setattr(sample, "__file__", str(Path("sample.py").resolve()))
    cifar = SimpleNamespace(data=np.load("few.npz")["arr_0"], targets=64 * [0], classes=["cat"])
    monkeypatch.setattr(fid, "CIFAR10", Mock(return_value=cifar))
    smaller = {"fid.py": "--features random", "sample.py": "--n 16",
               "train_cifar.py": TINY + "--precision fp32 --no-compile --features random"}
    lines = re.findall(r"(?:^|`)python ((?!-m)[^`#]+?) *(?:#.*)?(?:$|`)", README, re.MULTILINE)
    assert len(lines) > 5
    for program, *arguments in map(shlex.split, lines):
        if program == "train_cifar.py":
            shutil.rmtree("runs", ignore_errors=True)   # the next one has other settings
        for i, argument in enumerate(arguments):
            # The data's hash is another here.
            if argument.startswith("runs/") and program != "train_cifar.py":
                arguments[i] = str(next(Path().glob("runs/*")) / argument.split("/", 2)[2])
        if program == "-c":
            exec(arguments[0], {})
        else:
            module = sys.modules[program.removesuffix(".py")]
            module.main(arguments + smaller[program].split())

@pytest.mark.skipif(not (HERE / "assets/diffusion.pt").exists(), reason="assets/ is not made yet")
def test_the_models_that_come_with_the_code(folder):
    sample.main("--steps 1 --n 1".split())
    assert train_cifar.load_checkpoint(HERE / "assets/diffusion.pt")["phase"] == "diffusion"
