"""The sparse autoencoder of Direct3D-S2 restated in plain torch, with the names, shapes and layouts of its files.

Written from its description, for few voxels, and imports nothing of the project, on purpose: neighbours by number of
the voxel, attention under a mask over all pairs. Features are rows (N, C), coordinates rows (sample, x, y, z).
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn


def numbered(coords):
    """One number a voxel, for coordinates of -1 to 1998."""
    sample, x, y, z = (coords + 1).unbind(1)
    return ((sample * 2000 + x) * 2000 + y) * 2000 + z


def rows_at(wanted, coords):
    """Row of each wanted voxel among coordinates; one past the end where there is none."""
    numbers, order = numbered(coords).sort()
    place = torch.searchsorted(numbers, numbered(wanted)).clamp(max=len(coords) - 1)
    return torch.where(numbers[place] == numbered(wanted), order[place], len(coords))


class Kernel(nn.Module):
    """What torchsparse keeps of a convolution: kernel (27, in, out), or (in, out) of a 1x1x1, and bias."""

    def __init__(self, inputs, outputs, size):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros((size**3, inputs, outputs) if size > 1 else (inputs, outputs)))
        self.bias = nn.Parameter(torch.zeros(outputs))


class Convolution(nn.Module):
    """Submanifold: only occupied voxels count and come out. Offset (dx+1) + 3 (dy+1) + 9 (dz+1)."""

    def __init__(self, inputs, outputs, size=3):
        super().__init__()
        self.conv = Kernel(inputs, outputs, size)

    def forward(self, feats, coords):
        kernel = self.conv.kernel
        if kernel.ndim == 2:
            return feats @ kernel + self.conv.bias
        out = self.conv.bias.expand(len(feats), -1).clone()
        padded = torch.cat([feats, torch.zeros_like(feats[:1])])
        for dz, dy, dx in itertools.product((-1, 0, 1), repeat=3):
            near = padded[rows_at(coords + torch.tensor([0, dx, dy, dz]), coords)]
            out += near @ kernel[(dx + 1) + 3 * (dy + 1) + 9 * (dz + 1)]
        return out


class GroupNorm(nn.Module):
    """Groups of channels over all voxels of a sample, eps 1e-5."""

    def __init__(self, channels):
        super().__init__()
        self.groups = min(32, channels)
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, feats, coords):
        out = torch.empty_like(feats)
        for sample in coords[:, 0].unique():
            rows = coords[:, 0] == sample
            part = feats[rows].unflatten(1, (self.groups, -1))
            mean, variance = part.mean((0, 2), keepdim=True), part.var((0, 2), unbiased=False, keepdim=True)
            out[rows] = ((part - mean) / (variance + 1e-5).sqrt()).flatten(1)
        return out * self.weight + self.bias


class Activation(nn.Module):
    def forward(self, feats, coords):
        return F.silu(feats)


class Layers(nn.Sequential):
    def forward(self, feats, coords):
        for layer in self:
            feats = layer(feats, coords)
        return feats


def halved(feats, coords):
    """Means of the children, with a start value of zero counted among them."""
    cells, cell = torch.unique(torch.cat([coords[:, :1], coords[:, 1:] // 2], 1), dim=0, return_inverse=True)
    sums = feats.new_zeros(len(cells), feats.shape[1]).index_add(0, cell, feats)
    return sums / (torch.bincount(cell)[:, None] + 1), cells


class DownBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.act_layers = Layers(GroupNorm(inputs), Activation())
        self.out_layers = Layers(
            Convolution(inputs, outputs), GroupNorm(outputs), Activation(), Convolution(outputs, outputs)
        )
        self.skip_connection = Convolution(inputs, outputs, size=1)

    def forward(self, feats, coords):
        inner, cells = halved(self.act_layers(feats, coords), coords)
        outer, _ = halved(feats, coords)
        return self.out_layers(inner, cells) + self.skip_connection(outer, cells), cells


class UpBlock(nn.Module):
    """Every voxel becomes its eight children, which start as copies of it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.act_layers = Layers(Convolution(inputs, outputs), Activation())
        self.out_layers = Layers(Convolution(outputs, outputs), Activation())

    def forward(self, feats, coords):
        steps = torch.tensor([(0, *step) for step in itertools.product((0, 1), repeat=3)])
        children = (coords * torch.tensor([1, 2, 2, 2]))[:, None] + steps
        feats = self.act_layers(feats, coords).repeat_interleave(8, 0)
        return self.out_layers(feats, children.flatten(0, 1)), children.flatten(0, 1)


