"""Samplers, plain functions of plain callables, and the command from a checkpoint to images.

    multistep   f(z, t)      MCM Algorithm 2. With a diffusion model's f this same loop is DDIM
    addim       f(z, t)      MCM Algorithm 3: DDIM that keeps its variance
    renoise     D(x, sigma)  predict, add fresh noise, predict: consistency models, ECT's 2 steps
    heun        D(x, sigma)  EDM Algorithm 1 without churn: second order, 2 * steps - 1 evaluations

All take unit Gaussian noise [B, ...], save multistep and addim: z at their first time. Results are
on the scale of [-1, 1], not clipped. The state is float64, as float32 errors add up at sigma = 80.
f gets the noise's dtype; D gets float64 and casts it. Labels and guidance belong to the callable.

    python sample.py --steps 2                                   # a model that comes with the code
    python sample.py CKPT --steps 2 --n 64 --out grid.png
    python sample.py CKPT --n 50000 --out samples.npz            # uint8 NHWC in arr_0, for fid.py
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import ect, fid, mcm

@torch.no_grad()
def multistep(f, z, steps, schedule=mcm.cosine, move=mcm.ddim):
    """MCM Algorithm 2, a jump a segment: z at the first time -> z at the last.

    steps: N for the times 1, (N-1)/N, ..., 0, or the times.
    """
    times = [i / steps for i in range(steps, -1, -1)] if isinstance(steps, int) else steps
    state = z.double()
    for t, s in zip(times[:-1], times[1:]):
        x = f(state.to(z.dtype), torch.full((len(z),), t, dtype=z.dtype, device=z.device))
        state = move(x.double(), state, t, s, schedule=schedule)
    return state.to(z.dtype)

ddim = multistep  # eq. (4), repeated: what differs is f, not the sampler

def paper_x_var(alpha, sigma):
    """The variance per element that x_hat lacks, as the paper guesses it for images."""
    return 0.1 / (2 + alpha**2 / sigma**2)

def addim(f, z, steps, x_var=paper_x_var, schedule=mcm.cosine):
    """MCM Algorithm 3, as multistep; x_var(alpha_t, sigma_t) -> missing variance per element."""
    def move(x, z, t, s, schedule):
        return mcm.addim(x, z, t, s, x_var(*mcm.at(schedule, t, z)), schedule)
    return multistep(f, z, steps, schedule, move)

@torch.no_grad()
def renoise(denoise, latents, sigmas, noise=None):
    """x = D(sigma_0 latents), then x = D(x + sigma noise) for each further sigma -> x, float64.

    sigmas: decreasing, ECT's are 80, 0.821; noise: a [B, ...] for each after the first, or fresh.
    """
    x = torch.zeros_like(latents, dtype=torch.float64)
    for i, sigma in enumerate(sigmas):
        eps = latents if i == 0 else torch.randn_like(x) if noise is None else noise[i - 1]
        t = torch.full((len(x),), float(sigma), dtype=x.dtype, device=x.device)
        x = denoise(x + sigma * eps.double(), t).double()
    return x

@torch.no_grad()
def heun(denoise, latents, steps, sigma_min=mcm.SIGMA_MIN, sigma_max=mcm.SIGMA_MAX, rho=7):
    """EDM Algorithm 1 without churn: latents ~ N(0, 1) -> x, float64."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64).tolist()
    sigmas = [(high + u * (low - high)) ** rho for u in ramp] + [0.0]
    x = latents.double() * sigmas[0]
    for t, s in zip(sigmas[:-1], sigmas[1:]):
        at = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        slope = (x - denoise(x, at).double()) / t
        euler = x + (s - t) * slope
        if s > 0:  # the average of the slopes at both ends
            slope = (slope + (euler - denoise(euler, torch.full_like(at, s)).double()) / s) / 2
        x = x + (s - t) * slope
    return x

# ---- From a network to images --------------------------------------------------------------------

def generate(net, method, steps, z, sampler=None, segmented=False, **condition):
    """Noise z [B, C, H, W] -> x, by what suits how `net` was trained: diffusion, mct, mcd or ect.

    sampler: ddim, addim or heun, for a diffusion model. segmented: ECT in segments. condition: what
    else the network is to be given, as labels.
    """
    if method == "diffusion" and sampler == "heun":
        return heun(mcm.conditioned(net, **condition), z, steps).float()
    if method == "diffusion":
        return (addim if sampler == "addim" else ddim)(mcm.as_f(net, **condition), z, steps)
    if method != "ect":
        return multistep(mcm.as_f(net, steps=steps, **condition), z, steps)
    edges = ect.default_edges(steps).tolist()[::-1]
    if segmented:
        f = mcm.as_f(net, mcm.edm, steps, **condition)
        return multistep(f, mcm.SIGMA_MAX * z, [mcm.SIGMA_MAX, *edges, 0.0], mcm.edm)
    # The further noise is a function of the batch's first, so that results repeat.
    g = torch.Generator(z.device).manual_seed(int(z.double().abs().sum() * 1e6))
    noise = torch.randn(steps, *z.shape, generator=g, device=z.device)
    # For two steps ECT gives the sigma. For others we take steps of equal length in cosine's t.
    sigmas = [mcm.SIGMA_MAX, *([ect.MID_SIGMA] if steps == 2 else edges)]
    return renoise(mcm.conditioned(net, 1, **condition), z, sigmas, noise).float()

