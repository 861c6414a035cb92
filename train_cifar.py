"""Train a few-step generator, from nothing to a table, in one command on a GPU or a laptop.

    python train_cifar.py --steps 2                      # all of it, 11 minutes on two CPU cores
    python train_cifar.py --steps 1 2 4 8                # one network, the whole dial
    torchrun --nproc_per_node=8 train_cifar.py --steps 2

In reading order: Config (every setting, once), UNet (EDM's DDPM++), data, load_edm (EDM's published
weights, opened safely), the step (what is drawn, which loss), train, report; plumbing comes last.
"""
import argparse
import copy
import fcntl
import io
import json
import math
import operator
import os
import signal
import sys
import time
import types
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from pickletools import genops, markobject

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import ect
import fid
import mcm
import sample
from fid import UserError

# ------------------------------------------------------------------------------------------------
# Settings.

HOUR = ect.RECIPES["hour"]

def opt(default, help, low=None, high=None, kind=None, **more):
    kind = kind or type(default)
    return field(default=default, metadata=dict(help=help, kind=kind, range=(low, high), more=more))

@dataclass
class Config:
    """Every setting, once. None means: by device, see PRESETS."""
    steps: tuple = opt((2,), "sampling steps to tune for; several: one network for all",
                       1, 64, int, nargs="+")
    method: str = opt("mct", "consistency training, distillation, or Easy Consistency Tuning",
                      choices=("mct", "mcd", "ect"))
    data: str = opt("auto", "auto (CIFAR-10, else shapes), cifar10, shapes, an image folder, .npz")
    init: str = opt(
        "auto", "start from: edm (a GPU's default), a .pkl of EDM or ECT, our .pt; or none")
    out: str = opt("", "run folder, runs/DATA-METHOD-STEPS if empty")
    device: str = opt("auto", "where to run", choices=("auto", "cuda", "cpu"))
    seed: int = opt(0, "of all randomness", 0, 2**31)
    iters: int = opt(None, "tuning iterations", 1, 10**9, int)
    pretrain_iters: int = opt(None, "diffusion iterations, without --init", 1, 10**9, int)
    batch: int = opt(None, "images per iteration, over all processes", 1, 10**6, int)
    lr: float = opt(None, "tuning learning rate, falls linearly to 0", 0, 1, float)
    pretrain_lr: float = opt(None, "diffusion learning rate, the same", 0, 1, float)
    ema: float = opt(None, "decay of the averaged weights, the ones sampled", 0, 1, float)
    dropout: float = opt(None, "one mask for both passes of a step", 0, 0.99, float)
    width: int = opt(None, "U-Net channels", 8, 1024, int)
    mult: tuple = opt(None, "channel multiplier at each resolution", 1, 16, int, nargs="+")
    blocks: int = opt(None, "U-Net blocks per resolution", 1, 16, int)
    attention: tuple = opt(
        None, "resolutions with attention, beside the lowest", 1, 4096, int, nargs="*")
    patch: int = opt(None, "space-to-depth before the U-Net", 1, 16, int)
    T: tuple = opt(None, "teacher steps, first and last", 1, 10**6, float, nargs=2)
    huber_eps: float = opt(None, "1e-4: a norm (long runs); 1: squared (short)", 0, 1e6, float)
    q: float = opt(None, "ECT: how fast r approaches t", 1.001, 1e6, float)
    double_every: int = opt(None, "ECT: iterations per stage; 0: one stage", 0, 10**9, int)
    ect_c: float = opt(None, "ECT: c of the pseudo-Huber norm of an image", 0, 1e6, float)
    segmented: bool = opt(False, "ECT: one consistency function per step, not one in all")
    precision: str = opt(None, "of the network", choices=("fp16", "tf32", "bf16", "fp32"))
    compile: bool = opt(None, "torch.compile the step", kind=bool)
    accum: int = opt(1, "parts to split a batch into that does not fit in memory", 1, 10**4)
    features: str = opt("random", "of the Frechet distance: inception, random, TorchScript file")
    fd_samples: int = opt(None, "samples for the Frechet distance", 2, 10**7, int)
    many: int = opt(18, "Heun steps of the diffusion model at its best", 2, 10**4)
    save_every: int = opt(None, "iterations between checkpoints", 1, 10**9, int)
    log_every: int = opt(100, "iterations between log lines", 1, 10**9)

