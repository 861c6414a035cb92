"""Train a few-step generator, from a diffusion model to a table and a picture, in one command.

    python train_cifar.py --steps 2                      # MCT on shapes; on a GPU, ECT on CIFAR-10
    python train_cifar.py --method ect --steps 2         # Easy Consistency Tuning
    python train_cifar.py --method mct --steps 1 2 4 8   # one network for the whole dial
    torchrun --nproc-per-node 8 train_cifar.py --steps 2 # on eight GPUs

A diffusion model D(x, sigma) is loaded or trained. Then a copy is tuned to few steps. An iteration:
    draw            images, noise, times, dropout seeds: functions of (seed, iteration), no state
    no gradient     the teacher's guess at t (mcd), then the network's own guess at the earlier time
    gradient        the network's guess at t, with the same dropout mask
    compare         step_loss: mcm.v_loss, mcm.consistency_loss or ect.ect_loss -> [B]
    update          RAdam, with a learning rate that falls to 0 and, in fp16, a loss scale
    average         ema <- ema + (1 - decay) (net - ema): the weights that are sampled
    log, save       every 100 and every 500 iterations
"""
import argparse, contextlib, copy, datetime, hashlib, io, json, os, pickle, signal, sys
import threading, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ect, fid, mcm, sample
from fid import DEVICE, InputError, refuse
# `with refuse(text):` makes an InputError of what goes wrong. fid.usage_errors says it in one line.

# ---- Several processes ---------------------------------------------------------------------------
# torchrun starts this program once for each GPU. Every process draws the whole batch and takes its
# own rows of it, RANK, RANK + WORLD, ... The gradients of all are added up before each update. So
# the weights are equal; only rounding depends on WORLD. Machines must share --out and downloads.
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ              # set by torchrun alone
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1

def join_processes():
    """Each process gets its GPU and can reach the others. Only the first one prints. The others
    wait in here until it has downloaded and read everything, or all would download at once."""
    backend = "gloo"
    if DEVICE.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
        add_up(torch.zeros(1))      # until the first process makes this call in main

def add_up(tensor):
    """The sum of a tensor over all processes, in place. It waits until all of them are here."""
    if LAUNCHED:
        dist.all_reduce(tensor)
    return tensor

def gather(share):
    """The tensors of all processes, on the CPU, one after the other."""
    shares = [share] * WORLD
    if LAUNCHED:
        dist.all_gather_object(shares, share)
    return torch.cat(shares)

