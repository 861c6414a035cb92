"""Samplers: plain functions of a network and noise. And a command, from a checkpoint to images.

    multistep   f(z, t)       MCM Algorithm 2: a jump in each of N segments (or DDIM steps)
    addim       f(z, t)       MCM Algorithm 3: DDIM that keeps the variance of the images
    renoise     D(x, sigma)   predict, add fresh noise, predict: consistency models, ECT
    heun        D(x, sigma)   EDM Algorithm 1: second order, 2 * steps - 1 evaluations

mcm.make_f(D) is an f. Noise and images are [B, ...], images not clipped to [-1, 1]. A sampler's
state is float64: float32 errors add up at sigma = 80. f's z and the result have the noise's dtype.

    python sample.py --steps 2                               # a model that comes with the code
    python sample.py --steps 2 --prompt "green square"       # the same, told what to draw
    python sample.py CHECKPOINT --n 50000 --out samples.npz  # uint8 NHWC in arr_0, for fid.py
"""
import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import ect, mcm

def guess(network, z, t, dtype):
    """f(z, t) or D(z, sigma), with one t for all -> float64. The network gets z in dtype."""
    time_dtype = torch.promote_types(dtype, torch.float32)
    times = torch.full((len(z),), float(t), dtype=time_dtype, device=z.device)
    return network(z.to(dtype), times).double()

@torch.no_grad()
def multistep(f, z, steps, schedule=mcm.cosine, x_var=None):
    """MCM Algorithm 2: z [B, ...] at the first time -> the last guess, where DDIM to sigma 0 ends.
    steps: N, for cosine's times 1, (N - 1)/N, ..., 1/N, or a list of falling times, one a guess.
    x_var: None for DDIM, or for aDDIM a function (alpha_t, sigma_t) -> variance per element."""
    times = steps
    if np.ndim(steps) == 0:
        times = [i / steps for i in range(steps, 0, -1)]
    state = z.double()
    x_hat = guess(f, state, times[0], z.dtype)
    for t, s in pairwise(times):
        if x_var is None:
            state = mcm.ddim(x_hat, state, t, s, schedule)
        else:
            variance = x_var(*mcm.alpha_sigma(schedule, t, state))
            state = mcm.addim(x_hat, state, t, s, variance, schedule)
        x_hat = guess(f, state, s, z.dtype)
    return x_hat.to(z.dtype)

def paper_x_var(alpha, sigma):
    """The paper's guess of the variance per element that x_hat lacks, for images."""
    return 0.1 / (2 + alpha**2 / sigma**2)

def addim(f, z, steps, x_var=paper_x_var, schedule=mcm.cosine):
    """MCM Algorithm 3: z [B, ...] -> images. x_var(alpha_t, sigma_t) -> variance per element."""
    return multistep(f, z, steps, schedule, x_var)

@torch.no_grad()
def renoise(denoise, latents, sigmas, noise=None):
    """Consistency sampling: latents ~ N(0, 1) [B, ...] -> x [B, ...].
    sigmas: falling noise levels, one for each step. ECT's two steps are [80, 0.821].
    noise: one [B, ...] for each sigma after the first. None: drawn here."""
    if noise is None:
        noise = [torch.randn_like(latents) for sigma in sigmas[1:]]
    x = guess(denoise, sigmas[0] * latents.double(), sigmas[0], latents.dtype)
    for sigma, eps in zip(sigmas[1:], noise, strict=True):
        x = guess(denoise, x + sigma * eps.double(), sigma, latents.dtype)
    return x.to(latents.dtype)

@torch.no_grad()
def heun(denoise, latents, steps):
    """EDM Algorithm 1: latents ~ N(0, 1) [B, ...] -> x [B, ...]."""
    # (1) Noise levels 80 = t_0 > ... > t_(n-1) = 0.002 and t_n = 0. They are evenly spaced in
    #     sigma^(1 / rho), with EDM's rho = 7: most of them are small, where the paths bend.
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = mcm.SIGMA_MIN ** (1 / 7), mcm.SIGMA_MAX ** (1 / 7)
    sigmas = ((high + ramp * (low - high)) ** 7).tolist() + [0.0]
    x = latents.double() * sigmas[0]
    for t, t_next in pairwise(sigmas):
        # (2) An Euler step along the slope dx/dsigma at t.
        slope = (x - guess(denoise, x, t, latents.dtype)) / t
        x_next = x + (t_next - t) * slope
        # (3) Heun's correction: the average of the slopes at both ends.
        if t_next > 0:
            slope_next = (x_next - guess(denoise, x_next, t_next, latents.dtype)) / t_next
            x_next = x + (t_next - t) * (slope + slope_next) / 2
        x = x_next
    return x.to(latents.dtype)

