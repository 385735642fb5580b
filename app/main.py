"""The MONAI Label app: `monailabel start_server --app app --studies DIR` serves tokens, reconstructions and answers.

MONAI Label loads this file by its path; nothing else imports it. What is served is app/serving's; here it gets MONAI
Label's form. --conf takes tokenizer, align and max_upload_mb.
"""

import atexit
import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # only this folder is on the path while it is loaded

from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.utils.sessions import SessionInfo, Sessions

from app.serving.answers_page import AnswersPage
from app.serving.guard import Guard
from app.serving.refused import as_http
from app.serving.served import DESCRIPTIONS, Served
from app.shared.refusals import as_refused
from app.shared.version import VERSION

CONF = {"tokenizer": None, "align": None, "max_upload_mb": "2048"}
OF_THE_SERVER = ("server_mode",)
SESSION = re.compile(r"[0-9a-f-]{36}")  # MONAI Label takes any text for a folder's name
SEGMENTATIONS = ("show_answer",)  # the one kind of models that viewers list
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
MORE_SCANS = ("*.zip", "*.mha", "*.dcm")  # than MONAI Label lists by itself; a zip may hold a DICOM series


class Task(InferTask):
    """One of the served models."""

    def __init__(self, name: str, served: Served) -> None:
        self.name, self.served = name, served
        kind = InferType.SEGMENTATION if name in SEGMENTATIONS else InferType.OTHERS
        super().__init__(kind, [], 3, DESCRIPTIONS[name], served.options(name))

    def is_valid(self) -> bool:
        return True

    def __call__(self, request: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        try:
            file, content = self.served.answer(self.name, Path(request["image"]), request)
        except Exception as error:
            raise HTTPException(*as_http(error)) from None
        return None if file is None else str(file), content


class PrivateSessions(Sessions):
    """Volumes that viewers send: under a neutral name, known by an id that is no path, never unpacked."""

    def get_session(self, session_id: str, *args: Any, **given: Any) -> SessionInfo | None:
        return super().get_session(session_id, *args, **given) if SESSION.fullmatch(session_id) else None

    def remove_session(self, session_id: str) -> None:
        if SESSION.fullmatch(session_id):
            super().remove_session(session_id)

    def add_session(self, data_file: str, expiry: int = 0, uncompress: bool = False) -> tuple[str, SessionInfo]:
        if uncompress:
            why = "archives are not unpacked into a session"
            raise HTTPException(422, {"code": "BAD_CALL", "message": why, "remedy": "send a zip of a series as it is"})
        file = Path(data_file)
        if file.is_file():
            file = file.rename(file.with_name("scan" + (".nii.gz" if file.name.endswith(".nii.gz") else file.suffix)))
        return super().add_session(str(file), expiry)


class Voxelingo(MONAILabelApp):
    """Models by name; images by id, by upload, or by their place below the studies."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        logging.getLogger("monailabel").setLevel(logging.WARNING)  # its lines hold names of files and of images
        unknown = sorted(set(conf) - {*CONF, *OF_THE_SERVER})
        if unknown:
            _leave(f"UNKNOWN_KEY: --conf has no {unknown[0]}. It takes {', '.join(CONF)}.")
        given = {**CONF, **conf}
        if not given["max_upload_mb"].isdecimal():
            _leave(f"BAD_VALUE: max_upload_mb must be a whole number, got {given['max_upload_mb']}. Give another.")
        try:
            self.served = Served(tokenizer=given["tokenizer"], align=given["align"])
        except ValueError as error:
            _leave(str(as_refused(error)))
        self.uploads = _private_folder()
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="Voxelingo",
            description="CT volumes as discrete 3D tokens. Research use only, not for diagnosis.",
            version=VERSION,
        )
        guard_server(max_bytes=int(given["max_upload_mb"]) << 20)

    def init_infers(self) -> dict[str, InferTask]:
        return {name: Task(name, self.served) for name in self.served.models}

    def init_datastore(self) -> Datastore:
        if self.studies.startswith(("http://", "https://")):
            settings.MONAI_LABEL_DICOMWEB_CONVERT_TO_NIFTI = False  # a series passes the gate as DICOM, like any other
            settings.MONAI_LABEL_DICOMWEB_CACHE_PATH = (
                settings.MONAI_LABEL_DICOMWEB_CACHE_PATH
                or settings.MONAI_LABEL_DATASTORE_CACHE_PATH
                or str(self.uploads / "dicomweb")
            )
            return self.init_remote_datastore()
        return LocalDatastore(
            self.studies,
            extensions=[*settings.MONAI_LABEL_DATASTORE_FILE_EXT, *MORE_SCANS],
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def _load_sessions(self, load: bool = False) -> Sessions | None:
        """In a folder of this process, which goes with it: MONAI Label keeps them in the user's own."""
        place = settings.MONAI_LABEL_SESSION_PATH or str(self.uploads / "sessions")
        return PrivateSessions(place, settings.MONAI_LABEL_SESSION_EXPIRY) if load else None

    def _download_dcmqi_tools(self) -> None:
        """For segmentations, which are not served: nothing is downloaded."""

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        place = self.place_of(str(request.get("image") or ""), datastore or self.datastore())
        try:
            if request.get("model") not in self._infers:
                why = f"there is no such model, there is {', '.join(self._infers)}"
                raise HTTPException(404, {"code": "NO_MODEL", "message": why, "remedy": "name one of these"})
            if place is None:
                why = "there is no such image"
                raise HTTPException(404, {"code": "NO_SOURCE", "message": why, "remedy": "see /datastore for the ids"})
            return super().infer({**request, "image": str(place), "save_label": False}, datastore)
        except HTTPException:
            if place is not None and place.parent == self.uploads:  # MONAI Label removes what it could answer
                place.unlink(missing_ok=True)
            raise

    def place_of(self, image: str, datastore: Datastore) -> Path | None:
        """The file of an id, or of a path where this server takes them: uploads, sessions, the studies."""
        path = Path(image)
        if not image or "\0" in image:
            return None
        if not path.is_absolute():
            try:
                if uri := datastore.get_image_uri(image):
                    return Path(uri)
            except IndexError:  # how MONAI Label says that a DICOMweb server has no such series
                return None
            path = Path(self.studies, image)
        try:
            place = path.resolve(strict=True)
        except OSError:  # not there, or a name that no file can have
            return None
        folders = [self.uploads, Path(self.studies).resolve()]
        if self.sessions() is not None:
            folders.append(Path(self.sessions().store_path).resolve())
        below = any(folder in place.parents for folder in folders)
        return place if below else None


def guard_server(*, max_bytes: int) -> None:
    """Lays guard and page around the server that loads this app; without --host it is bound to this machine."""
    config = _running_server()
    if config is None:  # no server loads this app: there is nobody to guard it from
        return
    named = any(word.startswith(("-i", "--h")) for word in sys.argv[1:])
    if config.host == EVERYWHERE and not named:
        config.host = LOOPBACK  # it is bound only after the app has loaded
    local = config.host in (LOOPBACK, "localhost", "::1") or not named
    config.loaded_app = Guard(AnswersPage(config.loaded_app), max_bytes=max_bytes, local_only=local)


def _private_folder() -> Path:
    """Where this process puts files from now on: uploads are patients', so nobody else reads them and none is left."""
    tempfile.tempdir = tempfile.mkdtemp(prefix="voxelingo_")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)
    return Path(tempfile.tempdir).resolve()


def _running_server() -> Any:
    """uvicorn's settings of the server on whose stack this runs: MONAI Label hands them to nobody."""
    frame = sys._getframe()
    while frame is not None:
        config = getattr(frame.f_locals.get("self"), "config", None)
        if hasattr(config, "loaded_app"):
            return config
        frame = frame.f_back
    return None


def _leave(line: str) -> None:
    """Ends the server in one line; an exception would reach the console as uvicorn's trace."""
    if line:
        sys.stderr.write(f"{line}\n")
    logging.shutdown()
    sys.stderr.flush()
    os._exit(2)
