"""Train a few-step generator, from nothing to a table, in one command on a GPU or a laptop.

    python train_cifar.py --steps 2                      # all of it, 10 minutes on two CPU cores
    python train_cifar.py --steps 1 2 4 8                # one network, the whole dial
    torchrun --nproc_per_node=8 train_cifar.py --steps 2

In reading order: settings, UNet (EDM's DDPM++), data, load_edm (EDM's published weights, opened
safely), the step (what is drawn, which loss, which update), report, main, and last the plumbing.
"""
import argparse, contextlib, copy, fcntl, io, json, os, pickle, resource, signal, sys, time, types
import warnings
from pathlib import Path
from pickletools import genops

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import ect, fid, mcm, sample
from fid import UserError

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun

# ---- Settings ----------------------------------------------------------------------------------

NETS = {  # arguments of UNet; a laptop's works on 2x2 patches
    "small": dict(width=32, mult=[1, 2, 2], blocks=1, attention=[], patch=2),
    "edm": dict(width=128, mult=[2, 2, 2], blocks=4, attention=[16], patch=1)}
PRESETS = {
    # A laptop: few teacher steps and an error that is nearly squared, because errors accumulate
    # along the chain of references and a short run cannot wash them out.
    "cpu": dict(iters=2100, pretrain_iters=2800, batch=32, lr=2e-3, pretrain_lr=2e-3, ema=0.995,
                dropout=0.0, net="small", T=[8, 64], huber_eps=0.1, q=2.0, double_every=300,
                ect_c=50.0, precision="fp32", compile=False, fd_samples=1000, save_every=500,
                init="none", features="random"),
    # ECT's hour for every method; the long one, ect.RECIPES["long"], by --iters, --q, ...
    "cuda": dict(ect.RECIPES["hour"], pretrain_iters=100_000, pretrain_lr=5e-4, net="edm",
                 T=[64, 1280], huber_eps=1e-4, ect_c=0.0, precision="fp16", compile=True,
                 fd_samples=50_000, save_every=1000, init="auto", features="auto")}

def settings(device):
    """-> the parser of the command line, which keeps only what is given, and all the defaults."""
    defaults = dict(PRESETS[device])
    parser = fid.Parser("train_cifar.py", description=__doc__.split("\n")[0],
                        argument_default=argparse.SUPPRESS)
    def add(name, help, default=None, low=None, high=None, **more):
        value = defaults.setdefault(name.replace("-", "_"), default)
        if low is not None:
            more["type"] = number(type(high), low, high)
        shown = str(value).strip("[]")
        parser.add_argument("--" + name, help=f"{help} (default: {shown})", **more)
    switch = dict(action=argparse.BooleanOptionalAction)
    add("steps", "sampling steps to tune for; several: one network for all", [2], 1, 64, nargs="+")
    add("method", "consistency training, distillation, or Easy Consistency Tuning", "mct",
        choices=("mct", "mcd", "ect"))  # another: see draw, step_loss and sample.generate
    add("data", "auto (CIFAR-10, else shapes), cifar10, shapes, an image folder or .npz", "auto")
    add("classes", "give the network the class labels", False, **switch)
    add("guidance", "mcd: the teacher's guidance weight, needs --classes", 0.0, 0, 100.0)
    add("init", "start from: edm, a .pkl of EDM or ECT, our .pt; none; auto: edm, else none")
    add("out", "run folder; None: runs/DATA-METHOD-STEPS")
    add("device", "where to run", device, choices=("cuda", "cpu"))
    add("seed", "of all randomness", 0, 0, 2**31)
    add("iters", "tuning iterations", None, 1, 10**9)
    add("pretrain-iters", "diffusion iterations, where --init gives no model", None, 1, 10**9)
    add("batch", "images per iteration, over all processes", None, 1, 10**6)
    add("lr", "tuning learning rate, falls linearly to 0", None, 0, 1.0)
    add("pretrain-lr", "diffusion learning rate, the same", None, 0, 1.0)
    add("ema", "decay of the averaged weights, the ones sampled", None, 0, 1.0)
    add("dropout", "one mask for both passes of a step", None, 0, 0.99)
    add("net", "small, or EDM's DDPM++", choices=tuple(NETS))
    add("T", "teacher steps, first and last", None, 1, 1e6, nargs=2)
    add("huber-eps", "mct, mcd: 1e-4, a norm, for long runs; 1, squared error", None, 0, 1e6)
    add("q", "ect: r approaches t by this factor from stage to stage", None, 1.001, 1e6)
    add("double-every", "ect: iterations per stage; 0: one stage", None, 0, 10**9)
    add("ect-c", "ect: c of the pseudo-Huber norm of an image in x", None, 0, 1e6)
    add("segmented", "ect: a consistency function for each step, not one in all", False, **switch)
    add("precision", "of the network", choices=("fp16", "tf32", "bf16", "fp32"))
    add("compile", "torch.compile the step", **switch)
    add("accum", "parts to split a batch into that does not fit in memory", 1, 1, 10**4)
    add("features", "of the distance: inception, random, a TorchScript file; auto: as it can be")
    add("fd-samples", "samples for the distance", None, 2, 10**7)
    add("many", "Heun steps that show the diffusion model at its best", 18, 2, 10**4)
    add("save-every", "iterations between checkpoints", None, 1, 10**9)
    add("log-every", "iterations between log lines", 100, 1, 10**9)
    add("profile", "measure the tuning step and stop", False, **switch)
    return parser, defaults

# ---- The network: DDPM++ as EDM ships it, so that the published weights load by key -------------

def hash32(h):
    """An integer hash on int64 tensors that hold 32-bit values (products stay below 2^63)."""
    for _ in range(2):
        h = ((h >> 16) ^ h) * 0x45D9F3B & 0xFFFFFFFF
    return (h >> 16) ^ h

