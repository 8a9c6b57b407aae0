"""What a result folder says of the model in it: ``vlm.json``."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

PROMPT_PARTS = {"before_image", "after_image", "after_answer"}  # of `slide_reports.Prompt`
LATER_PROMPT_PARTS = {"next_question", "between_images"}  # which models of earlier versions lack
FORMAT_VERSION = 1


@dataclass
class VLMSettings:
    """What ``vlm.json`` holds: all that later stages and inference need to know of a trained model."""

    llm_name: str
    patch_width: int
    projector: str = "mlp2x_gelu"
    token_reducer: str = "none"
    position_codes: str = "none"
    num_visual_tokens: int = 256
    output_rms: float = 1.0
    placeholder_id: int = 0
    prompt: dict[str, str] = field(default_factory=dict)
    question: str = ""
    max_question_tokens: int = 128
    max_answer_tokens: int = 512
    encoder: str | None = None
    encoder_fingerprint: str | None = None
    input_kind: str = "features"
    tiling: dict[str, Any] = field(default_factory=dict)
    llm_revision: str | None = None
    llm_fingerprint: str | None = None
    llm_four_bit: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    decoding: dict[str, Any] = field(default_factory=dict)
    git_revision: str | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: str | Path) -> "VLMSettings":
        """Read ``folder/vlm.json``.

        Raises:
            FileNotFoundError: the folder is not the result of a training stage.
            ValueError: the file was written by a later version, lacks a field, or holds another kind of value in one.
        """
        path = Path(folder) / "vlm.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; give the final_model folder of a stage 1 or stage 2 run")
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON ({error}); copy the folder anew") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: holds no settings; copy the folder anew")
        if values.get("format_version", 0) > FORMAT_VERSION:
            raise ValueError(
                f"{path}: format {values['format_version']} is newer than {FORMAT_VERSION}; update SlideScribe"
            )
        try:
            settings = cls(**{key: value for key, value in values.items() if key in {f.name for f in fields(cls)}})
        except TypeError as error:
            raise ValueError(f"{path}: {error}; the file is incomplete") from error
        settings._check_kinds(path)
        return settings

    def _check_kinds(self, path: Path) -> None:
        mend = "mend it, or copy the folder anew"
        for name, hint in get_type_hints(type(self)).items():
            kinds = [get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else [hint])]
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (*kinds, int) if float in kinds else tuple(kinds)):
                wanted = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
                raise ValueError(f"{path}: {name} is {value!r:.80}, where {wanted} belongs; {mend}")
        odd = sorted(self.prompt.keys() - {*PROMPT_PARTS, *LATER_PROMPT_PARTS})
        odd += sorted(PROMPT_PARTS - self.prompt.keys()) if self.prompt else []
        odd += [name for name, text in self.prompt.items() if not isinstance(text, str)]
        if odd:
            raise ValueError(f"{path}: prompt: {odd[0]!r} is missing, unknown or no text; {mend}")

    def fingerprints(self) -> dict[str, str | None]:
        """Of the language model and the image encoder."""
        return {"llm": self.llm_fingerprint, "encoder": self.encoder_fingerprint}

    def write(self, folder: Path) -> None:
        """Write ``folder/vlm.json``."""
        (folder / "vlm.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