PRESETS = {
    # A laptop: a small U-Net on 2x2 patches. Squared error and few teacher steps, because errors
    # accumulate along the chain of references and a short run cannot wash them out.
    "cpu": dict(iters=1500, pretrain_iters=3200, batch=32, lr=2e-3, pretrain_lr=2e-3, ema=0.995,
                dropout=0.0, width=32, mult=(1, 2, 2), blocks=1, attention=(), patch=2, T=(8, 64),
                huber_eps=1.0, q=2.0, double_every=250, ect_c=50.0, precision="fp32", compile=False,
                fd_samples=1000, save_every=500),
    # ECT's hour for every method; ect.RECIPES has the long one, to be given by --iters, --q, ...
    "cuda": dict(iters=HOUR.iterations, pretrain_iters=100_000, batch=HOUR.batch, lr=HOUR.lr,
                 pretrain_lr=5e-4, ema=HOUR.ema, dropout=HOUR.dropout, width=128, mult=(2, 2, 2),
                 blocks=4, attention=(16,), patch=1, q=HOUR.q, double_every=HOUR.double_every,
                 ect_c=0.0,
                 T=(64, 1280), huber_eps=1e-4, precision="fp16", compile=True, fd_samples=50_000,
                 save_every=1000),
}

# ------------------------------------------------------------------------------------------------
# The network: DDPM++ as EDM ships it, so that the published weights load by key. shared names:
# {resolution}x{resolution}_{block}. Comments give the shapes of the full network.

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
        self.resample = resample
        if resample:  # never used; a key of the published weights
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x):
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return super().forward(x)

def norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)

class Block(nn.Module):
    def __init__(self, c_in, c_out, c_emb, p=0.0, layer=0, resample=None, attention=False):
        super().__init__()
        self.p, self.layer = p, layer
        self.norm0 = norm(c_in)
        self.conv0 = Conv(c_in, c_out, 3, resample)
        self.affine = nn.Linear(c_emb, c_out)
        self.norm1 = norm(c_out)
        self.conv1 = Conv(c_out, c_out, 3)
        self.skip = Conv(c_in, c_out, 1, resample) if resample or c_in != c_out else None
        if attention:
            self.norm2 = norm(c_out)
            self.qkv = Conv(c_out, 3 * c_out, 1)
            self.proj = Conv(c_out, c_out, 1)
        self.attention = attention

    def forward(self, x, emb, seed):
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        if self.training and self.p:
            h = dropout(h, self.p, seed, self.layer)
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * 0.5**0.5
        if self.attention:
            B, C, H, W = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(B, 1, C, 3, H * W).transpose(2, 4)
            q, k, v = qkv.contiguous().unbind(3)                                  # [B, 1, HW, C]
            a = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(B, C, H, W)
            x = (self.proj(a) + x) * 0.5**0.5
        return x