def dropout(x, p, seed, layer):
    """Dropout by a mask that is a function of (seed of the sample [B], layer, element), no more.

    Both passes of a consistency step must share a mask, on every device, compiled, replayed or
    split over processes. Saved and restored generator state does not survive CUDA graphs.
    """
    element = torch.arange(x[0].numel(), device=x.device).view(x.shape[1:])
    start = hash32(seed + 0x9E3779B1 * layer & 0xFFFFFFFF).view(-1, 1, 1, 1)
    keep = hash32(start + element & 0xFFFFFFFF) >= int(p * 2**32)
    return x * keep / (1 - p)

class Conv(nn.Conv2d):
    """A convolution that EDM may fuse with 2x2 resampling: box average down, repeat up."""
    def __init__(self, c_in, c_out, kernel, resample=None):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        self.resample = {"down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2)}.get(resample)
        if resample:  # never used; a key of the published weights
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))
    def forward(self, x):
        return super().forward(self.resample(x) if self.resample else x)

def norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)

class Block(nn.Module):
    def __init__(self, c_in, c_out, c_emb, p=0.0, layer=0, resample=None, attention=False):
        super().__init__()
        self.p, self.layer, self.attention = p, layer, attention
        self.norm0, self.conv0 = norm(c_in), Conv(c_in, c_out, 3, resample)
        self.affine = nn.Linear(c_emb, c_out)
        self.norm1, self.conv1 = norm(c_out), Conv(c_out, c_out, 3)
        self.skip = Conv(c_in, c_out, 1, resample) if resample or c_in != c_out else None
        if attention:
            self.norm2, self.qkv = norm(c_out), Conv(c_out, 3 * c_out, 1)
            self.proj = Conv(c_out, c_out, 1)
    def forward(self, x, emb, seed):
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        if self.training and self.p:
            h = dropout(h, self.p, seed, self.layer)
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * 0.5**0.5
        if self.attention:
            qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (1, -1, 3))   # [B, 1, C, 3, HW]
            a = F.scaled_dot_product_attention(*qkv.permute(3, 0, 1, 4, 2).contiguous())
            x = (self.proj(a.mT.reshape(x.shape)) + x) * 0.5**0.5
        return x

