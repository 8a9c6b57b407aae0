import csv
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from slide_features import read_slide_coords
from slide_reports.annotation_files import read_rows
from stage0_tiling import tile
from stage0_tiling.run_table import RunFolder
from stage0_tiling.slide import Slide
from stage0_tiling.slide_files import files_of
from stage0_tiling.slide_list import SlideEntry, find_slides
from tests.dicom_slides import write_dicom_slide
from tests.slides import DrawnSlide


def ids(*sources):
    return {entry.slide_id for entry in find_slides([str(source) for source in sources])}


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"1")


def test_folders_files_and_lists_of_slides(tmp_path):
    touch(tmp_path, "b.svs", "a.TIFF", "deep/er/c.png", ".hidden.svs", ".cache/d.svs", "._a.TIFF", "notes.txt")
    assert ids(tmp_path) == {"a", "b", "c"}
    assert ids(tmp_path / "b.svs", tmp_path / "notes.txt") == {"b", "notes"}
    assert len(find_slides([str(tmp_path), str(tmp_path / "b.svs")])) == 3

    (tmp_path / "list.csv").write_text("slide,mpp\nb.svs,0.25\ndeep/er/c.png,\nabsent.svs,\n")
    assert find_slides([str(tmp_path / "list.csv")]) == [
        SlideEntry("b", tmp_path / "b.svs", mpp=0.25),
        SlideEntry("c", tmp_path / "deep/er/c.png"),
        SlideEntry("absent", tmp_path / "absent.svs"),
    ]
    (tmp_path / "excel.csv").write_text('path;mpp\nb.svs;0,25\n"deep;er/c.png";\n', encoding="utf-8-sig")
    assert find_slides([str(tmp_path / "excel.csv")]) == [
        SlideEntry("b", tmp_path / "b.svs", mpp=0.25),
        SlideEntry("c", tmp_path / "deep;er/c.png"),
    ]


def test_what_a_list_says_of_mpp_and_names(tmp_path):
    rows = [
        "x.svs,named,0.25,,",
        "y.svs,,,0.5,",
        "z.svs,,0.3,,assumed",
        "v.svs,,0.3,,slide",
        "w.svs,,0.3,0.4,objective",
    ]
    (tmp_path / "list.csv").write_text("path,slide_id,mpp,assume_mpp,mpp_source\n" + "\n".join(rows))
    found = [(e.slide_id, e.mpp, e.assume_mpp) for e in find_slides([str(tmp_path / "list.csv")])]
    assert found == [
        ("named", 0.25, None),
        ("y", None, 0.5),
        ("z", None, 0.3),
        ("v", None, None),
        ("w", None, 0.4),
    ]


def test_formats_that_cannot_be_read_are_named(tmp_path, caplog):
    touch(tmp_path, "a.svs", "b.vsi", "deep/c.VSI", "d.kfb", "notes.txt")
    assert ids(tmp_path) == {"a"}
    assert "2 .vsi left out, which cannot be read" in caplog.text and "1 .kfb left out" in caplog.text


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path, "store/a.svs")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "slides").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "circle").symlink_to(tmp_path / "project")
    (tmp_path / "project" / "gone.svs").symlink_to(tmp_path / "absent.svs")
    assert ids(tmp_path / "project") == {"a", "gone"}, "a link to nothing is reported, not passed over"


def test_lists_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_slides([str(tmp_path / "absent")])
    with pytest.raises(ValueError, match="no slide in this folder"):
        find_slides([str(tmp_path)])
    for content, complaint in (
        ("name\nx\n", "columns are name"),
        ("path,mpp\nx.svs,big\n", "line 2, mpp big"),
        ("path,mpp\nx.svs,\ny.svs,352\n", "line 3, mpp 352: expected 0.05 to 20 um/px"),
        ("path,assume_mpp\nx.svs,0\n", "line 2, assume_mpp 0"),
        ("path,slide_id\nx.svs,../x\n", "line 2, slide_id ../x"),
        ("path,slide_id\nx.svs,..\n", r"line 2, slide_id \.\.: a name of printable"),
        ("path,slide_id\nx.svs,a\0b\n", r"line 2, slide_id a\\x00b: a name of printable"),
        ("path\n.\n", r"line 2, \. is a folder of 0 slides"),
    ):
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(ValueError, match=complaint):
            find_slides([str(tmp_path / "a.csv")])
    for content in (
        "path\nM\u00fcller.svs\n".encode("latin-1"),
        "path\na.svs\n".encode("utf-16"),
        b"path\n" + b"a" * 140_000,
    ):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.csv: is no CSV in UTF-8"):
            find_slides([str(tmp_path / "a.csv")])