def positions(coords, channels):
    """Per axis all sines, then all cosines; zeros to the end."""
    count = channels // 3 // 2
    frequencies = torch.tensor([1 / 10000 ** (i / count) for i in range(count)], dtype=torch.float64)
    parts = []
    for axis in (1, 2, 3):
        angles = coords[:, axis, None].double() * frequencies
        parts += [angles.sin(), angles.cos()]
    parts.append(torch.zeros(len(coords), channels - 6 * count))
    return torch.cat(parts, 1)


class Attention(nn.Module):
    def __init__(self, channels, heads, window, shift):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.to_qkv, self.to_out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, feats, coords):
        cell = torch.cat([coords[:, :1], (coords[:, 1:] + self.shift) // self.window], 1)
        q, k, v = self.to_qkv(feats).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        scores = q @ k.mT / math.sqrt(q.shape[2])
        shares = scores.masked_fill((cell[:, None] != cell[None]).any(2), -math.inf).softmax(2)
        return self.to_out((shares @ v).permute(1, 0, 2).flatten(1))


class Feedforward(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(approximate="tanh"), nn.Linear(4 * channels, channels)
        )

    def forward(self, feats):
        return self.mlp(feats)


class Block(nn.Module):
    def __init__(self, channels, heads, window, shift):
        super().__init__()
        self.attn, self.mlp = Attention(channels, heads, window, shift), Feedforward(channels)

    def forward(self, feats, coords):
        feats = feats + self.attn(F.layer_norm(feats, feats.shape[1:], eps=1e-6), coords)
        return feats + self.mlp(F.layer_norm(feats, feats.shape[1:], eps=1e-6))


class Half(nn.Module):
    """What encoder and decoder share: a first linear map, positions, blocks shifted by half every other time."""

    def __init__(self, inputs, channels, *, blocks, heads, window):
        super().__init__()
        self.input_layer = nn.Linear(inputs, channels)
        self.blocks = nn.ModuleList(Block(channels, heads, window, window // 2 * (i % 2)) for i in range(blocks))

    def attend(self, feats, coords):
        feats = self.input_layer(feats)
        feats = feats + positions(coords, feats.shape[1]).to(feats.dtype)
        for block in self.blocks:
            feats = block(feats, coords)
        return feats


class Encoder(Half):
    def __init__(self, widths, latent, **sizes):
        super().__init__(widths[3], widths[3], **sizes)
        self.input_layer1 = nn.Linear(1, widths[0])
        self.downsample = nn.ModuleList(DownBlock(*widths[i : i + 2]) for i in range(3))
        self.out_layer = nn.Linear(widths[3], 2 * latent)

    def forward(self, feats, coords):
        feats = self.input_layer1(feats)
        for block in self.downsample:
            feats, coords = block(feats, coords)
        feats = self.attend(feats, coords)
        return self.out_layer(F.layer_norm(feats, feats.shape[1:])), coords


class Decoder(Half):
    def __init__(self, widths, latent, **sizes):
        super().__init__(latent, widths[3], **sizes)
        back = widths[::-1]
        self.upsample = nn.ModuleList(UpBlock(*back[i : i + 2]) for i in range(3))
        self.out_layer = nn.Linear(widths[0], 1)

    def forward(self, feats, coords):
        feats = self.attend(feats, coords)
        for block in self.upsample:
            feats, coords = block(feats, coords)
        return self.out_layer(feats).tanh(), coords


class Autoencoder(nn.Module):
    """Encoder and decoder; the published sizes where none are given."""

    def __init__(self, widths=(32, 64, 128, 512), latent=16, *, blocks=4, heads=8, window=8):
        super().__init__()
        sizes = {"blocks": blocks, "heads": heads, "window": window}
        self.encoder, self.decoder = Encoder(widths, latent, **sizes), Decoder(widths, latent, **sizes)


def made(*sizes, seed=0, **more):
    """An autoencoder with every weight drawn, at scales that let differences through to the end."""
    network, draw = Autoencoder(*sizes, **more), torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        noise = torch.randn(weight.shape, generator=draw)
        if weight.ndim == 1:
            noise = 0.2 * noise + float(name.endswith("weight"))
        elif weight.ndim == 3:
            noise *= math.sqrt(2 / (weight.shape[1] * 8))  # of 27 neighbours a few are occupied
        else:
            noise /= math.sqrt(weight.shape[0 if name.endswith("kernel") else 1])
        weight.data = noise
    return network.eval()


def as_published(network):
    """The state dict as its files hold it: 16-bit, norms in 32. The network takes over what rounding left."""
    state = {name: weight if is_norm(name) else weight.half() for name, weight in network.state_dict().items()}
    network.load_state_dict({name: weight.float() for name, weight in state.items()})
    return state


def is_norm(name):
    return ".act_layers.0.weight" in name or ".act_layers.0.bias" in name or ".out_layers.1." in name
