"""The demo's classes: organ, diagnosis, grade, the report of each, and what its tissue looks like."""

from dataclasses import dataclass, replace

from demo.textures import Tissue


@dataclass(frozen=True)
class Case:
    """One class of the demo. `grade` is "" where the diagnosis has none."""

    organ: str
    procedure: str
    diagnosis: str
    grade: str
    finding: str
    tissue: Tissue

    @property
    def report(self) -> str:
        """The report as a REG 2025 record words and breaks it."""
        return f"{self.organ}, {self.procedure};\n  {self.finding}"


def breast() -> list[Case]:
    """Small ducts and fat."""
    base = Tissue("ducts", thickness_um=8)
    in_situ = replace(base, stratified=1, thickness_um=9)
    low = replace(in_situ, filled=0.9, nucleus_um=8, crowding=14)
    high = replace(in_situ, filled=1, necrosis=0.7, nucleus_um=14, nucleus_spread=0.28, crowding=5)
    invasive = replace(base, nest_share=0.7)
    grades = [
        ("I", 2, 1, 1, replace(invasive, nests="acini", nucleus_um=7.5, crowding=12)),
        ("II", 3, 2, 1, replace(invasive, nests="cords", nucleus_um=10.5, nucleus_spread=0.15, crowding=7)),
        ("III", 3, 3, 3, replace(invasive, nests="sheets", nucleus_um=15, nucleus_spread=0.3, crowding=3.4)),
    ]
    rows = [
        ("fibrocystic", "", "Fibrocystic change without atypia", base),
        ("in situ", "low", "Ductal carcinoma in situ, cribriform type, low nuclear grade", low),
        ("in situ", "high", "Ductal carcinoma in situ, comedo type with necrosis, high nuclear grade", high),
    ]
    rows += [
        (
            "invasive",
            grade,
            f"Invasive carcinoma of no special type, grade {grade} "
            f"(Tubule formation: {tubules}, Nuclear grade: {nuclear}, Mitoses: {mitoses})",
            tissue,
        )
        for grade, tubules, nuclear, mitoses, tissue in grades
    ]
    return [Case("Breast", "core-needle biopsy", *row) for row in rows]


def prostate() -> list[Case]:
    """Large lobed glands in smooth muscle."""
    base = Tissue("glands", thickness_um=13, crowding=12)
    neoplasia = replace(base, stratified=1, thickness_um=19, nucleus_um=11, crowding=7, nucleus_spread=0.15)
    acinar = "Acinar adenocarcinoma, Gleason's score"
    rows = [
        ("benign", "", "No tumor present in benign glands and stroma", base),
        ("neoplasia", "", "High-grade prostatic intraepithelial neoplasia, no invasive tumor", neoplasia),
        (
            "adenocarcinoma",
            "1",
            f"{acinar} 6 (3+3), grade group 1, tumor volume: 20%",
            replace(base, nests="acini", nest_share=0.85, nucleus_um=8, crowding=12),
        ),
        (
            "adenocarcinoma",
            "4",
            f"{acinar} 8 (4+4), grade group 4, tumor volume: 60%",
            replace(base, filled=0.9, stratified=1, nests="cords", nest_share=0.8, nucleus_um=10.5, crowding=7.5),
        ),
        (
            "adenocarcinoma",
            "5",
            f"{acinar} 10 (5+5), grade group 5, tumor volume: 90%",
            replace(base, nests="sheets", nest_share=0.75, nucleus_um=14, nucleus_spread=0.25, crowding=3.4),
        ),
    ]
    return [Case("Prostate", "needle biopsy", *row) for row in rows]


def colon() -> list[Case]:
    """A honeycomb of crypts with goblet cells."""
    base = Tissue("crypts", thickness_um=20, goblets=1)
    adenoma = replace(base, goblets=0.25, thickness_um=19)
    rows = [
        ("colitis", "", "Chronic active colitis with dense lymphocytic infiltration", replace(base, lymphocytes=11)),
        (
            "adenoma",
            "low",
            "Tubular adenoma with low grade dysplasia",
            replace(adenoma, stratified=0.6, nucleus_um=8.5, crowding=14, darkness=1),
        ),
        (
            "adenoma",
            "high",
            "Tubular adenoma with high grade dysplasia",
            replace(adenoma, goblets=0, stratified=1, nucleus_um=12.5, nucleus_spread=0.22, crowding=4.8),
        ),
        (
            "adenocarcinoma",
            "well",
            "Adenocarcinoma, well differentiated, arising in a background of necrotic glands",
            replace(base, goblets=0.3, stratified=1, thickness_um=11, necrosis=0.8, nucleus_um=9, crowding=12),
        ),
        (
            "adenocarcinoma",
            "poor",
            "Adenocarcinoma, poorly differentiated, with solid growth",
            replace(
                base, goblets=0.6, nests="sheets", nest_share=0.85, nucleus_um=14, nucleus_spread=0.3, crowding=3.6
            ),
        ),
    ]
    return [Case("Colon", "colonoscopic biopsy", *row) for row in rows]


def bladder() -> list[Case]:
    """Fronds of urothelium on stromal cores."""
    base = Tissue("papillae", thickness_um=16, stratified=1, crowding=10)
    note = "\n\nNote) The specimen includes muscle proper."
    papillary = "Non-invasive papillary urothelial carcinoma,"
    rows = [
        ("cystitis", "", f"Chronic cystitis, no tumor present{note}", replace(base, lymphocytes=11)),
        ("papillary", "low", f"{papillary} low grade{note}", replace(base, thickness_um=40, nucleus_um=8, crowding=14)),
        (
            "papillary",
            "high",
            f"{papillary} high grade{note}",
            replace(base, thickness_um=40, nucleus_um=14, nucleus_spread=0.28, crowding=3.8),
        ),
        (
            "invasive",
            "",
            f"Invasive urothelial carcinoma,\n  with involvement of subepithelial connective tissue{note}",
            replace(base, nests="cords", nest_share=0.95, nucleus_um=11, nucleus_spread=0.2, crowding=7),
        ),
    ]
    return [Case("Urinary bladder", "transurethral resection", *row) for row in rows]


def lung() -> list[Case]:
    """Air spaces between thin walls."""
    base = Tissue("alveoli", thickness_um=3, stratified=1)
    rows = [
        ("benign", "", "No evidence of malignancy or granuloma", base),
        (
            "granuloma",
            "",
            "Chronic granulomatous inflammation with necrosis",
            replace(base, granulomas=0.85, lymphocytes=7),
        ),
        (
            "adenocarcinoma",
            "well",
            "Adenocarcinoma, well differentiated, lepidic pattern",
            replace(base, thickness_um=9, nucleus_um=9.5, nucleus_spread=0.12, crowding=13),
        ),
        (
            "adenocarcinoma",
            "poor",
            "Adenocarcinoma, poorly differentiated, solid pattern",
            replace(base, nests="sheets", nest_share=0.65, nucleus_um=14, nucleus_spread=0.3, crowding=3.6),
        ),
        (
            "small cell",
            "",
            "Small cell carcinoma with crush artifact",
            replace(base, nests="sheets", nest_share=0.65, nucleus_um=7.5, crowding=22, darkness=1.15),
        ),
    ]
    return [Case("Lung", "biopsy", *row) for row in rows]


CASES: tuple[Case, ...] = (*breast(), *prostate(), *colon(), *bladder(), *lung())