# ---- Settings ------------------------------------------------------------------------------------
def number(kind, low, high=2**32):
    """A type for argparse: an int or a float from low to high."""
    def numeric(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
    return numeric

COUNT, WHOLE, REAL = number(int, 1), number(int, 0), number(float, 0)
SWITCH = argparse.BooleanOptionalAction
SAMPLERS = {"mct": "multistep", "mcd": "multistep", "ect": "renoise", "ect-segmented": "multistep",
            "diffusion": "heun"}            # by method

def add_settings(parser):
    """Adds an argument for each setting -> its values in the presets, {preset: {name: value}}.
    "cifar10" is ECT's A100 hour, which has a published number (its authors' lr is constant), with
    T of MCM's paper. "shapes" is a short run. Each time learns from a slightly lower one, so errors
    add up over these steps. So they are few and long: T ends at 128, not 1280, and ECT's t - r at
    about t / 8, not t / 256. The other settings were found by trying, see the README."""
    presets = {"shapes": {}, "cifar10": {}}
    parser.add_argument("--preset", choices=presets, help="picks the defaults, shown in brackets")
    def add(name, shapes, cifar10, help, **how):
        presets["shapes"][name], presets["cifar10"][name] = shapes, cifar10
        help = f"{help} (shapes: {shapes}, cifar10: {cifar10})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=help, **how)

    # Each line: name, value in preset shapes, in cifar10, help, and how argparse reads it.
    add("steps", [2], [2], "several: all in one network", type=number(int, 1, 64), nargs="+")
    add("method", "mct", "ect", "see mcm.py, ect.py; diffusion: no tuning", choices=SAMPLERS)
    add("data", "shapes", "cifar10", "shapes, cifar10, a folder or an .npz")
    add("init", "shapes", "edm", "EDM's .pkl or our .pt; none: train one first")
    add("classes", True, False, "class labels (captions of shapes) for the network", action=SWITCH)
    add("guidance", 0.0, 0.0, "mcd with --classes: weight of the teacher's guidance", type=REAL)
    add("out", None, None, "folder of the run; default: runs/DATA-METHOD-STEPS")
    # The optimizer. For longer runs, ema nearer to 1. RAdam multiplies lr by about root(i / 2000)
    # until iteration 2000, so a short run never has the whole lr.
    add("iters", 400, 8_000, "iterations of tuning", type=COUNT)
    add("pretrain_iters", 2500, 100_000, "the same of the diffusion model", type=WHOLE)
    add("batch", 32, 128, "images in an iteration", type=COUNT)
    add("lr", 1.6e-3, 1e-4, "learning rate of tuning, falls linearly to 0", type=REAL)
    add("pretrain_lr", 2e-3, 5e-4, "the same for the diffusion model", type=REAL)
    add("ema", 0.975, 0.9993, "decay of the averaged weights", type=REAL)
    # The network. Both passes of an iteration share a dropout mask. --init brings its own width.
    add("width", 32, 128, "channels", type=int, choices=(8, 16, 32, 64, 128, 256))
    add("dropout", 0.0, 0.2, "in training", type=number(float, 0, 0.99))
    # MCM. T rises until mid-run. Small huber_eps: a norm, needs a small --lr. 1: nearly a square.
    # T stays below mcm.segment_of's limit, 10,000 teacher steps in a segment.
    add("T", [8, 128], [64, 1280], "first and last T(i)", type=number(int, 1, 8192), nargs=2)
    add("huber_eps", 6e-3, 1e-4, "mct, mcd: rounds the loss near 0 (pseudo-Huber)", type=REAL)
    # ECT. In the last stage t - r = n(t) t / q^stages, n: see ect.py. ln t ~ N(p_mean, p_std^2).
    add("q", 2.0, 256.0, "ect: each stage divides t - r by it", type=number(float, 1))
    add("stages", 3, 1, "ect: stages of the curriculum, of equal length", type=COUNT)
    add("p_mean", 1.0, -1.1, "ect, diffusion: mean of ln t", type=number(float, -9, 9))
    add("p_std", 1.8, 2.0, "the same: its standard deviation", type=REAL)
    add("c", 0.05, 0.0, "ect: as huber_eps, but the norm sums over an image", type=REAL)
    # The machine. bf16 is not offered: where t - r is small, its gradients are too coarse.
    add("precision", "fp32", "fp16", "fp16 is for a GPU", choices=("fp16", "fp32"))
    add("compile", False, True, "torch.compile: takes minutes, pays on a GPU", action=SWITCH)
    add("seed", 0, 0, "of all that is random", type=WHOLE)
    add("features", "random", "inception", "random, inception, a TorchScript file")
    add("fd_samples", 1000, 50_000, "images to measure", type=number(int, 10))
    return presets

MAY_CHANGE = ("out", "precision", "compile", "features", "fd_samples")     # in a run
# The presets' networks: a small one that works on patches of 2x2 pixels, and EDM's.
NETS = {"shapes": dict(mult=(1, 2, 2), blocks=1, attention=(), patch=2), "cifar10": {}}

def read_settings(parser, arguments):
    """The command line -> all settings, a namespace. InputError for what does not go together."""
    # Read once to learn what is given, None for the rest, and so which preset is meant.
    presets = add_settings(parser)
    given = parser.parse_args(arguments)
    preset = given.preset or choose_preset(given.data)
    # Read again: what is not given is now the preset's, except that its diffusion model and its
    # classes fit only its own data.
    defaults = presets[preset]
    if given.data not in (None, preset):
        defaults.update(init="none", classes=False)
    parser.set_defaults(preset=preset, **defaults)
    settings = parser.parse_args(arguments)
    settings.steps = sorted(set(settings.steps))
    if given.width and settings.init != "none":
        raise InputError("--width: the model of --init has its own; add --init none")
    if settings.method == "ect-segmented" and len(settings.steps) > 1:
        raise InputError("--method ect-segmented: needs a single number of --steps")
    if settings.guidance and not (settings.method == "mcd" and settings.classes):
        raise InputError("--guidance: needs --method mcd and --classes")
    if settings.stages * np.log2(settings.q) > 20:
        raise InputError("--q, --stages: with q^stages above 2^20, t - r is lost in rounding")
    if min(settings.batch, settings.fd_samples) < WORLD:
        raise InputError(f"--batch, --fd-samples: need {WORLD}, one image for each process")
    return settings

def choose_preset(data):
    """The preset where none is given: "cifar10" on a GPU, but "shapes" with other --data, or if no
    --data is given and cifar10's files cannot be had (not tried under torchrun: all must agree)."""
    if DEVICE.type == "cuda" and data in (None, "cifar10"):
        if data or LAUNCHED:
            return "cifar10"
        with contextlib.suppress(InputError):
            fid.download(*EDM)
            fid.download(*fid.INCEPTION)
            fid.read_images("cifar10")
            return "cifar10"
    print("preset shapes chosen (no GPU or internet, or --data given); A100 hour: --preset cifar10")
    return "shapes"

# ---- The network: DDPM++ as EDM ships it, so that the published weights load by key --------------
def hash32(h):
    """Mixes the bits of h, int32 of any shape, in place: each bit then depends on all of them."""
    for _ in range(2):
        h ^= (h >> 16) & 0xFFFF         # >> copies the sign, & drops the copies
        h *= 0x45D9F3B                  # 32 bits of the product are kept
    h ^= (h >> 16) & 0xFFFF
    return h

def dropout(x, p, seed, layer):
    """Dropout of x [B, C, H, W] by a mask that depends on (seed [B], layer, element) alone.
    Both passes of a consistency step must have one mask. A random generator would have to be set
    back in between, which a CUDA graph cannot do."""
    element = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device)
    # A prime near 2^32 over the golden ratio keeps the layers' seeds far apart.
    start = hash32((seed + 0x9E3779B1 * layer).int())               # [B]
    bits = hash32(mcm.per_sample(start, x) + element.view(x.shape[1:]))     # [B, C, H, W]
    keep = bits >= int(p * 2**32) - 2**31           # bits are uniform over all of int32
    return x * keep / (1 - p)

