"""Tests: limits and closed forms, the peers' own numbers, the programs as a user runs them."""
import collections, contextlib, fcntl, gc, hashlib, io, itertools, json, math, os, pickle, re
import resource, shlex, shutil, signal, socket, subprocess, sys, threading, time, types, zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy import allclose
from PIL import Image
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import ect, fid, mcm, sample, train_cifar

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="../shared/fixtures is absent")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()

# All t > s >= t_step (here e, for edge) that are multiples of 1/32, with 0 and 1.
TIMES = torch.combinations(torch.arange(34), 3).double() - torch.tensor([0, 1, 1])
TIMES = T, S, E = tuple(TIMES.flip(1).T.contiguous() / 32)
X, EPS = randn(2, len(T), 2, 3)  # data and noise
V = 0.3  # the variance of Gaussian data, whose denoiser and consistency function are known

def D(x, sigma, w=0.8):  # the fixtures' stand-in for a network; to us, any f(z, t)
    scale = mcm.per_sample((sigma**2 + 0.25).rsqrt(), x)
    return scale**2 / 4 * x + mcm.per_sample(sigma, x) / 2 * scale * torch.tanh(w * scale * x)

def gaussian(x, sigma, V=V):
    return x * mcm.per_sample(V / (V + sigma**2), x)

def exact(x, sigma, segment, N, end=mcm.SIGMA_MIN):
    """The x whose jump ends where the flow of Gaussian data, x ~ (V + sigma^2)^1/2, ends it."""
    i = segment.double() - N * (N - 1) // 2
    alpha, edge = mcm.cosine(i / N)
    edge = torch.where(i > 0, edge / alpha, end)
    x_edge = x * mcm.per_sample((V + edge**2) / (V + sigma**2), x) ** 0.5
    return mcm.inv_ddim(x_edge, x, sigma, edge, mcm.edm)

def load(name):
    arrays = np.load(FIXTURES / name).items()
    return {k: v if v.dtype.kind == "U" else torch.tensor(v) for k, v in arrays}

def small_net(**more):  # a network away from the zeros that it starts with
    net = train_cifar.UNet(16, (1,), 1, **{"resolution": 8, "attention": (), **more})
    torch._foreach_add_([p.data for p in net.parameters()], 0.05)
    return net

def test_schedules_and_segments():
    alpha, sigma = mcm.cosine(torch.linspace(0, 1, 10_001))
    ratio = sigma / alpha
    assert allclose(alpha**2 + sigma**2, 1) and alpha.gt(0).all() and ratio.diff().gt(0).all()
    assert allclose(ratio[[0, -1]], [0.002, 80], rtol=1e-4)
    assert mcm.edm(T)[0].eq(1).all() and mcm.edm(T)[1].equal(T)
    assert mcm.as_f(lambda x, sigma: sigma)(X, 0.5).shape == T.shape
    for N, inside in itertools.product(range(1, 65), (1e-3, 0.5, 1.0)):
        rows = torch.arange(N) + N * (N - 1) // 2
        lower = torch.cat([torch.zeros(1), ect.default_edges(N)])
        alpha, sigma = mcm.cosine((torch.arange(N).double() + inside) / N)
        sigma = (sigma / alpha).float()  # an edge is of the segment below it, also if rounded up:
        assert mcm.segment(sigma, N).equal(rows)
        assert mcm.segment(sigma * 1.000001, torch.full((N,), N)).equal(rows)
        for up in (1, 1 + 5e-7):
            assert ect.lower_edge(sigma * up, lower[1:]).equal(lower)
        assert mcm.segment(torch.tensor([0.0, 1e9]), N).equal(rows[[0, -1]])

def test_the_toys_truth():
    z, x = mcm.quantiles(10_000)
    assert allclose([z.mean(), z.std()], [0, 1], atol=1e-3)
    mode = (x - mcm.MEANS).abs().argmin(1)
    assert allclose(mode.bincount() / 10_000, mcm.WEIGHTS, atol=1e-3)
    assert allclose((x[:, 0] - mcm.MEANS[mode]).std(), mcm.STD, rtol=0, atol=1e-3)
    assert mcm.distance(mcm.jumps(mcm.as_f(mcm.exact_denoise), z, 512)[-1], x) < 0.005

@pytest.mark.parametrize("N, T, n", [(1, 24, 24), (2, 25, 12), (3, 24, 8), (8, 22, 3), (8, 3, 1)])
def test_times(N, T, n):
    """A function of u: n teacher steps in each segment, and s on its edge exactly."""
    u = torch.rand(2, 4096, generator=torch.Generator().manual_seed(0))
    t, s, t_step = times = mcm.draw_times(4096, N, T, torch.Generator().manual_seed(0))
    assert all(map(torch.equal, times, mcm.draw_times(4096, torch.full((4096,), N), T, u=u)))
    step, k = (u * torch.tensor([[N], [n]])).floor()
    assert allclose(t_step * N, step) and allclose((t - s) * n * N, 1, atol=1e-4)
    assert allclose((s - t_step) * n * N, k, atol=1e-4) and s.eq(t_step).equal(k == 0)
    assert allclose([mcm.teacher_steps(i) for i in (-1, 0, 5e4, 2e5)], [64, 64, 81920**0.5, 1280])

