"""The methods of finding tissue, against exact masks of drawn slides and by known fractions of real ones."""

import cv2
import numpy as np
import pytest

from demo.make_slides import MASK_STEP, draw_slide
from demo.textures import MPP
from stage0_tiling.slide import Slide
from stage0_tiling.tissue import find_tissue
from stage0_tiling.tissue_methods import METHODS, tissue_mask
from tests.slides import INKS, DrawnSlide
from tests.test_stage0_tissue import KINDS, SHARED_SLIDES

UNSTAINED, BROWN = (214, 212, 208), (190, 150, 110)
FLOORS = {"otsu": 0.93, "hsv": 0.93, "entropy": 0.9}  # mean IoU on the demo's slides
KIND_FLOORS = {"otsu": 0.97, "hsv": 0.97, "entropy": 0.94}


def iou(found, exact):
    return (found & exact).sum() / (found | exact).sum()


@pytest.fixture(scope="module")
def demo_slides():
    """Thumbnails at the resolution of the demo's exact masks, and the masks."""
    drawn = [draw_slide(case, np.random.default_rng([7, case])) for case in range(0, 25, 4)]
    step = 1 / MASK_STEP
    return [
        (cv2.resize(image, None, fx=step, fy=step, interpolation=cv2.INTER_AREA), mask > 0) for image, mask in drawn
    ]


@pytest.mark.parametrize("method", METHODS)
def test_methods_on_the_demos_slides(method, demo_slides, capsys):
    ious = [iou(tissue_mask(picture, MPP * MASK_STEP, method), exact) for picture, exact in demo_slides]
    with capsys.disabled():
        print(f"\nmean IoU of {method} on {len(ious)} demo slides {np.mean(ious):.3f}, worst {min(ious):.3f}")
    assert np.mean(ious) >= FLOORS[method] and min(ious) >= 0.8


def thumbnail(shrink=8, **how):
    """Thumbnail of a drawn slide of 2048 x 1536 um and its exact mask, both at `shrink` um/px."""
    how = {"width": 2048 // 2, "height": 1536 // 2, "mpp": 2.0} | how
    picture, exact = DrawnSlide(**how).draw()
    size = exact.shape[1] // (shrink // 2), exact.shape[0] // (shrink // 2)
    exact = cv2.resize(exact.view(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA), exact


@pytest.fixture(scope="module")
def kinds():
    skipped = ("coarse slide", "40x slide", "no pyramid")  # the same to a method as a white background
    told = {name: vars(drawn) for name, drawn in KINDS.items() if name not in skipped}
    keep = ("background", "stain", "pen", "black_border", "seed")
    return {name: thumbnail(**{key: how[key] for key in keep}) for name, how in told.items()}


@pytest.mark.parametrize("method", METHODS)
def test_methods_on_all_kinds_of_slides(method, kinds, capsys):
    ious = {kind: iou(tissue_mask(picture, 8.0, method), exact) for kind, (picture, exact) in kinds.items()}
    with capsys.disabled():
        print(f"\nmean IoU of {method} on {len(ious)} kinds of slides {np.mean(list(ious.values())):.3f}")
    assert np.mean(list(ious.values())) >= KIND_FLOORS[method] and min(ious.values()) >= 0.85, ious


@pytest.mark.parametrize("stain", [UNSTAINED, BROWN])
def test_entropy_finds_tissue_whatever_its_colour(stain):
    picture, exact = thumbnail(stain=stain, seed=20)
    assert iou(tissue_mask(picture, 8.0, "entropy"), exact) > 0.9
    assert iou(tissue_mask(picture, 8.0, "hsv"), exact) < 0.1, "outside of its bounds, as its help says"


@pytest.mark.parametrize("background", [(255, 255, 255), (180, 180, 180), (244, 238, 228), (0, 0, 0)])
def test_empty_glass_is_no_tissue_by_any_method(background):
    blank, _ = thumbnail(background=background, pieces=())
    assert not any(tissue_mask(blank, 8.0, method).any() for method in METHODS)


@pytest.mark.parametrize("ink", INKS)
def test_ink_is_no_tissue_by_any_method(ink):
    inked, _ = thumbnail(pen=ink, pieces=())
    assert not any(tissue_mask(inked, 8.0, method).any() for method in METHODS)


def test_entropy_takes_white_filling_beside_grey_glass_for_no_tissue():
    """Scanners leave out fields without tissue and fill them with white, in steps that no stain causes."""
    picture, exact = thumbnail(background=(238, 237, 239))
    filled = picture.shape[1] // 8
    picture[:, :filled], exact[:, :filled] = 255, False
    assert iou(tissue_mask(picture, 8.0, "entropy"), exact) > 0.9


@pytest.mark.skipif(not SHARED_SLIDES.is_dir(), reason="the real slides in ../shared/data/slides are not here")
@pytest.mark.parametrize("method", METHODS[1:])
def test_methods_agree_on_real_slides(method):
    for path in sorted(SHARED_SLIDES.iterdir()):
        with Slide(path) as slide:
            pixel_size = slide.pixel_size(assume_mpp=0.5)
            found, usual = (find_tissue(slide, pixel_size, name).mask for name in (method, "otsu"))
        assert iou(found, usual) > 0.8, path.name
