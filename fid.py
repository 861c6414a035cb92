"""FID as the published numbers are computed, in one file that works alone.

    python fid.py samples.npz cifar10                         # called FID if n is 50,000 or more
    python fid.py samples train --features random --n 1000    # any images, no download

First the images to judge, then the real ones: a folder, an .npz (arr_0: uint8 NHWC), cifar10 (its
training set) or shapes (built in). A published FID has four parts: the Inception graph of 2015,
TensorFlow 1's resize, n = 50,000 and the unbiased covariance. With fewer images it is too large:
about 30 for 2,000 real images against 2,000 others. With n images against N it goes as 1/n + 1/N.
So beside a distance stands its floor, n real images against n others: that goes as 2/n. A perfect
model scores (1 + n/N) / 2 of it. (Fewer than 2 n real images: two halves, (1 + N/n) / 4.)
Comments say by how much an error "moves features": the largest change of one (they reach 39).
"""
import argparse, contextlib, glob, pickle, zipfile, zlib
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
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

class InputError(ValueError):
    """A mistake that the user can mend: one line that names it and the remedy."""

# What is raised over a file that is damaged, of another program, or not there.
DAMAGED = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, TypeError,
           RuntimeError, ValueError, pickle.PickleError, zipfile.BadZipFile, zlib.error)

@contextlib.contextmanager
def refuse(message, kinds=DAMAGED):
    """`with refuse(message):` around what opens a file: a failure gets that message."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{message} ({error})") from error

@contextlib.contextmanager
def usage_errors(parser):
    """`with usage_errors(parser):` around all that a user can get wrong. One line says what it is,
    and the program ends with code 2. Any other error is ours and keeps its traceback."""
    try:
        yield
    except (InputError, OSError) as error:
        parser.error(" ".join(str(error).split()))

def download(url, sha256):
    """The path of url's file in torch's cache, where it is downloaded if it is not there."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not path.exists():
        with refuse(f"{path}: put {url} there"):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, sha256)   # checks it, then renames it
    return path

# ---- Inception -----------------------------------------------------------------------------------
def resize_tf1(images):
    """[N, C, H, W] in 0..255 -> float32 [N, C, 299, 299], as TensorFlow 1 resizes.
    It reads at i * size / 299 (half a pixel of offset moves features by 0.8). align_corners reads
    at i * (size - 1) / (299 - 1). So we give it one pixel more, at the right and the bottom, and
    300 for 299. In float64, because float32 rounds these positions."""
    padded = F.pad(images.double(), (0, 1, 0, 1), mode="replicate")
    larger = F.interpolate(padded, size=(300, 300), mode="bilinear", align_corners=True)
    return larger[:, :, :299, :299].float()

# TensorFlow's graph differs from torchvision's in its pooling branches. Averages leave out padding
# (counting it moves features by 2.5). The last block has a maximum (an average moves them by 9.6).
def uncount_padding(branch_pool, inputs):
    """A hook: inputs[0], means that count padding -> without: (sum / 9) / (pixels inside / 9)."""
    one = torch.ones_like(inputs[0][:1, :1])
    return inputs[0].div_(F.avg_pool2d(one, 3, stride=1, padding=1))

class LastBlock(inception.InceptionE):
    def forward(self, x):       # x and the result [N, 2048, H, W]; the result's last 192: pool
        pooled = self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        return torch.cat([super().forward(x)[:, :-192], pooled], 1)

class InceptionFID(inception.Inception3):
    """uint8 [N, 3, H, W] -> [N, 2048]. Its state dict has the keys of the published weights."""
    def __init__(self):
        super().__init__(1008, aux_logits=False, init_weights=False)
        for name, part in self.named_modules():
            if name.endswith("branch_pool"):
                part.register_forward_pre_hook(uncount_padding)
        self.Mixed_7c = LastBlock(2048)         # a maximum needs no hook
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
    """uint8 [N, 3, H, W] -> [N, 36]: colours, and energies of random filters. H, W >= 10.
    They are few because the floor grows with their number. At full size nothing is strided, so
    that grain is seen. The factors 24 and 8 were chosen on CIFAR-10."""
    x = images.float() / 127.5 - 1
    rng = np.random.default_rng(2)
    # The mean colours of the four quarters, then log energies at full and at half size.
    features = [F.adaptive_avg_pool2d(x, 2).flatten(1)]
    for scale, weight in ((1, 24), (2, 8)):
        y = F.avg_pool2d(x, scale)
        for layer in range(2):
            filters = rng.standard_normal((12, y.shape[1], 3, 3)) / (9 * y.shape[1]) ** 0.5
            if scale == 1:                  # zero mean: a flat area gives 0, only grain counts
                filters -= filters.mean((2, 3), keepdims=True)
            y = F.conv2d(y, torch.from_numpy(filters).to(y)).abs()
        features.append(weight * (y.mean((2, 3)) + 0.02).log())
    return torch.cat(features, 1)