def group_norm(channels):           # at most 32 groups, with at least 4 channels in each
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)

def conv(c_in, c_out, kernel):      # keeps H and W
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)

class Block(nn.Module):
    """A residual block, x [B, c_in, H, W] and emb [B, c_emb] -> [B, c_out, H', W'].
    p: of dropout. layer: the block's number. resample: a module that halves or doubles H and W."""
    def __init__(self, c_in, c_out, c_emb, p, layer, resample=None, attention=False):
        super().__init__()
        self.p, self.layer, self.attention = p, layer, attention
        self.resample = resample or nn.Identity()
        self.norm0 = group_norm(c_in)
        self.conv0 = conv(c_in, c_out, 3)
        self.affine = nn.Linear(c_emb, c_out)
        self.norm1 = group_norm(c_out)
        self.conv1 = conv(c_out, c_out, 3)
        self.skip = conv(c_in, c_out, 1) if resample or c_in != c_out else nn.Identity()
        if resample:
            # EDM's filter. `resample` does the same without it. It is kept as a key of the weights.
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
            # Attention between all pixels, with one head: softmax(q k^T / sqrt(C)) v. The channels
            # of qkv are interleaved, as in EDM: q, k, v of channel 0, q, k, v of channel 1, ...
            qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (1, -1, 3))
            # qkv is [B, 1, C, 3, H W]. Of it q, k, v, each [B, 1, H W, C].
            q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()
            a = F.scaled_dot_product_attention(q, k, v)
            x = (self.proj(a.mT.reshape(x.shape)) + x) * 0.5**0.5
        return x