@pytest.mark.parametrize("schedule", [mcm.cosine, mcm.edm])
def test_limits(schedule):
    (alpha, sigma), (alpha_s, sigma_s), (alpha_e, sigma_e) = (mcm.at(schedule, u, X) for u in TIMES)
    z_t, z_s = alpha * X + sigma * EPS, alpha_s * X + sigma_s * EPS
    assert allclose(mcm.ddim(X, z_t, T, S, schedule), z_s)  # eq. (4)
    assert allclose(mcm.inv_ddim(z_s, z_t, T, S, schedule), X, rtol=0, atol=1e-9)  # eq. (5)
    assert allclose(mcm.inv_ddim(*(u.float() for u in (z_s, z_t, T, S)), schedule), X, 0, 2e-3)
    # aDDIM is DDIM if no variance is missing; else eq. (14); it is finite where eps_hat = 0.
    assert allclose(mcm.addim(X, z_t, T, S, 0.0, schedule), z_s)
    length = mcm.mean_per_sample((mcm.addim(X, z_t, T, S, T, schedule) - alpha_s * X) ** 2)
    missing = (alpha_s - alpha * sigma_s / sigma).flatten() ** 2 * T
    assert allclose(length, mcm.mean_per_sample((sigma_s * EPS) ** 2) + missing)
    assert mcm.addim(z_t / alpha, z_t, T, S, 1.0, schedule).isfinite().all()
    # Led by the data, both jumps come to a mean of reference and data. Where s = e that is data:
    # T = N is diffusion. Where e = 0 and alpha = 1, w = 1: N = 1 is Song et al.'s consistency loss.
    w = (1 - sigma_e / alpha_e * alpha_s / sigma_s) / (1 - sigma_e / alpha_e * alpha / sigma)
    target = torch.where(mcm.per_sample(S > E, X), w * D(z_s, S) + (1 - w) * X, X)
    error = (D(z_t, T) - target) * (alpha**2 + sigma**2) ** 0.5 / sigma  # the root of SNR + 1
    loss = mcm.consistency_loss(D, X, EPS, *TIMES, schedule, huber_eps=0.01)
    assert allclose(loss, (mcm.mean_per_sample(error**2) + 1e-4) ** 0.5 - 0.01)

def test_a_batch_of_two_is_two_batches_of_one():
    def run(x, z, t, s, e, N):
        return [mcm.ddim(x, z, t, s), mcm.inv_ddim(x, z, t, s), mcm.addim(x, z, t, s, t),
                mcm.consistency_loss(D, x, z, t, s, e), mcm.v_loss(x, z, x, t), mcm.segment(t, N),
                mcm.consistency_loss(D, x, z, t, s, e, teacher=gaussian),
                ect.ect_loss(D, x, z, t, 1, c=0.06), ect.ect_loss(D, x, z, t, 1, edges=E[-1:] / 2)]
    two = [u[::4000].contiguous() for u in (X, EPS, *TIMES)] + [torch.tensor([2, 4])]
    for both, *alone in zip(run(*two), *(run(*(u[i:i + 1] for u in two)) for i in (0, 1))):
        assert allclose(both, torch.cat(alone), rtol=1e-12, atol=0)

def test_teachers_references_and_gradients():
    w, seen = torch.tensor(0.8, dtype=torch.float64, requires_grad=True), []
    def other(z, u):
        seen.append((z, u, torch.is_grad_enabled()))
        return D(z, u)
    def loss(w, leads=other, **more):
        return mcm.consistency_loss(mcm.conditioned(D, w=w), X, EPS, *TIMES, teacher=leads, **more)
    mcd = loss(w)
    mcd.sum().backward()  # as if the teacher and the reference were constants:
    rise = loss(0.8 + 1e-6, f_ref=other) - loss(0.8 - 1e-6, f_ref=other)
    assert allclose(w.grad, rise.sum() / 2e-6, rtol=1e-6)
    assert mcd.equal(loss(w, f_ref=other)) and not mcd.allclose(loss(w, f_ref=gaussian))  # TRACT
    (z_t, t, grad_t), (z_s, s, grad_s) = seen[-3:-1]
    assert t.equal(T) and s.equal(torch.where(S > E, S, T)) and not (grad_t or grad_s)
    x_hat = D(z_t, T)
    assert allclose(z_s, mcm.addim(x_hat, z_t, T, S, 0.75 * mcm.mean_per_sample((x_hat - X) ** 2)))
    leads, varies = mcm.guided(D, gaussian, 2.0)(z_t, T)
    assert allclose(leads, 3 * x_hat - 2 * gaussian(z_t, T)) and varies.equal(x_hat)
    assert loss(w, lambda z, t: (D(z, t), X)).equal(loss(w, x_var_frac=0.0))
    zero = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad(mcm.pseudo_huber(zero**2, 0.0), zero)[0] == 0

