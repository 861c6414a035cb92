"""Train a few-step generator, from a diffusion model to a table and a picture, in one command.

    python train_cifar.py --steps 2                      # the whole job, on a GPU or a laptop
    python train_cifar.py --method ect --steps 2         # Easy Consistency Tuning
    python train_cifar.py --steps 1 2 4 8                # one network for the whole dial

A diffusion model D(x, sigma) is loaded, or trained first (phase "diffusion"). Then a copy of it is
tuned to few steps (phase "tuned"). One iteration of `train`:

    draw            from (seed, phase, iteration) alone: images, noise, times, dropout seeds
    no gradient     the teacher's guess at t (mcd), then the network's own guess at the earlier time
    gradient        the network's guess at t, with the same dropout mask
    compare         step_loss: mcm.v_loss, mcm.consistency_loss or ect.ect_loss -> [B]
    update          RAdam, with a learning rate that falls to 0 and, in fp16, a loss scale
    average         ema <- ema + (1 - decay) (net - ema): the weights that are sampled
    log, save       every 100 and every --save-every iterations: a line, a checkpoint
"""
import argparse, contextlib, copy, hashlib, io, json, math, pickle, signal, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import ect, fid, mcm, sample
from fid import InputError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ---- Settings ------------------------------------------------------------------------------------
def number(kind, low, high):
    """A type for argparse: an int or a float from low to high."""
    def numeric(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    return numeric

# How argparse reads a setting.
COUNT = dict(type=number(int, 1, 10**9))
RATIO = dict(type=number(float, 0, 1))
SIZE = dict(type=number(float, 0, 1e6))
SWITCH = dict(action=argparse.BooleanOptionalAction)

# Two presets, named after their data. "cifar10" has the papers' settings: those of ECT's A100 hour,
# with T and huber_eps of MCM. "shapes" is small and short. Errors add up over the teacher steps, so
# it has fewer of them (T; for ECT, a smaller q^stages). The rest was found by trying.
SETTINGS = [
    # name, how it is read ({}: as text), preset shapes, preset cifar10, what it is
    ("preset", dict(choices=("shapes", "cifar10")), "shapes", "cifar10", "picks the defaults"),
    ("steps", dict(type=number(int, 1, 64), nargs="+"), [2], [2], "several: all in one network"),
    ("method", dict(choices=("mct", "mcd", "ect", "ect-segmented")), "mct", "mct", "the loss"),
    ("data", {}, "shapes", "cifar10", "shapes, cifar10, a folder or an .npz"),
    ("init", {}, "shapes", "edm", "EDM's .pkl or our .pt; none: train one first"),
    ("classes", SWITCH, False, False, "give the network the class labels"),
    ("out", {}, None, None, "folder of the run; default: runs/DATA-METHOD-STEPS"),
    # The optimizer. For longer runs, ema nearer to 1.
    ("iters", COUNT, 1000, 8_000, "iterations of tuning"),
    ("pretrain_iters", COUNT, 2500, 100_000, "iterations of training a diffusion model"),
    ("batch", COUNT, 32, 128, "images in an iteration"),
    ("lr", RATIO, 2e-3, 1e-4, "learning rate of tuning, falls linearly to 0"),
    ("pretrain_lr", RATIO, 2e-3, 5e-4, "the same for the diffusion model"),
    ("ema", RATIO, 0.99, 0.9993, "decay of the averaged weights"),
    # The network. Both passes of an iteration share a dropout mask. --init brings its own width.
    ("width", dict(type=int, choices=(8, 16, *range(32, 1025, 32))), 32, 128, "channels"),
    ("dropout", dict(type=number(float, 0, 0.99)), 0.0, 0.2, "in training"),
    # MCM. T rises until mid-run. huber_eps 1e-4: a norm, for long runs; 1: nearly a square error.
    ("T", dict(type=number(int, 1, 8192), nargs=2), [8, 512], [64, 1280], "first and last T(i)"),
    ("huber_eps", SIZE, 0.02, 1e-4, "mct, mcd: rounds the loss near 0 (pseudo-Huber)"),
    # ECT. Each stage divides t - r by q, and ln t ~ N(p_mean, p_std^2).
    ("q", dict(type=number(float, 1.001, 1e6)), 2.0, 256.0, "ect: each stage divides t - r by it"),
    ("stages", COUNT, 3, 1, "ect: stages of the curriculum, of equal length"),
    ("p_mean", dict(type=number(float, -20, 20)), 1.0, -1.1, "ect: mean of ln t"),
    ("p_std", SIZE, 1.8, 2.0, "ect: standard deviation of ln t"),
    ("c", SIZE, 0.05, 0.0, "ect: as huber_eps, but the norm sums over an image"),
    # The machine. Gradients of bf16 are too coarse where t - r is small.
    ("precision", dict(choices=("fp16", "bf16", "tf32", "fp32")), "fp32", "fp16", "of the network"),
    ("compile", SWITCH, False, True, "torch.compile: takes minutes, pays on a GPU"),
    ("save_every", COUNT, 500, 1000, "iterations between checkpoints"),
    ("seed", dict(type=number(int, 0, 2**32)), 0, 0, "of all that is random"),
    # The measurement.
    ("features", {}, "random", "inception", "random, inception, a TorchScript file"),
    ("fd_samples", dict(type=number(int, 10, 10**7)), 1000, 50_000, "images to measure"),
]
# What may change when a run goes on.
MAY_CHANGE = ("out", "precision", "compile", "features", "fd_samples", "save_every")
# The presets' networks: a small one that works on patches of 2x2 pixels, and EDM's.
NETS = {"shapes": dict(mult=(1, 2, 2), blocks=1, attention=(), patch=2), "cifar10": {}}

def read_settings(parser, arguments):
    """The command line -> all settings, a namespace. InputError for what does not go together."""
    for name, how, shapes, cifar10, text in SETTINGS:
        parser.add_argument("--" + name.replace("_", "-"), **how,
                            help=f"{text} (shapes: {shapes}, cifar10: {cifar10})")
    settings = parser.parse_args(arguments)
    settings.preset = settings.preset or choose_preset(settings.data)
    # What is not given is the preset's. Its diffusion model fits only its own data and network.
    other_data = settings.data not in (None, settings.preset)
    if settings.init is None and (other_data or settings.width or settings.classes):
        settings.init = "none"
    for name, how, shapes, cifar10, text in SETTINGS:
        if getattr(settings, name) is None:
            setattr(settings, name, shapes if settings.preset == "shapes" else cifar10)
    if settings.method == "ect-segmented" and len(settings.steps) > 1:
        raise InputError("--method ect-segmented: needs a single number of --steps")
    if settings.stages * math.log2(settings.q) > 20:
        raise InputError("--q, --stages: q^stages is above 2^20, too much for float32")
    return settings

def choose_preset(data):
    """-> "cifar10", if `data` is that or None and a GPU and the files are there; else "shapes"."""
    if data in (None, "cifar10"):
        try:
            if DEVICE.type == "cpu":
                raise InputError("there is no GPU here")
            fid.download(*EDM)
            fid.download(*fid.INCEPTION)
            fid.read_images("cifar10")
            return "cifar10"
        except InputError as error:
            print(f"preset shapes (a small network, a short run), because {error}\nfor ECT's own "
                  "settings: --preset cifar10 (an hour on an A100, days on a laptop)")
    return "shapes"                             # its settings suit any small run

# ---- The network: DDPM++ as EDM ships it, so that the published weights load by key --------------
def hash32(h):
    """Mixes the bits of h, int32 of any shape: each bit of the result depends on all of them."""
    for _ in range(2):
        h = (((h >> 16) & 0xFFFF) ^ h) * 0x45D9F3B          # 32 bits of the product are kept
    return ((h >> 16) & 0xFFFF) ^ h

def dropout(x, p, seed, layer):
    """Dropout of x [B, C, H, W] by a mask that depends on (seed [B], layer, element) alone.
    Both passes of a consistency step must have one mask. To save and restore the state of a random
    generator in between would not survive CUDA graphs.
    """
    element = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device)
    # The prime, 2^32 over the golden ratio, keeps the layers' seeds far apart.
    start = hash32((seed + 0x9E3779B1 * layer).int())               # [B]
    chance = hash32(start.view(-1, 1, 1, 1) + element.view(x.shape[1:]))    # [B, C, H, W]
    keep = chance >= int(p * 2**32) - 2**31         # chance is uniform over all of int32
    return x * keep / (1 - p)

