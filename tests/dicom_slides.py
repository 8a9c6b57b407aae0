"""DICOM slides for tests: VL Whole Slide Microscopy Images, tiled in full, in JPEG baseline, which OpenSlide opens."""

from pathlib import Path

import cv2
import imagecodecs
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

from tests.slides import _tiles

TILE = 256


def write_dicom_slide(
    folder: Path,
    stem: str,
    picture: np.ndarray,
    mpp: float,
    *,
    num_levels: int = 2,
    label: np.ndarray | None = None,
    icc_profile: bytes | None = None,
) -> list[Path]:
    """Write (H, W, 3) uint8 RGB as one series, a file per level, and return the files, finest level first.

    A `label` becomes an instance of type LABEL of the same series, uncompressed as scanners write it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series = {
        "StudyInstanceUID": generate_uid(entropy_srcs=[stem, "study"]),
        "SeriesInstanceUID": generate_uid(entropy_srcs=[stem, "series"]),
        "FrameOfReferenceUID": generate_uid(entropy_srcs=[stem, "frame"]),
    }
    files = []
    for level in range(num_levels):
        origin, change = ("DERIVED", "RESAMPLED") if level else ("ORIGINAL", "NONE")
        files.append(folder / f"{stem}_level{level}.dcm")
        _write(files[-1], picture, mpp * 2**level, [origin, "PRIMARY", "VOLUME", change], series, icc_profile)
        size = picture.shape[1] // 2, picture.shape[0] // 2
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    if label is not None:
        files.append(folder / f"{stem}_label.dcm")
        _write(files[-1], label, mpp, ["ORIGINAL", "PRIMARY", "LABEL", "NONE"], series)
    return files


def _write(
    path: Path,
    picture: np.ndarray,
    mpp: float,
    image_type: list[str],
    series: dict[str, str],
    icc_profile: bytes | None = None,
) -> None:
    is_label = image_type[2] == "LABEL"
    height, width = picture.shape[:2]
    rows, columns = (height, width) if is_label else (TILE, TILE)
    frames = [picture] if is_label else list(_tiles(picture, TILE))
    data = Dataset()
    for name, value in series.items():
        setattr(data, name, value)
    data.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    data.SOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    data.Modality, data.Manufacturer = "SM", "made for a test"
    data.PatientName, data.PatientID = "", ""
    data.ImageType = image_type
    data.VolumetricProperties = "VOLUME"
    data.SpecimenLabelInImage = "YES" if is_label else "NO"
    data.SamplesPerPixel, data.PlanarConfiguration = 3, 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.Rows, data.Columns, data.NumberOfFrames = rows, columns, len(frames)
    data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows = width, height
    data.TotalPixelMatrixFocalPlanes, data.NumberOfOpticalPaths = 1, 1
    data.DimensionOrganizationType = "TILED_FULL"
    data.ImagedVolumeWidth, data.ImagedVolumeHeight = width * mpp / 1000, height * mpp / 1000
    path_item = Dataset()
    path_item.OpticalPathIdentifier, path_item.ObjectiveLensPower = "0", str(round(10 / mpp))
    if icc_profile is not None:
        path_item.ICCProfile = icc_profile
    data.OpticalPathSequence = [path_item]
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1000, mpp / 1000], 0.001
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    if is_label:
        data.PhotometricInterpretation = "RGB"
        data.PixelData = np.pad(picture.ravel(), (0, picture.size % 2)).tobytes()
    else:
        jpegs = [imagecodecs.jpeg8_encode(frame, level=92, colorspace="rgb", outcolorspace="ycbcr") for frame in frames]
        data.PhotometricInterpretation, data.LossyImageCompression = "YBR_FULL_422", "01"
        data.PixelData = encapsulate(jpegs)
        data["PixelData"].is_undefined_length = True
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if is_label else JPEGBaseline8Bit
    data.save_as(path, enforce_file_format=True)
