"""MONAI's dense VQVAE as a peer on the same samples: our sparse batches as boxes of voxels, and back.

A box is the smallest of whole 8x8x8 cells around a batch's voxels. Voxels that were dropped hold -1, air in every
window; they enter neither the loss nor the count of codes, so that both networks are asked for the same.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from monai.networks.nets import VQVAE
from torch import Tensor, nn

from networks.quantizer import kmeans, nearest_codes

CELL = 8


class Boxes(NamedTuple):
    volume: Float[Tensor, "B C X Y Z"]
    place: tuple[Int[Tensor, " N"], ...]  # sample, x, y, z of each row in the volume
    cells: tuple[Int[Tensor, " M"], ...]  # the same of each occupied cell, an eighth as fine


def boxes_of(feats: Float[Tensor, "N C"], coords: Int[Tensor, "N 4"], batch_size: int) -> Boxes:
    """The rows of a batch, densely; cells keep their absolute place, as latents do."""
    sample, at = coords[:, 0].long(), coords[:, 1:].long()
    parts = [at[sample == i] for i in range(batch_size)]
    low = torch.stack([part.amin(0) // CELL * CELL for part in parts])
    size = torch.stack([part.amax(0) + 1 for part in parts]) - low
    shape = (-(-size.amax(0) // CELL) * CELL).tolist()
    local = at - low[sample]
    place = (sample, *local.unbind(1))
    volume = feats.new_full((batch_size, *shape, feats.shape[1]), -1.0)
    volume[place] = feats
    occupied = torch.zeros((batch_size, *(n // CELL for n in shape)), dtype=torch.bool, device=feats.device)
    occupied[(sample, *(local // CELL).unbind(1))] = True
    return Boxes(volume.movedim(-1, 1).contiguous(), place, occupied.nonzero(as_tuple=True))


def rows_of(volume: Float[Tensor, "B C X Y Z"], boxes: Boxes) -> Float[Tensor, "N C"]:
    sample, x, y, z = boxes.place
    return volume[sample, :, x, y, z]


def dense_vqvae(widths: tuple[int, int, int], *, in_channels: int, num_codes: int, code_width: int) -> VQVAE:
    """Three halvings, two residual layers each: with widths 44, 88, 176 as many parameters as preset `base`."""
    return VQVAE(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=in_channels,
        channels=widths,
        num_res_channels=widths,
        num_res_layers=2,
        downsample_parameters=((2, 4, 1, 1),) * 3,
        upsample_parameters=((2, 4, 1, 1, 0),) * 3,
        num_embeddings=num_codes,
        embedding_dim=code_width,
    )


def loss_of(
    network: VQVAE, boxes: Boxes, target: Float[Tensor, "N C"], *, quantize: bool = True
) -> dict[str, Float[Tensor, ""]]:
    """Absolute error on the kept voxels, a mean over each sample and then over samples; and MONAI's commitment."""
    if quantize:
        recon, commitment = network(boxes.volume)
    else:
        recon, commitment = network.decode(network.encode(boxes.volume)), target.new_zeros(())
    error = (rows_of(recon, boxes).float() - target).abs().mean(1)
    sizes = torch.bincount(boxes.place[0]).tolist()
    recon_loss = torch.stack([part.mean() for part in error.split(sizes)]).mean()
    return {"loss": recon_loss + commitment, "recon": recon_loss, "commitment": commitment}


@torch.no_grad()
def latents_of(network: VQVAE, boxes: Boxes) -> Float[Tensor, "M D"]:
    """Encoder outputs in occupied cells."""
    sample, x, y, z = boxes.cells
    return network.encode(boxes.volume)[sample, :, x, y, z].float()


@torch.no_grad()
def lay_codebook(network: VQVAE, rows: Float[Tensor, "N D"], *, seed: int) -> None:
    """k-means in place of MONAI's random start, with the counts that its moving averages then go on from."""
    quantizer = network.quantizer.quantizer
    centres = kmeans(rows, quantizer.num_embeddings, generator=torch.Generator().manual_seed(seed))
    counts = torch.bincount(nearest_codes(rows, centres), minlength=len(centres)).float().clamp(min=1)
    quantizer.embedding.weight.copy_(centres)
    quantizer.ema_cluster_size.copy_(counts)
    quantizer.ema_w.copy_(centres * counts[:, None])


class Judged(NamedTuple):
    rows: Float[Tensor, "N C"]  # window values on the kept voxels
    shuffled: Float[Tensor, "N C"]  # the same with the codes of occupied cells exchanged
    codes: Int[Tensor, " M"]  # of occupied cells


@torch.no_grad()
def reconstruct(network: VQVAE, boxes: Boxes) -> Judged:
    """One volume through its codes, as they would be stored."""
    network.eval()
    codes = network.index_quantize(boxes.volume)
    mixed = codes.clone()
    kept = codes[boxes.cells]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
    mixed[boxes.cells] = kept[order.to(kept.device)]
    straight, exchanged = (rows_of(network.decode_samples(part), boxes).float().clamp(-1, 1) for part in (codes, mixed))
    return Judged(straight, exchanged, kept)


def trainable_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
