"""A tiny untrained tokenizer, its files, and a volume for it, whose answers can be told; one of shapes too."""

import numpy as np
import torch

from app.shapes.bands import check_surface, mesh_affine, shape_of
from app.shapes.mesh_files import Mesh
from app.tokens.open_scan import Volume
from app.tokens.shape_tokens import shape_tensor
from app.tokens.tokenizer import CTTokenizer
from app.training import checkpoints
from networks import make_vqvae
from tests.solids import sphere
from transforms.grid import RESAMPLER

AFFINE = np.array([[6.0, 0, 0, -150], [0, 6.0, 0, -130], [0, 0, 8.0, -900], [0, 0, 0, 1]])
SHAPE = (50, 44, 30)


def hu_volume():
    """An off-centre ellipsoid of soft tissue with a lung and a bone, in air."""
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), -1)
    hu = np.full(SHAPE, -1000, np.int16)
    hu[(((grid - [22, 20, 14]) / [17, 13, 11]) ** 2).sum(-1) < 1] = 40
    hu[(((grid - [15, 20, 14]) / [5, 6, 7]) ** 2).sum(-1) < 1] = -800
    hu[30:33, 18:21, 6:22] = 700
    return hu


def make_network(**changes):
    torch.manual_seed(0)
    sizes = {"resolution": 48, "widths": (8, 8, 8), "model_channels": 16, "num_embeddings": 8, "num_blocks": 1}
    sizes |= {"resampler": RESAMPLER, "spacing": 8.0, "latent_channels": 16}
    network = make_vqvae("tiny", **{**sizes, **changes}).eval()
    made = CTTokenizer(network, digest="")
    x = made.on_device(made.rows_of(Volume(hu_volume(), AFFINE)))
    with torch.no_grad():
        network.vq.start_from(network.encoder(x)[0].feats, generator=torch.Generator().manual_seed(0))
    return network


def make_shape_network(resolution=32):
    """Of signed distance; its codes are laid over the encoder's outputs for a sphere."""
    torch.manual_seed(0)
    sizes = {"resolution": resolution, "widths": (8, 8, 8), "model_channels": 16, "num_embeddings": 8, "num_blocks": 1}
    network = make_vqvae("tiny", **sizes, features="sdf", windows=(), keep="band").eval()
    mesh = Mesh(*sphere(30))
    shape = shape_of(check_surface(mesh), mesh_affine(mesh, resolution), resolution=resolution)
    x = shape_tensor(CTTokenizer(network, digest=""), shape)
    with torch.no_grad():
        network.vq.start_from(network.encoder(x)[0].feats, generator=torch.Generator().manual_seed(0))
    return network


def save(network, folder, step=5):
    (folder / "ckpts").mkdir(parents=True)
    weights = {"vqvae": network.state_dict(), "vqvae_ema0.9999": network.state_dict()}
    checkpoints.save_set(folder, step, weights, {"step": step})
    return folder