class DDPMpp(nn.Module):
    """The raw network F(c_in x, c_noise, ...). Names of its blocks: {side}x{side}_{block}."""
    def __init__(self, width=128, mult=(2, 2, 2), blocks=4, classes=0, augment_dim=0, dropout=0.0,
                 resolution=32, patch=1, segments=0, attention=(16,)):
        super().__init__()
        self.patch, c_emb = patch, 4 * width
        freqs = torch.arange(width // 2, dtype=torch.float32) / (width // 2 - 1)
        self.register_buffer("freqs", (1 / 10000) ** freqs, persistent=False)
        self.map_label = nn.Linear(classes, width) if classes else None
        self.map_augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(width, c_emb)
        self.map_layer1 = nn.Linear(c_emb, c_emb)
        self.map_segment = nn.Embedding(segments, c_emb) if segments else None  # ours; mcm.segment
        layers = iter(range(1000))

        def block(c_in, c_out, **kw):
            return Block(c_in, c_out, c_emb, dropout, next(layers), **kw)
        levels = [(resolution // patch >> i, width * m) for i, m in enumerate(mult)]
        c, skips, side = width, [width], resolution // patch
        self.enc = nn.ModuleDict({f"{side}x{side}_conv": Conv(3 * patch**2, width, 3)})
        for side, c_out in levels:
            if len(skips) > 1:
                self.enc[f"{side}x{side}_down"] = block(c, c, resample="down")
                skips.append(c)
            for j in range(blocks):
                self.enc[f"{side}x{side}_block{j}"] = block(c, c_out, attention=side in attention)
                c = c_out
                skips.append(c)
        self.dec = nn.ModuleDict({f"{side}x{side}_in0": block(c, c, attention=True),
                                  f"{side}x{side}_in1": block(c, c)})
        for side, c_out in levels[::-1]:
            if side != levels[-1][0]:
                self.dec[f"{side}x{side}_up"] = block(c, c, resample="up")
            for j in range(blocks + 1):
                last = side in attention and j == blocks
                self.dec[f"{side}x{side}_block{j}"] = block(c + skips.pop(), c_out, attention=last)
                c = c_out
        self.dec[f"{side}x{side}_aux_norm"] = norm(c)
        self.dec[f"{side}x{side}_aux_conv"] = Conv(c, 3 * patch**2, 3)
        for name, p in self.named_parameters():  # as EDM: the ends of residual branches near zero
            if "map_segment" in name or name.endswith("bias"):  # a loaded model is unchanged
                nn.init.zeros_(p)
            elif p.ndim > 1:
                last = name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight"))
                nn.init.xavier_uniform_(p, 1e-5 if last else 0.2**0.5 if "qkv" in name else 1)
    def forward(self, x, c_noise, labels=None, augment=None, segment=None, seed=None):
        angle = c_noise[:, None].float() * self.freqs
        emb = torch.cat([angle.sin(), angle.cos()], 1)
        if self.map_label is not None:  # no labels: the zero vector, which still adds the bias
            labels = emb.new_zeros(1, self.map_label.in_features) if labels is None else labels
            emb = emb + self.map_label(labels * self.map_label.in_features**0.5)
        if augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if segment is not None:
            emb = emb + self.map_segment(segment)
        emb, x, skips = F.silu(emb), F.pixel_unshuffle(x, self.patch), []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("conv") else layer(x, emb, seed)
            skips.append(x)
        for name, layer in self.dec.items():
            x = torch.cat([x, skips.pop()], 1) if "block" in name else x
            x = layer(x) if "aux" in name else layer(x, emb, seed)
            x = F.silu(x) if "aux_norm" in name else x
        return F.pixel_shuffle(x, self.patch)

class UNet(nn.Module):
    """D(x, sigma) under EDM's preconditioning, sigma_data = 0.5, the same in train() and eval().

    Another network needs the same forward, .arguments to rebuild it, .autocast and .load.
    """
    def __init__(self, width=128, mult=(2, 2, 2), blocks=4, **more):  # more: see DDPMpp
        super().__init__()
        self.arguments = {"classes": 0, "resolution": 32, **more,
                          "width": width, "mult": mult, "blocks": blocks}
        self.model = DDPMpp(**self.arguments)
        self.autocast = None  # the dtype of the raw network, None: float32
    def forward(self, x, sigma, labels=None, augment=None, segment=None, seed=None):
        """x [B, 3, H, W] = x0 + sigma eps, sigma [B] or a number > 0 -> x_hat, float32.

        labels: one-hot float [B, classes], zeros for none. segment: int64 [B], of mcm.segment.
        seed: int64 [B] in [0, 2^32), of the dropout masks: fresh ones each step, default zeros.
        """
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1)
        sigma = sigma.expand(len(x))
        seed = torch.zeros(len(x), dtype=torch.int64, device=x.device) if seed is None else seed
        s = sigma.view(-1, 1, 1, 1)
        scale = (s**2 + 0.25).rsqrt()
        # Autocast inside: each pass has its own weight cache, and the no-grad pass can't poison it.
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            out = self.model(x * scale, sigma.log() / 4, labels, augment, segment, seed)
        return 0.25 * scale**2 * x + 0.5 * s * scale * out.float()
    def load(self, state, name):
        """Load `state` by key; only the segment embedding may be missing. Returns self."""
        own = {key: value for key, value in self.state_dict().items() if "map_segment" in key}
        with fid.blame(f"{name} does not fit the network, give one of this architecture"):
            self.load_state_dict({**own, **state})
        return self

# ---- Data: uint8 images [n, 3, H, W], labels [n], and a name that follows the run everywhere -----

SHAPES = ["disc", "square", "triangle"]
PAINTS = ((230, 40, 50), (40, 170, 70), (40, 90, 220), (240, 200, 40), (170, 60, 190))

def shapes(n=20_000, size=32):
    """The stand-in when nothing can be downloaded: a shape in one of five colours on a soft grey
    background. A small network learns it in minutes, and noise, blur and wrong colours all show."""
    g = torch.Generator().manual_seed(0)
    ramp = (torch.arange(size) + 0.5) / size * 2 - 1
    labels, images = torch.arange(n) % len(SHAPES), []
    for label in labels.split(1000):
        r, dx, dy, light, slope = torch.rand(5, len(label), 1, 1, generator=g)
        r = 0.4 + 0.2 * r                                                    # in half image widths
        x = ramp.view(1, 1, -1) - (dx * 2 - 1) * (0.9 - r)                   # [B, H, W], centred
        y = ramp.view(1, -1, 1) - (dy * 2 - 1) * (0.9 - r)
        edge = torch.stack([x.hypot(y) - r,                                  # < 0 inside
                            torch.maximum(x.abs(), y.abs()) - 0.85 * r,
                            torch.maximum(y, 3**0.5 / 2 * x.abs() - y / 2) - 0.6 * r])
        edge = edge[label, torch.arange(len(label))]
        inside = (0.5 - edge * size / 2).clamp(0, 1)[:, None]                # soft by one pixel
        ground = 60 + 120 * light + 100 * (slope - 0.5) * ramp.view(1, -1, 1)
        paint = torch.tensor(PAINTS)[torch.randint(len(PAINTS), (len(label),), generator=g)]
        images.append(inside * paint[:, :, None, None] + (1 - inside) * ground[:, None])
    return torch.cat(images).round().byte(), labels, SHAPES

def load_data(spec):
    """--data -> .name, .images, .labels, .classes; square images whose side a U-Net can halve."""
    images, labels, classes = shapes() if spec == "shapes" else fid.read(spec)
    n, _, height, width = images.shape
    if height != width or height % 16 or n < 8:
        raise UserError(f"--data {spec}: {n} images of {width}x{height}; give at least 8, square, "
                        "with a side that 16 divides")
    if not classes and labels.any():
        classes = [*range(labels.max() + 1)]
    return types.SimpleNamespace(name=Path(spec).resolve().stem, images=images, labels=labels,
                                 classes=classes)

# ---- EDM's published weights (CC BY-NC-SA 4.0), opened safely ------------------------------------

EDM = ("https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl",
       "4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da")

# EDM's and ECT's weights are pickles: programs that import and call. This one imports nothing. Each
# name that such files import stands for a function below or an inert Object, any other is refused,
# as are opcodes that no such file needs; source code in a file is a mere string.
OPCODES = b"\x80\x95\x94.(0JKM\x8aGX\x8cBCN\x88\x89]ae)t\x85\x86\x87}su\x8fc\x93R\x81bhjqr"
INERT = ("collections OrderedDict", "torch.nn.modules.container ModuleDict", "numpy dtype",
         "numpy.core.multiarray scalar", "numpy._core.multiarray scalar", "builtins set",
         "builtins getattr")
FIXED = dict(embedding_type="positional", resample_filter=[1, 1], sigma_data=0.5, net="EDMPrecond")

class Object(dict):
    """Stands for any dict, and for an object of any class, whose state it keeps and no more."""
    def __init__(self, *ignored):
        super().__init__()
    def __setitem__(self, key, value):  # of str only: other keys can be made to collide
        super().__setitem__(str.__str__(key), value)
    def __setstate__(self, state):
        self["state"] = state

OPERATIONS = {**{op: run for op, run in pickle._Unpickler.dispatch.items() if op in OPCODES},
              pickle.EMPTY_DICT[0]: lambda self: self.append(Object()),
              pickle.EMPTY_SET[0]: lambda self: self.append(None)}

class EDMUnpickler(pickle._Unpickler):  # Python's, as C's lets bytes claim gigabytes
    left = 2 * 10**6  # microseconds, about, so that every file ends, and EDM's are read whole
    dispatch = property(lambda self: self)  # where the library looks each operation up
    def spend(self, cost):
        self.left -= cost
        if self.left < 0:
            raise ValueError("larger than any published network")
    def __getitem__(self, opcode):
        self.spend(5 + (len(self.stack[-1]) if opcode in b"R\x81" else 0))  # calls copy arguments
        return OPERATIONS[opcode]
    def find_class(self, module, name):
        return {**dict.fromkeys(INERT, Object),
                "torch_utils.persistence _reconstruct_persistent_obj": lambda kept: kept,
                "torch._utils _rebuild_parameter": lambda tensor, *rest: tensor,
                "torch._utils _rebuild_tensor_v2": lambda *given: given[:4],
                "torch.storage _load_from_bytes": self.floats}[f"{module} {name}"]
    def floats(self, payload):
        """torch.save's bytes of old: five pickles (not run, only looked at), a length, the data."""
        self.spend(500)
        head = io.BytesIO(payload[:1000])
        names = [arg for _ in range(5) for op, arg, _ in genops(head) if op.name == "GLOBAL"]
        if names != ["torch FloatStorage"]:
            raise ValueError(f"a storage of {names}")
        return memoryview(payload)[head.tell() + 8:]
    def tensor(self, data, offset, size, stride):  # only now, so that no operation can fill one
        self.spend(500 + len(data) // 250)
        weight = torch.frombuffer(bytearray(data), dtype=torch.float32).view(size[:4])
        if (offset, stride) != (0, weight.stride()):
            raise ValueError("a weight is not the whole of its storage in order")
        return weight
    def weights(self, module, prefix=""):
        for kind in ("_parameters", "_buffers", "_modules"):  # the order of torch's state_dict
            for name, value in module["state"][kind].items():
                self.spend(10 + len(prefix + name))
                if type(value) is Object:
                    yield from self.weights(value, prefix + name + ".")
                elif type(value) is tuple:
                    yield prefix + name, self.tensor(*value)
    def network(self):
        """-> weights by name, arguments for UNet. Those not looked at show in names or shapes."""
        ema = self.load()["ema"]
        given = ema["state"]["_modules"]["model"]["state"]["_init_kwargs"]
        found = {**FIXED, **given, **ema["state"], "net": ema["class_name"].replace("ECM", "EDM")}
        mult, dropout = tuple(given["channel_mult"]), float(given["dropout"])
        counts = dict(width=given["model_channels"], blocks=given.get("num_blocks", 4),
                      classes=given["label_dim"], augment_dim=given.get("augment_dim", 0),
                      resolution=given["img_resolution"])
        if (any(type(n) is not int or not 0 <= n <= 1024 for n in (*mult, *counts.values()))
                or any(found[key] != value for key, value in FIXED.items())
                or len(mult) > 9 or counts["blocks"] > 32 or not 0 <= dropout < 1):
            raise ValueError(f"ours has {FIXED} and modest sizes")
        return dict(self.weights(ema)), dict(counts, mult=mult, dropout=dropout)

def load_edm(path):
    """EDM's or ECT's pickle -> (the state dict of its EMA, the arguments for UNet)."""
    with (fid.blame(f"{path}: no network of EDM or ECT that fits ours: give another --init"),
          open(path, "rb") as file):
        return EDMUnpickler(file).network()

# ---- One step: what is drawn, which loss, which update -------------------------------------------

PHASES = ("pretrain", "tune")

def draw(run, phase, step):
    """The random part of a step, a function of (seed, phase, step) alone: a dict of [B, ...].

    Every process draws the whole batch, of which `gradients` keeps its part: a run does not depend
    on the number of processes, and on the CPU it repeats bit for bit.
    """
    c, device, images = run.c, run.device, run.data.images
    words = np.random.SeedSequence([c.seed, PHASES.index(phase), step]).generate_state(1, np.uint64)
    on = dict(generator=torch.Generator(device).manual_seed(int(words[0]) >> 1), device=device)
    index = torch.randint(len(images), (c.batch,), **on)
    b = {"x": images[index], "eps": torch.randn(c.batch, *images.shape[1:], **on),
         "seed": torch.randint(2**32, (c.batch,), **on)}  # of the dropout masks
    if run.classes:  # one in ten is trained without its label, for guidance
        kept = torch.rand(c.batch, 1, **on) > 0.1
        b["labels"] = F.one_hot(run.data.labels[index], run.classes) * kept.float()
    if phase == "pretrain":
        b["t"] = torch.rand(c.batch, **on)
    elif c.method == "ect":
        b["t"] = ect.draw_t(c.batch, **on)
    else:
        b["N"] = run.steps[torch.randint(len(c.steps), (c.batch,), **on)]
        T = mcm.teacher_steps(step, *c.T, anneal=c.iters / 2)
        b["t"], b["s"], b["t_step"] = mcm.draw_times(c.batch, b["N"], T, **on)
    return b

def step_loss(net, teacher, c, phase, stage, edges, x, eps, seed, t, N=None, s=None, t_step=None,
              **labels):
    """[B] from what `draw` drew. All of it runs on the device and compiles as one graph."""
    x = x.float() / 127.5 - 1
    if phase == "pretrain":  # the limit T = N: every s is on an edge, so the target is the data
        alpha, sigma = mcm.at(mcm.cosine, t, x)
        z_t = alpha * x + sigma * eps
        return mcm.v_loss(mcm.as_f(net, seed=seed, **labels)(z_t, t), x, z_t, t, huber_eps=1.0)
    if c.method == "ect":
        N = c.steps[0] if c.segmented else 1  # 1: one segment, from 80 down to 0
        denoise = mcm.conditioned(net, N, seed=seed, **labels)
        return ect.ect_loss(denoise, x, eps, t, stage, q=c.q, c=c.ect_c, edges=edges)
    guide = mcm.as_f(teacher, **labels) if c.method == "mcd" else None  # else the data itself
    if c.guidance:
        guide = mcm.guided(guide, mcm.as_f(teacher), c.guidance)
    f = mcm.as_f(net, steps=N, seed=seed, **labels)
    return mcm.consistency_loss(f, x, eps, t, s, t_step, teacher=guide, huber_eps=c.huber_eps)

def rectification(step, beta=0.999):
    """RAdam is Adam times this factor (Liu et al. 1908.03265), a function of the step alone.

    torch's fused Adam skips an fp16 overflow by itself; its RAdam would ask the host each time. The
    one difference: RAdam's first five steps are momentum SGD, ours are nothing.
    """
    limit, power = 2 / (1 - beta) - 1, beta**step
    rho = limit - 2 * step * power / (1 - power)
    factor = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)
    return factor**0.5 if rho > 5 else 0.0

class Trainer:
    """A network in training, its average, its optimizer, the fp16 loss scale."""
    def __init__(self, run, net, phase, teacher=None):
        self.run, self.phase, self.teacher, c = run, phase, teacher, run.c
        self.iters, self.lr = {"pretrain": (c.pretrain_iters, c.pretrain_lr),
                               "tune": (c.iters, c.lr)}[phase]
        self.net = net.train().requires_grad_(True).to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self.params, self.averages = list(net.parameters()), list(self.ema.parameters())
        self.optimizer = torch.optim.Adam(self.params, fused=True)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=c.precision == "fp16")
        self.edges = ect.default_edges(c.steps[0]).to(run.device) if c.segmented else None
        mode = "reduce-overhead" if c.accum == 1 else None  # CUDA graphs, on a GPU
        self.loss = torch.compile(step_loss, fullgraph=True, mode=mode, disable=not c.compile)
    def gradients(self, batch, step):
        """Adds up gradients, over parts and processes -> losses [this process's images]."""
        c, run, parts, losses = self.run.c, self.run, self.run.c.accum * WORLD, []
        stage = torch.full((), ect.stage(step, c.double_every), device=run.device)
        for i in range(RANK * c.accum, (RANK + 1) * c.accum):
            part = {key: value.chunk(parts)[i] for key, value in batch.items()}
            loss = self.loss(self.net, self.teacher, c, self.phase, stage, self.edges, **part)
            self.scaler.scale(loss.mean() / parts).backward()
            losses.append(loss.detach().clone())  # CUDA graphs reuse its memory
        if WORLD > 1:  # in one message, not one for each weight
            grads = [p.grad for p in self.params if p.grad is not None]
            flat = torch.cat([grad.flatten() for grad in grads])
            torch.distributed.all_reduce(flat)
            shares = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [s.view_as(g) for s, g in zip(shares, grads)])
        return torch.cat(losses)
    def update(self, step):
        """Adam, rate falling to 0; an average, whose decay rises from 0.1 to forget the start."""
        rate = self.lr * rectification(step + 1) * (1 - step / self.iters)
        self.optimizer.param_groups[0]["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with torch.no_grad():
            decay = min(self.run.c.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.averages, self.params, 1 - decay)
    def train(self):
        """-> the averaged network."""
        for step in range(self.run.restore(self), self.iters):
            losses = self.gradients(draw(self.run, self.phase, step), step)
            self.update(step)
            self.run.tick(self, step + 1, losses)
        return self.ema

# ---- What the tuning bought, and what a step costs -----------------------------------------------

def report(run, diffusion, tuned):
    """The diffusion model at N steps and at many, the tuned one at N: a table and a picture."""
    c, n, rows = run.c, run.c.fd_samples, []
    real, floor, floor_n = fid.reference(run.data.images, run.extractor, n)
    metric = fid.metric_name(run.extractor.name, n)
    for net in (diffusion, tuned):  # the raw network: its inputs have one dtype, so one graph
        net.model.compile(dynamic=True, disable=not c.compile)
    def samples(model, N, sampler, first, last):
        net, method = (tuned, c.method) if model == "tuned" else (diffusion, "diffusion")
        return sample.generate(net, method, N, sampler=sampler, segmented=c.segmented,
                               **run.noise(first, last))
    say(f"\n{run.data.name}, {c.method}: {metric} against {len(run.data.images)} images; two sets "
        f"of {floor_n} real images are {floor:.4f} apart\n"
        f"{'model':<10} {'steps':>5} {'evaluations':>11} {'distance':>10} {'images/s':>9}")
    before, after = ([(model, N, "ddim") for N in c.steps] for model in ("diffusion", "tuned"))
    many = ("diffusion", c.many, "heun")  # at its best
    for model, N, sampler in [*before, *after, many]:
        seconds = []  # per image, of each batch
        def batches():
            for i in range(0, n, 500):
                start = time.time()
                x = sample.to_uint8(samples(model, N, sampler, i, min(i + 500, n)))
                if run.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append((time.time() - start) / len(x))
                yield from x.split(64)  # Inception's own activations are large
        made = fid.evaluate(batches(), run.extractor)
        rows.append(dict(
            model=model, method=c.method if model == "tuned" else "diffusion", steps=N,
            nfe=2 * N - 1 if sampler == "heun" else N, metric=metric,
            features=run.extractor.name, n=n, floor=floor,
            distance=fid.frechet_distance(made.mean, made.cov, real.mean, real.cov),
            images_per_second=1 / min(seconds)))  # the first batch may have compiled
        say("{model:<10} {steps:>5} {nfe:>11} {distance:>10.4f} {images_per_second:>9.0f}".format(
            **rows[-1]))
    own, now, best = (rows[i]["distance"] for i in (0, len(c.steps), -1))
    closed = f"closed {(own - now) / (own - best):.0%}" if own > best else "found nothing to close"
    say(f"tuning {closed} of the gap between {c.steps[0]} steps of the diffusion model and its "
        f"{rows[-1]['nfe']} evaluations; judge by the pictures too: {run.out}/dial.png")
    write(run.out / "result.json", lambda path: path.write_text(json.dumps(rows, indent=1)))
    write(run.out / "reference.npz", lambda path: np.savez(  # what fid.py can compare to
        path, mu=real.mean.cpu(), sigma=real.cov.cpu(), floor=(floor, floor_n)))
    others = [("diffusion", N, "ddim") for N in (1, 2, 4, 8) if N not in c.steps]
    one = before if len(c.steps) == 1 else []  # a single N: before and after
    dial = sorted([*others, *one, *after], key=lambda row: (row[1], row[0])) + [many]
    pictures = torch.cat([samples(*row, 0, 10) for row in dial])
    labels = [f"{model} {N}" for model, N, _ in dial[:-1]] + [f"diffusion {rows[-1]['nfe']}"]
    write(run.out / "dial.png", lambda path: sample.save_grid(pictures, path, 10, labels))

def profile(trainer, steps=20):
    """--profile: speed, arithmetic, memory and interruptions of a tuning step on this machine."""
    from torch.utils.flop_counter import FlopCounterMode
    run, c, batch, cuda = trainer.run, trainer.run.c, {}, trainer.run.device.type == "cuda"
    wait, watch = torch.cuda.synchronize, torch.cuda.set_sync_debug_mode
    if not cuda:
        wait = watch = lambda *_: None
    parts = {"draw": lambda i: batch.update(draw(run, "tune", i)),
             "forward and backward": lambda i: trainer.gradients(batch, i),
             "optimizer and average": trainer.update}
    spent = dict.fromkeys([*parts, "step"], 0.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for i in range(-5, 2 * steps):  # compiles and warms up, times each part, then all at once
            if i == steps:
                watch("warn")  # from here on, torch warns of each operation that waits
                start = time.perf_counter()
            for name, part in parts.items():
                began = time.perf_counter()
                part(max(i, 0))
                if i < steps:
                    wait()
                    spent[name] += (time.perf_counter() - began) / steps * (i >= 0)
        watch("default")
        wait()
    spent["step"] = (time.perf_counter() - start) / steps
    syncs = sum("called a synchronizing" in str(warning.message) for warning in seen)
    some = {key: value[:4] for key, value in batch.items()}
    given = trainer.net, trainer.teacher, c, "tune", torch.tensor(0), trainer.edges
    with FlopCounterMode(display=False) as flops:
        step_loss(*given, **some).sum().backward()
    flop, speed = flops.get_total_flops() / 4, c.batch / WORLD / spent["step"]
    peak = (torch.cuda.max_memory_allocated() if cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    say(f"{speed:.0f} images/s, {flop / 1e9:.3f} GFLOP each, {flop * speed / 1e12:.3f} TFLOP/s, "
        f"peak {peak / 2**30:.2f} GiB, {syncs} host synchronisations in {steps} steps, "
        f"{torch._dynamo.explain(step_loss)(*given, **some).graph_break_count} graph breaks;",
        ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in spent.items()))

# ---- All of it -----------------------------------------------------------------------------------

def main(arguments=None):
    run, lock = prepare(arguments)  # --out is ours as long as the lock lives
    c, diffusion = run.c, diffusion_model(run)
    # The network to tune: the same with a segment embedding, which is zero and changes nothing yet.
    net = UNet(**{**diffusion.arguments, "dropout": c.dropout,
                  "segments": max(c.steps) * (max(c.steps) + 1) // 2})
    net.to(run.device).load(diffusion.state_dict(), "diffusion.pt").autocast = diffusion.autocast
    trainer = Trainer(run, net, "tune", diffusion)
    if c.profile:
        return profile(trainer)
    tuned = trainer.train()
    if RANK == 0:
        report(run, diffusion, tuned)
    if WORLD > 1:
        torch.distributed.destroy_process_group()

def diffusion_model(run):
    """The diffusion model to tune: this run's own, else what --init gave, else one trained here.

    A run that was interrupted while training it has no diffusion.pt yet, and Trainer goes on.
    """
    c, net, own = run.c, run.init, run.out / "diffusion.pt"
    if own.exists():
        net = load_checkpoint(own, run.device)[0]
    elif not net:
        torch.manual_seed(c.seed)
        net = UNet(**NETS[c.net], dropout=c.dropout, classes=run.classes,
                   resolution=run.data.images.shape[-1]).to(run.device)
        net.autocast = HALF.get(c.precision)
        net = net if c.profile else Trainer(run, net, "pretrain").train()
    if RANK == 0 and not own.exists() and not c.profile:
        run.save("diffusion.pt", net, "pretrain")
    net.autocast = HALF.get(c.precision)
    return net.to(run.device).eval().requires_grad_(False).to(memory_format=torch.channels_last)

# ---- Plumbing: folder, checkpoints, processes, arguments. Nothing below is about the method ------

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
FREE = ("out", "init", "device", "iters", "features", "fd_samples", "many", "precision",
        "compile", "accum", "save_every", "log_every", "profile")  # may change when a run goes on

def say(*words):
    if RANK == 0:
        print(*words, flush=True)

def number(kind, low, high):
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
    return parse

def write(path, save):
    """The one way a file comes to be: save(a temporary path), flushed to the disk, then renamed."""
    temporary = path.with_name(f".part-{path.name}")
    try:
        save(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise OSError(f"cannot write {path} ({error}); what was there is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)

def load_checkpoint(path, device="cpu"):
    """A checkpoint of ours -> (its averaged network, all of it)."""
    with (fid.blame(f"{path} is missing, damaged or no checkpoint of ours: give another, or in a "
                    "run's own folder remove it, to begin again"),
          warnings.catch_warnings(action="ignore")):
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except pickle.UnpicklingError:  # whose text tells how to run what is in the file
            raise ValueError("not tensors and plain values") from None
        if lacks := {"method", "config", "data"} - state.keys():
            raise ValueError(f"it lacks {lacks}")
        return UNet(**state["arguments"]).to(device).load(state["ema"], path).eval(), state

class Run:
    """A run: settings, data, device, folder, log."""
    def __init__(self, c, data, device, saved, extractor, init):
        self.c, self.data, self.device, self.saved = c, data, device, saved
        self.extractor, self.init = extractor, init
        self.out, self.stop, self.log = Path(c.out), 0, saved.get("log", [])
        self.classes = len(data.classes) if c.classes else 0
        self.steps = torch.tensor(c.steps, device=device)
    def noise(self, first, last):
        """z and labels of samples first .. last - 1, the same in every table and picture."""
        g = torch.Generator(self.device).manual_seed(2**24 * (self.c.seed + 1) + first)
        shape = last - first, *self.data.images.shape[1:]
        given = {"z": torch.randn(shape, generator=g, device=self.device)}
        if self.classes:
            index = torch.randint(len(self.data.labels), shape[:1], generator=g, device=self.device)
            given["labels"] = F.one_hot(self.data.labels[index], self.classes).float()
        return given
    def restore(self, trainer):
        """Take up latest.pt if it is of this phase -> iterations done."""
        # The losses since the last log line, of this process's images, for the next one.
        self.recent, self.first, self.start = [], 0, time.time()
        if self.saved.get("phase") == trainer.phase:
            self.first, share = self.saved["step"], self.c.batch // WORLD
            self.recent = [each for each in self.saved["recent"] if len(each) == share]
            for name in ("net", "ema", "optimizer", "scaler"):
                if self.saved[name]:  # a scaler has a state with fp16 only
                    getattr(trainer, name).load_state_dict(self.saved[name])
        say(f"{trainer.phase}: {trainer.iters} iterations, {self.first} of them done")
        if WORLD == 1 and self.first < trainer.iters:
            for caught in (signal.SIGINT, signal.SIGTERM):
                signal.signal(caught, lambda number, frame: setattr(self, "stop", number))
        return self.first
    def tick(self, trainer, step, losses):
        """After each step: log, save, stop. The host waits for the device here and nowhere else."""
        c, phase, last, stop = self.c, trainer.phase, step == trainer.iters, self.stop
        logs = last or step % c.log_every == 0
        saves = last or step % c.save_every == 0 or stop
        self.recent.append(losses)
        if not (logs or saves):
            return
        self.recent = [each.cpu() for each in self.recent]
        self.check(trainer, step)
        if logs:
            speed = (step - self.first) * c.batch / (time.time() - self.start)
            left = int((trainer.iters - step) * c.batch / speed)
            skipped = step - int(next(iter(trainer.optimizer.state.values()))["step"])  # overflows
            losses = torch.cat(self.recent)
            self.log.append(dict(phase=phase, step=step, images_per_second=speed, skipped=skipped,
                                 loss=losses[losses.isfinite()].mean().item()))
            self.recent, self.first, self.start = [], step, time.time()
            say(f"{phase} {step}  loss {self.log[-1]['loss']:.5f}  {speed:.0f} images/s  "
                f"{left // 60}:{left % 60:02} left", f" {skipped} skipped" if skipped else "")
        if RANK == 0:
            lines = "".join(json.dumps(row) + "\n" for row in self.log)
            write(self.out / "metrics.jsonl", lambda path: path.write_text(lines))
        if saves and RANK == 0:
            self.save("latest.pt", trainer.ema, phase, step=step, recent=self.recent, log=self.log,
                      **{name: getattr(trainer, name).state_dict()
                         for name in ("net", "optimizer", "scaler")})
            N, method = (c.many, "diffusion") if phase == "pretrain" else (c.steps[-1], c.method)
            x = sample.generate(trainer.ema, method, N, sampler="heun", segmented=c.segmented,
                                **self.noise(0, 32))
            write(self.out / f"samples-{phase}-{step:06d}.png",
                  lambda path: sample.save_grid(x, path, 8))
        if stop:
            say(f"stopped at {phase} iteration {step} and saved; the same command goes on")
            sys.exit(128 + stop)
        if last:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    def check(self, trainer, step):
        """Ends a run that cannot go on, and says what was drawn for the first bad loss."""
        scaler, bad, trouble = trainer.scaler, (~torch.stack(self.recent).isfinite()).nonzero(), ""
        if len(bad) and not scaler.is_enabled():  # which skips such steps
            i, j = bad[0].tolist()
            which, step = j + RANK * len(self.recent[0]), step - len(self.recent) + i
            drawn = {name: value[which].item() for name, value in draw(
                self, trainer.phase, step).items() if value.ndim == 1}
            trouble = f"loss not finite, sample {which}, {drawn}"
        elif scaler.is_enabled() and scaler.get_scale() < 1:
            trouble = "fp16 overflows at every loss scale"
        elif not torch.stack(torch._foreach_norm(trainer.params)).isfinite().all():
            trouble = "weights not finite"
        if trouble:
            sys.exit(f"error: {trainer.phase} iteration {step}: {trouble}; the last checkpoint is "
                     "kept: try a smaller --lr or another --precision")
    def save(self, name, ema, phase, **more):
        method = "diffusion" if phase == "pretrain" else self.c.method
        state = dict(ema=ema.state_dict(), arguments=ema.arguments, method=method, phase=phase,
                     schedule="edm" if method == "ect" else "cosine", data=self.data.name,
                     config=vars(self.c), **more)
        write(self.out / name, lambda path: torch.save(state, path))

# The command line, checked, and what it names, read.

AUTO = {"data": ("cifar10", "shapes", "the built-in shapes stand in for it"),
        "init": ("edm", "none", "a diffusion model is trained first"),
        "features": ("inception", "random", "random features measure the distance")}

def choose(c, name, get):
    """get(setting). "auto" is the first choice, or loudly the second where that cannot be had."""
    if getattr(c, name) == "auto":
        first, second, what = AUTO[name]
        try:
            found = get(first)
            setattr(c, name, first)
            return found
        except UserError:
            say(f"*** NO {first.upper()} HERE (--{name} {first} says why): {what.upper()} ***")
            setattr(c, name, second)
    return get(getattr(c, name))

def load_init(path, asked):
    """--init -> None, or a diffusion model of the arguments asked: of EDM, of ECT, or ours."""
    if path == "none":
        return None
    if path == "edm":
        path = str(fid.fetch(*EDM))
        say("EDM's weights are CC BY-NC-SA 4.0: not for commercial use, nor what is made of them")
    with fid.blame(f"--init {path}: give a diffusion model of {asked}, as diffusion.pt of a run"):
        if path.endswith(".pkl"):
            (state, arguments), kind = load_edm(path), "diffusion model of EDM or ECT"
            net = UNet(**arguments).load(state, path)
        else:
            net, state = load_checkpoint(path)
            kind = f"{state['method']} model of ours"
        its = {name: net.arguments[name] for name in asked}
        say(f"--init: {path} is a {kind}, {its}")
        if not kind.startswith("diffusion") or its != asked:
            raise ValueError(f"this is a {kind} of {its}")
    return net

def inputs(c, device):
    """What the first process reads for all -> data, features, the model to begin with or None."""
    features = choose(c, "features", lambda spec: fid.feature_extractor(spec, device))
    data = choose(c, "data", load_data)
    side = data.images.shape[-1]
    c.data = f"{data.name}, {len(data.images)} images of {side}x{side}"
    c.out = c.out or f"runs/{data.name}-{c.method}-{'-'.join(map(str, c.steps))}"
    if c.classes and not data.classes:
        raise UserError(f"--classes: {c.data} has none: give a folder of folders, or leave it out")
    latest, own = Path(c.out, "latest.pt"), Path(c.out, "diffusion.pt")
    if latest.exists() and not own.exists() and load_checkpoint(latest)[1].get("phase") == "tune":
        raise UserError(f"--out {c.out} has no diffusion.pt, which its latest.pt tunes: put it "
                        "back, or choose another --out")
    if latest.exists() or own.exists():
        if c.init not in ("auto", "none"):
            say(f"--init is not looked at: {c.out} has its own diffusion model already")
        return data, features, None
    if c.init == "auto" and c.net != "edm":
        c.init = "none"
    asked = dict(resolution=side, classes=len(data.classes) if c.classes else 0)
    return data, features, choose(c, "init", lambda path: load_init(path, asked))

def open_folder(out):
    """Make --out ours alone -> its latest checkpoint (or {}), the lock (the system drops it)."""
    latest = out / "latest.pt"
    with fid.blame(f"--out {out} cannot be written or is in use by another run: choose another"):
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "a")
        if RANK == 0:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return (load_checkpoint(latest)[1] if latest.exists() else {}), lock

def refuse_contradictions(parser, c):
    if c.segmented and (c.method != "ect" or len(c.steps) > 1):
        parser.error("--segmented needs --method ect and a single --steps")
    if c.guidance and not (c.classes and c.method == "mcd"):
        parser.error("--guidance needs --classes and --method mcd")
    if c.batch % (c.accum * WORLD):
        parser.error(f"--batch {c.batch} cannot be split evenly over --accum {c.accum} and the "
                     "processes: make it a multiple")

def prepare(arguments):
    """The command line, checked, and all that it names, read -> Run, lock."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser, _ = settings(here)
    given = vars(parser.parse_args(arguments))
    c = types.SimpleNamespace(**{**settings(given.get("device", here))[1], **given})
    if c.device == "cuda" and here == "cpu":
        parser.error("--device cuda: torch sees no GPU here; use --device cpu")
    refuse_contradictions(parser, c)
    device = torch.device("cpu")
    if c.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            parser.error(f"--nproc_per_node: there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    if WORLD > 1:
        torch.distributed.init_process_group("nccl" if c.device == "cuda" else "gloo")
    data, extractor, init = inputs(c, device) if RANK == 0 else [None] * 3
    if WORLD > 1:  # so one process downloads, and none can have others
        shared = [c, data, init]
        torch.distributed.broadcast_object_list(shared)
        c, data, init = shared
    saved, lock = open_folder(Path(c.out))
    # What the run was begun with stays, even where it is another machine's default.
    frozen = {k: v for k, v in saved.get("config", {}).items() if k not in FREE}
    for key, now in {**given, "data": c.data}.items():
        if frozen.get(key, now) != now:
            parser.error(f"--{key.replace('_', '-')}: {c.out} was begun with {frozen[key]}, not "
                         f"{now}: leave that as it was, or choose another --out")
    vars(c).update(frozen)
    refuse_contradictions(parser, c)
    torch.set_float32_matmul_precision("highest" if c.precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = c.precision != "fp32"
    data.images, data.labels = data.images.to(device), data.labels.to(device)
    return Run(c, data, device, saved, extractor, init), lock

if __name__ == "__main__":
    fid.run(main)