def test_reading_reports_leaves_the_limits_of_other_readers_alone(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "reports.csv").write_text("id,report\na," + "x" * 2 * limit + "\n")
    rows = read_rows(tmp_path / "reports.csv")
    assert len(next(rows).values["report"]) == 2 * limit
    rows.close()
    assert csv.field_size_limit() == limit
    touch(tmp_path, "a.svs", "b/a.tiff")
    with pytest.raises(ValueError, match="share the name a"):
        find_slides([str(tmp_path)])
    (tmp_path / "a.csv").write_text("path,slide_id\na.svs,\nb/a.tiff,a-2\n")
    assert ids(tmp_path / "a.csv") == {"a", "a-2"}


def test_a_slide_given_twice_must_be_given_alike(tmp_path):
    touch(tmp_path, "a.svs")
    (tmp_path / "list.csv").write_text("path,slide_id\na.svs,a\na.svs,b\n")
    with pytest.raises(ValueError, match=r"a\.svs is given twice, as a and as b"):
        find_slides([str(tmp_path / "list.csv")])
    (tmp_path / "list.csv").write_text("path,mpp\na.svs,0.25\n")
    with pytest.raises(ValueError, match=r"as a and as a, mpp 0\.25"):
        find_slides([str(tmp_path), str(tmp_path / "list.csv")])
    (tmp_path / "list.csv").write_text("path,mpp\na.svs,\na.svs,\n")
    assert ids(tmp_path, tmp_path / "list.csv") == {"a"}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (b"L" * 240, "longer than 200 bytes"),
        (b"M\xfcller", "not in UTF-8"),
        (b"two\nlines", r"two\\nlines.svs holds a control character"),
    ],
)
def test_names_that_no_record_can_have_are_refused_before_any_work(tmp_path, name, told):
    touch(tmp_path, "good.svs")
    (tmp_path / os.fsdecode(name + b".svs")).write_bytes(b"1")
    with pytest.raises(ValueError, match=told) as refusal:
        find_slides([str(tmp_path)])
    assert str(refusal.value).encode().count(b"\n") == 0  # can be printed


def test_parts_of_slides_are_no_slides(tmp_path):
    touch(tmp_path, "m.mrxs", "m/Slidedat.ini", "m/Index.dat", "m/Data0001.dat", "m/label.jpg", "m/sub/scan.png")
    touch(tmp_path, "ham/h.jpg", "ham/h(1,0).jpg", "ham/h_map.jpg", "ham/h_macro.JPG", "ham/other.jpg", "ham/h.opt")
    lines = ["[Virtual Microscope Specimen]", "NoJpegColumns=2", "ImageFile=h.jpg", "ImageFile(1,0)=h(1,0).jpg"]
    lines += ["MapFile=h_map.jpg", "OptimisationFile=h.opt", "MacroImage=h_macro.jpg"]
    (tmp_path / "ham" / "h.vms").write_text("\r\n".join(lines), encoding="latin-1")
    found = find_slides([str(tmp_path)])
    assert [entry.path.name for entry in found] == ["h.vms", "other.jpg", "m.mrxs"]
    assert {file.name for file in files_of(found[0].path)} == {
        *("h.vms", "h.jpg", "h(1,0).jpg", "h_map.jpg", "h_macro.JPG", "h.opt")
    }
    assert len(files_of(found[2].path)) == 6 and files_of(found[1].path) == [found[1].path]


def test_what_stage_0_wrote_beside_the_slides_is_no_slide(tmp_path):
    DrawnSlide(width=512, height=512, num_levels=1).write(tmp_path / "a.tiff")
    flags = ["--slides", str(tmp_path), "--output_dir", str(tmp_path), "--tile_size", "64"]
    assert tile.main(flags) == 0
    assert (tmp_path / "overlays" / "a.jpg").exists()
    touch(tmp_path, "survey.csv", "survey.png", "survey_thumbnails_01.jpg", "survey_slides/a.jpg")
    assert ids(tmp_path) == {"a"}
    assert tile.main(flags) == 0
    shutil.rmtree(tmp_path / "state")  # another process has begun, and is at its first slide
    assert (tmp_path / "claims").is_dir() and ids(tmp_path) == {"a"}


