"""Networks on CT tokens: the sparse VQ-VAE and its parts."""

from networks.coders import Decoder, Encoder
from networks.fsq import FiniteScalarQuantizer
from networks.projector import Projector
from networks.quantizer import VectorQuantizer
from networks.residual import ResidualQuantizer, build_quantizer
from networks.support import SubdivisionHeads
from networks.vqvae import SparseVQVAE, make_vqvae

__all__ = [
    "Decoder",
    "Encoder",
    "FiniteScalarQuantizer",
    "Projector",
    "ResidualQuantizer",
    "SparseVQVAE",
    "SubdivisionHeads",
    "VectorQuantizer",
    "build_quantizer",
    "make_vqvae",
]