def group_norm(channels):
    """At most 32 groups, with at least 4 channels in each."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)

def conv(c_in, c_out, kernel):
    """Keeps H and W."""
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)

class Block(nn.Module):
    """A residual block, x [B, c_in, H, W] and emb [B, c_emb] -> [B, c_out, H', W'].
    p: of dropout. layer: the block's number. resample: a module that halves or doubles H and W.
    """
    def __init__(self, c_in, c_out, c_emb, p, layer, resample=None, attention=False):
        super().__init__()
        self.p, self.layer, self.attention = p, layer, attention
        self.resample = resample or nn.Identity()
        self.norm0 = group_norm(c_in)
        self.conv0 = conv(c_in, c_out, 3)
        self.affine = nn.Linear(c_emb, c_out)
        self.norm1 = group_norm(c_out)
        self.conv1 = conv(c_out, c_out, 3)
        self.skip = nn.Identity()
        if resample or c_in != c_out:
            self.skip = conv(c_in, c_out, 1)
        if resample:                    # never used, but keys of the published weights
            for part in (self.conv0, self.skip):
                part.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))
        if attention:
            self.norm2 = group_norm(c_out)
            self.qkv = conv(c_out, 3 * c_out, 1)
            self.proj = conv(c_out, c_out, 1)

    def forward(self, x, emb, seed):
        # Two convolutions. What the embedding says is added in between, equally for all pixels.
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        if seed is not None and self.p > 0:
            h = dropout(h, self.p, seed, self.layer)
        # Plus the way around them. The factor keeps the variance of a sum of two.
        x = (self.conv1(h) + self.skip(self.resample(x))) * 0.5**0.5
        if self.attention:
            # With one head. The channels are interleaved: q, k, v of channel 0, of channel 1, ...
            qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (1, -1, 3))
            q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()   # each [B, 1, H W, C]
            a = F.scaled_dot_product_attention(q, k, v)
            x = (self.proj(a.mT.reshape(x.shape)) + x) * 0.5**0.5
        return x

class DDPMpp(nn.Module):
    """The raw network F(c_in x, c_noise). Its blocks are called {side}x{side}_{block}, as EDM's.
    width, mult: channels of the levels. blocks: of each level. attention: sides that have it.
    patch: works on patch x patch pixels at a time. segments: rows of an embedding, mcm.segment.
    """
    def __init__(self, width, mult, blocks, resolution, classes=0, augment_dim=0, dropout=0.0,
                 patch=1, segments=0, attention=(16,)):
        super().__init__()
        self.patch, self.classes = patch, classes
        c_emb = 4 * width
        # The ways into the embedding: noise level, label, segment (ours).
        frequencies = (1 / 10000) ** (torch.arange(width // 2).float() / (width // 2 - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        if classes:
            self.map_label = nn.Linear(classes, width)
        if augment_dim:                 # never used, but a key of the published weights
            self.map_augment = nn.Linear(augment_dim, width, bias=False)
        self.map_layer0 = nn.Linear(width, c_emb)
        self.map_layer1 = nn.Linear(c_emb, c_emb)
        if segments:
            self.map_segment = nn.Embedding(segments, c_emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()

        def block(c_in, c_out, attention=False, resample=None):
            layer = len(self.enc) + len(self.dec) - 1       # 0, 1, 2, ..., for dropout
            return Block(c_in, c_out, c_emb, dropout, layer, resample, attention)

        # Encoder: at each level a halving block, except at the first, then the residual blocks.
        side = resolution // patch
        c = width                       # channels so far
        self.enc[f"{side}x{side}_conv"] = conv(3 * patch**2, c, 3)
        skips = [c]                     # channels of each output of the encoder
        for level, multiple in enumerate(mult):
            if level > 0:
                side = side // 2
                self.enc[f"{side}x{side}_down"] = block(c, c, resample=nn.AvgPool2d(2))
                skips.append(c)
            for j in range(blocks):
                c_in, c = c, width * multiple
                self.enc[f"{side}x{side}_block{j}"] = block(c_in, c, side in attention)
                skips.append(c)

        # Decoder: two blocks, then blocks + 1 at each level, which each take an encoder's output.
        self.dec[f"{side}x{side}_in0"] = block(c, c, attention=True)
        self.dec[f"{side}x{side}_in1"] = block(c, c)
        for level, multiple in reversed(list(enumerate(mult))):
            for j in range(blocks + 1):
                c_in, c = c + skips.pop(), width * multiple
                attend = side in attention and j == blocks
                self.dec[f"{side}x{side}_block{j}"] = block(c_in, c, attend)
            if level > 0:
                side = side * 2
                self.dec[f"{side}x{side}_up"] = block(c, c, resample=nn.Upsample(scale_factor=2))
        self.dec[f"{side}x{side}_aux_norm"] = group_norm(c)
        self.dec[f"{side}x{side}_aux_conv"] = conv(c, 3 * patch**2, 3)
        # As EDM: the last layer of each residual branch begins near zero.
        for name, p in self.named_parameters():
            if name.endswith("bias") or "map_segment" in name:
                nn.init.zeros_(p)
            elif name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight")):
                nn.init.xavier_uniform_(p, 1e-5)
            elif "qkv" in name:
                nn.init.xavier_uniform_(p, 0.2**0.5)
            elif p.ndim > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, x, c_noise, labels=None, segment=None, seed=None):
        """Noisy images [B, 3, H, W] and c_noise [B] -> [B, 3, H, W]. The rest: UNet.forward."""
        # The embedding of noise level, label and segment: [B, c_emb].
        angle = c_noise[:, None] * self.frequencies
        emb = torch.cat([angle.sin(), angle.cos()], 1).to(x.dtype)
        if self.classes:
            if labels is None:              # zeros, which still add the bias
                labels = emb.new_zeros(1, self.classes)
            emb = emb + self.map_label(labels.to(x.dtype) * self.classes**0.5)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if segment is not None:
            emb = emb + self.map_segment(segment)
        emb = F.silu(emb)
        # Down and up again. The decoder's blocks take the encoder's outputs, the last one first.
        x = F.pixel_unshuffle(x, self.patch)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb, seed) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = torch.cat([x, skips.pop()], 1)
            if "aux_conv" in name:
                x = F.silu(x)
            x = layer(x, emb, seed) if isinstance(layer, Block) else layer(x)
        return F.pixel_shuffle(x, self.patch)

SIGMA_DATA = 0.5        # EDM's standard deviation of images in [-1, 1]
class UNet(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), EDM's preconditioning. `more`: see DDPMpp.
    It is the same in train() and eval(). (ECT's authors have sigma - 0.003 in eval()'s c_skip and
    c_out.) Another network here needs the same forward, .arguments, .image_shape, .model.classes.
    """
    dtype = torch.float32           # that all raw networks compute in

    def __init__(self, width=128, mult=(2, 2, 2), blocks=4, resolution=32, **more):
        super().__init__()
        self.arguments = dict(more, width=width, mult=mult, blocks=blocks, resolution=resolution)
        self.model = DDPMpp(**self.arguments)
        self.image_shape = (3, resolution, resolution)

    def forward(self, x, sigma, labels=None, segment=None, seed=None):
        """x [B, 3, H, W] = x0 + sigma eps, sigma [B] or a number > 0 -> x_hat, float32.
        labels: one-hot float [B, classes], zeros or None for no label. segment: int64 [B] of
        mcm.segment. seed: int64 [B] in [0, 2^32) of the dropout masks, or None: no dropout.
        """
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        # EDM, table 1. Input and target of the raw network have variance 1 at every sigma.
        level = mcm.per_sample(sigma, x)                        # [B, 1, 1, 1]
        c_in = (level**2 + SIGMA_DATA**2).rsqrt()
        c_skip = SIGMA_DATA**2 * c_in**2
        c_out = SIGMA_DATA * level * c_in
        c_noise = sigma.log() / 4                               # [B]

        # The raw network computes in self.dtype. (autocast would leave group norms in float32.)
        weights = {name: p.to(self.dtype) for name, p in self.model.named_parameters()}
        inputs = (c_in * x).to(self.dtype), c_noise, labels, segment, seed
        raw = torch.func.functional_call(self.model, weights, inputs)
        return c_skip * x + c_out * raw