class DDPMpp(nn.Module):
    """The raw network F(c_in x, c_noise). Its blocks are called {side}x{side}_{block}, as EDM's.
    width, mult: channels of the levels. blocks: of each level. attention: sides that have it
    (in0 always has). patch: works on patch x patch pixels. segments: rows of mcm.segment_row."""
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
            # Its number: 0, 1, 2, ... The first part of enc is a convolution, not a block.
            layer = len(self.enc) + len(self.dec) - 1
            return Block(c_in, c_out, c_emb, dropout, layer, resample, attention)

        # Encoder: at each level a halving block, except at the first, then the residual blocks.
        # With EDM's settings: 32x32, 16x16 and 8x8 pixels, 256 channels each.
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
                # As EDM: here only a level's last block attends, in the encoder each of them.
                attend = side in attention and j == blocks
                self.dec[f"{side}x{side}_block{j}"] = block(c_in, c, attend)
            if level > 0:
                side = side * 2
                self.dec[f"{side}x{side}_up"] = block(c, c, resample=nn.Upsample(scale_factor=2))
        self.dec[f"{side}x{side}_aux_norm"] = group_norm(c)
        self.dec[f"{side}x{side}_aux_conv"] = conv(c, 3 * patch**2, 3)

        # As EDM: the last layer of each residual branch begins near zero. Labels and segments begin
        # with zeros, so that they can be added to a trained network.
        for name, p in self.named_parameters():
            if name.endswith("bias") or "map_segment" in name or "map_label" in name:
                nn.init.zeros_(p)
            elif name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight")):
                nn.init.xavier_uniform_(p, 1e-5)
            elif "qkv" in name:
                nn.init.xavier_uniform_(p, 0.2**0.5)
            elif p.ndim > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, x, c_noise, labels=None, segment=None, seed=None):
        """Noisy images [B, 3, H, W] and c_noise [B] -> [B, 3, H, W]. The rest: UNet.forward."""
        # The embedding of noise level, label and segment: [B, c_emb]. The noise level enters as
        # sines and cosines, of frequencies from 1 down to 1/10000, as in EDM.
        angle = c_noise[:, None] * self.frequencies
        emb = torch.cat([angle.sin(), angle.cos()], 1).to(x.dtype)
        if self.classes:
            labels = torch.full_like(c_noise, -1) if labels is None else labels
            one_hot = labels[:, None] == torch.arange(self.classes, device=x.device)    # -1: zeros
            emb = emb + self.map_label(one_hot.to(x.dtype) * self.classes**0.5)
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
    c_out.) A class of your own in its place needs the same forward, the attributes arguments,
    image_shape, dtype, model.classes, and the parameters that `extended` and load_init give."""
    def __init__(self, width=128, mult=(2, 2, 2), blocks=4, resolution=32, **more):
        super().__init__()
        self.arguments = dict(more, width=width, mult=mult, blocks=blocks, resolution=resolution)
        self.model = DDPMpp(**self.arguments)
        self.image_shape = (3, resolution, resolution)
        self.dtype = torch.float32      # of the raw network; float16 only on a GPU, see place

    def forward(self, x, sigma, labels=None, segment=None, seed=None):
        """x [B, 3, H, W] = x0 + sigma eps, sigma [B] or a number > 0 -> x_hat, float32.
        labels: int64 [B], -1 for none, or None. segment: int64 [B] of mcm.segment_row.
        seed: int64 [B] in [0, 2^32) of the dropout masks, or None: no dropout."""
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        # EDM, table 1. The input c_in x and the target (x0 - c_skip x) / c_out of the raw network
        # have variance 1 at every sigma. Where sigma is small, c_skip is near 1 and c_out near 0:
        # then x is almost clean, and the network's errors hardly count.
        level = mcm.per_sample(sigma, x)                        # [B, 1, 1, 1]
        c_in = (level**2 + SIGMA_DATA**2).rsqrt()
        c_skip = SIGMA_DATA**2 * c_in**2
        c_out = SIGMA_DATA * level * c_in
        c_noise = sigma.log() / 4                               # [B]
        # The weights are cast by hand: autocast would run group norms in float32, which is slower.
        weights = {name: p.to(self.dtype) for name, p in self.model.named_parameters()}
        inputs = (c_in * x).to(self.dtype), c_noise, labels, segment, seed
        raw = torch.func.functional_call(self.model, weights, inputs)
        return c_skip * x + c_out * raw

def extended(net, classes, **more):
    """A copy of a UNet, other arguments in `more`. New embeddings are zeros: no effect yet."""
    copied = UNet(**{**net.arguments, "classes": net.model.classes or classes, **more})
    copied.load_state_dict({**copied.state_dict(), **net.state_dict()})
    return copied

def place(net, precision):
    """A UNet on DEVICE, in channels last. Only on a GPU, and for "fp16", in half precision."""
    half = precision == "fp16" and DEVICE.type == "cuda"
    net.dtype = torch.float16 if half else torch.float32
    return net.to(DEVICE, memory_format=torch.channels_last)

# ---- EDM's published weights (CC BY-NC-SA 4.0), opened safely ------------------------------------
# EDM's files are pickles: programs that import names and call them. Our unpickler imports nothing.
# The five names in ALLOWED stand for what rebuilds tensors and plain containers. Any other name
# stands for Inert, which does nothing. So a hostile file can waste memory, but run no code.
EDM = ("https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl",
       "4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da")

class Inert(nn.Module):
    """Stands for an object of any class. Its state_dict() is that of the module it stands for.
    EDM's pickles rebuild a module by calling a function with one dict, of its class and state. Here
    this call makes an Inert, and `saved` is the dict. Objects of other kinds are never read."""
    def __init__(self, saved=None, *ignored):
        super().__init__()
        if isinstance(saved, dict):
            self.__dict__.update(saved["state"], class_name=saved["class_name"])

    # torch's own modules come this way, without __init__. (A numpy type's state is a tuple.)
    def __setstate__(self, state):
        if isinstance(state, dict):
            super().__setstate__(state)

ALLOWED = {
    "torch._utils _rebuild_parameter": torch._utils._rebuild_parameter,
    "torch._utils _rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch.storage _load_from_bytes": lambda b: torch.load(io.BytesIO(b), weights_only=True),
    "collections OrderedDict": dict,
    "builtins set": set,
}
class EDMUnpickler(pickle.Unpickler):
    def find_class(self, module, name):                 # is called for every name in a file
        return ALLOWED.get(f"{module} {name}", Inert)

def load_edm(path):
    """A .pkl of EDM or ECT -> (state dict of its EMA, arguments for UNet)."""
    with refuse(f"{path}: not a network of EDM or ECT"), open(path, "rb") as file:
        ema = EDMUnpickler(file).load()["ema"]
        if ema.class_name not in ("EDMPrecond", "ECMPrecond") or ema.sigma_data != SIGMA_DATA:
            raise ValueError(f"it is {ema.class_name}, with another preconditioning")
        its = ema.model._init_kwargs                    # of the SongUNet inside
        return ema.state_dict(), dict(
            width=its["model_channels"], mult=tuple(its["channel_mult"]), dropout=its["dropout"],
            blocks=its.get("num_blocks", 4), augment_dim=its.get("augment_dim", 0),
            classes=its["label_dim"], resolution=its["img_resolution"])

# ---- One iteration: what is drawn, which loss ----------------------------------------------------
def draw(data, settings, method, i):
    """What iteration i draws -> a dict of [batch, ...], a function of (seed, phase, i), no state.
    So a run that was killed goes on with the very batches that it would have drawn."""
    device, batch = data.images.device, settings.batch
    entropy = np.random.SeedSequence([settings.seed, method != "diffusion", i])
    bits = int(entropy.generate_state(1, np.uint64)[0]) >> 1     # fits int64
    how = dict(generator=torch.Generator(device).manual_seed(bits), device=device)
    # Images, noise and the seeds of the dropout masks.
    index = torch.randint(len(data.images), (batch,), **how)
    x = data.images[index]
    eps = torch.randn(x.shape, **how)
    seed = torch.randint(2**32, (batch,), **how)
    # One in ten is trained without its label, so that the model can be guided (mcm.guided).
    labels = data.labels[index].where(torch.rand(batch, **how) > 0.1, -1)
    drawn = dict(x=x, eps=eps, seed=seed, labels=labels)
    if method in ("mct", "mcd"):
        # The times of MCM's Algorithm 1, for an N of --steps.
        which = torch.randint(len(settings.steps), (batch,), **how)
        N = torch.tensor(settings.steps).to(device, non_blocking=True)[which]   # no wait
        T = mcm.teacher_steps(i, *settings.T, anneal=settings.iters / 2)
        t, s, t_step = mcm.draw_times(batch, N, T, **how)
        drawn.update(N=N, t=t, s=s, t_step=t_step)
    else:
        # A log-normal noise level, and ECT's stage, which diffusion ignores.
        drawn["t"] = ect.draw_t(batch, settings.p_mean, settings.p_std, **how)
        stage = i * settings.stages // settings.iters
        drawn["stage"] = torch.full_like(index, stage)
    return drawn

def step_loss(net, teacher, settings, method, x, eps, seed, labels, t, s=None, t_step=None, N=None,
              stage=None):
    """The loss of one iteration, of what `draw` drew -> [B]. It compiles as one graph."""
    x = x.float() / 127.5 - 1
    if method == "diffusion":
        # As MCT where s = t_step: the target is x, the weight SNR + 1. Nearly a squared error.
        D = mcm.conditioned(net, labels=labels, seed=seed)
        z_t = x + mcm.per_sample(t, x) * eps
        return mcm.v_loss(D(z_t, t), x, z_t, t, mcm.edm, huber_eps=1.0)
    if method in ("ect", "ect-segmented"):
        # The paper's ECT is a single segment, down to 0, without inner edges.
        segments = settings.steps[0] if method == "ect-segmented" else 1
        D = mcm.conditioned(net, segments, labels=labels, seed=seed)
        edges = ect.segment_edges(segments, x.device)
        return ect.ect_loss(D, x, eps, t, stage, settings.q, c=settings.c, edges=edges)
    # MCM: training, where the data itself makes the step to s, or distillation of the teacher.
    f = mcm.make_f(net, steps=N, labels=labels, seed=seed)
    teacher_f = mcm.make_f(teacher, labels=labels) if method == "mcd" else None
    if settings.guidance:
        teacher_f = mcm.guided(teacher_f, mcm.make_f(teacher), settings.guidance)
    return mcm.consistency_loss(f, x, eps, t, s, t_step, teacher=teacher_f,
                                huber_eps=settings.huber_eps)

# ---- The loop ------------------------------------------------------------------------------------
def train(net, teacher, data, settings, method):
    """Trains `net` (teacher: for mcd) -> its average. The same call goes on where one stopped."""
    path, iters, peak_lr = Path(settings.out, "tuned.pt"), settings.iters, settings.lr
    if method == "diffusion":
        path = Path(settings.out, "diffusion.pt")
        iters, peak_lr = settings.pretrain_iters, settings.pretrain_lr
    place(net, settings.precision)
    ema = copy.deepcopy(net).requires_grad_(False)
    weights = list(net.parameters())
    optimizer = torch.optim.RAdam(weights, foreach=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=settings.precision == "fp16")
    # Each weight's .grad is a part of one vector, with the strides of its weight (channels last).
    # So add_up(gradient) is one call for all.
    sizes = [p.numel() for p in weights]
    gradient = torch.zeros(sum(sizes), device=DEVICE)
    for p, part in zip(weights, gradient.split(sizes)):
        p.grad = part.as_strided(p.shape, p.stride())
    # One graph, which a GPU replays. Channels last is forced: the compiler's choice is 1.5x slower.
    loss_of = torch.compile(step_loss, fullgraph=True, disable=not settings.compile, options={
        "triton.cudagraphs": True, "force_layout_optimization": True})

    # Restore. The run goes on as if it had not stopped, because all that is drawn follows from i.
    # load_state_dict takes tensors to the GPU, where their weights are.
    state = dict(ema=ema, net=net, optimizer=optimizer, scaler=scaler)
    first = 0
    if path.exists():
        saved = load_checkpoint(path)
        first = saved["step"]
        for name, part in state.items():
            if saved[name]:                     # the scaler has a state in fp16 only
                part.load_state_dict(saved[name])
    print(f"{method}: {iters} iterations, {first} of them done")
    with ctrl_c() as asked:
        for i in range(first, iters):
            if i % 100 == 0 or i <= first + 1:          # the first is not timed: it compiles
                losses, clock = [], time.perf_counter()

            # Draw the batch. Forward and backward over this process' share of it. The division
            # makes the sum over all shares the mean over the batch.
            drawn = draw(data, settings, method, i)
            share = {name: value[RANK::WORLD] for name, value in drawn.items()}
            loss = loss_of(net, teacher, settings, method, **share).sum() / settings.batch
            gradient.zero_()        # zero_grad() would take the .grads out of this vector
            scaler.scale(loss).backward()
            add_up(gradient)
            losses.append(loss.detach())

            # Update the weights. In fp16, an iteration that overflows is skipped.
            optimizer.param_groups[0]["lr"] = peak_lr * (1 - i / iters)
            scaler.step(optimizer)
            scaler.update()

            # Update their average: the mean of all weights so far, while i / (1 + i) < --ema.
            decay = min(settings.ema, i / (1 + i))
            update_average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
            update_average(list(ema.parameters()), weights, i)          # it ignores i

            # Log. The host waits for the GPU only here, in saving and, in fp16, in scaler.step.
            done = i + 1
            if done % 100 == 0 or done == iters:
                loss = add_up(torch.stack(losses).mean()).item()
                speed = len(losses) * settings.batch / (time.perf_counter() - clock)
                left = f"{(iters - done) * settings.batch / speed / 60:.1f} min left"
                print(f"{method} {done}  loss {loss:.5f}  {speed:.0f} images/s  {left}", flush=True)

            # Save the state. All processes stop if one of them is asked to.
            stop = add_up(torch.tensor(len(asked))) > 0
            if done % 500 == 0 or done == iters or stop:
                save(path, data, settings, method, done, state)
            if stop:
                sys.exit(f"stopped at iteration {done} and saved; the same command goes on")
    return ema

@contextlib.contextmanager
def ctrl_c():
    """`with ctrl_c() as asked:` Ctrl-C only puts something into the list `asked`."""
    asked, before = [], signal.getsignal(signal.SIGINT)
    # Only a main thread may set a handler. A process that ignores Ctrl-C goes on ignoring it.
    if threading.current_thread() is threading.main_thread() and callable(before):
        signal.signal(signal.SIGINT, lambda *ignored: asked.append(True))
    try:
        yield asked
    finally:
        if signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)

# ---- Results -------------------------------------------------------------------------------------
def report(nets, data, settings, extractor):
    """The networks {method: network}, against all data: a table, result.json, dial.png.
    Each process makes and measures its share of the images."""
    n, real = settings.fd_samples, data.images
    real_features = gather(fid.features_of(real.tensor_split(WORLD)[RANK], extractor))
    floor = fid.floor_of(real_features, n)
    metric = fid.metric_name(settings.features, n)
    print(f"\n{settings.data!a}: {metric}; floor, real images to real: {floor:.2f}\n"
          "model         steps  evaluations  distance  images/s")

    # Method, sampler, steps, evaluations: N steps before and after tuning, then EDM's 18. Heun's
    # method calls the network twice in each step, except in the last.
    table = [("diffusion", "ddim", N, N) for N in settings.steps]
    if settings.method != "diffusion":
        table += [(settings.method, SAMPLERS[settings.method], N, N) for N in settings.steps]
    table += [("diffusion", "heun", 18, 35)]

    # All rows have the same noise and the same labels, those of n real images in random order.
    numbers = torch.arange(n).tensor_split(WORLD)[RANK]
    order = fid.shuffled(len(real))
    labels = data.labels[order[numbers % len(real)]]
    rows, pictures = [], []
    for method, sampler, steps, nfe in table:               # nfe: evaluations of the network
        start = time.perf_counter()
        share = sample.generate(nets[method], sampler, steps, numbers, labels, settings.seed)
        speed = n / (time.perf_counter() - start)
        distance = fid.distance_of(gather(fid.features_of(share, extractor)), real_features)
        print(f"{method:<13} {steps:5} {nfe:12} {distance:9.2f} {speed:9.0f}", flush=True)
        rows.append(dict(method=method, sampler=sampler, steps=steps, nfe=nfe, metric=metric,
                         distance=distance, floor=floor))
        pictures.append(share[:10])
    if RANK == 0:
        Path(settings.out, "result.json").write_text(json.dumps(rows, indent=1))
        sample.save_grid(torch.cat(pictures), Path(settings.out, "dial.png"), len(pictures[0]))
    print(f"pictures, a row for each line: {settings.out + '/dial.png'!a}")

# ---- All of it -----------------------------------------------------------------------------------
@torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
def main(arguments=None):
    """The command line: read everything, train or load a diffusion model, tune it, report."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    if LAUNCHED:
        join_processes()
    # All that a user can get wrong is read here, before any work.
    with fid.usage_errors(parser):
        settings = read_settings(parser, arguments)
        data = load_data(settings)
        extractor = fid.load_extractor(settings.features, data.images[:2])
        diffusion = load_init(settings, data)
        open_run(settings)
    if RANK == 0:
        add_up(torch.zeros(1))                  # the others wait for this, see join_processes

    # A diffusion model that is new is trained. With --method diffusion, any is trained further.
    more = dict(dropout=settings.dropout, classes=len(data.class_names))
    if settings.method == "diffusion" or settings.init == "none":
        diffusion = train(extended(diffusion, **more), None, data, settings, "diffusion")
    nets = {"diffusion": place(diffusion, settings.precision).requires_grad_(False)}

    # Tune a copy, with an embedding for each segment of each N: 1 + 2 + ... + max N rows.
    if settings.method != "diffusion":
        net = extended(diffusion, **more, segments=sum(range(max(settings.steps) + 1)))
        nets[settings.method] = train(net, diffusion, data, settings, settings.method)
    report(nets, data, settings, extractor)