class DDPMpp(nn.Module):
    """The raw network F(c_in x, c_noise, labels, augment labels, segment)."""

    def __init__(self, width=128, mult=(2, 2, 2), blocks=4, classes=0, augment_dim=0, dropout=0.0,
                 resolution=32, patch=1, segments=0, attention=(16,)):
        super().__init__()
        self.patch = patch
        c_emb = 4 * width
        freqs = torch.arange(width // 2, dtype=torch.float32) / (width // 2 - 1)
        self.register_buffer("freqs", (1 / 10000) ** freqs, persistent=False)
        self.map_label = nn.Linear(classes, width) if classes else None
        self.map_augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(width, c_emb)
        self.map_layer1 = nn.Linear(c_emb, c_emb)
        # Ours: which (N, segment) a time lies in. Zero at first, so a loaded model is unchanged.
        self.map_segment = nn.Embedding(segments, c_emb) if segments else None
        layers = iter(range(1000))

        def block(c_in, c_out, **kw):
            return Block(c_in, c_out, c_emb, dropout, next(layers), **kw)
        sizes = [f"{size}x{size}" for size in (resolution // patch >> i for i in range(len(mult)))]
        attends = [size in [f"{a}x{a}" for a in attention] for size in sizes]
        c, skips = width, [width]
        self.enc = nn.ModuleDict({f"{sizes[0]}_conv": Conv(3 * patch**2, width, 3)})
        for i, (size, m) in enumerate(zip(sizes, mult)):
            if i > 0:
                self.enc[f"{size}_down"] = block(c, c, resample="down")
                skips.append(c)
            for j in range(blocks):
                self.enc[f"{size}_block{j}"] = block(c, width * m, attention=attends[i])
                c = width * m
                skips.append(c)
        self.dec = nn.ModuleDict({f"{sizes[-1]}_in0": block(c, c, attention=True),
                                  f"{sizes[-1]}_in1": block(c, c)})
        for i, (size, m) in reversed(list(enumerate(zip(sizes, mult)))):
            if i < len(mult) - 1:
                self.dec[f"{size}_up"] = block(c, c, resample="up")
            for j in range(blocks + 1):
                self.dec[f"{size}_block{j}"] = block(c + skips.pop(), width * m,
                                                     attention=attends[i] and j == blocks)
                c = width * m
        self.dec[f"{sizes[0]}_aux_norm"] = norm(c)
        self.dec[f"{sizes[0]}_aux_conv"] = Conv(c, 3 * patch**2, 3)
        for name, p in self.named_parameters():  # as EDM: the ends of residual branches near zero
            if "map_segment" in name or name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim > 1:
                last = name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight"))
                nn.init.xavier_uniform_(p, 1e-5 if last else 0.2**0.5 if "qkv" in name else 1)

    def forward(self, x, c_noise, labels=None, augment=None, segment=None, seed=None):
        angle = c_noise[:, None].float() * self.freqs
        emb = torch.cat([angle.sin(), angle.cos()], 1)
        if self.map_label is not None:  # no labels: the zero vector, which still adds the bias
            if labels is None:
                labels = emb.new_zeros(1, self.map_label.in_features)
            emb = emb + self.map_label(labels * self.map_label.in_features**0.5)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        emb = F.silu(self.map_layer0(emb))
        emb = self.map_layer1(emb)
        if segment is not None:
            emb = emb + self.map_segment(segment)
        emb = F.silu(emb)
        x = F.pixel_unshuffle(x, self.patch)
        skips = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("conv") else layer(x, emb, seed)
            skips.append(x)
        for name, layer in self.dec.items():
            if name.endswith("aux_norm"):
                x = F.silu(layer(x))
            elif name.endswith("aux_conv"):
                x = layer(x)
            else:
                x = layer(torch.cat([x, skips.pop()], 1) if "block" in name else x, emb, seed)
        return F.pixel_shuffle(x, self.patch)

class UNet(nn.Module):
    """D(x, sigma) under EDM's preconditioning, sigma_data = 0.5; the same in train and eval.

    arguments: those of DDPMpp.
    """

    def __init__(self, width=128, mult=(2, 2, 2), blocks=4, **more):
        super().__init__()
        self.arguments = dict(more, width=width, mult=mult, blocks=blocks)
        self.model = DDPMpp(**self.arguments)
        self.half = None  # the autocast dtype of the raw network

    def forward(self, x, sigma, labels=None, augment=None, segment=None, seed=None):
        """x [B, 3, H, W] = x0 + sigma eps, sigma [B] or a number > 0 -> x_hat, float32.

        labels: one-hot float [B, classes]; segment: int64 [B], rows of mcm.segment; seed: int64 [B]
        in [0, 2^32), of the dropout masks: give a fresh one each step, default zeros.
        """
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1)
        sigma = sigma.expand(len(x))
        if seed is None:
            seed = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        s = sigma.view(-1, 1, 1, 1)
        scale = (s**2 + 0.25).rsqrt()
        # Autocast inside: each pass has its own weight cache, and the no-grad pass can't poison it.
        with torch.autocast(x.device.type, self.half, enabled=self.half is not None):
            out = self.model(x * scale, sigma.log() / 4, labels, augment, segment, seed)
        return 0.25 * scale**2 * x + 0.5 * s * scale * out.float()

    def load(self, state, name):
        """Load `state` by key; only the segment embedding may be missing. Returns self."""
        own = self.state_dict()
        odd = [key for key in own.keys() | state.keys() if "map_segment" not in key and (
            key not in own or key not in state or own[key].shape != state[key].shape)]
        if odd:
            raise UserError(f"{name} does not fit the network at {sorted(odd)[:3]}: give one of "
                            "this architecture")
        self.load_state_dict(state, strict=False)
        return self

# ------------------------------------------------------------------------------------------------
# Data: one uint8 tensor [n, 3, H, W], labels [n], and a name that follows the run everywhere.

SHAPES = ("disc", "square", "triangle")
PAINTS = ((230, 40, 50), (40, 170, 70), (40, 90, 220), (240, 200, 40), (170, 60, 190))

def shapes(n=20_000, size=32, seed=0):
    """The stand-in when nothing can be downloaded: a shape in one of five colours on a soft grey
    background. A small network learns it in minutes, and noise, blur and wrong colours all show."""
    g = torch.Generator().manual_seed(seed)
    ramp = (torch.arange(size) + 0.5) / size * 2 - 1
    labels = torch.arange(n) % len(SHAPES)
    images = []
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
        paint = torch.randint(len(PAINTS), (len(label),), generator=g)
        paint = torch.tensor(PAINTS)[paint][:, :, None, None]
        images.append((inside * paint + (1 - inside) * ground[:, None]).round().byte())
    return torch.cat(images), labels

@dataclass
class Data:
    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: list

def load_data(spec):
    """--data -> Data; square images whose side the U-Net can halve."""
    if spec == "auto":
        try:
            return load_data("cifar10")
        except UserError as error:
            say(f"{error}\n*** NO CIFAR-10: THE BUILT-IN SHAPES STAND IN FOR IT, SEE --data ***")
            return load_data("shapes")
    if spec == "shapes":
        return Data(spec, *shapes(), SHAPES)
    if spec == "cifar10":
        return Data(spec, *fid.read_cifar10())
    data = Data(Path(spec).resolve().stem, * \
                (fid.read_npz if spec.endswith(".npz") else fid.read_folder)(spec))
    height, width = data.images.shape[2:]
    if height != width or height % 16 or len(data.images) < 8:
        raise UserError(f"--data {spec}: {len(data.images)} images of {width}x{height}; give at "
                        "least 8, square, with a side that 16 divides")
    return data

# ------------------------------------------------------------------------------------------------
# EDM's published weights (CC BY-NC-SA 4.0), opened safely.

EDM = ("https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl",
       "4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da")

# EDM's and ECT's weights are pickles: programs that import and call. So nothing here unpickles:
# EDMReader turns opcodes into dicts, lists, plain values and tensors, with stubs of its own for the
# few names that such files import. All else is refused; source code in a file is a mere string.
PUSHES = {  # what opcodes put on the stack, given their argument and what they take from there
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES "
    "NONE NEWTRUE NEWFALSE": lambda arg: arg,  # None for booleans: nothing here needs one
    "EMPTY_LIST EMPTY_SET EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3": lambda _, *items: [*items],
    "EMPTY_DICT": lambda _: {}, "APPEND APPENDS": lambda _, old, *new: operator.iadd(old, new),
    "SETITEM SETITEMS": lambda _, old, *new: operator.ior(  # str only: other keys can collide
        old, dict(zip(map(str.__str__, new[::2]), new[1::2]))),
    "GLOBAL STACK_GLOBAL": lambda name, *words: EDMReader.stubs[name or " ".join(words)],
    "BUILD": lambda _, module, state: {"state": state}, "BINPERSID STOP": lambda _, value: value}
PUSHES = {op: push for ops, push in PUSHES.items() for op in ops.split()}
FIXED = dict(embedding_type="positional", resample_filter=[1, 1], sigma_data=0.5, net="EDMPrecond")

class EDMReader:
    left = 850 << 20  # bytes, each opcode counting 4,000; EDM's CIFAR-10 network takes 730 MB

    def spend(self, size):  # so time and memory end, whatever a file claims, shares or nests
        self.left -= 4000 + size
        if self.left < 0:
            raise ValueError("larger than any published network")

    def run(self, stream):
        stack, marks, memo = [], [], {}
        for opcode, arg, _ in genops(stream):
            self.spend(sys.getsizeof(arg))
            op, needs = opcode.name, opcode.stack_before
            start = (marks.pop() - needs.index(markobject) if markobject in needs
                     else len(stack) - len(needs))
            taken, stack[start:] = stack[start:], []
            if op == "MARK":
                marks.append(len(stack))
            elif op in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif op in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                stack += taken
                memo[len(memo) if arg is None else arg] = stack[-1]
            elif op in ("REDUCE", "NEWOBJ"):
                stack.append(taken[0](self, *taken[1][:4]))
            elif op not in ("PROTO", "FRAME", "POP"):
                stack.append(PUSHES[op](arg, *taken))
        return stack[-1]

    def floats(self, payload):
        stream = io.BytesIO(payload)  # torch.save's of old: five pickles, the data's length, data
        for _ in range(5):  # `stubs` has no storage but FloatStorage
            self.run(stream)
        return memoryview(payload)[stream.tell() + 8:]

    def tensor(self, data, offset, size, stride):
        self.spend(memoryview(data).nbytes)
        weight = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(size[:9])
        if [offset, stride] != [0, [*weight.stride()]]:
            raise ValueError("a weight is not the whole of its storage in order")
        return weight

    stubs = {
        "torch_utils.persistence _reconstruct_persistent_obj,torch._utils _rebuild_parameter,"
        "torch FloatStorage,numpy.core.multiarray scalar,numpy._core.multiarray scalar,"
        "numpy dtype,builtins set,builtins getattr": lambda self, first, *rest: first,
        "collections OrderedDict,torch.nn.modules.container ModuleDict": lambda self: {},
        "torch.storage _load_from_bytes": floats, "torch._utils _rebuild_tensor_v2": tensor}
    stubs = {name: stub for names, stub in stubs.items() for name in names.split(",")}

    def weights(self, module, prefix=""):
        for kind in ("_parameters", "_buffers", "_modules"):  # the order of torch's state_dict
            for name, value in module["state"][kind].items():
                self.spend(99 * sys.getsizeof(prefix + name))
                if type(value) is dict:
                    yield from self.weights(value, prefix + name + ".")
                elif type(value) is torch.Tensor:
                    yield prefix + name, value

    def network(self, stream):  # arguments not looked at show in the weights' names or shapes
        ema = self.run(stream)["ema"]
        given = ema["state"]["_modules"]["model"]["state"]["_init_kwargs"]
        found = {**FIXED, **given, **ema["state"], "net": ema["class_name"].replace("ECM", "EDM")}
        kwargs = dict(mult=tuple(given["channel_mult"][:9]), dropout=float(given["dropout"]),
                      width=given["model_channels"], blocks=given.get("num_blocks", 4),
                      classes=given["label_dim"], augment_dim=given.get("augment_dim", 0),
                      resolution=given["img_resolution"])
        mult, dropout, *counts = kwargs.values()
        if (any(type(n) is not int or not 0 <= n <= 1024 for n in (*mult, *counts))
                or kwargs["blocks"] > 32 or not 0 <= dropout < 1 or {**found, **FIXED} != found):
            raise ValueError(f"ours has {FIXED} and modest sizes")
        return dict(self.weights(ema)), kwargs

def load_edm(path):
    """EDM's or ECT's pickle -> (the state dict of its EMA, the arguments for UNet)."""
    with open(path, "rb") as file:
        limited = types.SimpleNamespace(read=lambda size: file.read(min(size, 16 << 20)),
                                        readline=lambda: file.readline(200))
        try:
            return EDMReader().network(limited)
        except Exception as error:  # whatever the bytes led to, it is the file that is wrong
            raise UserError(f"{path}: not a network of EDM or ECT that fits ours (download it "
                            f"again or give another --init): {error!r:.300}") from error

# ------------------------------------------------------------------------------------------------
# One step: what is drawn, and which loss. Randomness is a function of (seed, phase, step).

def draw(run, phase, step):
    """The random part of a step, for the whole batch of all processes: a dict of tensors [B, ...].

    Every process draws all of it and keeps its part, so a run does not depend on their number.
    """
    c, data, device = run.config, run.data, run.device
    words = np.random.SeedSequence([c.seed, PHASES.index(phase), step]).generate_state(1, np.uint64)
    on = dict(generator=torch.Generator(device).manual_seed(int(words[0]) >> 1), device=device)
    index = torch.randint(len(data.images), (c.batch,), **on)
    b = {"x": data.images[index], "eps": torch.randn(c.batch, *data.images.shape[1:], **on),
         "seed": torch.randint(2**32, (c.batch,), **on)}
    if phase == "pretrain":
        b["t"] = torch.rand(c.batch, **on)
    elif c.method == "ect":
        b["t"] = ect.draw_t(c.batch, **on)
    else:
        b["N"] = torch.tensor(c.steps, device=device)[torch.randint(len(c.steps), (c.batch,), **on)]
        T = mcm.teacher_steps(step, *c.T, anneal=c.iters / 2)
        b["t"], b["s"], b["t_step"] = mcm.draw_times(c.batch, b["N"], T, **on)
    return b

def step_loss(net, teacher, c, phase, b, stage):
    """[B] from the tensors of `draw`. All that runs on the device; it compiles as one graph."""
    x = b["x"].float() / 127.5 - 1
    if phase == "pretrain":  # the limit T = N: every s is on an edge, so the target is the data
        alpha, sigma = mcm.at(mcm.cosine, b["t"], x)
        z_t = alpha * x + sigma * b["eps"]
        x_hat = mcm.as_f(net, seed=b["seed"])(z_t, b["t"])
        return mcm.v_loss(x_hat, x, z_t, b["t"], huber_eps=1.0)
    if c.method == "ect":
        edges = ect.default_edges(c.steps[0]).to(x.device) if c.segmented else None
        denoise = ect.told_segment(net, edges, seed=b["seed"])
        return ect.ect_loss(denoise, x, b["eps"], b["t"], stage, q=c.q, c=c.ect_c, edges=edges)
    f = mcm.as_f(net, steps=b["N"], seed=b["seed"])
    return mcm.consistency_loss(f, x, b["eps"], b["t"], b["s"], b["t_step"], huber_eps=c.huber_eps,
                                teacher=mcm.as_f(teacher) if c.method == "mcd" else None)

def rectification(step, beta=0.999):
    """RAdam's factor on Adam's step (Liu et al. 1908.03265), a function of the step alone.

    With it torch's fused Adam is RAdam but for its first five steps (momentum SGD there, none
    here), and unlike RAdam it skips an fp16 overflow without asking the host.
    """
    limit = 2 / (1 - beta) - 1
    rho = limit - 2 * step * beta**step / (1 - beta**step)
    if rho <= 5:
        return 0.0
    return ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5

def train(run, net, phase, teacher=None):
    """Train `net` in a phase ("pretrain" or "tune") -> its averaged copy, which is the result."""
    c = run.config
    iterations, lr = {"pretrain": (c.pretrain_iters, c.pretrain_lr), "tune": (c.iters, c.lr)}[phase]
    net.train().requires_grad_(True).to(memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    params, averages = list(net.parameters()), list(ema.parameters())
    optimizer = torch.optim.Adam(params, fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=c.precision == "fp16")
    loss_of = torch.compile(step_loss, fullgraph=True) if c.compile else step_loss
    parts = dict(net=net, ema=ema, optimizer=optimizer, scaler=scaler)
    for step in range(run.restore(phase, parts), iterations):
        optimizer.param_groups[0]["lr"] = lr * rectification(step + 1) * (1 - step / iterations)
        stage = torch.tensor(ect.stage(step, c.double_every), device=run.device)
        batch, losses = draw(run, phase, step), []
        for i in range(run.rank, c.accum * run.world, run.world):
            part = {key: value.chunk(c.accum * run.world)[i] for key, value in batch.items()}
            losses.append(loss_of(net, teacher, c, phase, part, stage))
            scaler.scale(losses[-1].mean() / (c.accum * run.world)).backward()
        run.add_over_processes([p.grad for p in params if p.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():  # a short memory first, so that the average forgets the start
            torch._foreach_lerp_(averages, params, 1 - min(c.ema, (1 + step) / (10 + step)))
        run.tick(phase, step + 1, iterations, torch.cat(losses).detach().clone(), parts)
    return ema

# ------------------------------------------------------------------------------------------------
# What the tuning bought: one table, one picture.

def report(run, extractor, diffusion, tuned):
    """The diffusion model at N steps and at many, the tuned one at N: a table and a picture."""
    c, n = run.config, run.config.fd_samples
    real, floor, floor_n = fid.reference(run.data.images, extractor, n)
    metric = fid.metric_name(extractor.name, n)

    def sampler(model, N, kind=None):
        net, method = (tuned, c.method) if model == "tuned" else (diffusion, "diffusion")
        generate, nfe = sample.generator(net, method, N, c.segmented, kind)
        return generate, dict(model=model, method=method, steps=N, nfe=nfe)
    many = ("diffusion", c.many, "heun")  # the diffusion model at its best
    say(f"\n{run.data.name}, {c.method}: {metric} against {len(run.data.images)} images; two sets "
        f"of {floor_n} real images are {floor:.4f} apart\n"
        f"{'model':<10} {'steps':>5} {'evaluations':>11} {'distance':>10} {'images/s':>9}")
    rows = []
    for choice in [*((model, N) for model in ("diffusion", "tuned") for N in c.steps), many]:
        generate, row = sampler(*choice)
        start = time.time()
        noise = (run.noise(i, min(500, n - i)) for i in range(0, n, 500))
        made = fid.evaluate((sample.to_uint8(generate(z)) for z in noise), extractor)
        row["images_per_second"] = n / (time.time() - start)
        row["distance"] = fid.frechet_distance(made.mean, made.cov, real.mean, real.cov)
        rows.append(dict(row, metric=metric, features=extractor.name, n=n, floor=floor))
        say(f"{row['model']:<10} {row['steps']:>5} {row['nfe']:>11} {row['distance']:>10.4f} "
            f"{row['images_per_second']:>9.0f}")
    own, now, best = (rows[i]["distance"] for i in (0, len(c.steps), -1))
    closed = f"{(own - now) / (own - best):.0%}" if own > best else "nothing, there was none,"
    say(f"tuning closed {closed} of the gap between {c.steps[0]} steps of the diffusion model and "
        f"its {rows[-1]['nfe']} evaluations; pictures: {run.out}/dial.png")
    write(run.out / "result.json", lambda path: path.write_text(json.dumps(rows, indent=1)))
    dial = [sampler("tuned" if N in c.steps else "diffusion", N) for N in (1, 2, 4, 8)]
    dial.append(sampler(*many))
    pictures = torch.cat([generate(run.noise(0, 10)) for generate, _ in dial])
    labels = [f"{row['model']} {row['nfe']}" for _, row in dial]
    write(run.out / "dial.png", lambda path: sample.save_grid(pictures, path, 10, labels))

# ------------------------------------------------------------------------------------------------
# Plumbing: the run's folder, checkpoints, processes, arguments. Nothing below is about the method.

PHASES = ("pretrain", "tune")
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
FREE = ("out", "data", "init", "device", "iters", "features", "fd_samples", "many", "precision",
        "compile", "accum", "save_every", "log_every")  # what may change when a run goes on

def say(*words):
    if os.environ.get("RANK", "0") == "0":
        print(*words, flush=True)

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

def load_checkpoint(path, device="cpu", **changes):
    """A checkpoint of ours -> (its averaged network, all of it); changes: constructor arguments."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        net = UNet(**{**state["arguments"], **changes}).to(device)
        return net.load(state["ema"], path).eval(), state
    except UserError:
        raise
    except Exception as error:  # torch.load fails in too many ways to name, all with one remedy
        raise UserError(f"{path} is missing, damaged or not a checkpoint of train_cifar.py "
                        f"({type(error).__name__}): give another, or delete it") from None

def load_diffusion(path, device):
    """What --init names: EDM's published network, a pickle of EDM or ECT, or one of ours."""
    if path == "edm":
        path = str(fid.fetch(*EDM))
        say("EDM's weights are CC BY-NC-SA 4.0: not for commercial use, nor what is made of them")
    if path.endswith(".pkl"):
        state, arguments = load_edm(path)
        say(f"--init: {path} is a network of EDM or ECT, {arguments}")
        return UNet(**arguments).load(state, path).to(device), "diffusion"
    try:
        net, state = load_checkpoint(path, device)
    except UserError as error:
        raise UserError(f"--init: {error}") from None
    say(f"--init: {path} is a {state['method']} model of {state['data']}, by train_cifar.py")
    return net, state["method"]

class Run:
    """A run: its settings, data, device and folder, and this process's place among the others."""

    def __init__(self, config, data, device, saved):
        self.config, self.data, self.device, self.saved = config, data, device, saved
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.out, self.stop = Path(config.out), 0

    def noise(self, start, n):
        """Noise of samples start .. start + n - 1, the same in every table and picture."""
        g = torch.Generator(self.device).manual_seed(2**40 * (self.config.seed + 1) + start)
        return torch.randn(n, *self.data.images.shape[1:], generator=g, device=self.device)

    def add_over_processes(self, tensors):
        """Sum in place over processes, in one message."""
        if self.world > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            torch.distributed.all_reduce(flat)
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))

    def restore(self, phase, parts):
        """Take up latest.pt if it is of this phase -> iterations done."""
        state = self.saved if self.saved.get("phase") == phase else {"step": 0, "recent": []}
        if state["step"]:
            say(f"{phase}: going on from iteration {state['step']}")
            for name, part in parts.items():
                part.load_state_dict(state[name])
        self.recent, self.first, self.start = list(state["recent"]), state["step"], time.time()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: setattr(self, "stop", number))
        return self.first

    def tick(self, phase, step, iterations, losses, parts):
        """After each step: log, save, stop. The host waits for the device here and nowhere else."""
        c, last = self.config, step == iterations
        self.recent.append(losses)
        logs, saves = (last or step % every == 0 for every in (c.log_every, c.save_every))
        stop = self.stop if self.world == 1 else 0
        if self.world > 1 and (logs or saves):  # all stop at the same step
            flag = torch.tensor(self.stop, device=self.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            stop = int(flag)
        if not (logs or saves or stop):
            return
        recent = torch.stack(self.recent).cpu()                                     # [steps, B]
        if not recent.isfinite().all():
            i, j = (~recent.isfinite()).nonzero()[0].tolist()
            at = step - len(recent) + i
            times = {k: v[j].item() for k, v in draw(self, phase, at).items() if k in ("t", "s")}
            sys.exit(f"error: loss {recent[i, j]} in {phase} iteration {at}, sample {j}, {times}; "
                     "the last checkpoint is kept: try a smaller --lr, or --precision fp32")
        if logs and self.rank == 0:
            self.log(phase, step, iterations, recent.mean().item(),
                     parts["optimizer"], parts["scaler"])
        self.recent = [] if logs else self.recent
        if (saves or stop) and self.rank == 0:
            self.save("latest.pt", phase, parts["ema"], step=step, recent=self.recent,
                      **{name: part.state_dict() for name, part in parts.items() if name != "ema"})
            N, method = (c.many, "diffusion") if phase == "pretrain" else (c.steps[-1], c.method)
            images = sample.generator(parts["ema"], method, N, c.segmented)[0](self.noise(0, 32))
            write(self.out / f"samples-{phase}-{step:06d}.png",
                  lambda path: sample.save_grid(images, path, 8))
        if last:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if stop:
            say(f"stopped at {phase} iteration {step} and saved; the same command goes on")
            sys.exit(128 + stop)

    def log(self, phase, step, iterations, loss, optimizer, scaler):
        speed = (step - self.first) * self.config.batch / (time.time() - self.start)
        left = (iterations - step) * self.config.batch / speed
        skipped = step - int(next(iter(optimizer.state.values()))["step"])  # fp16 overflows
        say(f"{phase} {step}/{iterations}  loss {loss:.5f}  {speed:.0f} images/s  "
            f"{left // 60:.0f}:{left % 60:02.0f} left{f'  {skipped} skipped' * bool(skipped)}")
        row = dict(phase=phase, step=step, loss=loss, images_per_second=speed, skipped=skipped)
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if scaler.is_enabled() and scaler.get_scale() < 1:
            sys.exit(f"error: fp16 overflows at every loss scale, {skipped} steps were skipped; "
                     "the last checkpoint is kept: try --precision bf16")

    def save(self, name, phase, ema, **more):
        method = "diffusion" if phase == "pretrain" else self.config.method
        state = dict(ema=ema.state_dict(), arguments=ema.arguments, method=method, phase=phase,
                     data=self.data.name, config=asdict(self.config), **more)
        write(self.out / name, lambda path: torch.save(state, path))

def diffusion_model(run, init):
    """The diffusion model to tune: this run's own, else that of --init, else one trained here."""
    c, own = run.config, run.out / "diffusion.pt"
    if own.exists():
        net = load_checkpoint(own, run.device)[0]
    elif init:
        net = init
    else:
        torch.manual_seed(c.seed)
        net = UNet(width=c.width, mult=c.mult, blocks=c.blocks, dropout=c.dropout, patch=c.patch,
                   resolution=run.data.images.shape[-1], attention=c.attention).to(run.device)
        net.half = HALF.get(c.precision)
        net = train(run, net, "pretrain")
    if run.rank == 0 and not own.exists():
        run.save("diffusion.pt", "pretrain", net)
    net.half = HALF.get(c.precision)
    return net.requires_grad_(False).to(memory_format=torch.channels_last)

def open_folder(c, given, data, device):
    """Make --out ours alone -> the settings of the run, its latest checkpoint (or {}), the lock."""
    out = Path(c.out or f"runs/{data.name}-{c.method}-{'-'.join(map(str, c.steps))}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "a")
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}): choose another") from None
    try:
        if os.environ.get("RANK", "0") == "0":
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go when we end
    except OSError:
        raise UserError(f"--out {out} is in use by another run: wait, or choose another") from None
    for stale in out.glob(".part-*") if os.environ.get("RANK", "0") == "0" else ():
        stale.unlink()  # of a run that was killed while it wrote
    c = replace(c, out=str(out))
    if not (out / "latest.pt").exists():
        return c, {}, lock
    saved = load_checkpoint(out / "latest.pt", device)[1]
    kept = {k: v for k, v in saved["config"].items() if k not in FREE}
    asked = {**{k: v for k, v in given.items() if k in kept}, "data": data.name}
    for key, value in {**kept, "data": saved["data"]}.items():
        if asked.get(key, value) != value:
            raise UserError(f"--{key.replace('_', '-')}: {out} was begun with {value}, not "
                            f"{asked[key]}: leave that as it was, or choose another --out")
    now, log = (PHASES.index(saved["phase"]), saved["step"]), out / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rows = [row for row in rows if (PHASES.index(row["phase"]), row["step"]) <= now]
    if os.environ.get("RANK", "0") == "0":  # what came after the checkpoint will come again
        write(log, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)))
    return replace(c, **kept), saved, lock

