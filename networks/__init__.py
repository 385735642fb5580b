"""Networks on CT tokens: the sparse VQ-VAE and its parts."""

from networks.fsq import FiniteScalarQuantizer
from networks.projector import Projector
from networks.quantizer import VectorQuantizer
from networks.residual import ResidualQuantizer
from networks.vqvae import SparseVQVAE, make_vqvae

__all__ = ["FiniteScalarQuantizer", "Projector", "ResidualQuantizer", "SparseVQVAE", "VectorQuantizer", "make_vqvae"]