# ---- Data: uint8 images [n, 3, H, W], labels int64 [n], names of the classes ---------------------
COLOURS = torch.tensor([[230, 40, 50], [40, 170, 70], [40, 90, 220],    # red, green, blue
                        [240, 200, 40], [170, 60, 190]])                # yellow, purple

def shapes(n=20_000, size=32):
    """Discs, squares and triangles in five colours on soft grey -> images, labels, class names."""
    g = torch.Generator().manual_seed(0)
    ramp = (torch.arange(size) + 0.5) / size * 2 - 1            # pixels, in [-1, 1]
    labels = torch.arange(n) % 3
    images = []
    for label in labels.split(1000):
        radius, dx, dy, light, slope = torch.rand(5, len(label), 1, 1, generator=g)
        radius = 0.4 + 0.2 * radius
        x = ramp - (dx * 2 - 1) * (0.9 - radius)            # from the centre: [B, 1, W]
        y = ramp[:, None] - (dy * 2 - 1) * (0.9 - radius)   # [B, H, 1]
        # The distance to the edge of each shape, negative inside: [3, B, H, W] -> [B, H, W].
        disc = x.hypot(y) - radius
        square = torch.maximum(x.abs(), y.abs()) - 0.85 * radius
        triangle = torch.maximum(y, 3**0.5 / 2 * x.abs() - y / 2) - 0.6 * radius
        edge = torch.stack([disc, square, triangle])[label, torch.arange(len(label))]
        # The shape over its ground, with an edge that is soft by one pixel: [B, 3, H, W].
        inside = (0.5 - edge * size / 2).clamp(0, 1)[:, None]
        ground = 60 + 120 * light + 100 * (slope - 0.5) * ramp[:, None]
        colour = COLOURS[torch.randint(len(COLOURS), (len(label),), generator=g)]
        images.append(inside * colour[:, :, None, None] + (1 - inside) * ground[:, None])
    return torch.cat(images).round().byte(), labels, ["disc", "square", "triangle"]

