"""FID as the published numbers are computed, in one file that works alone.

    python fid.py samples.npz cifar10                         # called FID if n is 50,000 or more
    python fid.py samples train --features random --n 1000    # any images, no download

First the images to judge, then the real ones: a folder, an .npz (arr_0: uint8 NHWC) or cifar10
(its training set). The real ones may also be statistics of Inception's features that another
program saved, an .npz with mu and sigma.

A published FID has four parts: the Inception graph of 2015, TensorFlow 1's resize, n = 50,000 and
the unbiased covariance. With fewer images it is too large: about 30 at n = 2,000, even between real
images. This error is proportional to 1/n + 1/N for n images against N. So beside a distance stands
its floor, that of n real images from n others, where the error is 2/n. A perfect model, measured
against all N, has (1/n + 1/N) / (2/n) of the floor. (With fewer than 2 n real images, the floor is
that of their two halves.)

"Moves features by", below, is the largest change in any feature (they reach 39).
"""
import argparse, math, os, sys, zipfile, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.models import inception

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth",
             "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")

class InputError(ValueError):
    """A mistake that the user can mend: one line that names it and the remedy."""

def download(url, sha256):
    """The path of url's file in torch's cache, where it is downloaded if it is not there."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, sha256)   # checks it, then renames it
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} ({error}): put {url} there") from error
    return path

# ---- Inception -----------------------------------------------------------------------------------
def resize_tf1(images):
    """[N, C, H, W] in 0..255 -> float32 [N, C, 299, 299], as TensorFlow 1 resizes.
    It reads at i * size / 299 (half a pixel of offset moves features by 0.8). With one more
    pixel at the right and the bottom, and 300 instead of 299, align_corners reads at
    i * (size + 1 - 1) / (300 - 1), the same. In float64, because float32 rounds these positions.
    """
    padded = F.pad(images.double(), (0, 1, 0, 1), mode="replicate")
    larger = F.interpolate(padded, size=(300, 300), mode="bilinear", align_corners=True)
    return larger[:, :, :299, :299].float()

# TensorFlow's graph differs from torchvision's in its pooling branches. Its averages leave the
# padding out (counting it moves features by 2.5), and the last block has a maximum instead of an
# average (by 9.6).
def uncount_padding(module, inputs):
    """Before a branch_pool: sums over 3x3, all divided by 9 -> divided by the pixels inside."""
    pooled, = inputs
    share_inside = F.avg_pool2d(torch.ones_like(pooled[:1, :1]), 3, stride=1, padding=1)
    return pooled / share_inside

class LastBlock(inception.InceptionE):
    def forward(self, x):               # [N, 2048, H, W] -> [N, 2048, H, W]
        others = super().forward(x)[:, :-192]               # all channels but the pool's
        pooled = self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        return torch.cat([others, pooled], 1)

class InceptionFID(inception.Inception3):
    """uint8 [N, 3, H, W] -> [N, 2048]. Its state dict has the keys of the published weights."""
    def __init__(self):
        super().__init__(1008, aux_logits=False, init_weights=False)
        for block in self.children():
            if hasattr(block, "branch_pool"):
                block.branch_pool.register_forward_pre_hook(uncount_padding)
        self.Mixed_7c = LastBlock(2048)
        self.eval()

    def forward(self, images):
        # TensorFlow's graph normalises by 128. With v / 127.5 - 1, features would move by 0.2.
        x = (resize_tf1(images) - 128) / 128
        for part in list(self.children())[:-1]:     # in their order; fc is kept for its keys
            x = part(x)
        return x.flatten(1)

    def fold(self):
        """Folds BatchNorm into the convolutions, channels last: the same function, faster."""
        for part in self.modules():
            if isinstance(part, inception.BasicConv2d):
                part.conv = nn.utils.fuse_conv_bn_eval(part.conv, part.bn)
                part.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)

# ---- Features ------------------------------------------------------------------------------------
def random_features(images):
    """uint8 [N, 3, H, W] -> [N, 36]: colours, and energies of random filters. No download.
    They are few because the floor grows with their number. At full size nothing is strided, so
    that grain is seen. The factors 24 and 8 were chosen on CIFAR-10.
    """
    x = images.float() / 127.5 - 1
    rng = np.random.default_rng(2)

    # The mean colours of the four quarters, then log energies at full and at half size.
    features = [F.adaptive_avg_pool2d(x, 2).flatten(1)]
    for scale, weight in ((1, 24), (2, 8)):
        y = F.avg_pool2d(x, scale)
        for layer in range(2):
            channels = y.shape[1]
            filters = rng.standard_normal((12, channels, 3, 3)) / (9 * channels) ** 0.5
            if scale == 1:                          # blind to flat areas
                filters -= filters.mean((2, 3), keepdims=True)
            y = F.conv2d(y, torch.from_numpy(filters).to(y)).abs()
        features.append(weight * (y.mean((2, 3)) + 0.02).log())
    return torch.cat(features, 1)

def load_extractor(features, example, device="cpu"):
    """"inception", "random" or a TorchScript file -> a function, uint8 [N, 3, H, W] -> [N, d].
    It is tried on an example, images of that shape, before any work.
    """
    if features == "random":
        net = random_features
    elif features == "inception":       # so a file of this name is "./inception", and no FID
        net = InceptionFID().to(device, torch.float32)
        net.load_state_dict(torch.load(download(*INCEPTION), device, weights_only=True))
        net.fold()
    else:
        try:
            net = torch.jit.load(features, device).eval()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"--features {features}: not found, or no TorchScript") from error

    def extractor(images):
        # In float32: not in TF32, torch's default for convolutions, nor in a caller's autocast.
        with (torch.inference_mode(), torch.autocast(torch.device(device).type, enabled=False),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
            return net(images.to(device)).flatten(1).cpu()
    try:
        extractor(example)
    except (RuntimeError, AttributeError, IndexError) as error:
        raise InputError(f"--features {features}: fails on such images ({error})") from error
    return extractor

def features_of(images, extractor, rows=None):
    """uint8 images [N, 3, H, W], a tensor or `Files`, and which of them (None: all) -> [n, d]."""
    if rows is None:
        rows = torch.arange(len(images))
    features = []
    for batch in rows.split(250 if torch.cuda.is_available() else 16):      # what is fast
        features.append(extractor(images[batch]))
        if getattr(sys.stderr, "isatty", bool)():           # a notebook's stderr may lack it
            print(f"{len(features) * len(batch)} of {len(rows)}", end="\r", file=sys.stderr)
    return torch.cat(features)

# ---- Statistics and distance ---------------------------------------------------------------------
def moments(features):
    """[n, d] -> mean [d] and unbiased covariance [d, d], in float64."""
    features = features.double()
    mean = features.mean(0)
    deviation = features - mean
    return mean, deviation.T @ deviation / (len(features) - 1)

def frechet_distance(mean1, cov1, mean2, cov2):
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), means [d], covariances [d, d].
    With cov1 = R R^T, the last trace is that of (R^T cov2 R)^(1/2). This matrix is symmetric, so
    the trace is the sum of the roots of its eigenvalues, and no matrix root can fail.
    """
    # In float64, since the distance is a small difference of large traces.
    given = [torch.as_tensor(x).double().cpu() for x in (mean1, cov1, mean2, cov2)]
    mean1, cov1, mean2, cov2 = given

    # R from the eigenvalues of cov1. For n <= d some are 0, and come out as rounding errors.
    values, vectors = torch.linalg.eigh(cov1)
    values = values.where(values > 1e-12 * values[-1], 0)
    root = vectors * values.sqrt()
    shared = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + (cov1 + cov2).trace() - 2 * shared
    return distance.clamp(min=0).item()

