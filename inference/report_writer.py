"""A slide to its report with evidence, step by step: the work behind each job of the page."""

import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inference.answers import Answering, budgets_of, make_sample, unread_tokens
from inference.evidence import METHODS, Evidence, explain
from inference.evidence_files import describe, describe_lines, tiled_slide, write_evidence
from inference.job_queue import Job
from inference.memory import is_out_of_memory
from inference.slide_tokens import reads_tiles
from slide_features import MAKING_FACTS, SlideFeatures
from slide_reports import case_of_slides
from slide_vlm import SlideVLM
from stage0_tiling.encoding import encode_slide
from stage0_tiling.geojson import tissue_polygons
from stage0_tiling.pixel_size import SlideError
from stage0_tiling.plan import TilePlan, TilingSettings, plan_tiles
from stage0_tiling.slide import Slide
from stage0_tiling.tissue_sources import TissueSources
from vlm_loading import check_encoder
from vlm_settings import VLMSettings

SLIDES_KEPT = 8  # whose patch tokens stay, so that a question about a slide does not encode it again
NO_TILES = "This model reads the slide as a whole, so no line can be traced back to single tiles."
NO_MEMORY_FOR_EVIDENCE = "The memory did not suffice to find what the lines rest on: that takes more than writing."


def check_settings(settings: VLMSettings, folder: str) -> None:
    """Refuse a model that new slides cannot be read for, before anything is loaded.

    Raises:
        ValueError: it is of images, or does not say how its slides were tiled.
    """
    if settings.input_kind != "features":
        raise ValueError(f"{folder} was trained on images; the page shows slides")
    if not {"tile_size", "mpp"} <= settings.tiling.keys():
        raise ValueError(f"{folder} does not say how its slides were tiled (their feature files did not); train anew")
    if unknown := settings.tiling.keys() - MAKING_FACTS.keys():
        raise ValueError(f"{folder} was trained on tiles with {', '.join(sorted(unknown))}; update SlideScribe")