@pytest.fixture(scope="module")
def dicom(tmp_path_factory):
    """A flat folder of two DICOM slides, of two and three levels, one with a label."""
    folder = tmp_path_factory.mktemp("dicom") / "flat"
    label = np.full((120, 81, 3), (255, 0, 0), np.uint8)
    for name, seed, levels in (("one", 0, 2), ("two", 1, 3)):
        picture = DrawnSlide(width=1100, height=900, seed=seed).draw()[0]
        write_dicom_slide(folder, name, picture, 0.5, num_levels=levels, label=label if name == "two" else None)
    return folder


def test_dicom_slides_of_one_folder_are_told_apart(dicom, tmp_path):
    assert [(e.slide_id, e.path.name) for e in find_slides([str(dicom)])] == [
        ("one_level0", "one_level0.dcm"),
        ("two_level0", "two_level0.dcm"),
    ]
    assert [file.stem for file in files_of(dicom / "one_level0.dcm")] == ["one_level0", "one_level1"]
    with Slide(dicom / "two_level0.dcm") as slide:
        assert (slide.format, slide.num_levels, slide.width, slide.height) == ("dicom", 3, 1100, 900)
        assert slide.pixel_size().mpp == pytest.approx(0.5)


def test_a_dicom_slide_alone_is_named_by_its_folder(dicom, tmp_path):
    case = tmp_path / "case_7"
    case.mkdir()
    for path in dicom.glob("two*"):
        (case / path.name).symlink_to(path)
    assert ids(case) == {"case_7"} and ids(tmp_path) == {"case_7"}
    (tmp_path / "list.csv").write_text("path\ncase_7\n")
    assert find_slides([str(tmp_path / "list.csv")]) == [SlideEntry("case_7", case / "two_level0.dcm")]
    touch(case, "photo.svs")
    assert ids(case) == {"two_level0", "photo"}


def test_dicom_that_is_no_slide_is_left_out_and_what_is_broken_is_not(dicom, tmp_path, caplog):
    label = dcmread(dicom / "two_label.dcm")
    label.save_as(tmp_path / "label.dcm")
    label.SOPClassUID = label.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"  # a CT image
    label.save_as(tmp_path / "ct.dcm")
    with pytest.raises(ValueError, match="no slide in this folder"):
        find_slides([str(tmp_path)])
    assert "label or overview images only" in caplog.text
    (tmp_path / "cut.dcm").write_bytes((dicom / "two_level0.dcm").read_bytes()[:100])
    assert ids(tmp_path) == {"cut"}


def test_dicom_slides_through_the_command_without_their_label(dicom, tmp_path, monkeypatch):
    import openslide

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(lambda self: pytest.fail("read")))
    assert tile.main(["--slides", str(dicom), "--output_dir", str(tmp_path), "--tile_size", "64"]) == 0
    for name in ("one_level0", "two_level0"):
        row = RunFolder(tmp_path).read_state(name).row
        assert (row.status, row.format, row.mpp, row.mpp_source) == ("done", "dicom", 0.5, "slide")
        assert len(read_slide_coords(tmp_path / "coords" / f"{name}.h5").coords) == row.n_tiles > 20
        overlay = np.asarray(Image.open(tmp_path / "overlays" / f"{name}.jpg")).astype(int)
        assert not ((overlay[..., 0] > 220) & (overlay[..., 1:].max(axis=2) < 60)).any(), "red is the label"


def test_an_assumed_mpp_of_many_digits_is_known_again(tmp_path):
    DrawnSlide(width=512, height=512, num_levels=1, mpp=None).write(tmp_path / "a.tiff")
    flags = ["--slides", str(tmp_path / "a.tiff"), "--output_dir", str(tmp_path / "out"), "--tile_size", "64"]
    assert tile.main([*flags, "--assume_mpp", "0.4651162790697674"]) == 0
    assert tile.main([*flags, "--assume_mpp", "0.4651162790697674"]) == 0
    with pytest.raises(ValueError, match="--assume_mpp 0.465116, not --assume_mpp 0.47"):
        tile.main([*flags, "--assume_mpp", "0.47"])