def shuffled(n):
    """0 .. n - 1 in an order that is always the same -> int64 [n]."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))

def floor_of(real, n):
    """Features [N, d] of real images -> the floor for n images, see the top."""
    one, other = real[shuffled(len(real))[:2 * n]].chunk(2)
    return frechet_distance(*moments(one), *moments(other))

def metric_name(features, n):
    """FID only for what papers call FID. Any other distance is named after its features and n."""
    if features == "inception" and n >= 50_000:
        return "FID"
    return f"FD({features})@{n}"

# ---- Images --------------------------------------------------------------------------------------
def read_images(source):
    """A folder, an .npz or "cifar10" -> uint8 [n, 3, H, W], labels int64 [n], class names.
    The images are a tensor or `Files`. InputError for what cannot be read, with its name.
    """
    path = Path(source)
    if source == "cifar10":
        try:
            data = CIFAR10("data", download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"data/{CIFAR10.filename}: put {CIFAR10.url} there") from error
        images, labels = data.data, np.array(data.classes)[data.targets]
    elif path.suffix == ".npz":
        arrays = read_npz(path)
        images = arrays.get("arr_0", np.zeros(0))
        labels = arrays.get("arr_1", np.zeros(images.shape[:1]))
        if images.dtype != np.uint8 or images.shape[3:] != (3,) or labels.shape != images.shape[:1]:
            raise InputError(f"{path}: needs uint8 arr_0 [n, H, W, 3], labels arr_1 [n]")
    else:
        images = Files(path)
        labels = images.labels
    if not isinstance(images, Files):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)

    # Labels, names or numbers, become 0, 1, 2, ... in sorted order. One class is no class.
    classes, labels = np.unique(labels, return_inverse=True)
    names = [str(name) for name in classes] if len(classes) > 1 else []
    return images, torch.from_numpy(labels), names

def read_npz(path):
    """An .npz -> a dict of its arrays."""
    try:
        return dict(np.load(path))                                  # runs no pickles
    except (EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable .npz, write it anew") from error

def files_below(path):
    """The files in a folder and below, sorted, without hidden ones. Links are followed."""
    def refuse(error):
        raise error
    def is_shown(name):
        return not name.startswith(".") and name != "__MACOSX"

    files, seen = [], set()
    for place, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:            # by another link, or by one that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(is_shown, folders))          # where os.walk goes next
        files += [Path(place, name) for name in filter(is_shown, names)]
    return sorted(files)

class Files:
    """The images in a folder, decoded when asked for: files[rows] -> uint8 [B, 3, H, W].
    So they need not fit into memory. The label of each is the folder that it lies in.
    """
    def __init__(self, path):
        kinds = Image.registered_extensions()
        files = files_below(path)
        self.files = [file for file in files if kinds.get(file.suffix.lower()) in Image.OPEN]
        if not self.files:
            raise InputError(f"{path}: no folder with images, no .npz and not cifar10")
        if len(self.files) < len(files):
            print(f"{str(path)!a}: {len(files) - len(self.files)} files are no images")
        self.labels = [file.relative_to(path).parent.as_posix() for file in self.files]
        self.shape = (len(self.files), *self.decode(self.files[0]).shape)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        files = [self.files[row] for row in rows.tolist()]
        with ThreadPoolExecutor(4) as pool:
            images = list(pool.map(self.decode, files))
        for file, image in zip(files, images):
            if image.shape != self.shape[1:]:
                raise InputError(f"{file} is {image.shape}, not {self.shape[1:]}")
        return torch.from_numpy(np.stack(images))

    def decode(self, file):
        """A file's path -> uint8 [3, H, W]."""
        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):       # Pillow would clip these
                    raise ValueError("more than 8 bits a channel")
                return np.array(image.convert("RGB")).transpose(2, 0, 1)
        except Exception as error:      # over a damaged file Pillow raises whatever it likes
            raise InputError(f"{file} cannot be read ({error})") from error

