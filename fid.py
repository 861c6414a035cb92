"""FID as the published numbers are computed, in one file that works alone.

    python fid.py samples.npz cifar10                         # "FID" from 50,000 samples on
    python fid.py samples train --features random --n 1000    # any images, no download

First the images to judge, then the real ones: a folder, a .zip, an .npz (arr_0: uint8 NHWC),
cifar10 (its training set) or, for the real ones, an .npz of statistics (mu, sigma). The floor
beside a distance is that of n real images from n others. (Against all real images, n samples of a
perfect model have about half of it.)

What a published FID is, and why each part matters. ("Moves features by": the largest change on two
test images. Features reach 39.)
1. Features of the Inception graph of 2015. Other weights or other pooling are another measure.
2. TensorFlow 1's resize to 299 x 299. Half a pixel of offset moves features by 0.8.
3. n = 50,000. With fewer images the distance is too large: about 30 at n = 2,000, even between
   real images. So only that of 50,000 or more is called FID here, any other FD(features)@n.
4. The unbiased covariance (n - 1). Dividing by n is another number when n is small.
"""
import argparse, hashlib, json, sys, time, zipfile, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision.datasets import CIFAR10, folder
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
            torch.hub.download_url_to_file(url, path, sha256)
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise OSError("truncated, or another file")
    except (OSError, RuntimeError) as error:            # RuntimeError is torch's
        raise InputError(f"{path} ({error}): put {url} there") from error
    return path

# ---- Inception -----------------------------------------------------------------------------------

def resize_tf1(images):
    """[N, C, H, W] in 0..255 -> float32 [N, C, 299, 299], as TensorFlow 1 resizes.

    TensorFlow 1 reads at i * size / 299: no half-pixel offset, no reading beyond the last pixel.
    With one more pixel at the right and the bottom, and 300 instead of 299, align_corners reads at
    i * (size + 1 - 1) / (300 - 1), the same. In float64, because float32 rounds these positions.
    """
    padded = F.pad(images.double(), (0, 1, 0, 1), mode="replicate")
    larger = F.interpolate(padded, size=(300, 300), mode="bilinear", align_corners=True)
    return larger[:, :, :299, :299].float()

# TensorFlow's graph differs from torchvision's in its pooling branches. Averages leave the padding
# out (counting it moves features by 2.5). The last block takes the maximum (9.6 for the average).
# So the forward passes of the three blocks that have such a branch are spelled out here.
AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

class BlockA(inception.InceptionA):
    def forward(self, x):  # [N, C, 35, 35] -> [N, 256 or 288, 35, 35]
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pool = self.branch_pool(AVERAGE(x))
        return torch.cat([self.branch1x1(x), five, three, pool], 1)

class BlockC(inception.InceptionC):
    def forward(self, x):  # [N, 768, 17, 17] -> the same shape
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pool = self.branch_pool(AVERAGE(x))
        return torch.cat([self.branch1x1(x), seven, double, pool], 1)

class BlockE(inception.InceptionE):
    pool = AVERAGE
    def forward(self, x):  # [N, C, 8, 8] -> [N, 2048, 8, 8]
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pool = self.branch_pool(self.pool(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), pool], 1)

class LastBlock(BlockE):
    pool = nn.MaxPool2d(3, stride=1, padding=1)

