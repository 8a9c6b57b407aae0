"""Words of pathology reports: spelling, organs, procedures, diagnoses and their behavior."""

import re
from functools import lru_cache

from evaluation.fields.hinted import Hinted

# Misspellings of REG 2025, and the two spellings of English; a mended text is what everything below reads.
SPELLINGS = [
    (r"\b(?:interstinal|nterstinal)\b", "intestinal"),
    (r"\bcolmnar\b", "columnar"),
    (r"\boherewise\b", "otherwise"),
    (r"\bolonoscopic\b", "colonoscopic"),
    (r"\blintermediate\b", "intermediate"),
    (r"\bserrated serrated lesion\b", "sessile serrated lesion"),
    (r"\btumour", "tumor"),
    (r"\boesophag", "esophag"),
    (r"\bfavour", "favor"),
    (r"\bmicro-invasive\b", "microinvasive"),
    (r"\bsignet[- ]ring[- ]cell\b", "signet ring cell"),
    (r"\bb[- ]cell\b", "b cell"),
    (r"\bnoninvasive\b", "non-invasive"),
    (r"\bbiopsies\b", "biopsy"),
]
_MISSPELLED = Hinted(
    "|".join(f"({wrong})" for wrong, _ in SPELLINGS),
    *("terstinal", "colmnar", "oherewise", "olonoscopic", "lintermediate", "serrated serrated", "tumour", "oesophag"),
    *("favour", "micro-invasive", "signet", "b cell", "b-cell", "noninvasive", "biopsies"),
)
_MENDED = [right for _, right in SPELLINGS]
_TYPOGRAPHY = str.maketrans({"\u2019": "'", "\u2013": "-", "\u2014": "-", "\u00a0": " "})

# Canonical organ -> words that mean it where a report has no heading of its own.
ORGANS = {
    "urinary bladder": "urinary bladder|bladder|urothelium",
    "uterine cervix": "uterine cervix|cervix|endocervix|ectocervix|cervical",
    "endometrium": "endometrium|endometrial",
    "uterus": "uterus",
    "breast": "breast|mammary",
    "nipple": "nipple",
    "prostate": "prostate|prostatic",
    "stomach": "stomach|gastric|antrum",
    "colon": "colon|colonic|sigmoid|cecum|caecum",
    "rectum": "rectum|rectal",
    "anus": "anus|anal canal",
    "lung": "lung|pulmonary|bronchus|bronchial",
    "esophagus": "esophagus|esophageal",
    "duodenum": "duodenum|duodenal",
    "small intestine": "small intestine|small bowel|ileum|jejunum",
    "appendix": "appendix",
    "liver": "liver|hepatic",
    "gallbladder": "gallbladder",
    "pancreas": "pancreas|pancreatic",
    "kidney": "kidney|renal",
    "ureter": "ureter",
    "testis": "testis|testicular",
    "ovary": "ovary|ovarian",
    "thyroid": "thyroid",
    "parathyroid": "parathyroid",
    "salivary gland": "salivary gland|parotid",
    "lymph node": "lymph node|lymph nodes",
    "skin": "skin|cutaneous|epidermis",
    "soft tissue": "soft tissue",
    "bone marrow": "bone marrow",
    "bone": "bone",
    "brain": "brain|cerebral|cerebellum",
    "larynx": "larynx|laryngeal|vocal cord",
    "oral cavity": "oral cavity|tongue|gingiva|buccal mucosa",
    "nasopharynx": "nasopharynx|nasopharyngeal",
    "tonsil": "tonsil",
    "pleura": "pleura|pleural",
    "adrenal gland": "adrenal gland|adrenal",
    "spleen": "spleen",
    "thymus": "thymus|thymic",
    "vulva": "vulva|vulvar",
    "vagina": "vagina|vaginal",
}
_PATTERNS = [word for words in ORGANS.values() for word in words.split("|")]
_ORGAN_NAMES = {word: organ for organ, words in ORGANS.items() for word in words.split("|")}
# Longer names first, so that "urinary bladder" is not found as "bladder".
ORGAN_IN_TEXT = re.compile(rf"\b(?:{'|'.join(sorted(_PATTERNS, key=len, reverse=True))})\b", re.IGNORECASE)