def to_uint8(x):
    """[-1, 1] -> 0 .. 255, to the nearest: the inverse of v / 127.5 - 1 on all 256 levels."""
    return (x.clamp(-1, 1) * 127.5 + 127.5).round().byte()

def save_grid(x, path, columns, labels=()):
    """x [B, 3, H, W] in [-1, 1] -> a PNG, `columns` images wide, at twice their size."""
    from PIL import Image, ImageDraw
    from torchvision.utils import make_grid
    grid = make_grid(to_uint8(x.cpu()), columns, pad_value=255).permute(1, 2, 0)
    picture = Image.fromarray(grid.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy())
    canvas = Image.new("RGB", (picture.width + 90 * bool(labels), picture.height), "white")
    canvas.paste(picture, (canvas.width - picture.width, 0))
    for i, label in enumerate(labels):
        y = (i + 0.4) * picture.height / len(labels)
        ImageDraw.Draw(canvas).text((6, y), label, fill="black")
    canvas.save(path, format="PNG")

def main(arguments=None):
    from train_cifar import load_checkpoint, number, write
    parser = fid.Parser(prog="sample.py", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", default=Path(__file__).parent / "assets/dial.pt",
                        help="latest.pt or diffusion.pt of a run; default: shapes, 1 2 4 8 steps")
    parser.add_argument("--steps", type=number(int, 1, 1000), help="default: most tuned for, or 18")
    parser.add_argument("--n", type=number(int, 1, 10**7), default=64, help="how many")
    parser.add_argument("--out", default="samples.png", help="a .png grid, or .npz (arr_0, NHWC)")
    parser.add_argument("--sampler", choices=("ddim", "addim", "heun"),
                        help="of a diffusion model; default: ddim up to 8 steps, else heun")
    parser.add_argument("--class-label", type=number(int, 0, 10**6), help="default: all in turn")
    parser.add_argument("--batch", type=number(int, 1, 10**6), default=250)
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    out, label = Path(args.out), args.class_label
    if out.suffix not in (".png", ".npz") or not out.parent.is_dir():
        parser.error(f"--out {out}: give a .png or .npz in a folder that exists")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out")
    net, state = load_checkpoint(args.checkpoint, args.device)
    method, config, classes = state["method"], state["config"], net.arguments["classes"]
    segmented = config["segmented"]
    steps = args.steps or (18 if method == "diffusion" else max(config["steps"]))
    sampler = args.sampler or ("heun" if steps > 8 else "ddim")
    if args.sampler and method != "diffusion":
        parser.error(f"--sampler is for diffusion models, this one is tuned by {method}")
    if not (method == "diffusion" or method == "ect" and not segmented or steps in config["steps"]):
        parser.error(f"--steps {steps}: {args.checkpoint} was trained for {config['steps']}")
    if label is not None and label >= classes:
        parser.error(f"--class-label {label}: {args.checkpoint} knows {classes} classes")
    net.model.compile(dynamic=True, disable=args.device == "cpu")
    side, x = net.arguments["resolution"], []
    z = torch.randn(args.n, 3, side, side, generator=torch.Generator().manual_seed(args.seed))
    index = torch.arange(args.n) % max(classes, 1) if label is None else torch.tensor(label)
    for noise, c in zip(z.split(args.batch), index.expand(args.n).split(args.batch)):
        labels = F.one_hot(c, classes).float().to(args.device) if classes else None
        x.append(generate(net, method, steps, noise.to(args.device), sampler, segmented,
                          labels=labels).cpu())
    x = torch.cat(x)
    if out.suffix == ".npz":
        images = to_uint8(x).permute(0, 2, 3, 1).numpy()
        write(out, lambda path: np.savez(path, arr_0=images))
    else:
        write(out, lambda path: save_grid(x, path, math.ceil(args.n**0.5)))
    by = f"diffusion ({sampler})" if method == "diffusion" else method
    print(f"{out}: {args.n} samples of {state['data']} by {by} in {steps} steps")

if __name__ == "__main__":
    fid.run(main)