# ---- What a run reads and writes: data, checkpoints, its folder ----------------------------------
def load_data(settings):
    """--data -> a namespace: images, labels, class_names. Without --classes: -1 and no names.
    A folder's name in the settings gets a hash of its images, because two may have one name."""
    images, labels, names = fid.read_images(settings.data)
    images = fid.batch_of(images)           # reads all files
    n, _, height, width = images.shape
    if n < max(8, WORLD) or height != width or height % 16:
        raise InputError(f"--data {settings.data}: needs {max(8, WORLD)} images, 16x16, 32x32, ...")
    if settings.classes and not names:
        raise InputError(f"--classes: {settings.data} has no classes, leave it out")
    if settings.data not in ("shapes", "cifar10"):
        content = images.numpy().tobytes() + labels.numpy().tobytes()
        settings.data = f"{Path(settings.data).name}-{hashlib.sha256(content).hexdigest()[:6]}"
    if not settings.classes:
        labels, names = torch.full_like(labels, -1), []
    return SimpleNamespace(images=images.to(DEVICE), labels=labels.to(DEVICE), class_names=names)

@contextlib.contextmanager
def atomic(path):
    """`with atomic(path) as part:` write to part, which becomes `path` when it is whole."""
    part = path.with_name(f".part-{path.name}")
    yield part
    part.replace(path)