class ReportWriter:
    """Model and encoder in memory, used by one thread at a time.

    Attributes:
        model: in evaluation mode.
        tokenizer: of its language model.
        encoder: of its tiles.
        finish: what makes the model's features of those of the tiles, where a slide encoder follows.
        answering: how it answers.
        sources: files that tissue is found with, where the model's slides had a segmenter.
        assume_mpp: um per level-0 pixel of slides that state none.
        batch_size: tiles per forward pass of the encoder.
        num_workers: threads that read tiles.
    """

    def __init__(
        self,
        model: SlideVLM,
        tokenizer: Any,
        encoder: Any,
        *,
        answering: Answering,
        finish: Callable[[SlideFeatures], SlideFeatures] | None = None,
        sources: TissueSources | None = None,
        assume_mpp: float | None = None,
        batch_size: int = 64,
        num_workers: int = 4,
    ):
        if finish is None:
            check_encoder(encoder, model.settings)
        self.finish = finish or (lambda tiles: tiles)
        self.model, self.tokenizer, self.encoder = model, tokenizer, encoder
        self.answering, self.sources, self.assume_mpp = answering, sources or TissueSources(), assume_mpp
        self.batch_size, self.num_workers = batch_size, num_workers
        self._kept: OrderedDict[tuple, tuple[SlideFeatures, int]] = OrderedDict()

    @property
    def no_evidence(self) -> str | None:
        """Why no report of this model has evidence; None where it has."""
        return None if reads_tiles(self.model.settings) else NO_TILES

    @property
    def tiling(self) -> dict[str, Any]:
        """How the model's slides were tiled."""
        return self.model.settings.tiling

    @property
    def tiling_settings(self) -> TilingSettings:
        """The same as stage 0 takes it, without the colours of tiles."""
        names = TilingSettings.__dataclass_fields__
        return TilingSettings(**{name: value for name, value in self.tiling.items() if name in names})

    def plan(self, path: Path) -> TilePlan:
        """Tissue and tiles of a slide.

        Raises:
            SlideError: it cannot be read, or has no tile.
        """
        with Slide(path, icc=self.tiling_settings.icc) as slide:
            plan = plan_tiles(slide, self.tiling_settings, self.assume_mpp, self.sources)
        if len(plan.coords) == 0:
            raise SlideError(
                f"{path.name}: {_why_no_tile(plan)}, searched as the model's slides were; try another slide"
            )
        return plan

    def write(self, job: Job, path: Path, question: str | None = None) -> dict[str, Any]:
        """Write the report of a slide, or answer a question about it, and find what it rests on.

        Files go to the job's folder: those of :mod:`inference.evidence_files`, and report.txt.

        Returns:
            What evidence.json holds, with ``question`` and ``seconds``. Where there is no evidence, ``no_evidence``
            says why, ``method`` is None and no line has tiles.

        Raises:
            SlideError, ValueError: the slide cannot be used, or does not fit the memory.
            Cancelled: the job was given up.
        """
        try:
            return self._write(job, path, question)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, where the error would keep the tensors of what failed.
        self._give_memory_back()
        raise ValueError(
            f"the memory of {self.model.device} did not suffice while {job.step[:1].lower()}{job.step[1:]}; close what "
            "else uses it, or start the page with --num_beams 1, --dtype bf16 or --load_in int8"
        )

    def _write(self, job: Job, path: Path, question: str | None) -> dict[str, Any]:
        began = time.perf_counter()
        slide, num_tiles = self._features(job, path)
        settings = self.model.settings
        case = case_of_slides([slide], **budgets_of(settings))
        sample = make_sample(self.model, self.tokenizer, question or settings.question, case, 1)
        job.progress("Writing the report" if question is None else "Answering")
        (answer,) = self.answering.answer(self.model, self.tokenizer, [sample])
        report = answer.pop("report")
        if not report:
            raise ValueError("the model wrote nothing; ask another question")
        about = {"question": question or settings.question, **answer, "num_tiles": num_tiles}
        if question and (unread := unread_tokens(settings, self.tokenizer, question)):
            about["unread_question_tokens"] = unread
        job.progress("Finding the evidence")
        evidence = self._explain(sample, report)
        if isinstance(evidence, str):
            job.folder.mkdir(parents=True, exist_ok=True)
            found = {"no_evidence": evidence, **describe_lines(report), "slides": [{"slide_id": path.stem}]}
        else:
            where = tiled_slide(path, self.tiling, self.assume_mpp)
            write_evidence(job.folder / "evidence", evidence, [where], about)
            found = describe(evidence, [where])
        (job.folder / "report.txt").write_text(report + "\n", encoding="utf-8")
        return {**about, **found, "seconds": round(time.perf_counter() - began, 1)}

    def _explain(self, sample: dict[str, Any], report: str) -> Evidence | str:
        """What a report rests on, or in a sentence why that is not known; a written report is not lost for it."""
        if self.no_evidence:
            return self.no_evidence
        try:
            return explain(self.model, self.tokenizer, sample, report, METHODS[:1])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self._give_memory_back()
        return NO_MEMORY_FOR_EVIDENCE

    def _give_memory_back(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _features(self, job: Job, path: Path) -> tuple[SlideFeatures, int]:
        """Patch tokens of a slide and how many tiles it has, kept from the last time where the file is the same."""
        try:
            status = path.stat()
        except FileNotFoundError as error:  # it may have waited long for its turn
            raise SlideError(f"{path.name}: is no longer in the folder") from error
        key = str(path), status.st_mtime_ns, status.st_size
        if key not in self._kept:
            job.progress("Finding the tissue")
            coords = self.plan(path).coords
            job.progress("Reading tiles", 0, len(coords))

            def count(tiles: int) -> None:
                job.progress("Reading tiles", job.done + tiles, len(coords))

            tiles = encode_slide(
                path,
                self.encoder,
                **self.tiling,
                coords=np.asarray(coords),
                assume_mpp=self.assume_mpp,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                on_tiles=count,
            )
            self._kept[key] = self.finish(tiles), len(tiles.coords)
            while len(self._kept) > SLIDES_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def _why_no_tile(plan: TilePlan) -> str:
    """What nobody at the page can change is left to `stage0_tiling.plan.why_empty`, which speaks of flags."""
    if not plan.tissue.mask.any():
        return "no tissue was found on it"
    if plan.dropped:
        return f"all {sum(plan.dropped.values())} tiles on its tissue are spoilt ({', '.join(plan.dropped)})"
    return f"too little tissue was found on it ({plan.tissue.fraction:.2%})"


def outline(plan: TilePlan) -> dict[str, Any]:
    """Tissue and tiles of a plan for the page, in level-0 pixels."""
    pieces = [
        [np.round(np.asarray(ring.coords), 1).tolist() for ring in (piece.exterior, *piece.interiors)]
        for polygons in tissue_polygons(plan.tissue)
        for piece in getattr(polygons, "geoms", [polygons])
        if not piece.is_empty
    ]
    return {
        "tissue": pieces,
        "tissue_fraction": plan.tissue.fraction,
        "tiles": plan.coords.tolist(),
        "tile_width": plan.grid.tile_width,
        "tile_height": plan.grid.tile_height,
    }