def main(arguments=None):
    """The command line: images to judge and real ones -> one line with the distance."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    parser.add_argument("a", help="images to judge: a folder, an .npz or cifar10")
    parser.add_argument("b", help="real images: the same, or an .npz with mu and sigma")
    parser.add_argument("--features", default="inception", help="or random, or TorchScript")
    parser.add_argument("--n", type=int, default=50_000, help="images of a to use")
    args = parser.parse_args(arguments)
    try:
        images = read_images(args.a)[0]
        n = min(args.n, len(images))
        if n < 2:
            raise InputError(f"--n {args.n}: needs 2 images or more in {args.a}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        extractor = load_extractor(args.features, images[torch.arange(2)], device)

        # The real images, or their statistics.
        arrays = read_npz(args.b) if args.b.endswith(".npz") else {}
        if {"mu", "sigma"} <= arrays.keys():
            reference, floor = (arrays["mu"], arrays["sigma"]), math.nan
            if args.features != "inception" or reference[0].shape != (2048,):
                raise InputError(f"{args.b}: its statistics are of {reference[0].shape} features, "
                                 f"needs --features inception, which has (2048,)")
        else:
            real_images = read_images(args.b)[0]
            if len(real_images) < 4:
                raise InputError(f"{args.b}: needs 4 images or more")
            if args.features != "inception" and real_images.shape[2:] != images.shape[2:]:
                raise InputError(f"{args.a} and {args.b} have images of different sizes")
            real = features_of(real_images, extractor)
            reference, floor = moments(real), floor_of(real, n)

        # Of the images to judge, n are drawn, always the same.
        made = features_of(images, extractor, shuffled(len(images))[:n])
        distance = frechet_distance(*moments(made), *reference)
    except (InputError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"{metric_name(args.features, n)} {distance:.4f}, floor {floor:.4f}, n {n}, "
          f"features {args.features!a}, real images {args.b!a}")

if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")       # a terminal may lack a letter
    main()