def save(path, data, settings, method, step, parts):
    """One file of tensors and plain values: the parts, and all that sample.py needs.
    If weights are not finite, or fp16 overflows at every loss scale, the run ends instead."""
    finite = all(p.isfinite().all() for p in parts["net"].parameters())
    if not finite or parts["scaler"].get_scale() < 1:           # it is 1 in fp32
        sys.exit(f"{method}, iteration {step}: not finite; try fp32, or less --lr in a new --out")
    steps = [18] if method == "diffusion" else settings.steps               # 18: EDM's
    state = {name: part.state_dict() for name, part in parts.items()}
    state.update(arguments=parts["ema"].arguments, method=method, step=step, steps=steps,
                 class_names=data.class_names, settings=vars(settings))
    if RANK == 0:
        with atomic(path) as file:
            torch.save(state, file)
    add_up(torch.zeros(1))                      # nobody ends before the file is whole

def load_checkpoint(path):
    """A file of `save` -> its dict, on the CPU."""
    with refuse(f"{path}: damaged, or no checkpoint of this version"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["method"]                         # a KeyError, if it is another's
    return state

def load_network(state):
    """A dict of load_checkpoint -> its averaged network."""
    net = UNet(**state["arguments"])
    net.load_state_dict(state["ema"])
    return place(net, state["settings"]["precision"])

def open_run(settings):
    """Makes the folder of the run. InputError if it holds one of other settings or data."""
    steps = "-".join(map(str, settings.steps))
    settings.out = settings.out or f"runs/{settings.data}-{settings.method}-{steps}"
    # The same command goes on with a run. Another must not mix with it.
    for path in Path(settings.out).glob("[!.]*.pt"):        # no .part- that atomic left
        begun = load_checkpoint(path)["settings"]
        for name, now in vars(settings).items():
            if name not in MAY_CHANGE and begun.get(name) != now:
                raise InputError(f"--{name.replace('_', '-')}: {settings.out} was begun with "
                                 f"{begun.get(name)}, not {now}; give another --out")
    Path(settings.out).mkdir(parents=True, exist_ok=True)

def load_init(settings, data):
    """The diffusion model of --init, or a new one. Settings get a hash instead of its path, because
    a file may be moved or overwritten while a run waits to go on."""
    if settings.init == "none":
        torch.manual_seed(settings.seed)
        return UNet(settings.width, **NETS[settings.preset], resolution=data.images.shape[-1])
    path = Path(settings.init)
    if settings.init == "shapes":
        path = Path(__file__).parent / "assets/diffusion.pt"
    if settings.init == "edm":
        path = fid.download(*EDM)
        print("EDM's weights are CC BY-NC-SA 4.0: no commercial use, nor of models made from them")
    with refuse(f"--init {path}: cannot be read"):
        settings.init = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    if path.suffix == ".pkl":                   # EDM's. (ECT's are tuned already, but they load.)
        weights, arguments = load_edm(path)
        net = UNet(**arguments)
        with refuse(f"{path}: its network is not EDM's DDPM++"):
            net.load_state_dict(weights)
    else:
        state = load_checkpoint(path)
        net = load_network(state)
        if state["method"] != "diffusion":
            raise InputError(f"--init {path}: tuned already, give a diffusion model")
    # A model with classes needs as many as the data. One without learns them, but cannot teach.
    has, needs = net.model.classes, len(data.class_names)
    wrong_classes = needs and has != needs and (has or settings.method == "mcd")
    if net.image_shape != data.images.shape[1:] or wrong_classes:
        raise InputError(f"--init {path}: is for {net.image_shape}, {has} classes; try --init none")
    return net

if __name__ == "__main__":
    main()