class InceptionFID(inception.Inception3):
    """uint8 [N, 3, H, W] -> [N, 2048]. Its state dict has the keys of the published weights."""
    def __init__(self):
        blocks = [inception.BasicConv2d, BlockA, inception.InceptionB, BlockC,
                  inception.InceptionD, BlockE, inception.InceptionAux]
        super().__init__(1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
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

class Extractor:
    """Features: "inception", "random" or a TorchScript file; uint8 [N, 3, H, W] -> [N, d]."""
    def __init__(self, spec, device="cpu"):
        self.device, self.name = device, spec
        if spec == "random":
            self.net = random_features
        elif spec == "inception":
            net = InceptionFID().to(device)
            net.load_state_dict(torch.load(download(*INCEPTION), device, weights_only=True))
            self.net = net.fold()
        else:
            try:
                self.net = torch.jit.load(spec, device).eval()
            except (RuntimeError, ValueError) as error:
                raise InputError(f"--features {spec}: not found, or no TorchScript") from error
            # With a hash, because two files may have one name.
            content = hashlib.sha256(Path(spec).read_bytes())
            self.name = f"{Path(spec).stem}-{content.hexdigest()[:6]}"

    def made_by(self, images):
        """What must agree to compare: the features and, but for Inception, the images' size."""
        if self.name == "inception":
            return self.name
        return f"{self.name} of {images.shape[2]}x{images.shape[3]} pixels"

    def __call__(self, images):
        # TF32, torch's default for convolutions on a GPU, would move the features.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.net(images.to(self.device)).flatten(1)

# ---- Statistics and distance ---------------------------------------------------------------------

class Statistics:
    """n, mean [d] and unbiased covariance [d, d], in float64, of features that are not kept."""
    def __init__(self):
        self.n, self.mean, self.scatter = 0, 0.0, 0.0

    def update(self, features):
        """Adds features [B, d] (Welford): deviations from the old mean times those from the new."""
        x = features.double()
        if self.n == 0:                 # from a mean of 0, digits would cancel
            self.mean = x.mean(0)
        self.n += len(x)
        deviation = x - self.mean
        self.mean = self.mean + deviation.sum(0) / self.n
        self.scatter = self.scatter + deviation.T @ (x - self.mean)
        return self

    @property
    def cov(self):
        return self.scatter / (self.n - 1)

def frechet_distance(mean1, cov1, mean2, cov2):
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), means [d], covariances [d, d].

    With cov1 = R R^T, the last trace is that of (R^T cov2 R)^(1/2). This matrix is symmetric, so
    the trace is the sum of the roots of its eigenvalues, and no matrix root can fail.
    """
    # In float64, since the distance is a small difference of large traces.
    given = [torch.as_tensor(x).double().cpu() for x in (mean1, cov1, mean2, cov2)]
    mean1, cov1, mean2, cov2 = given
    if len(mean1) != len(mean2):
        raise InputError(f"features have {len(mean1)} and {len(mean2)} dimensions")
    if not (mean1 - mean2 + cov1 + cov2).isfinite().all():
        raise InputError("features or statistics are not finite")

    # R from the eigenvalues of cov1. For n <= d some are 0, and come out as rounding errors.
    values, vectors = torch.linalg.eigh(cov1)
    values = values.where(values > 1e-12 * values[-1], 0)
    root = vectors * values.sqrt()
    shared = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + (cov1 + cov2).trace() - 2 * shared
    return distance.clamp(min=0).item()

def distance_of(one, other):
    """The Fréchet distance of two Statistics."""
    return frechet_distance(one.mean, one.cov, other.mean, other.cov)

def statistics_of(images, extractor, rows=None):
    """Images of read_images, and which of them (None: all) -> Statistics. Shows the time left."""
    if rows is None:
        rows = torch.arange(len(images))
    statistics, start = Statistics(), time.perf_counter()
    for batch in rows.split(64):
        statistics.update(extractor(images[batch]))
        if sys.stderr.isatty():         # one line, written over again and again
            rate = statistics.n / (time.perf_counter() - start)
            left = (len(rows) - statistics.n) / rate
            print(f"{rate:.0f} images/s, {left:.0f} s left", end="   \r", file=sys.stderr)
    return statistics

def shuffled(images):
    """The rows of the images, in an order that is always the same -> [n]."""
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(0))

def floor_of(images, extractor, n):
    """The distance of n real images from n others, or of the two halves if there are fewer."""
    halves = shuffled(images)[:2 * n].chunk(2)
    return distance_of(*[statistics_of(images, extractor, rows) for rows in halves])

def metric_name(features, n):
    """FID only for what papers call FID. Any other distance is named after its features and n."""
    if features == "inception" and n >= 50_000:
        return "FID"
    return f"FD({features})@{n}"

def save_statistics(path, statistics, made_by):
    """Writes an .npz. made_by (of the Extractor): so that nothing else is compared to it."""
    np.savez(path, mu=statistics.mean.cpu(), sigma=statistics.cov.cpu(), made_by=made_by)

def load_statistics(path, made_by):
    """-> mean [d], cov [d, d]. Files of other tools do not say what made them."""
    saved = load_arrays(path)
    if saved.get("made_by", made_by) != made_by:
        raise InputError(f"{path} is of {saved['made_by']}, not of {made_by}")
    return saved["mu"], saved["sigma"]

# ---- Images --------------------------------------------------------------------------------------

def read_images(source):
    """A folder, a .zip, an .npz or "cifar10" -> uint8 [n, 3, H, W], labels int64 [n], class names.

    The images are a tensor or `Files`. A label that no image has is no class. InputError for what
    cannot be read, with its name.
    """
    path = Path(source)
    if source == "cifar10":
        try:
            data = CIFAR10("data", download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"data/{CIFAR10.filename}: put {CIFAR10.url} there") from error
        images, labels = data.data, np.array(data.classes)[data.targets]
    elif path.suffix == ".npz":
        arrays = load_arrays(path)
        images = arrays.get("arr_0", np.zeros(0))
        labels = arrays.get("arr_1", np.zeros(len(images)))
        uint8_nhwc = images.dtype == np.uint8 and images.shape[3:] == (3,)
        if not uint8_nhwc or labels.shape != (len(images),):
            raise InputError(f"{path}: needs uint8 arr_0 [n, H, W, 3], labels arr_1 [n]")
    else:
        images = Files(path)
        labels = images.labels
    if path.suffix == ".npz" or source == "cifar10":
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    # Labels may be names or numbers. They become 0, 1, 2, ... in sorted order.
    classes, labels = np.unique(labels, return_inverse=True)
    names = [str(name) for name in classes]
    if len(names) == 1:                                             # no classes
        names = []
    return images, torch.from_numpy(labels), names

def load_arrays(path):
    """An .npz -> a dict of its arrays."""
    try:
        return dict(np.load(path))                                  # runs no pickles
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable .npz, write it anew") from error

class Files:
    """The images in a folder or a .zip, decoded when asked for: files[rows] -> uint8 [B, 3, H, W].

    So they need not fit into memory. Each has a label, the name or number of its class.
    """
    def __init__(self, path):
        # Which files? Each once, whatever links lead to it, but not the shadows that macOS leaves.
        if path.is_dir():
            found = {file.resolve(): file for file in sorted(path.rglob("*")) if file.is_file()}
            root, names = path, [file.relative_to(path).as_posix() for file in found.values()]
        elif zipfile.is_zipfile(path):
            root, names = zipfile.Path(path), zipfile.ZipFile(path).namelist()
            names = [name for name in names if not name.endswith("/")]
        else:
            raise InputError(f"{path}: is no folder, no .zip, no .npz and not cifar10")
        files = [name for name in sorted(names)
                 if folder.is_image_file(name) and not Path(name).name.startswith("._")]
        if not files:
            raise InputError(f"{path}: no images in it")
        others = len(set(names) - {*files, "dataset.json"})
        if others:
            print(f"{path}: {others} files are no images, and are left out", file=sys.stderr)

        # EDM and StyleGAN keep labels in dataset.json. Without it, the folders are the classes.
        self.labels = [name.rpartition("/")[0] for name in files]
        if "dataset.json" in names:
            try:
                table = dict(json.loads((root / "dataset.json").read_text())["labels"] or ())
                self.labels = [int(table.get(name, -1)) for name in files]
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{path}: dataset.json lacks numbers") from error
        self.root, self.files = root, files
        self.shape = (len(files), *self.decode(files[0]).shape)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        files = [self.files[row] for row in rows.tolist()]
        with ThreadPoolExecutor(4) as pool:
            images = list(pool.map(self.decode, files))
        for file, image in zip(files, images):
            if image.shape != self.shape[1:]:
                raise InputError(f"{self.root / file} is {image.shape}, not {self.shape[1:]}")
        return torch.from_numpy(np.stack(images))

    def decode(self, file):
        """A file's name -> uint8 [3, H, W], upright, on white where it is transparent.

        Pillow and zipfile raise these errors over damaged files.
        """
        try:
            with (self.root / file).open("rb") as opened, Image.open(opened) as image:
                if image.mode.startswith(("I", "F")):       # Pillow would clip these
                    raise ValueError("more than 8 bits a channel")
                image = ImageOps.exif_transpose(image).convert("RGBA")
        except (OSError, SyntaxError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{self.root / file} cannot be read ({error})") from error
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
        return np.array(image).transpose(2, 0, 1)

def main(arguments=None):
    """The command line: images to judge and real ones -> one line with the distance."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    parser.add_argument("a", help="images to judge: a folder, a .zip, an .npz or cifar10")
    parser.add_argument("b", help="real images: the same, or an .npz of statistics")
    parser.add_argument("--features", default="inception", help="or random, or TorchScript")
    parser.add_argument("--n", type=int, default=50_000, help="images of a to use")
    args = parser.parse_args(arguments)
    try:
        # What can be missing is opened first. Of a, n images are drawn, always the same.
        images = read_images(args.a)[0]
        rows = shuffled(images)[:max(args.n, 0)]
        if len(rows) < 2:
            raise InputError(f"--n {args.n}, {args.a}: needs two images or more")
        extractor = Extractor(args.features, "cuda" if torch.cuda.is_available() else "cpu")
        floor = "unknown"
        if args.b.endswith(".npz") and {"mu", "sigma"} <= load_arrays(args.b).keys():
            mean, cov = load_statistics(args.b, extractor.made_by(images))
        else:
            real = read_images(args.b)[0]
            if len(real) < 4:
                raise InputError(f"{args.b}: needs four images or more")
            if extractor.made_by(real) != extractor.made_by(images):
                raise InputError(f"{args.a} and {args.b} have images of different sizes")
            floor = f"{floor_of(real, extractor, len(rows)):.4f}"
            statistics = statistics_of(real, extractor)
            mean, cov = statistics.mean, statistics.cov
        made = statistics_of(images, extractor, rows)
        distance = frechet_distance(made.mean, made.cov, mean, cov)
    except (InputError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"{metric_name(extractor.name, made.n)} {distance:.4f}, n {made.n}, features "
          f"{extractor.name}, reference {args.b}, floor {floor}")

if __name__ == "__main__":
    main()