@pytest.mark.parametrize("N", [1, 2, 4])
def test_gaussian_data(N):
    """One DDIM step of 1/T errs by O(1/T^2), so the exact f has that loss at a fixed distance from
    the edge. The jump back divides by that distance: right next to the edge it is O(1/T)."""
    losses = []
    for n in (64, 256):
        k, (x, eps) = torch.arange(n * N), randn(2, n * N, 64)
        times = [u.double() / (n * N) for u in (k + 1, k, k // n * n)]
        loss = mcm.consistency_loss(mcm.as_f(exact, steps=N, N=N), V**0.5 * x, eps, *times,
                                    teacher=mcm.as_f(gaussian), x_var_frac=0.0, huber_eps=0.0)
        losses.append((loss.view(N, n)[:, n // 2:].mean(), loss[0]))
    far, near = (few / many for few, many in zip(*losses))
    assert 14 < far < 18 and 3 < near < 5
    z = randn(10_000, 3)  # it samples N(0, V), and with ECT's fresh noise the right variance
    for method, more in (("mct", {}), ("ect", dict(segmented=True, end=0.0))):
        assert allclose(sample.generate(exact, method, N, z, N=N, **more), V**0.5 * z, rtol=1e-4)
    x, again = (sample.generate(exact, "ect", N, z, N=1) for _ in range(2))
    fresh = sample.renoise(mcm.conditioned(exact, 1, N=1), z, [80, 1])
    assert x.equal(again) and abs(x.var() - V) < 0.01 and abs(fresh.var() - V) < 0.01

def test_solvers():
    """For Gaussian data of variance c and its exact posterior variance, the error of one aDDIM step
    is -c cot(a_t) cot(a_s) times DDIM's to first order (a: the angles of cosine), as eq. (14) takes
    x_hat and eps_hat for uncorrelated. So it pays at a low SNR, and overshoots for c ~ 1."""
    c, z = 1e-4, randn(64, 10_000)
    f, alpha, sigma = mcm.as_f(gaussian, V=c), *mcm.cosine(0.0)
    addim = sample.addim(f, z, 8, x_var=lambda a, s: c * s**2 / (a**2 * c + s**2))
    error = [abs(z_0.var() - alpha**2 * c - sigma**2) for z_0 in (addim, sample.ddim(f, z, 8))]
    assert error[0] < 0.1 * error[1] and allclose(sample.paper_x_var(2.0, 1.0), 0.1 / 6)
    heun = [sample.generate(gaussian, "diffusion", n, z, "heun") for n in (32, 64, 128)]
    error = [abs(x - 80 * (V / (V + 80**2)) ** 0.5 * z).max() for x in heun]
    assert 3 < error[0] / error[1] < 5 and 3 < error[1] / error[2] < 5  # of second order
    addim = sample.addim(mcm.as_f(gaussian), z, 8)
    assert addim.equal(sample.generate(gaussian, "diffusion", 8, z, "addim"))

@pytest.mark.parametrize("method, steps, sampler, sigmas", [
    ("diffusion", 2, "heun", [80, 0.002, 0.002]), ("diffusion", 2, "ddim", [80, 1]),
    ("ect", 2, None, [80, 0.821]), ("ect", 3, None, [80, 3**0.5, 3**-0.5])])
def test_where_samplers_ask(method, steps, sampler, sigmas):
    net = Mock(side_effect=lambda x, sigma, segment=None: 0 * x)
    sample.generate(net, method, steps, randn(1, 3), sampler)
    assert allclose([call.args[1].item() for call in net.call_args_list], sigmas, rtol=0.03)

@needs_fixtures
def test_ect_mapping_and_generator():
    data = load("ect_t_to_r.npz")
    t, wide = data["t"], data["t"].numpy().astype(np.longdouble)
    for q, k, i in itertools.product((2, 4, 256), (8, 0), range(9)):
        name = f"q{q}_{'sigmoid' if k else 'const'}"
        r_64, r_32 = (ect.t_to_r(u, i, q, k) for u in (t, t.float()))
        assert allclose(r_64, data[f"r64_{name}"][i], rtol=1e-12, atol=1e-12)
        assert allclose(r_32, data[f"r32_{name}"][i], rtol=3e-7, atol=1e-6)
        gap = wide * np.minimum(1, (1 + k / (1 + np.exp(wide))) / np.longdouble(q) ** (i + 1))
        assert allclose(ect.gap(t.float(), i, q, k).numpy(), gap, rtol=1e-5, atol=0)
    data = load("ect_generator_standin.npz")
    for n in (1, 2, 3):
        sigmas = [80.0, *data[f"mid_t_{n}step"]]
        x = sample.renoise(mcm.conditioned(D, w=data["w"]), data["latents"], sigmas, data["noise"])
        assert allclose(x, data[f"out_{n}step_f64"], rtol=0, atol=1e-10)

@needs_fixtures
def test_ect_loss():
    data = load("ect_loss_standin.npz")
    cases = re.findall(r"losshp_(q(\d+)_(\w+)_s(\d)_c(\S+))", " ".join(data))
    dtypes = torch.float64, torch.float32
    for (case, q, adjust, stage, c), dtype in itertools.product(cases, dtypes):
        q, k, stage, c = int(q), 8 * (adjust == "sigmoid"), int(stage), float(c)
        w, x, eps, t = (data[key].to(dtype) for key in ("w", "x", "eps", "t_f64"))
        loss = ect.ect_loss(mcm.conditioned(D, w=w.requires_grad_()), x, eps, t, stage, q, k, c=c)
        slope, loss = torch.autograd.grad(loss.mean(), w)[0], loss.detach()
        assert loss.isfinite().all() and slope.isfinite()  # the authors' is NaN in places
        if dtype == torch.float64 and q ** (stage + 1) <= 65536:
            assert allclose(loss, data[f"loss_{case}_f64"], rtol=1e-9)
            assert allclose(slope, data[f"gradw_{case}_f64"], rtol=1e-8)
        elif dtype == torch.float32 and stage == 0:
            assert allclose(loss, data[f"losshp_{case}"], rtol=5e-5 if q == 2 else 1.5e-2)
    data = load("ect_loss_net.npz")
    net = train_cifar.UNet(8).load(load("ect_snapshot_tiny_state.npz"), "ect_snapshot_tiny")
    x_hat = net(data["precond_x"], data["precond_sigma"]).detach()
    assert allclose(x_hat, data["D_train"], atol=3e-5)
    weights = [net.get_parameter(name) for name in data["param_names"]]
    t = (2 * data["rnd_normal"] - 1.1).exp()  # some with r = 0, where the network is NaN
    for stage, c, rtol in [(0, "0", 2e-4), (0, "0.06", 2e-4), (3, "0", 1e-3)]:
        loss = ect.ect_loss(net, data["x"], data["eps"], t, stage, c=float(c))
        norms = [gradient.norm() for gradient in torch.autograd.grad(loss.mean(), weights)]
        assert allclose(loss.detach(), data[f"loss_s{stage}_c{c}"], rtol=rtol)
        assert allclose(norms, data[f"gradnorm_s{stage}_c{c}"], rtol=2e-3)

def test_ect_in_segments():
    t, edges = ect.draw_t(len(T)).double(), ect.default_edges(4).double()
    n = 1 + 8 / (1 + t.exp())
    assert allclose(ect.t_to_r(t, 0), t * (1 - n / 2).clamp(min=0))
    # Both predictions are carried to the edge, and compared there.
    edge = ect.lower_edge(t, edges)
    r = edge.maximum(t * (1 - n / 2**4))
    z_t, z_r = (X + mcm.per_sample(u, X) * EPS for u in (t, r))
    d = mcm.ddim(D(z_t, t), z_t, t, edge, mcm.edm) - mcm.ddim(D(z_r, r), z_r, r, edge, mcm.edm)
    loss = ((d**2).flatten(1).sum(1) + 0.06**2) ** 0.5 - 0.06
    assert allclose(ect.ect_loss(D, X, EPS, t, 3, c=0.06, edges=edges), loss / (t - r))
    # So near an edge the loss stays bounded, though its weight 1 / (t - r) does not.
    near = edges[0] * (1 + torch.logspace(-12, -1, len(T)).double())
    assert ect.ect_loss(D, X, EPS, near, 3, edges=edges).max() < 50
    paper, one = (ect.ect_loss(D, X, EPS, t, 3, edges=u) for u in (None, edges[:0]))
    assert paper.equal(one) and allclose(edges, np.tan(np.pi / 8 * np.arange(1, 4)), rtol=0.03)
    assert [ect.stage(i, 100) for i in (0, 99, 100)] == [0, 0, 1] and ect.stage(9, 0) == 0
    assert allclose(torch.std_mean(ect.draw_t(10**6).log()), [2, -1.1], rtol=0.01)

def test_the_loss_compiles_whole_and_its_reference_keeps_no_activations():
    net, x, eps = small_net(segments=3, dropout=0.3), *randn(2, 4, 3, 8, 8).float()
    f = mcm.as_f(net, steps=torch.full((4,), 2), seed=torch.arange(4))
    times = [u[::1500].float() for u in TIMES]
    def run(loss):
        value = loss(f, x, eps, *times, teacher=mcm.as_f(net)).mean()
        return value, *torch.autograd.grad(value, list(net.parameters()))
    whole = torch.compile(mcm.consistency_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(whole), run(mcm.consistency_loss), rtol=1e-4, atol=1e-5)
    kept = []  # bytes, for the backward pass
    for function, given in ((f, (x, times[0])), (mcm.consistency_loss, (f, x, eps, *times))):
        pack = Mock()
        with torch.autograd.graph.saved_tensors_hooks(pack, pack):
            function(*given)
        kept.append(sum(call.args[0].nbytes for call in pack.call_args_list))
    assert kept[1] < 1.1 * kept[0]

@pytest.mark.parametrize("device, backend, atol", [  # inductor takes half a minute on a CPU
    ("cpu", "aot_eager", 1e-6), pytest.param("cuda", "inductor", 1e-3, marks=needs_gpu)])
def test_dropout_is_one_mask(device, backend, atol):
    net, x = small_net(dropout=0.5).to(device), randn(2, 3, 8, 8).to(device)
    seed = torch.tensor([5, 6], device=device)
    for run in (net, torch.compile(net, backend=backend)):
        once, again, other = (run(x, 1.0, seed=u) for u in (seed, seed, seed + 1))
        assert once.equal(again) and not once.allclose(other)
        assert once[1:].allclose(net(x[1:], 1.0, seed=seed[1:]), atol=atol)
    assert net.eval()(x, 1.0, seed=seed).equal(net(x, 1.0, seed=seed + 1))
    asked = torch.ones(64, 16, 16, 16, device=device), 0.2, torch.arange(64, device=device), 3
    kept = train_cifar.dropout(*asked)
    assert kept.equal(torch.compile(train_cifar.dropout)(*asked))
    assert abs(kept.mean() - 1) < 0.01 and kept.unique().tolist() == [0.0, 1.25]
    assert torch.corrcoef(kept.flatten(1)).fill_diagonal_(0).abs().max() < 0.08  # of samples

def test_adam_times_its_rectification_is_radam():
    ours, theirs = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    adam, radam = torch.optim.Adam([ours], 1.0), torch.optim.RAdam([theirs], 1.0)
    for step in range(1, 100):
        adam.param_groups[0]["lr"] = train_cifar.rectification(step)
        for w, optimizer in ((ours, adam), (theirs, radam)):
            w.data.zero_()
            w.grad = torch.tensor([1.0, -2.0, 3.0]).double() * step**0.5
            optimizer.step()
        assert allclose(ours.detach(), theirs.detach() * (step > 5))
    assert 0.99 < train_cifar.rectification(10**9) <= 1

@needs_fixtures
@pytest.mark.parametrize("kind, classes", [("uncond", 0), ("cond", 10)])
def test_unet_is_edms(kind, classes):
    io, state = load(f"edm_{kind}_ch32_io.npz"), load(f"edm_{kind}_ch32_state.npz")
    net = train_cifar.UNet(32, classes=classes, augment_dim=9, segments=3).load(state, kind)
    net.eval().requires_grad_(False)
    x, sigma, labels = io["x"], io["sigma"], io.get("class_labels")
    raw = net.model(x * mcm.per_sample((sigma**2 + 0.25).rsqrt(), x), sigma.log() / 4, labels)
    assert allclose(raw, io["F"], atol=3e-5)
    asked = dict(D=(sigma, labels), D_augment_labels=(sigma, labels, io["augment_labels"]),
                 D_scalar_sigma=(torch.tensor(1.5), labels), D_no_labels=(sigma,))
    for name in sorted(asked.keys() & io.keys()):
        x_hat = net(x, *asked[name], segment=torch.tensor([1]))  # a zero embedding, at first
        assert allclose(x_hat, io[name], atol=5e-5 if "scalar" in name else 3e-5), name
    del state["model.map_layer0.bias"]
    with pytest.raises(fid.UserError, match="map_layer0.bias"):
        net.load(state, kind)

def test_unet_is_as_large_as_edms():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = train_cifar.UNet(augment_dim=9)
        net.model(torch.empty(1, 3, 32, 32), torch.empty(1))
    assert sum(p.numel() for p in net.parameters()) == 55_733_891 and len(net.state_dict()) == 425
    assert round(counter.get_total_flops() / 1e9, 2) == 42.38

def distance(x, y):
    a, b = (fid.Statistics().update(torch.as_tensor(u)) for u in (x, y))
    return fid.frechet_distance(a.mean, a.cov, b.mean, b.cov)

def inception_weights(key, shape):  # the fixtures' rule
    rng = np.random.default_rng([11, zlib.crc32(key.encode())])
    if key.endswith(("bn.weight", "running_var")):
        return torch.tensor(rng.uniform(0.5, 1.5, shape))
    scale = 0.1 if len(shape) < 2 else (2 / np.prod(shape[1:])) ** 0.5
    return torch.tensor(rng.standard_normal(shape) * scale)

@needs_fixtures
def test_fid_is_the_published_one():
    resize, data, frechet = (load(f"fid_{k}.npz") for k in ("resize", "inception", "frechet"))
    for size in ("32", "64x48"):
        ours = fid.resize_tf1(resize[f"img{size}"])[:, :, ::13, ::13]
        assert allclose(ours, resize[f"tf1_{size}_stride13"], rtol=0, atol=2e-3)
    keys = json.loads((FIXTURES / "fid_inception_keys.json").read_text())["keys"]
    net = fid.InceptionFID().eval().requires_grad_(False)
    net.load_state_dict({k: inception_weights(k, v["shape"]) for k, v in keys.items()})
    for net in (net, net.fold()):
        assert allclose(net(data["img64x48"]), data["tfid_img64x48_2048"], rtol=0, atol=5e-4)
    for i in range(3):
        pair = [frechet[f"{k}_pair{i}"] for k in ("mu1", "sigma1", "mu2", "sigma2")]
        assert allclose(fid.frechet_distance(*pair), frechet[f"fd_pair{i}"], rtol=1e-9, atol=0)
    few = distance(frechet["x_rankdef"], frechet["y_rankdef"])
    assert allclose(few, frechet["fd_exact_rankdef"], rtol=1e-6, atol=0)
    rng, sets = np.random.default_rng([11, 30]), []
    for low, high, shift in ((0.5, 1.5, 0), (1.2, 0.6, 0.05)):
        z = rng.standard_normal((5000, 2048))
        sets.append(z * np.linspace(low, high, 2048) + 0.5 * np.roll(z, 1, 1) + shift)
    assert allclose(distance(*sets), frechet["fd_d2048"], rtol=1e-8, atol=0)

def test_fid_facts_and_grey_levels():
    assert fid.metric_name("inception", 50_000) == "FID" != fid.metric_name("inception", 49_999)
    x = randn(300, 5) + 1e7  # a mean that must not cancel
    a, b, c = (fid.Statistics().update(part) for part in x.split([10, 1, 289]))
    assert allclose(a.merge(b).merge(c).cov, np.cov(x.T), rtol=1e-9)
    few = randn(20, 50)  # n < d
    assert 0 <= distance(few, few) < 1e-6 and allclose(distance(few, few + 3), 50 * 3**2)
    levels, error = torch.arange(256).byte(), torch.tensor([[-0.4], [0.4]])
    assert sample.to_uint8((levels + error) / 127.5 - 1).eq(levels).all()
    assert sample.to_uint8(torch.tensor([-1.1, 1.1])).tolist() == [0, 255]

def asks(function, *args):  # pickled, it asks that function(*args) be called
    return types.SimpleNamespace(__reduce_ex__=lambda protocol: (function, args))

def edm_pickle(offset=0, size=(8, 8, 3, 3), stride=(72, 9, 3, 1), doubled=0, **changes):
    def module(name, **state):
        state = {"_parameters": {}, "_buffers": {"none": None}, "_modules": {}, **state}
        return asks(print, dict(module_src="open('PWNED', 'w')", class_name=name, state=state))
    storage = torch.arange(576.)._typed_storage()
    weight = asks(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    conv = module("Conv2d", _parameters=collections.OrderedDict(weight=weight, bias=None))
    for _ in range(doubled):  # a module of 2^doubled modules, by sharing
        conv = module("Conv2d", _modules=dict(a=conv, b=conv))
    given = dict(model_channels=8, channel_mult=[1], dropout=0.1, label_dim=0, img_resolution=8)
    unet = module("SongUNet", _modules=dict(conv=conv), _init_kwargs={**given, **changes})
    ema = module("EDMPrecond", _modules=dict(model=unet), sigma_data=0.5, gain=np.float64(1))
    return pickle.dumps(dict(loss_fn=asks(getattr, ema, "forward"), ema=ema), 3).replace(
        b"cbuiltins\nprint\n", b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n")

RUN = b"cposix\nsystem\n\x8c\x0btouch PWNED\x85"
HOSTILE = [
    RUN + b"R.", RUN + b"\x81.", RUN + b"}\x92.", b"(" + RUN + b"o.", b"(iposix\nsystem\n.", b"NQ.",
    b"\x8c\5posix\x8c\6system\x93.", b"\x82\1.", b"\x84\1\0\0\0.", b"Pposix\n.", b"}K\1Ns.", b"",
    b"\x8c\5numpy\x8c\7dtype.x\x93.", 2 * b"cbuiltins\ngetattr\n" + b"\x8c\4eval\x86R.",
    b"ccollections\nOrderedDict\n)\x81}\x8c\x0c__setstate__cposix\nsystem\nsb.",
    b"ctorch.storage\n_load_from_bytes\nC\x1e" + RUN + b"R.\x85R.", b"\x8b\xff\xff\xff\x7f",
    b"\x8e" + bytes(7) + b"\x10", b"\x8f" * 10**6, b"I" + b"9" * 10**7, b"]" * 10**5 + b"a.",
    edm_pickle(0, (2**20, 2**20), (0, 0)), edm_pickle(embedding_type="fourier"), edm_pickle(-2),
    edm_pickle(doubled=19), edm_pickle(extra={7: 7}), edm_pickle(model_channels=2**40),
    edm_pickle(channel_mult=10 * [1]), edm_pickle(num_blocks=33), edm_pickle(dropout=1.0),
    edm_pickle().replace(b"FloatStorage", b"EvilyStorage"),
    edm_pickle().replace(b"\x80\3", b"\x80\3(1", 1),
    # Calls with a long tuple: each would copy it.
    b"ccollections\nOrderedDict\nq\0(" + b"N" * 150_000 + b"tq\1" + 60_000 * b"h\0h\1R0" + b".",
    *map(Path.read_bytes, FIXTURES.glob("edm_maliciou*[!c].pkl"))]

@pytest.mark.parametrize("content", HOSTILE, ids=itertools.count())
def test_hostile_edm_pickles_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.pkl").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(fid.UserError, match="^net.pkl: .*--init"):
        train_cifar.load_edm("net.pkl")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 1 and os.listdir() == ["net.pkl"]
    assert after.ru_maxrss - before.ru_maxrss < 1 << 20  # kB

def test_edm_pickles_load(tmp_path):
    (tmp_path / "net.pkl").write_bytes(edm_pickle())
    state, kwargs = train_cifar.load_edm(tmp_path / "net.pkl")
    assert list(state) == ["model.conv.weight"] and state.popitem()[1].flatten()[575] == 575
    assert kwargs.items() >= {"mult": (1,), "dropout": 0.1, "width": 8, "blocks": 4}.items()
    for name in ("edm_uncond_small", "ect_snapshot_tiny") if FIXTURES.exists() else ():
        made = load(f"{name.replace('small', 'ch32')}_state.npz")
        state, _ = train_cifar.load_edm(FIXTURES / f"{name}.pkl")
        assert state.keys() == made.keys() and all(state[k].equal(made[k]) for k in made)

def test_downloads(tmp_path):
    good, start = b"weights" * 1000, time.monotonic()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 7000\r\n\r\n"
    server = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{server.getsockname()[1]}/file.pth"
    def fetch(reply, fault=None):
        def serve():
            call = server.accept()[0]
            call.recv(1 if fault == "reset" else 9999)  # closing with more to read is a reset
            call.sendall(reply)
            time.sleep(60 * (fault == "stall"))
            call.close()
        threading.Thread(target=serve, daemon=True).start()
        return fid.fetch(url, hashlib.sha256(good).hexdigest(), tmp_path, 0.3)
    for given in [(b"HTTP/1.1 404 None\r\n\r\n",), (head + good[::-1],), (head + good[:500],),
                  (head + good[:500], "reset"), (head + good[:500], "stall"), (b"", "stall")]:
        with pytest.raises(fid.UserError, match="file.pth"):
            fetch(*given)
        assert os.listdir(tmp_path) == []
    path = fetch(head + good)
    assert path.read_bytes() == good and time.monotonic() - start < 30
    path.write_bytes(good[1:])  # as an interrupted copy
    with pytest.raises(fid.UserError, match="file.pth is missing, truncated"):
        fetch(head + good)

# ---- The programs, as a user runs them -----------------------------------------------------------

TINY = ("--data few.npz --device cpu --net edm --pretrain-iters 6 --iters 6 --batch 4 --many 2 "
        "--log-every 2 --save-every 2 --fd-samples 16 --seed 2147483648 ")

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a program runs: few.npz, on which TINY takes seconds, and files of no use. Offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_cifar.NETS, "edm", dict(width=16, mult=[1, 2], blocks=1, patch=2))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=ConnectionError))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path.parent))
    images = train_cifar.shapes(64, 16)[0].permute(0, 2, 3, 1).numpy()
    np.savez("few.npz", images, 16 * [0, 2, 2, 2])
    np.savez("minus.npz", images, 64 * [-1])
    np.savez("object.npz", np.array([{}], dtype=object))
    for name, data in dict(zero=images, pair=images[:2], odd=images[:, 1:, 1:],
                           float=images / 255).items():
        np.savez(name, data)
    np.savez("short.npz", mu=np.zeros(5), sigma=np.eye(36))
    for name in ("data", "assets", "empty", "text", "deep", "FOLDER", "linked"):
        Path(name).mkdir()
    Path("FOLDER/sub").symlink_to("../linked")
    Image.new("I;16", (16, 16)).save("deep/a.png")
    for name in ("text/a.png", "text.npz", "text.pkl"):
        Path(name).write_text("nothing of the kind")
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"FOLDER/{'sub/' * (i % 2)}{i}.png")
    shutil.copytree("FOLDER", "mixed")
    Image.new("RGB", (32, 32)).save("mixed/larger.png")

def train(line):
    train_cifar.main((TINY + line).split())

def refusal(program, line):
    """The exit code and the stderr of a command line of ours that has to fail."""
    gc.collect()  # lets go of a run's lock, which the last traceback held
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as stop:
        fid.run(lambda: sys.modules[program].main(line.split()))
    code = stop.value.code
    return (1, code) if isinstance(code, str) else (code, stderr.getvalue())

def state_of(out):
    """All that a run leaves but speeds and its own name, with tensors as their bytes."""
    state = torch.load(f"{out}/latest.pt", weights_only=True)
    log = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    table = json.loads(Path(out, "result.json").read_text())
    for each in (state["config"], *state["log"], *log, *table):
        each["out"] = each["images_per_second"] = None
    return tree_map_only(torch.Tensor, lambda t: t.numpy().tobytes(), [state, log, table])

@pytest.mark.parametrize("method", ["mct", "mcd --classes --guidance 1", "ect --segmented"])
def test_a_run_that_died_and_went_on_is_the_run_that_did_not(method, folder, monkeypatch, capsys):
    grid = Mock(wraps=sample.save_grid)
    monkeypatch.setattr(sample, "save_grid", grid)
    train(f"--out straight --method {method}")
    assert grid.call_args.args[3] == [
        "diffusion 1", "diffusion 2", "tuned 2", "diffusion 4", "diffusion 8", "diffusion 3"]
    blows = {("pretrain", 3): "crash", ("pretrain", 5): signal.SIGINT,
             ("tune", 1): "crash", ("tune", 4): signal.SIGTERM}
    def deadly(run, phase, step, draw=train_cifar.draw):
        blow = blows.pop((phase, step), None)
        if blow == "crash":  # as kill -9: nothing is saved
            raise RuntimeError
        if blow:
            signal.raise_signal(blow)
        return draw(run, phase, step)
    monkeypatch.setattr(train_cifar, "draw", deadly)
    while blows:
        with pytest.raises((RuntimeError, SystemExit)):
            train(f"--out torn --method {method}")
    for _ in range(2):  # the second time there is only the report left to do
        train(f"--out torn --method {method}")
        assert state_of("straight") == state_of("torn")
    assert [(row["model"], row["nfe"]) for row in state_of("torn")[2]] == [
        ("diffusion", 2), ("tuned", 2), ("diffusion", 3)]
    before, after = (torch.load(f"torn/{name}.pt")["ema"]["model.map_layer0.weight"]
                     for name in ("diffusion", "latest"))
    assert not before.equal(after)  # the average moves
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for line in ("latest.pt --out x.png", "diffusion.pt --sampler addim --steps 3 --out x.npz"):
        sample.main(f"torn/{line} --n 5".split())
    images = np.load("x.npz")["arr_0"]
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    train(f"--out fresh --method {method} --profile")
    assert os.listdir("fresh") == ["lock"]
    assert "0 host synchronisations in 20 steps, 0 graph breaks" in capsys.readouterr().out

def test_a_model_from_a_pickle_teaches_without_its_dropout(folder, monkeypatch):
    net, report = small_net(resolution=16, dropout=0.5), Mock()
    monkeypatch.setattr(train_cifar, "load_edm", lambda path: (net.state_dict(), net.arguments))
    monkeypatch.setattr(train_cifar, "report", report)
    train("--out run --method mcd --init net.pkl")
    with pytest.raises(fid.UserError, match="resolution"):
        train("--out other --init net.pkl --data shapes")
    # And on in half precision, where one loss that overflows is one step that is skipped.
    loss, factor = train_cifar.step_loss, iter([math.inf])
    monkeypatch.setattr(train_cifar, "step_loss", lambda *given, **drawn: loss(
        *given, **drawn) * next(factor, 1.0))
    train("--out run --method mcd --iters 8 --precision fp16 --init unread")
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == 1 and math.isfinite(last["loss"])
    modes = [net.training for call in report.call_args_list for net in call.args[1:]]
    assert modes == 4 * [False]

def test_two_processes_are_one(folder):
    line = "--net small --steps 1 2 --out "  # NETS of the other processes is as it stands there
    train(line + "one")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                    "--master_port=29517", HERE / "train_cifar.py", *(TINY + line).split(), "two"],
                   check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (torch.load(f"{out}/latest.pt", weights_only=True) for out in ("one", "two"))
    assert all(torch.allclose(one["net"][k], two["net"][k], atol=2e-4) for k in one["net"])
    for a, b in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values()):
        a, b = a["exp_avg"], b["exp_avg"]
        assert torch.allclose(a, b, rtol=0, atol=0.01 * a.abs().max())
    assert [row["step"] for row in one["log"]] == [row["step"] for row in two["log"]]
    torch.save({**two, "recent": [torch.zeros(2)]}, "two/latest.pt")  # stopped between log lines
    train(line + "two --iters 8")  # and gone on with by one process

