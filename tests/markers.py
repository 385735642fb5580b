"""Markers of identity, each one unlike any other, planted in raw scans and their manifest, and looked for afterwards.

A marker is a word, a date or a number. `found` reads every file below a folder, inside zips, gzip and arrays too, their
names, and what was said.
"""

import gzip
import io
import re
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset

from tests import scans

HEIGHTS = tuple(4.0 * k for k in range(-7, 8))
AFFINE = scans.centred((3.0, 3.0, 4.0), (36, 32, 28))
WORDS = ("PatientName", "PatientComments", "OtherPatientNames", "InstitutionName", "InstitutionAddress")
WORDS += ("ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "StudyDescription", "SeriesDescription")
WORDS += ("ProtocolName", "ImageComments", "StationName", "RequestingPhysician", "AdmittingDiagnosesDescription")
WORDS += ("ConvolutionKernel", "BodyPartExamined", "ContrastBolusAgent", "AdditionalPatientHistory", "Occupation")
WORDS += ("RequestedProcedureDescription", "PatientBirthName", "MilitaryRank", "EthnicGroup")
NUMBERS = ("PatientID", "AccessionNumber", "StudyID", "DeviceSerialNumber", "OtherPatientIDs", "AdmissionID")
DATES = ("PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "InstanceCreationDate")
OF_SERIES = {"PatientID", "FrameOfReferenceUID"}  # one in all slices, or the gate refuses them


class Markers:
    """Hands out markers and remembers where each one went."""

    def __init__(self) -> None:
        self.where: dict[str, str] = {}

    def word(self, where: str) -> str:
        return self._keep(f"Zq7k{len(self.where):05d}", where)

    def number(self, where: str) -> str:
        return self._keep(f"7391{len(self.where):06d}", where)

    def date(self, where: str) -> str:
        count = sum(len(marker) == 8 for marker in self.where)
        return self._keep(f"{1500 + count // 336:04d}{1 + count // 28 % 12:02d}{1 + count % 28:02d}", where)

    def _keep(self, marker: str, where: str) -> str:
        self.where[marker] = where
        return marker

    def found(self, data: bytes) -> set[str]:
        """Those in some bytes: words in any case, dates as 15001231 or 1500-12-31, digits not inside longer numbers."""
        seen = {word.decode().lower() for word in re.findall(rb"(?i)zq7k\d{5}", data)}
        seen |= {digits.decode() for digits in re.findall(rb"(?<![\d.])(7391\d{6}|1[5-9]\d{6})(?!\d)", data)}
        seen |= {digits.decode().replace("-", "") for digits in re.findall(rb"(?<!\d)1[5-9]\d\d-\d\d-\d\d(?!\d)", data)}
        return {marker for marker in self.where if marker.lower() in seen}


def contents(path: Path) -> list[bytes]:
    """A file's bytes, and what they unpack to."""
    return unpacked(path.read_bytes())


def unpacked(data: bytes) -> list[bytes]:
    if data[:2] == b"\x1f\x8b":
        return [data, gzip.decompress(data)]
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inner = [part for name in archive.namelist() for part in unpacked(archive.read(name))]
            return [data, *inner, *(part.decode("utf-32-le", "ignore").encode() for part in inner)]
    return [data]


def leaks(markers: Markers, folder: Path, said: dict[str, bytes]) -> list[str]:
    """Each marker below a folder or in what was said: where it is, and where it came from."""
    told = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        parts = [name.encode(), *(contents(path) if path.is_file() else ())]
        told += [(name, marker) for marker in set().union(*(markers.found(part) for part in parts))]
    told += [(what, marker) for what, data in said.items() for marker in markers.found(data)]
    return [f"{marker} of {markers.where[marker]} in {place}" for place, marker in sorted(told)]


# ---- planting


def marked_slices(markers: Markers, uid: str, where: str, heights=HEIGHTS, **tags) -> list[Dataset]:
    """A series with words, dates, numbers, private tags and a sequence full of markers in every slice."""
    whole = {name: markers.number(f"{where} {name}") for name in OF_SERIES & set(NUMBERS)}
    slices = scans.series(heights=heights, SeriesInstanceUID=uid, **{**whole, **tags})
    for number, ds in enumerate(slices):
        at = f"{where} slice {number}"
        for name in WORDS:
            setattr(ds, name, markers.word(f"{at} {name}"))
        for name in set(NUMBERS) - OF_SERIES:
            setattr(ds, name, markers.number(f"{at} {name}"))
        for name in DATES:
            setattr(ds, name, markers.date(f"{at} {name}"))
        block = ds.private_block(0x0029, markers.word(f"{at} private creator"), create=True)
        block.add_new(0x10, "LO", markers.word(f"{at} private tag"))
        block.add_new(0x11, "UN", markers.word(f"{at} private bytes").encode())
        item = Dataset()
        item.PatientID, item.IssuerOfPatientID = markers.number(f"{at} sequence"), markers.word(f"{at} sequence")
        ds.OtherPatientIDsSequence = pydicom.Sequence([item])
        ds.file_meta.ImplementationVersionName = markers.word(f"{at} file meta")
    return slices


def plant_scans(raw: Path, markers: Markers, *, per_format: int, series: int) -> None:
    """Good scans of every format in folders and files whose names are markers too."""
    for number in range(series):
        folder = raw / f"site_{markers.word('dataset folder')}" / markers.number("patient folder")
        slices = marked_slices(markers, f"1.2.{number}", f"series {number}", StudyInstanceUID=f"1.3.{number}")
        for ds in slices:
            scans.save(ds, folder / markers.word("dicom file"))
    for number in range(per_format):
        affine = AFFINE.copy()
        affine[:3, 3] += number  # no two of one content
        data = scans.sample(affine, (36, 32, 28))
        folder = raw / "volumes" / markers.date("volume folder")
        folder.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(data, affine)
        for field in ("descrip", "aux_file", "db_name", "intent_name"):
            image.header[field] = markers.word(f"nifti {field}").encode()
        for code in ("comment", "afni", "dicom"):
            text = markers.word(f"nifti extension {code}").encode().ljust(24)
            image.header.extensions.append(nib.nifti1.Nifti1Extension("comment" if code == "dicom" else code, text))
        nib.save(image, folder / f"{markers.word('nifti file')}.nii.gz")
        data[0, 0, 0] -= 1
        nrrd = scans.write_nrrd(
            folder / f"{markers.number('nrrd file')}.nrrd", affine, data, content=markers.word("nrrd content")
        )
        head, end, body = nrrd.read_bytes().partition(b"\n\n")
        comment = f"\n# {markers.word('nrrd comment')}\nname:={markers.word('nrrd value')}"
        nrrd.write_bytes(head + comment.encode() + end + body)
        data[0, 0, 0] -= 1
        texts = {"Comment": markers.word("mha comment"), "Name": markers.word("mha name")}
        texts |= {"PatientID": markers.number("mha id"), "Date": markers.date("mha date")}
        scans.write_mha(folder / f"{markers.word('mha file')}.mha", affine, data, **texts)


def plant_refused(raw: Path, markers: Markers) -> None:
    """What is refused, for a marker where a header's word or number should be, or for what is broken beside markers."""
    folder = raw / markers.word("folder of refused")
    fields = (
        "Modality",
        "PhotometricInterpretation",
        "RescaleType",
        "SOPClassUID",
        "ImageType",
        "LossyImageCompression",
    )
    for number, name in enumerate(fields):
        told = {name: markers.word(f"refused {name}")}
        for ds in marked_slices(markers, f"1.5.{number}", f"refused {name}", HEIGHTS[:5], **told):
            scans.save(ds, folder / markers.word("file") / markers.word("file"))
    numbers = {"slope": b"-1024", "uid": b"1.2.840.10008.1.2.1\0"}
    for number, (name, text) in enumerate(numbers.items()):
        for at, ds in enumerate(marked_slices(markers, f"1.6.{number}", f"garbled {name}", HEIGHTS[:5])):
            path = scans.save(ds, folder / f"garbled_{name}" / f"{at}")
            marker = markers.word(f"garbled {name}").encode().ljust(len(text), b" ")[: max(len(text), 9)]
            path.write_bytes(path.read_bytes().replace(text, marker[: len(text)].ljust(len(text), b" ")))
    data = scans.sample(AFFINE, (36, 32, 28))
    for name in (
        "type",
        "space",
        "sizes",
        "space directions",
        "kinds",
        "endian",
        "encoding",
        "space origin",
        "dimension",
    ):
        scans.write_nrrd(folder / f"{name[:8]}.nrrd", AFFINE, data, **{name: markers.word(f"nrrd {name}")}) if (
            name != "encoding"
        ) else scans.write_nrrd(folder / "enc.nrrd", AFFINE, data, encoding=markers.word("nrrd encoding"))
    for name in ("NDims", "DimSize", "ElementType", "Offset", "CompressedData", "ElementSpacing", "DistanceUnits"):
        scans.write_mha(folder / f"{name}.mha", AFFINE, data, **{name: markers.word(f"mha {name}")})
    (folder / f"{markers.word('broken nifti')}.nii.gz").write_bytes(markers.word("broken nifti").encode() * 40)
    (folder / f"{markers.word('notes file')}.txt").write_text(markers.word("notes"))
    with zipfile.ZipFile(folder / f"{markers.word('zip')}.zip", "w") as archive:
        archive.comment = markers.word("zip comment").encode()
        archive.writestr(f"../{markers.word('zip member')}.dcm", markers.word("zip content"))
    with zipfile.ZipFile(folder / f"{markers.word('zip')}.zip", "w") as archive:
        archive.writestr(f"{markers.word('zip member')}.dcm", markers.word("zip content"))


def plant_labels(raw: Path, markers: Markers) -> None:
    """Masks beside scans, called after markers."""
    flat = (scans.sample(AFFINE, (36, 32, 28)) > 0).astype(np.uint8)
    for folder in sorted((raw / "volumes").iterdir())[:2]:
        scans.write_nifti(folder / "masks" / f"{markers.word('mask file')}.nii.gz", AFFINE, flat)


def manifest_of(raw: Path, file: Path, markers: Markers) -> Path:
    """A row a volume file: a report without markers, and identity in every column that is no text of it."""
    columns = ("patient_name", "birth_date", "accession", "radiologist", "comment", "ward", "MRN", "Study Date")
    lines = ["image,patient,report,question,answer,type,nodule," + ",".join(columns)]
    for number, path in enumerate(sorted((raw / "volumes").rglob("*.*"))):
        if "masks" in path.parts:
            continue
        own = [markers.word(f"manifest {c}") for c in columns[:1]] + [markers.date("manifest birth")]
        own += [markers.number("manifest accession"), *(markers.word(f"manifest {c}") for c in columns[3:6])]
        own += [markers.number("manifest MRN"), markers.date("manifest study date")]
        side = ("left", "right")[number % 2]
        text = f"A nodule on the {side}.,On which side?,{side},side,{number % 2}"
        lines.append(f"{path.relative_to(raw)},{markers.number('manifest patient')},{text},{','.join(own)}")
    lines.append(f"{markers.word('lost image')}.nii.gz,{markers.number('lost patient')},None.,,,,0,,,,,,,,")
    file.write_text("\n".join(lines) + "\n")
    return file