def load_data(settings):
    """--data -> a namespace: images, labels, class_names (empty without --classes), name."""
    name = settings.data
    images, labels, class_names = shapes() if name == "shapes" else fid.read_images(name)
    images = images[torch.arange(len(images))]      # files are read here
    n, _, height, width = images.shape
    if height != width or height % 16 or height == 0 or n < 8:
        raise InputError(f"--data {name}: needs 8 square images or more, of 16, 32, ... pixels")
    if settings.classes and not class_names:
        raise InputError(f"--classes: {name} has no classes, leave it out")
    if name not in ("shapes", "cifar10"):       # two folders may have one name
        content = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes())
        name = f"{Path(name).name}-{content.hexdigest()[:6]}"
    return SimpleNamespace(images=images.to(DEVICE), labels=labels.to(DEVICE), name=name,
                           class_names=class_names if settings.classes else [])

# ---- EDM's published weights (CC BY-NC-SA 4.0), opened safely ------------------------------------
# EDM's and ECT's files are pickles: programs that import names and call them. Our unpickler imports
# nothing. Each name that such files need stands for something harmless, and any other is refused.
# A hostile file can waste memory, but run no code.
EDM = ("https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl",
       "4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da")

class Inert(nn.Module):
    """Stands for an object of any class. Its state_dict() is that of the module it stands for.
    EDM's classes arrive as calls of _reconstruct_persistent_obj, with a dict of their state. It is
    kept. The rest (getattr, numpy's scalars and types) is never read.
    """
    def __init__(self, saved=None, *ignored):
        super().__init__()
        if isinstance(saved, dict):
            self.__setstate__(saved["state"])

    def __setstate__(self, state):
        if isinstance(state, dict):                     # that of a numpy type is a tuple
            super().__setstate__(state)

