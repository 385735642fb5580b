"""The models that a server offers: a scan in, tokens or HU on its own grid or an answer out.

Answers carry hashes of content, never a name or path of what was asked about: viewers' logs keep them.
"""

import base64
import dataclasses
import math
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from app.language.assistant import CTAssistant, TokenizedScan, aligned_folder, read_settings, tokenizer_of
from app.language.where_looked import where_looked
from app.serving import label_map, options
from app.serving.options import Options
from app.shared.notice import NOTICE
from app.shared.refusals import Refused
from app.tokens.open_scan import Volume, scan_source
from app.tokens.token_files import CTTokens, write_tokens
from app.tokens.tokenizer import CTTokenizer
from app.tokens.volumes import onto_grid, write_image, write_nifti
from transforms.windows import window_bounds

MAX_GRID_VOXELS = 2**29  # of a grid that a token file from outside asks for
DESCRIPTIONS = {
    "tokenize": "Discrete 3D tokens of a CT scan (JSON; `npz` holds the token file in base64).",
    "reconstruct": "The scan as its tokens keep it, in HU on its own grid. The image may also be a token file.",
    "ask": f"An answer to a question about the scan (JSON). {NOTICE}",
    "report": f"A report of the scan (JSON). {NOTICE}",
    "show_answer": f"An answer (a report, without a question) as a segment's name, and where it rests. {NOTICE}",
}
ANSWERS = ("ask", "report", "show_answer")
Result = tuple[Path | None, dict[str, Any]]


class Served:
    """The tokenizer is there when this is made; a language model loads beside it, and who asks first waits for it."""

    def __init__(self, *, tokenizer: str | None = None, align: str | None = None) -> None:
        if align is not None and tokenizer is None:
            tokenizer = tokenizer_of(folder := aligned_folder(align), read_settings(folder))
        self.tokenizer = CTTokenizer.from_pretrained(tokenizer)
        if self.tokenizer.sizes.features == "sdf":
            what = "this tokenizer reads shapes, a viewer has images"
            remedy = "serve one of CT; meshes go through tokenize, reconstruct or an exported bundle"
            raise Refused("BAD_TOKENIZER", what, remedy)
        self.budget = None if align is None else read_settings(aligned_folder(align))["max_3d_tokens"]
        self._assistant: Future[CTAssistant] = Future()
        self._one_at_a_time = threading.Lock()
        if align is not None:
            threading.Thread(target=self._load, args=(align, tokenizer), daemon=True).start()

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(model for model in DESCRIPTIONS if self.budget is not None or model not in ANSWERS)

    def options(self, model: str) -> dict[str, Any]:
        return options.shown(model, self.tokenizer.sizes, budget=self.budget)

    def answer(self, model: str, image: Path, sent: Mapping[str, Any]) -> Result:
        """A file for the client or None, and JSON."""
        wanted = options.read(model, sent, self.options(model))
        how: Callable[[Path, Options], Result] = getattr(self, f"_{model}")
        with self._one_at_a_time:
            file, content = how(image, wanted)
        return file, {**content, "notice": NOTICE}

    def _load(self, align: str, tokenizer: str | None) -> None:
        try:
            self._assistant.set_result(CTAssistant.from_pretrained(align, tokenizer=tokenizer))
        except BaseException as error:  # raised again where an answer is asked for; models without it go on
            self._assistant.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    # ---- the models

    def _tokens_of(self, image: Path, wanted: Options) -> CTTokens:
        source = scan_source(image)
        if source.kind != "tokens":
            return self.tokenizer.encode(source, support=wanted.support, levels=wanted.levels)
        tokens = self.tokenizer.encode(source)
        if math.prod(tokens.source_shape) > MAX_GRID_VOXELS or not np.isfinite(tokens.source_affine).all():
            raise Refused("DAMAGED_TOKENS", f"the grid of its scan must have at most {MAX_GRID_VOXELS} voxels")
        return tokens

    def _tokenize(self, image: Path, wanted: Options) -> Result:
        tokens = self._tokens_of(image, wanted)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "tokens.npz")
            write_tokens(file, tokens)
            packed = base64.b64encode(file.read_bytes()).decode()
        return None, {**self._about(tokens), "npz": packed}

    def _reconstruct(self, image: Path, wanted: Options) -> Result:
        tokens = self._tokens_of(image, wanted)
        levels = None if wanted.levels is None else min(wanted.levels, tokens.levels)
        volume = onto_grid(self.tokenizer.decode(tokens, levels=levels), tokens.source_shape, tokens.source_affine)
        if wanted.window is not None:
            volume = Volume(np.clip(volume.hu, *window_bounds(wanted.window)), volume.affine)
        with tempfile.NamedTemporaryFile(prefix="reconstruction_", suffix=".nii.gz", delete=False) as made:
            file = Path(made.name)
        write_nifti(file, volume)
        return file, {**self._about(tokens), "window": wanted.window or options.HU}

    def _assistant_for(self, wanted: Options) -> CTAssistant:
        assistant = self._assistant.result()
        return assistant if wanted.max_3d_tokens is None else assistant.with_budget(wanted.max_3d_tokens)

    def _ask(self, image: Path, wanted: Options) -> Result:
        assistant = self._assistant_for(wanted)
        return None, self._answer_of(assistant, assistant.open(image), wanted)

    _report = _ask  # without a question

    def _show_answer(self, image: Path, wanted: Options) -> Result:
        """For viewers: the answer names the one segment of a label map of what it rests on."""
        assistant, tokens = self._assistant_for(wanted), self._tokens_of(image, wanted)
        opened = assistant.of_tokens(tokens)
        answer = self._answer_of(assistant, opened, wanted)
        occlusion = where_looked(assistant, answer["question"], answer["answer"], assistant.reduce(opened.tokens))
        cells = label_map.cells_of(tokens, occlusion)
        name = label_map.segment_name(answer["answer"], somewhere=cells is not None)
        with tempfile.NamedTemporaryFile(prefix="answer_", suffix=".nii.gz", delete=False) as made:
            file = Path(made.name)
        write_image(file, label_map.label_map(tokens, cells), tokens.source_affine)
        return file, {**answer, "label_names": {name: 1}}

    def _answer_of(self, assistant: CTAssistant, scan: TokenizedScan, wanted: Options) -> dict[str, Any]:
        """An answer without what names the scan or the folders of this machine."""
        scan = dataclasses.replace(scan, source="")
        answer = assistant.ask(scan, wanted.question, max_new_tokens=wanted.max_new_tokens).as_json()
        base = answer["provenance"]["base_model"]
        name = base["name"] and (Path(base["name"]).name if Path(base["name"]).is_absolute() else base["name"])
        answer["provenance"]["base_model"] = {**base, "name": name}
        del answer["source"], answer["scan"]
        return answer

    def _about(self, tokens: CTTokens) -> dict[str, Any]:
        return {
            "tokens": len(tokens.codes),
            "levels": tokens.levels,
            "latent_shape": list(tokens.latent_shape),
            "codes_used": len(np.unique(tokens.codes[tokens.codes >= 0])),
            "findings": list(tokens.findings or ("OK",)),
            "provenance": {
                "scan_sha256": tokens.source_hash,
                "tokenizer_sha256": tokens.tokenizer,
                "shape": list(tokens.source_shape),
                "affine": tokens.source_affine.round(6).tolist(),
                "windows": list(tokens.windows),
                "spacing": tokens.spacing,
                "keep": tokens.keep,
            },
        }
