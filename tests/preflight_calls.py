"""Files that tests of pre-flight run with."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGE1, ALIGN, EVALUATE = (str(ROOT / f"bundles/{name}.json") for name in ("vq_stage1", "align", "evaluate_language"))
SHAPES_STAGE2 = str([str(ROOT / "bundles/sdf_vqvae.json"), str(ROOT / "bundles/sdf_stage2.json")])