def number(kind, low, high):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return value
    return parse

def parse(arguments):
    """The command line -> a dict of the settings given there and no others."""
    parser = fid.Parser(prog="train_cifar.py", description=__doc__.split("\n")[0])
    for f in fields(Config):
        kind, limits, help, more = (f.metadata[k] for k in ("kind", "range", "help", "more"))
        if kind is bool:
            more = {"action": argparse.BooleanOptionalAction}
        elif limits[0] is not None:
            more = {**more, "type": number(kind, *limits)}
        default = f.default if f.default is not None else "{} on a CPU, {} on a GPU".format(
            *(PRESETS[name][f.name] for name in ("cpu", "cuda")))
        parser.add_argument("--" + f.name.replace("_", "-"),
                            help=f"{help} (default: {default})", **more)
    return {key: tuple(value) if isinstance(value, list) else value
            for key, value in vars(parser.parse_args(arguments)).items() if value is not None}

def main(arguments=None):
    given = parse(arguments)
    name = given.get("device", "auto")
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    c = Config(**{**PRESETS[name], **given})
    if c.segmented and (c.method != "ect" or len(c.steps) > 1):
        raise UserError("--segmented needs --method ect and a single --steps")
    if c.batch % (c.accum * int(os.environ.get("WORLD_SIZE", 1))):
        raise UserError(f"--batch {c.batch} cannot be split evenly over --accum {c.accum} and the "
                        "processes: make it a multiple")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    try:
        UNet(width=c.width, mult=c.mult, blocks=c.blocks,
             patch=c.patch)(torch.zeros(1, 3, 32, 32), 1.0)
    except (ValueError, RuntimeError, ZeroDivisionError, IndexError):
        raise UserError(f"--width {c.width}, --mult {c.mult} and --patch {c.patch} make no U-Net: "
                        "take widths of 16, 32, 64, 128 and patches of 1, 2, 4") from None
    extractor = fid.feature_extractor(c.features, device)
    data, init = load_data(c.data), None
    size = data.images.shape[-1]
    if c.init == "auto" and name == "cuda" and size == 32:
        try:
            fid.fetch(*EDM)
            c.init = "edm"
        except UserError as error:
            say(f"{error}\nNo EDM weights: a diffusion model is trained first")
    if c.init not in ("auto", "none"):
        init, method = load_diffusion(c.init, device)
        if method != "diffusion" or init.arguments["resolution"] != size:
            raise UserError(f"--init {c.init} is a {method} model, {init.arguments['resolution']} "
                            f"pixels wide: give the diffusion.pt of a run with {size}")
    c, saved, lock = open_folder(c, given, data, device)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("nccl" if name == "cuda" else "gloo")
    torch.set_float32_matmul_precision("highest" if c.precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = c.precision != "fp32"
    data.images = data.images.to(device)
    run = Run(c, data, device, saved)
    diffusion = diffusion_model(run, init)
    N = max(c.steps)
    net = UNet(**{**diffusion.arguments, "dropout": c.dropout, "segments": N * (N + 1) // 2})
    net.to(device).load(diffusion.state_dict(), "diffusion.pt").half = diffusion.half
    tuned = train(run, net, "tune", diffusion)
    if run.rank == 0:
        report(run, extractor, diffusion, tuned)

if __name__ == "__main__":
    fid.run(main)