def test_what_sample_asks_for(folder, monkeypatch):
    train("--out run --classes --steps 2 1")
    generate = Mock(side_effect=lambda net, method, steps, z, *_, labels: z)
    monkeypatch.setattr(sample, "generate", generate)
    for line in ("latest.pt", "latest.pt --steps 1 --class-label 1", "diffusion.pt --steps 2",
                 "diffusion.pt"):
        sample.main(f"run/{line} --n 4 --out x.png".split())
    asked = [(*call.args[1:3], call.args[4], call.kwargs["labels"].argmax(1).tolist())
             for call in generate.call_args_list]
    assert asked == [("mct", 2, "ddim", [0, 1, 2, 0]), ("mct", 1, "ddim", [1, 1, 1, 1]),
                     ("diffusion", 2, "ddim", [0, 1, 2, 0]),
                     ("diffusion", 18, "heun", [0, 1, 2, 0])]

def test_what_a_run_begins_with(folder):
    run, _ = train_cifar.prepare((TINY + "--out run --classes --batch 9000").split())
    shares = run.noise(0, 9000)["labels"].mean(0)
    assert allclose(shares, [1 / 4, 0, 3 / 4], atol=0.02)
    first, second = (train_cifar.draw(run, "pretrain", step) for step in (0, 1))
    assert not first["eps"].equal(second["eps"])
    assert allclose(first["labels"].mean(0), 0.9 * shares, atol=0.02)  # one in ten without
    auto, _ = train_cifar.prepare((TINY + "--data auto --init auto --features auto").split())
    assert (auto.data.name, auto.c.init, auto.extractor.name) == ("shapes", "none", "random")
    assert allclose(fid.reference("short.npz", auto.extractor, 9)[0].cov, np.eye(36))
    _, labels, classes = fid.read("FOLDER")
    assert labels.tolist() == 32 * [0] + 32 * [1] and classes == [".", "sub"]