PROCEDURE_STEM = re.compile(
    r"\b(?:biopsy|resection|excisional procedure|excision procedure|excision|dissection|polypectomy|curettage|curetting"
    r"|brushing|aspiration|conization|leep|lletz|turbt?|lumpectomy|pneumonectomy"
    r"|\w*(?:mast|lob|col|prostat|cyst|gastr|hyster|nephr|thyroid|append)ectomy)\b",
    re.IGNORECASE,
)

NO_TUMOR = re.compile(
    r"\b(?:no (?:definite |residual |viable )?(?:evidence of |sign of )?(?:residual |viable |invasive )?"
    r"(?:tumor|malignan\w+|carcinoma|cancer|neoplas\w+)|negative for (?:\w+ ){0,2}(?:tumor|malignan\w+"
    r"|carcinoma|neoplas\w+)"
    r"|free of (?:tumor|carcinoma|malignan\w+)|benign (?:prostatic |breast |glandular )?(?:tissue|glands))\b",
    re.IGNORECASE,
)
NEGATION = re.compile(
    r"\b(?:no|not|without|negative for|absence of|absent|free of|neither|nor|rule out|ruled out|denies|lacks?)\b", re.I
)

MALT_LYMPHOMA = "extranodal marginal zone lymphoma of mucosa associated lymphoid tissue"  # WHO 2022; by definition

# Names that mean one diagnosis.
SYNONYMS = {
    "invasive ductal carcinoma": "invasive carcinoma of no special type",
    "infiltrating ductal carcinoma": "invasive carcinoma of no special type",
    "invasive breast carcinoma of no special type": "invasive carcinoma of no special type",
    "infiltrating lobular carcinoma": "invasive lobular carcinoma",
    "sessile serrated adenoma": "sessile serrated lesion",
    "transitional cell carcinoma": "urothelial carcinoma",
    "prostatic adenocarcinoma": "acinar adenocarcinoma",
    "acinar adenocarcinoma of the prostate": "acinar adenocarcinoma",
    "infiltrating urothelial carcinoma": "invasive urothelial carcinoma",
    "flat urothelial carcinoma in situ": "urothelial carcinoma in situ",
    "hsil": "high-grade squamous intraepithelial lesion",
    "lsil": "low-grade squamous intraepithelial lesion",
    "high grade squamous intraepithelial lesion": "high-grade squamous intraepithelial lesion",
    "low grade squamous intraepithelial lesion": "low-grade squamous intraepithelial lesion",
    "dcis": "ductal carcinoma in situ",
    "lcis": "lobular carcinoma in situ",
    "gist": "gastrointestinal stromal tumor",
    "scc": "squamous cell carcinoma",
    "microcalcifications": "microcalcification",
    "tubulo-villous adenoma": "tubulovillous adenoma",
    "serrated lesion": "sessile serrated lesion",
}

# Behavior of a diagnosis: that of ICD-O-3.2 (/0 benign, /1 uncertain, /2 in situ, /3 and /6 malignant), and "no
# neoplasm" for what has no such code. Lesions of the breast that ICD-O leaves out and the B classification calls B3
# (uncertain malignant potential) are uncertain. The first rule that fits decides.
NO_NEOPLASM, BENIGN, UNCERTAIN, IN_SITU, MALIGNANT = "no neoplasm", "benign", "uncertain", "in situ", "malignant"
BEHAVIORS = (NO_NEOPLASM, BENIGN, UNCERTAIN, IN_SITU, MALIGNANT)
_BEHAVIOR_RULES = [
    (
        NO_NEOPLASM,
        r"^no tumor|^benign (?:tissue|glands)|radiation|consistent with|reactive|regenerative|carcinoid syndrome",
    ),
    (BENIGN, r"low[- ]grade squamous intraepithelial|condyloma|\bcin 1\b|squamous papilloma"),
    (IN_SITU, r"in situ\b|non-invasive papillary|high[- ]grade squamous intraepithelial|\bcin [23]\b"),
    (IN_SITU, r"high[- ]grade (?:prostatic|glandular|pancreatic) intraepithelial|paget"),
    (UNCERTAIN, r"metastatic leiomyoma|desmoid|uncertain malignant|low malignant potential|borderline|phyllodes"),
    (UNCERTAIN, r"atypical|flat epithelial atypia|^papillary neoplasm|^fibroepithelial|mucocele-like|\bneoplasm$"),
    (MALIGNANT, r"carcinoma|sarcoma|lymphoma|melanoma|malignan|metasta|carcinoid|neuroendocrine (?:tumor|neoplasm)"),
    (
        MALIGNANT,
        r"stromal tumor|leuk[ae]*mia|myeloma|seminoma|mesothelioma|plasmacytoma|glioblastoma|blastoma|\bcancer",
    ),
    (
        BENIGN,
        r"adenoma\b|papilloma|leiomyoma|lipoma|hamartoma|pneumocytoma|h[ae]*mangioma|n[ae]*vus|schwannoma|neurofibroma",
    ),
    (BENIGN, r"serrated lesion|cystadenoma|oncocytoma|teratoma|fibroma\b"),
    (
        NO_NEOPLASM,
        r"inflamm|itis\b|change|metaplasia|hyperplasia|fibrosis|polyp|necrosis|calcification|ectasia|adenosis|amyloid"
        r"|reaction|ulcer|erosion|normal|unremarkable|infection|granulom|columnar cell|aggregate|fungal"
        r"|atypia|cyst\b|abscess",
    ),
]
_BEHAVIOR_RULES = [(behavior, re.compile(rule, re.IGNORECASE)) for behavior, rule in _BEHAVIOR_RULES]