def rebuild_tensor(storage, offset, size, stride, *ignored):
    return torch.empty(0, dtype=storage.dtype).set_(storage, offset, size, stride)

ALLOWED = {
    "torch_utils.persistence _reconstruct_persistent_obj": Inert,
    "torch.nn.modules.container ModuleDict": Inert,
    "builtins getattr": Inert,
    "numpy dtype": Inert,
    "numpy.core.multiarray scalar": Inert,
    "numpy._core.multiarray scalar": Inert,
    "torch._utils _rebuild_parameter": lambda tensor, *ignored: tensor,
    "torch._utils _rebuild_tensor_v2": rebuild_tensor,
    "torch.storage _load_from_bytes": lambda b: torch.load(io.BytesIO(b), weights_only=True),
    "collections OrderedDict": dict,
    "builtins set": set,
}

class EDMUnpickler(pickle.Unpickler):
    """The base class does the rest: it calls find_class for every name in a file."""
    def find_class(self, module, name):
        return ALLOWED[f"{module} {name}"]              # any other name is a KeyError

def load_edm(path):
    """A .pkl of EDM or ECT -> (state dict of its EMA, arguments for UNet)."""
    try:
        with open(path, "rb") as file:
            ema = EDMUnpickler(file).load()["ema"]
        # The module that ema stands for is EDMPrecond, around a SongUNet that is called model.
        given = ema.model._init_kwargs
        return ema.state_dict(), dict(
            width=given["model_channels"], mult=tuple(given["channel_mult"]),
            blocks=given.get("num_blocks", 4), classes=given["label_dim"],
            augment_dim=given.get("augment_dim", 0), dropout=given["dropout"],
            resolution=given["img_resolution"])
    except (pickle.UnpicklingError, AttributeError, EOFError, LookupError, RuntimeError,
            TypeError, ValueError, MemoryError, OverflowError) as error:
        raise InputError(f"{path}: not a network of EDM or ECT ({error})") from error