# ---- From a network to images --------------------------------------------------------------------
def sample_batch(net, sampler, steps, noise, labels):
    """noise [draws, B, C, H, W], one draw or, for "renoise", one for each step -> x [B, C, H, W].
    sampler: "multistep" for MCT, MCD and ECT in segments; "renoise" for ECT; "ddim" or "heun" for a
    diffusion model. labels: int64 [B], -1 for none."""
    if sampler == "multistep":
        return multistep(mcm.make_f(net, steps=steps, labels=labels), noise[0], steps)
    if sampler == "ddim":
        return multistep(mcm.make_f(net, labels=labels), noise[0], steps)
    if sampler == "heun":
        return heun(mcm.conditioned(net, labels=labels), noise[0], steps)
    if sampler == "renoise":
        # ECT gives a level for two steps. For others we take equal distances in cosine's t. (Ours.)
        later = [ect.MID_SIGMA] if steps == 2 else ect.segment_edges(steps).flip(0).tolist()
        D = mcm.conditioned(net, 1, labels=labels)              # trained as one segment
        return renoise(D, noise[0], [mcm.SIGMA_MAX] + later, noise[1:])
    raise ValueError(f"sampler {sampler}: not multistep, ddim, heun or renoise")

# TF32, torch's default for convolutions on a GPU, would change some pixels.
@torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
def generate(net, sampler, steps, numbers, labels, seed=0):
    """Images of a train_cifar.UNet -> uint8 [n, C, H, W] on the CPU.
    numbers: int64 [n]: the noise of an image depends on (seed, its number) alone. labels: [n]."""
    device = next(net.parameters()).device
    draws = steps if sampler == "renoise" else 1
    shape = (draws, *net.image_shape)       # of one image's noise
    images = []
    for rows in torch.arange(len(numbers)).split(50):       # in batches that fit into memory
        each = [np.random.default_rng([seed, i]).standard_normal(shape, np.float32)
                for i in numbers[rows].tolist()]
        noise = torch.from_numpy(np.stack(each, axis=1)).to(device)
        x = sample_batch(net, sampler, steps, noise, labels[rows].to(device))
        images.append((x.clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu())    # 0 .. 255
    return torch.cat(images)

def save_grid(images, path, columns):
    """uint8 [B, 3, H, W] -> a PNG, each pixel as 2x2."""
    save_image(F.interpolate(images / 255, scale_factor=2), path, nrow=columns, pad_value=1.0)

def main(arguments=None):
    """The command line: a checkpoint of train_cifar.py -> a .png grid, or an .npz."""
    import fid, train_cifar                 # here, because train_cifar imports this file
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("checkpoint", nargs="?", default=Path(__file__).parent / "assets/dial.pt", help="of a run")
    add("--steps", type=train_cifar.COUNT, help="default: the most that it was trained for")
    add("--n", type=train_cifar.COUNT, default=64, help="how many images")
    add("--prompt", help="draw this class; default: all in turn")
    add("--out", type=Path, default=Path("samples.png"), help="a .png grid, or an .npz")
    add("--seed", type=train_cifar.WHOLE, default=0)
    args = parser.parse_args(arguments)

    with fid.usage_errors(parser):      # says an InputError in one line
        if args.out.suffix not in (".png", ".npz") or not args.out.parent.is_dir():
            raise fid.InputError(f"--out {args.out}: needs a .png or .npz in an existing folder")
        state = train_cifar.load_checkpoint(args.checkpoint)
        names, own_steps = state["class_names"], state["steps"]
        sampler = train_cifar.SAMPLERS[state["method"]]
        # "multistep" works only in the numbers of steps that the network was trained for.
        steps = args.steps or max(own_steps)
        if sampler == "multistep" and steps not in own_steps:
            raise fid.InputError(f"--steps {steps}: {args.checkpoint} is tuned for {own_steps}")
        if args.prompt and args.prompt not in names:
            raise fid.InputError(f"--prompt {args.prompt}: the classes are {names}")

    numbers = torch.arange(args.n)
    # All classes in turn, the prompt alone, or -1, for none.
    labels = numbers % len(names) if names else torch.full_like(numbers, -1)
    if args.prompt:
        labels[:] = names.index(args.prompt)
    net = train_cifar.load_network(state)
    images = generate(net, sampler, steps, numbers, labels, args.seed)
    with train_cifar.atomic(args.out) as part:
        if args.out.suffix == ".png":
            save_grid(images, part, columns=round(args.n**0.5))
        else:
            np.savez(part, arr_0=images.permute(0, 2, 3, 1).numpy())
    print(f"{str(args.out)!a}: {args.n} samples in {steps} steps; classes: {names!a}")

if __name__ == "__main__":
    main()
