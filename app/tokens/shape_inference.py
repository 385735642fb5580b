"""Shapes through a tokenizer and back, for `bundles/inference_shapes.json` and a bundle exported of one.

The counterpart of through_tokens.py: meshes have no dense array that MONAI's evaluator could carry.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.shapes.mesh_files import write_mesh
from app.shared.output_folder import check_folder
from app.shared.refusals import Refused
from app.tokens.shape_tokens import encode_shape, mesh_of, shapes_in
from app.tokens.token_files import write_tokens
from app.tokens.tokenizer import CTTokenizer

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class ShapesThroughTokens:
    """Token file and mesh of every shape at a path."""

    weights: str | Path  # a tokenizer of shapes, as `--tokenizer` takes it
    shape: str | Path | None  # a mesh, a file of signed distance, or a folder of them
    output_dir: str | Path
    support: bool = False  # whether tokens keep which voxels there were
    device: torch.device | str | None = None

    def run(self) -> dict[str, Any]:
        """Files by the names of the shapes."""
        if self.shape is None:
            raise Refused("NO_SOURCE", "no shape is given", "pass --shape PATH")
        out = Path(self.output_dir)
        check_folder(out, name="output_dir")
        ct = CTTokenizer.from_pretrained(self.weights, device=self.device)
        if ct.sizes.features != "sdf":
            what = "this tokenizer reads CT, not shapes"
            raise Refused("BAD_TOKENIZER", what, "give one that bundles/sdf_vqvae.json trained")
        done = {}
        for source in shapes_in(Path(self.shape), ct.sizes.resolution):
            tokens = encode_shape(ct, source, support=self.support)
            files = {"tokens": out / f"{source.name}.npz", "mesh": out / f"{source.name}.ply"}
            write_tokens(files["tokens"], tokens, tables=ct.tables)
            write_mesh(files["mesh"], mesh_of(ct.decode_sparse(tokens), tokens))
            log.info("%s: %d tokens, %s", source.name, len(tokens.codes), files["mesh"])
            done[source.name] = files
        return done