# ---- One iteration: what is drawn, which loss ----------------------------------------------------
def draw(data, settings, phase, step):
    """What iteration `step` draws, from (seed, phase, step) alone -> a dict of [batch, ...].
    So a run that was killed goes on with the very batches that it would have drawn.
    """
    device, batch = data.images.device, settings.batch
    entropy = np.random.SeedSequence([settings.seed, int(phase == "tuned"), step])
    seed = int(entropy.generate_state(1, np.uint64)[0]) >> 1     # of 63 bits
    chance = dict(generator=torch.Generator(device).manual_seed(seed), device=device)
    # Images, noise and the seeds of the dropout masks.
    index = torch.randint(len(data.images), (batch,), **chance)
    drawn = {"x": data.images[index],
             "eps": torch.randn(batch, *data.images.shape[1:], **chance),
             "seed": torch.randint(2**32, (batch,), **chance)}
    if data.class_names:
        # One in ten is trained without its label, so that the model can be guided (mcm.guided).
        kept = torch.rand(batch, 1, **chance) > 0.1
        drawn["labels"] = F.one_hot(data.labels[index], len(data.class_names)) * kept.float()
    # Times: cosine's t, ECT's t, or those of MCM's Algorithm 1 for an N of --steps.
    if phase == "diffusion":
        drawn["t"] = torch.rand(batch, **chance)
    elif settings.method in ("ect", "ect-segmented"):
        drawn["t"] = ect.draw_t(batch, settings.p_mean, settings.p_std, **chance)
    else:
        which = torch.randint(len(settings.steps), (batch,), **chance)
        # Without non_blocking, the host would wait for the copy.
        N = torch.tensor(settings.steps).to(device, non_blocking=True)[which]
        T = mcm.teacher_steps(step, *settings.T, anneal=settings.iters / 2)
        t, s, t_step = mcm.draw_times(batch, N, T, **chance)
        drawn.update(N=N, t=t, s=s, t_step=t_step)
    return drawn

def step_loss(net, teacher, settings, phase, stage, x, eps, seed, t, labels=None, N=None, s=None,
              t_step=None):
    """The loss of one iteration -> [B]. It runs on the device and compiles as one graph.
    x: uint8 [B, 3, H, W]. stage: ECT's, a tensor []. The rest: as `draw` drew it.
    """
    x = x.float() / 127.5 - 1
    f = mcm.make_f(net, steps=N, labels=labels, seed=seed)
    if phase == "diffusion":
        # As MCT where s = t_step: the target is x. With huber_eps 1, nearly a squared error.
        alpha, sigma = mcm.alpha_sigma(mcm.cosine, t, x)
        z_t = alpha * x + sigma * eps
        return mcm.v_loss(f(z_t, t), x, z_t, t, huber_eps=1.0)
    if settings.method in ("ect", "ect-segmented"):
        # The paper's ECT is a single segment, from 80 down to 0.
        N = settings.steps[0] if settings.method == "ect-segmented" else 1
        edges = ect.segment_edges(N, x.device) if N > 1 else None
        D = mcm.conditioned(net, N, labels=labels, seed=seed)
        return ect.ect_loss(D, x, eps, t, stage, settings.q, c=settings.c, edges=edges)

    # MCM: training, where the data itself leads from t to s, or distillation of the teacher.
    leader = mcm.make_f(teacher, labels=labels) if settings.method == "mcd" else None
    return mcm.consistency_loss(f, x, eps, t, s, t_step, teacher=leader,
                                huber_eps=settings.huber_eps)