def test_what_cannot_go_on_says_so_and_keeps_what_was_there(folder, monkeypatch):
    train("--out run --lr 0.5")
    assert train_cifar.prepare((TINY + "--out run").split())[0].c.lr == 0.5  # as it was begun with
    kept = Path("run/latest.pt").read_bytes()
    def refused(line, named):
        code, text = refusal("train_cifar", TINY + "--out run " + line)
        assert code != 0 and named in text and len(text.splitlines()) <= 2
        assert Path("run/latest.pt").read_bytes() == kept
    os.rename("run/diffusion.pt", "aside")  # without which latest.pt would be lost
    refused("", "no diffusion.pt")
    os.rename("aside", "run/diffusion.pt")
    with open("run/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("", "in use by another run")
    for line in ("--steps 4", "--method ect", "--net small", "--batch 8", "--seed 1", "--classes",
                 "--data shapes"):
        refused(line, line.split()[0] + ": run was begun with")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # as a full disk
    refused("--iters 8", "cannot write run/latest.pt")
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(Path("run").glob(".part*"))
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 0.5)
    for value, precision, named in ((math.nan, "fp32", "tune iteration 6: loss not finite"),
                                    (1.0, "fp16", "fp16 overflows"),
                                    (0.0, "fp32", "weights not finite")):  # slope of 0^1/2
        monkeypatch.setattr(train_cifar, "step_loss", lambda net, *_, x, **rest: torch.zeros(
            len(x)) + (value + 0 * sum(p.sum() for p in net.parameters())) ** 0.5)
        refused(f"--iters 7 --precision {precision}", named)

