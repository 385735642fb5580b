"""Networks on CT tokens: the sparse VQ-VAE and its parts."""

from networks.quantizer import VectorQuantizer
from networks.vqvae import SparseVQVAE, make_vqvae

__all__ = ["SparseVQVAE", "VectorQuantizer", "make_vqvae"]