# What a sentence of running text is searched for; the longest match counts.
_STEM = (
    r"carcinoma in situ|adenocarcinoma in situ|carcinoma of no special type|carcinoma|adenocarcinoma|sarcoma|\w*sarcoma"
    r"|lymphoma|melanoma|\w*adenoma|papilloma|leiomyoma|hamartoma|mesothelioma|seminoma|neuroendocrine tumor"
    r"|carcinoid tumor"
    r"|stromal tumor|phyllodes tumor|fibroepithelial tumor|intraepithelial (?:lesion|neoplasia)|papillary neoplasm"
    r"|gastritis|colitis|cervicitis|prostatitis|cystitis|mastitis|pneumonia|granulomatous inflammation"
    r"|inflammation|hyperplasia|metaplasia|fibrocystic changes?|duct ectasia|adenosis|\w+ polyp|fat necrosis"
    r"|microcalcifications?|amyloidosis"
)
DIAGNOSIS_STEM = re.compile(rf"\b(?:{_STEM})\b", re.IGNORECASE)
WORDS_BEFORE = re.compile(r"(?:[a-z][\w-]*[ ]){1,4}$", re.IGNORECASE)
# Words before a diagnosis in running text that are no part of its name.
NOT_OF_THE_NAME = re.compile(
    r"^.*\b(?:show(?:s|ing)?|reveal(?:s|ed)?|demonstrat\w+|with|of|is|are|a|an|the|and|consistent|diagnosis"
    r"|tissue|by|in(?! situ)|for"
    r"|contains?|including|from|foci|focus|has|arising|background|favor|sections?|biops(?:y|ies)|cores?"
    r"|differentiated|grade [0-9i]+)\s+(?=\S)",
    re.IGNORECASE,
)


def mend(text: str) -> str:
    """Text with its known misspellings mended and typographic quotes and dashes made plain."""
    return _MISSPELLED.sub(lambda found: _MENDED[(found.lastindex or 1) - 1], text.translate(_TYPOGRAPHY))


def canonical_organ(name: str) -> str:
    """One name for an organ: lower case, single blanks, its synonym's name ("Bladder" is "urinary bladder")."""
    plain = " ".join(name.lower().split())
    plain = re.sub(r"^(?:left|right|the|both)\s+|,.*$|\s+\((?:left|right)\)$", "", plain)
    return _ORGAN_NAMES.get(plain, plain)


def is_organ(name: str) -> bool:
    """Whether the name is one of an organ known here."""
    return canonical_organ(name) in ORGANS


@lru_cache(maxsize=4096)
def behavior_of(diagnosis: str, *, dysplasia: str | None = None) -> str | None:
    """Behavior of a diagnosis, one of BEHAVIORS, or None where no rule knows it.

    `dysplasia` is "low" or "high"; high-grade dysplasia of a benign neoplasm is in situ (as 8211/2 of ICD-O-3.2).
    """
    for behavior, rule in _BEHAVIOR_RULES:
        if rule.search(diagnosis):
            return IN_SITU if behavior == BENIGN and dysplasia == "high" else behavior
    return None