# Bad command lines and, behind >, what their one line must name; else it is their last option.
BAD = {"train_cifar": """
--steps 0, --steps x, --steps, --steps 1000, --method dog, --batch 0, --lr nan, --lr -1, --ema 2
--iters 1.5, --what, --precision fp8, --device cuda, --device tpu, --T 4, --seed -1, --accum 0
--net big, --fd-samples 1, --q 0, --guidance 1, --segmented, --segmented --method ect --steps 1 2
--batch 5 --accum 2, --init nowhere, --init text.npz, --init text.pkl > text.pkl, --out text.npz
--out text.npz/x, --features text.npz > text.npz, --data zero.npz --classes, --data ü.npz > ü.npz
--data nowhere > No such file, --data empty > empty, --data text > a.png, --data text.npz > text.npz
--data mixed > mixed, --data odd.npz > odd.npz, --data pair.npz > pair.npz, --data float.npz > float
--data object.npz > object.npz, --data minus.npz > below 0, --data cifar10 > cifar-10-python
--data deep > 8 bits""",
       "sample": """
ü.pt > ü.pt, x.pt y.pt > y.pt, nowhere.pt > nowhere.pt, text.npz > text.npz, x --steps 0, x --n 0
x --out x.jpg, x --out no/where.png, x --sampler euler, x --device cuda, x --class-label -1""",
       "fid": """
 > a, few.npz > b, nowhere few.npz > nowhere, few.npz nowhere > nowhere, few.npz few.npz --n 1
few.npz few.npz --features dog > dog, few.npz few.npz --features object.npz > object.npz
few.npz few.npz --weights nowhere > nowhere, few.npz few.npz --weights object.npz > object.npz
few.npz short.npz --features random > as many, few.npz pair.npz --features random > four
few.npz few.npz --batch 0, text few.npz --features random > a.png""",
       "mcm": "\n--what, --method dog", "ect": "\n--what"}