# ---- The loop ------------------------------------------------------------------------------------
def train(net, teacher, data, settings, phase):
    """Trains `net` in phase "diffusion" or "tuned" (teacher: for mcd alone) -> its average.
    {phase}.pt in the run's folder has the whole state. The same call goes on from there.
    """
    path = Path(settings.out, f"{phase}.pt")
    iters, peak_lr = settings.iters, settings.lr
    if phase == "diffusion":
        iters, peak_lr = settings.pretrain_iters, settings.pretrain_lr
    # The network, the average of its weights, and how they are updated.
    net.to(DEVICE, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.RAdam(net.parameters(), foreach=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=settings.precision == "fp16")

    # One graph, without recompiling. On a GPU it is recorded and replayed, all in channels last:
    # left to itself the compiler mixes layouts in a U-Net, and a step takes 1.5 times as long.
    loss_of = torch.compile(step_loss, fullgraph=True, disable=not settings.compile, options={
        "triton.cudagraphs": True, "force_layout_optimization": True})

    # Restore. This copies tensors to the GPU, all but RAdam's counter, which stays on the CPU.
    parts = dict(ema=ema, net=net, optimizer=optimizer, scaler=scaler)
    first = 0
    if path.exists():
        saved = load_checkpoint(path)
        first = saved["step"]
        for name, part in parts.items():
            if saved[name]:                     # the scaler has a state in fp16 only
                part.load_state_dict(saved[name])
    print(f"{phase}: {iters} iterations, {first} of them done")
    # Ctrl-C only asks: the loop saves, then stops.
    stop = []
    signal.signal(signal.SIGINT, lambda *ignored: stop.append(True))

    losses, clock = [], time.time()             # since the last line of the log
    for step in range(first, iters):
        # Draw the batch. ECT's stage, 0, 1, ..., is a tensor, because a number would compile again.
        drawn = draw(data, settings, phase, step)
        stage = torch.full((), step * settings.stages // iters, device=DEVICE)

        # Forward and backward.
        loss = loss_of(net, teacher, settings, phase, stage, **drawn).mean()
        scaler.scale(loss).backward()
        losses.append(loss.detach())

        # Update the weights. In fp16, an iteration that overflows is skipped.
        optimizer.param_groups[0]["lr"] = peak_lr * (1 - step / iters)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # Update their average: the mean of all weights so far, until its decay reaches --ema.
        decay = min(settings.ema, step / (1 + step))
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        average(list(ema.parameters()), list(net.parameters()), step)

        # Log. Only here, in saving and, in fp16, in scaler.step does the host wait for the device.
        done = step + 1
        if done % 100 == 0 or done == iters:
            loss = torch.stack(losses).mean().item()
            speed = len(losses) * settings.batch / (time.time() - clock)
            left = f"{(iters - done) * settings.batch / speed / 60:.1f} min left"
            print(f"{phase} {done}  loss {loss:.5f}  {speed:.0f} images/s  {left}", flush=True)
            losses, clock = [], time.time()

        # Save the state.
        if done % settings.save_every == 0 or done == iters or stop:
            save(path, data, settings, phase, done, parts)
            if stop:
                sys.exit(f"stopped at iteration {done} and saved; the same command goes on")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return ema

# ---- Results -------------------------------------------------------------------------------------
def how_to_sample(settings, phase):
    """-> the sampler of this phase's network, see sample.sample_batch, and its numbers of steps."""
    if phase == "diffusion":
        return "heun", [18]                                             # EDM's
    if settings.method == "ect":
        return "renoise", settings.steps
    return "multistep", settings.steps

def report(diffusion, tuned, data, settings, extractor):
    """The diffusion model beside the tuned one: a table, result.json and dial.png.
    The distances are from the whole data set. The floor: see fid.floor_of.
    """
    n, real = settings.fd_samples, data.images.cpu()
    statistics = fid.statistics_of(real, extractor)
    floor = fid.floor_of(real, extractor, n)
    metric = fid.metric_name(extractor.name, n)
    print(f"\n{data.name}: {metric}; floor, real images to real: {floor:.2f}\n"
        "model         steps  evaluations  distance  images/s")

    # Method, network, sampler, steps, evaluations: N steps before and after tuning, then EDM's 18.
    sampler, _ = how_to_sample(settings, "tuned")
    table = [("diffusion", diffusion, "ddim", N, N) for N in settings.steps]
    table += [(settings.method, tuned, sampler, N, N) for N in settings.steps]
    table += [("diffusion", diffusion, "heun", 18, 35)]
    labels = None                               # or those of n real images, in random order
    if data.class_names:
        labels = data.labels[fid.shuffled(real)[torch.arange(n) % len(real)]]
    # A row of the table and a row of the picture for each.
    rows, pictures = [], []
    for method, net, sampler, steps, nfe in table:          # nfe: evaluations of the network
        start = time.time()
        images = sample.generate(net, sampler, steps, n, settings.seed, labels)
        speed = n / (time.time() - start)
        distance = fid.statistics_of(images, extractor).distance(statistics)
        print(f"{method:<13} {steps:5} {nfe:12} {distance:9.2f} {speed:9.0f}", flush=True)
        rows.append(dict(method=method, steps=steps, nfe=nfe, metric=metric, distance=distance,
                         floor=floor, features=extractor.name, n=n, images_per_second=speed))
        pictures.append(images[:10])
    Path(settings.out, "result.json").write_text(json.dumps(rows, indent=1))
    sample.save_grid(torch.cat(pictures), Path(settings.out, "dial.png"), columns=10)
    print(f"pictures, a row for each line: {settings.out}/dial.png")

# ---- All of it -----------------------------------------------------------------------------------
def main(arguments=None):
    """The command line: read everything, train or load a diffusion model, tune it, report."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    # All that a user can get wrong is read here, before any work.
    try:
        settings = read_settings(parser, arguments)
        data = load_data(settings)
        extractor = fid.Extractor(settings.features, data.images[:2], DEVICE)
        diffusion = open_run(settings, data)
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        parser.error(" ".join(str(error).split()))
    # What the network computes in. TF32 is for convolutions on a GPU.
    torch.backends.cudnn.benchmark = True                   # shapes are always the same
    torch.backends.cudnn.allow_tf32 = settings.precision != "fp32"
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    UNet.dtype = dtypes.get(settings.precision, torch.float32)
    # Train a diffusion model, if none is given.
    if diffusion is None:
        torch.manual_seed(settings.seed)
        net = UNet(settings.width, **NETS[settings.preset], dropout=settings.dropout,
                   classes=len(data.class_names), resolution=data.images.shape[-1])
        diffusion = train(net, None, data, settings, "diffusion")
    diffusion.to(DEVICE, memory_format=torch.channels_last).requires_grad_(False)

    # Tune a copy. Its embedding of the segment is zero at first and changes nothing.
    segments = sum(range(max(settings.steps) + 1))          # rows of mcm.segment's table
    net = UNet(**dict(diffusion.arguments, dropout=settings.dropout, segments=segments))
    net.load_state_dict({**net.state_dict(), **diffusion.state_dict()})
    tuned = train(net, diffusion, data, settings, "tuned")
    report(diffusion, tuned, data, settings, extractor)

# ---- Checkpoints and the folder of a run ---------------------------------------------------------
@contextlib.contextmanager
def atomic(path):
    """`with atomic(path) as part:` write to part, which becomes `path` when it is whole."""
    part = path.with_name(f".part-{path.name}")
    yield part
    part.replace(path)

def save(path, data, settings, phase, step, parts):
    """One file of tensors and plain values: the parts, and all that sample.py needs.
    If weights are not finite, or fp16 overflows at every loss scale, the run ends instead.
    """
    finite = all(p.isfinite().all() for p in parts["net"].parameters())
    if not finite or parts["scaler"].get_scale() < 1:
        sys.exit(f"error: {phase}, iteration {step}: weights or losses not finite; {path}, if any, "
                 "is kept, try another --precision, or a smaller --lr with another --out")
    sampler, steps = how_to_sample(settings, phase)
    state = {name: part.state_dict() for name, part in parts.items()}
    state.update(arguments=parts["ema"].arguments, phase=phase, step=step, sampler=sampler,
                 steps=steps, class_names=data.class_names, settings=vars(settings))
    with atomic(path) as file:
        torch.save(state, file)

def load_checkpoint(path):
    """A file of `save` -> its dict, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["sampler"]                        # a KeyError, if it is another's
    except (pickle.PickleError, EOFError, LookupError, RuntimeError, TypeError, ValueError) as why:
        raise InputError(f"{path}: damaged, or no checkpoint of this version") from why
    return state

def load_network(state):
    """A dict of load_checkpoint -> its averaged network."""
    net = UNet(**state["arguments"])
    net.load_state_dict(state["ema"])
    return net.to(DEVICE)

def open_run(settings, data):
    """Opens the folder of the run -> the diffusion model of --init, or None: train one.
    InputError if the folder holds a run of other settings or data, or the model does not fit.
    """
    steps = "-".join(map(str, settings.steps))
    settings.out = settings.out or f"runs/{data.name}-{settings.method}-{steps}"
    settings.data = data.name

    # The same command goes on with a run. Another must not mix with it.
    for path in Path(settings.out).glob("[!.]*.pt"):        # no .part- that atomic left
        begun = load_checkpoint(path)["settings"]
        for name, now in vars(settings).items():
            if name not in MAY_CHANGE and begun.get(name) != now:
                raise InputError(f"--{name.replace('_', '-')}: {settings.out} was begun with "
                                 f"{begun.get(name)}, not {now}; give another --out, or delete it")
    # The diffusion model must fit the data.
    net = None
    if settings.init != "none":
        net = load_init(settings.init)
        its = net.image_shape[-1], net.model.classes
        if its != (data.images.shape[-1], len(data.class_names)):
            raise InputError(f"--init: {settings.init} has other (pixels, classes): {its}")
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    return net

def load_init(init):
    """A value of --init other than "none" -> a diffusion model."""
    if init == "shapes":
        init = Path(__file__).parent / "assets/diffusion.pt"
    elif init == "edm":
        init = fid.download(*EDM)
        print("EDM's weights are CC BY-NC-SA 4.0: no commercial use, nor of models made from them")
    # One of EDM's (ECT's load, too, but are tuned already), or one of ours.
    if Path(init).suffix == ".pkl":
        weights, arguments = load_edm(init)
        net = UNet(**arguments)
        if weights.keys() != net.state_dict().keys():
            raise InputError(f"{init}: its network is not EDM's DDPM++")
        net.load_state_dict(weights)
        return net
    state = load_checkpoint(init)
    if state["phase"] != "diffusion":
        raise InputError(f"--init {init}: tuned already, give a diffusion model")
    return load_network(state)

if __name__ == "__main__":
    main()