def load_extractor(features, example):
    """"inception", "random" or a TorchScript file -> a function, uint8 [N, 3, H, W] -> [N, d].
    It is tried on an example, batch_of(images[:2]), before any work."""
    net = random_features
    with refuse(f"--features {features}: cannot be opened, or fails on such images"):
        if features == "inception":             # the word: a file of this name is "./inception"
            net = InceptionFID().to(DEVICE, torch.float32)
            net.load_state_dict(torch.load(download(*INCEPTION), DEVICE, weights_only=True))
            net.fold()
        elif features != "random":
            net = torch.jit.load(features, DEVICE).eval()

        # In float32: not in TF32, torch's default for convolutions, nor in a caller's autocast.
        @torch.inference_mode()
        @torch.autocast(DEVICE.type, enabled=False)
        @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        def extractor(images):
            return net(images.to(DEVICE)).flatten(1).cpu()
        extractor(example)
    return extractor

def features_of(images, extractor):
    """Images, as read_images gives them -> [n, d]. Only one batch of files is in memory."""
    size = 250 if DEVICE.type == "cuda" else 16         # what is fast
    batches = [images[i:i + size] for i in range(0, len(images), size)]
    return torch.cat([extractor(batch_of(batch)) for batch in batches])

# ---- Statistics and distance ---------------------------------------------------------------------
def moments(features):
    """[n, d], n > 1 -> mean [d] and unbiased covariance [d, d], in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)

def frechet_distance(mean1, cov1, mean2, cov2):
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), means [d], covariances [d, d].
    The trace of a root is the sum of the roots of the eigenvalues, so no matrix root can fail.
    In float64, because the distance is a small difference of large traces."""
    mean1, cov1, mean2, cov2 = [torch.as_tensor(x).double() for x in (mean1, cov1, mean2, cov2)]
    # No eigenvalue is negative, but for rounding: with cov1 = R R^T they are those of R^T cov2 R.
    shared = torch.linalg.eigvals(cov1 @ cov2).real.clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + (cov1 + cov2).trace() - 2 * shared
    return distance.clamp(min=0).item()

def distance_of(features, real):
    """The distance of two sets of features, [n, d] and [N, d]."""
    return frechet_distance(*moments(features), *moments(real))

def shuffled(n):
    """0 .. n - 1 in an order that is always the same -> int64 [n]."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))

def floor_of(real, n):
    """Features [N, d] of real images -> the floor for n images, see the top."""
    one, other = real[shuffled(len(real))[:2 * n]].chunk(2)
    return distance_of(one, other)

def metric_name(features, n):
    """FID only for what papers call FID. Any other distance is named after its features and n."""
    return "FID" if features == "inception" and n >= 50_000 else f"FD({features})@{n}"

# ---- Images --------------------------------------------------------------------------------------
def read_images(source):
    """A folder, an .npz, "cifar10" or "shapes" -> images, labels int64 [n], class names.
    The images are uint8 [n, 3, H, W], or an array of n paths: files may not all fit into memory, so
    batch_of reads them, a slice at a time. InputError for what cannot be read."""
    path = Path(source)
    if source == "shapes":
        return shapes()
    if source == "cifar10":
        with refuse(f"data/{CIFAR10.filename}: put {CIFAR10.url} there"):
            data = CIFAR10("data", download=True)
        images, labels = data.data, np.array(data.classes)[data.targets]
    elif path.suffix == ".npz":
        with refuse(f"{path}: not a readable .npz"):
            arrays = dict(np.load(path))                            # runs no pickles
        images = arrays.get("arr_0", np.zeros(0))
        labels = arrays.get("arr_1", np.zeros(images.shape[:1]))
        if images.dtype != np.uint8 or images.shape[3:] != (3,) or labels.shape != images.shape[:1]:
            raise InputError(f"{path}: needs uint8 arr_0 [n, H, W, 3], labels arr_1 [n]")
    else:
        # The files that Pillow can open, by their endings, in all folders below, but none that is
        # hidden. Links are followed. The label of each is its folder.
        kinds = Image.registered_extensions()
        files = [Path(name) for name in sorted(glob.glob("**", root_dir=path, recursive=True))]
        files = [file for file in files if kinds.get(file.suffix.lower()) in Image.OPEN]
        if not files:
            raise InputError(f"{path}: no folder with images, no .npz, not cifar10 or shapes")
        images = np.array([path / file for file in files])
        labels = [file.parent.as_posix() for file in files]
    if images.dtype == np.uint8:            # pixels, not paths
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    # Labels, names or numbers, become 0, 1, 2, ... in sorted order. One class is no class.
    classes, labels = np.unique(labels, return_inverse=True)
    names = [str(name) for name in classes if len(classes) > 1]
    return images, torch.from_numpy(labels), names

def decode(file):
    """An image's path -> uint8 [3, H, W]. Over a damaged file Pillow raises whatever it likes."""
    with refuse(f"{file} cannot be read", Exception), Image.open(file) as image:
        if image.mode.startswith(("I", "F")):               # Pillow would clip these
            raise ValueError("more than 8 bits a channel")
        return np.array(image.convert("RGB")).transpose(2, 0, 1)

