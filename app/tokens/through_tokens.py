"""A CT volume through its tokens and back, as MONAI's inference takes it: a reading transform and an inferer.

Both serve `bundles/inference.json`, an exported bundle, and any host that feeds a bundle dense HU (MONAI Label's own
app does). What leaves is HU on the scan's own grid.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform

from app.prepare import RawScan, read_scan
from app.prepare.values import why_not_hu
from app.shared.refusals import Refused
from app.tokens.tokenizer import CTTokenizer
from app.tokens.volumes import onto_grid
from app.training.data import Transform
from networks.vqvae import SparseVQVAE


class ReadScand(MapTransform):
    """A path to HU on the scan's own grid, (1, X, Y, Z) float32, through the gate that every raw scan passes."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            if item[key] is None:
                raise Refused("NO_SOURCE", "no scan is given", "pass --scan PATH")
            volumes = read_scan(item[key])
            if len(volumes) > 1:
                raise Refused("MANY_SCANS", f"it holds {len(volumes)} scans", "give one series")
            hu = torch.from_numpy(np.ascontiguousarray(volumes[0].hu, np.float32))[None]
            affine = torch.from_numpy(np.array(volumes[0].affine, np.float64))
            meta = {"original_affine": affine.clone(), "spatial_shape": np.array(hu.shape[1:])}
            meta["filename_or_obj"] = str(item[key])
            item[key] = MetaTensor(hu, affine=affine, meta=meta)
        return item


class ThroughTokens(Inferer):
    """Encodes and decodes a batch of volumes in HU. Each lies where its affine says; on RAS axes or not.

    `chain` are the transforms from a volume to the network's features, the same as in training.
    """

    def __init__(self, chain: Sequence[Transform]) -> None:
        super().__init__()
        self.chain = chain

    def __call__(self, inputs: torch.Tensor, network: SparseVQVAE, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(inputs, MetaTensor):
            raise Refused("NO_SPACING", "the volume has no affine", "read it with metadata (a MetaTensor)")
        if inputs.ndim != 5 or inputs.shape[1] != 1:
            raise Refused("BAD_SHAPE", f"volumes must be (B, 1, X, Y, Z) in HU, got {tuple(inputs.shape)}")
        tokenizer = CTTokenizer(network, digest="", chain=self.chain)
        affines = np.broadcast_to(np.asarray(inputs.affine.cpu(), np.float64), (len(inputs), 4, 4))
        done = [
            _encoded_and_decoded(tokenizer, volume[0], affine)
            for volume, affine in zip(inputs.as_tensor(), affines, strict=True)
        ]
        result = torch.from_numpy(np.stack(done)[:, None]).to(inputs.device)
        return MetaTensor(result, meta=inputs.meta)


def _encoded_and_decoded(tokenizer: CTTokenizer, values: torch.Tensor, affine: np.ndarray) -> np.ndarray:
    hu = values.cpu().numpy()
    if (reason := why_not_hu(hu)) is not None:
        raise Refused("NOT_HU", reason, "give the volume in HU, as the scanner's files have it")
    raw = RawScan(hu, affine, findings=(), source_hash="")
    tokens = tokenizer.encode(raw)
    back = onto_grid(tokenizer.decode(tokens), hu.shape, affine)
    return np.rint(back.hu).astype(np.float32)