@pytest.mark.parametrize("program, line", [
    (program, line) for program in BAD for line in re.split(", |\n", BAD[program][1:])])
def test_bad_input_is_one_line(program, line, folder):
    line, _, named = line.partition(" > ")
    named = named or re.findall(r"--\S+", line)[-1]
    before = sorted(Path().rglob("*"))
    code, error = refusal(program, TINY * (program == "train_cifar") + line)
    assert code == 2 and named in error and "weights_only" not in error
    assert len(error.splitlines()) == 1 and sorted(Path().rglob("*")) == before

README = (HERE / "README.md").read_text()

def test_readme_snippets():
    for block in README.split("```python\n")[1:]:
        names = {}
        exec(block.split("```")[0], names)
        assert names["loss"].isfinite().all()

@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_readme_commands(folder, monkeypatch):
    """Each as it stands there, one after the other, with options behind it that make it small."""
    few = train_cifar.shapes(64, 16)
    monkeypatch.setattr(train_cifar, "shapes", lambda: few)
    monkeypatch.setattr(mcm, "train_toy", lambda net, loss, *_, real=mcm.train_toy: real(
        net, loss, 2, 8))
    features = torch.jit.trace(lambda x: x[:, :, 0, :3].flatten(1).float(), few[0])
    features.save("resnet56_cifar10.ts")
    digest = fid.feature_extractor("random").hash
    np.savez(f"data/fid-cifar10-train-16-{digest}.npz", mu=np.zeros(36), sigma=np.eye(36))
    smaller = {"mcm.py": ([], 6000), "ect.py": ([], 6000), "train_cifar.py": (TINY.split()[2:],),
               "sample.py": (["--n", "16"],), "fid.py": (["--features", "random"],)}
    lines = re.findall(r"(?:^|`)python ((?!-m)[^`]+?)(?: +#.*)?(?:$|`)", README, re.M)
    for program, *arguments in map(shlex.split, lines):
        if program == "-c":
            exec(arguments[0], {})
        else:
            more, *n = smaller[program]
            sys.modules[program[:-3]].main(arguments + more, *n)
    assert len(lines) > 12 and Path("assets/dial.pt").exists() and Path("mcm.png").exists()