def batch_of(images):
    """A slice of read_images' images -> uint8 [B, 3, H, W]. Files are read here, of one size."""
    if torch.is_tensor(images):
        return images
    with ThreadPoolExecutor(4) as pool:
        batch = list(pool.map(decode, images))
    for file, image in zip(images, batch):
        if image.shape != batch[0].shape:
            raise InputError(f"{file} is {image.shape}, but {images[0]} is {batch[0].shape}")
    return torch.from_numpy(np.stack(batch))

FORMS = ("disc", "square", "triangle")
HUES = ("red", "green", "blue", "yellow", "purple")
RGB = torch.tensor([[230, 40, 50], [40, 170, 70], [40, 90, 220], [240, 200, 40], [170, 60, 190]])

def shapes(n=20_000, size=32):
    """Forms in five colours on soft grey -> images, labels, names: "red disc", "red square", ..."""
    g = torch.Generator().manual_seed(0)
    ramp = (torch.arange(size) + 0.5) / size * 2 - 1            # pixels, in [-1, 1]
    images, labels = [], []
    for form in (torch.arange(n) % len(FORMS)).split(1000):
        radius, dx, dy, light, slope = torch.rand(5, len(form), 1, 1, generator=g)
        radius = 0.4 + 0.2 * radius
        x = ramp - (dx * 2 - 1) * (0.9 - radius)            # from the centre: [B, 1, W]
        y = ramp[:, None] - (dy * 2 - 1) * (0.9 - radius)   # [B, H, 1]
        # The distance to the edge of each shape, negative inside: [3, B, H, W] -> [B, H, W].
        disc = x.hypot(y) - radius
        square = torch.maximum(x.abs(), y.abs()) - 0.85 * radius
        triangle = torch.maximum(y, 3**0.5 / 2 * x.abs() - y / 2) - 0.6 * radius
        edge = torch.stack([disc, square, triangle])[form, torch.arange(len(form))]
        # The shape over its ground, with an edge that is soft by one pixel: [B, 3, H, W].
        inside = (0.5 - edge * size / 2).clamp(0, 1)[:, None]       # size / 2: in pixels
        ground = 60 + 120 * light + 100 * (slope - 0.5) * ramp[:, None]
        hue = torch.randint(len(HUES), (len(form),), generator=g)
        colour = RGB[hue][:, :, None, None]
        images.append(inside * colour + (1 - inside) * ground[:, None])
        labels.append(hue * len(FORMS) + form)
    names = [f"{hue} {form}" for hue in HUES for form in FORMS]
    return torch.cat(images).round().byte(), torch.cat(labels), names

def main(arguments=None):
    """The command line: images to judge and real ones -> one line with the distance."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.add_argument("a", help="images to judge: a folder, an .npz, cifar10 or shapes")
    parser.add_argument("b", help="real images: the same")
    parser.add_argument("--features", default="inception", help="or random, or TorchScript")
    parser.add_argument("--n", type=int, default=50_000, help="images of a to use")
    args = parser.parse_args(arguments)
    with usage_errors(parser):
        images, real_images = read_images(args.a)[0], read_images(args.b)[0]
        n = min(args.n, len(images))
        if n < 2 or len(real_images) < 4:
            raise InputError(f"--n {args.n}: needs 2 images or more in {args.a}, 4 in {args.b}")
        example = batch_of(images[:2])
        if args.features != "inception" and example.shape != batch_of(real_images[:2]).shape:
            raise InputError(f"{args.a} and {args.b} have images of different sizes")
        extractor = load_extractor(args.features, example)

        # Of the images to judge, n are drawn, always the same.
        drawn = images[shuffled(len(images))[:n].numpy()]
        made, real = features_of(drawn, extractor), features_of(real_images, extractor)
        distance, floor = distance_of(made, real), floor_of(real, n)
    # In ASCII (!a), because a terminal may lack a letter.
    print(f"{metric_name(args.features, n)} {distance:.4f}, floor {floor:.4f}, real {args.b!a}")

if __name__ == "__main__":
    main()
