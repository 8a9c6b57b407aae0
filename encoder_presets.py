"""Published settings of image encoders for pathology: what a name stands for, as data.

    preset = find_preset("virchow2")                  or by hub name: find_preset("hf-hub:paige-ai/Virchow2")
    preset.width, preset.mpp, preset.token_pooling    2560, (0.25, 0.5, 1.0, 2.0), "class_mean"
    preset.tiling_advice(tile_size=256, mpp=0.5)      one line, or None if the tiles are as in training

`encoders.load_encoder` builds a model from its preset; docs/encoders.md holds `markdown_table()`. Architectures have
timm's or transformers' names, or those of `encoder_backbones`, and their arguments are plain data.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
BIOPTIMUS = {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)}
HIBOU = {"mean": (0.7068, 0.5755, 0.722), "std": (0.195, 0.2316, 0.1816)}
LUNIT = {"mean": (0.70322989, 0.53606487, 0.66096631), "std": (0.21716536, 0.26081574, 0.20723464)}

EVERY_MPP = (0.25, 0.5, 1.0, 2.0)
POOLINGS = {
    "class": "class token",
    "class_mean": "class token ++ mean of patch tokens",
    "projection": "projected class token",
    "attention": "attentional pooler over all tokens",
    None: "timm's own",
}


@dataclass(frozen=True, kw_only=True)
class EncoderPreset:
    """One published encoder.

    Attributes:
        name: short name, or timm's name where timm itself knows all settings.
        repository: `org/name` on the Hugging Face hub.
        architecture: timm model (those of `encoder_backbones` too), or transformers `model_type` if `library` says so.
        library: `timm` or `transformers`.
        arguments: further arguments of the timm model, or fields of the transformers configuration.
        weights_file: file in the repository if it does not have one of the usual names.
        token_pooling: what becomes the vector of a tile, a key of `POOLINGS`.
        width: D of that vector.
        million_parameters: of the image model, as published; of the architecture where only "1.1 B" is published.
        input_size: side in pixels of what the model sees.
        interpolation: of the resize to `input_size / crop_pct`, before the central crop.
        crop_pct: side of the central crop over the side of the resized tile.
        mean: of each channel, subtracted.
        std: of each channel, divided by.
        tile_size: side in pixels of the tiles in training, None for models of ordinary photographs and figures.
        mpp: um per pixel of the tiles in training, empty where `tile_size` is None or the authors mixed them all.
        licence: of the weights.
        gated: whether the hub asks to accept terms first.
        sources: where these settings are published, beside the model card.
        aliases: other short names in use.
    """

    name: str
    repository: str
    architecture: str
    library: str = "timm"
    arguments: dict[str, Any] = field(default_factory=dict)
    weights_file: str | None = None
    token_pooling: str | None = "class"
    width: int
    million_parameters: float
    input_size: int = 224
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tile_size: int | None = None
    mpp: tuple[float, ...] = ()
    licence: str
    gated: bool = False
    sources: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """The model card, where a gated model's terms are accepted."""
        return f"https://huggingface.co/{self.repository}"

    @property
    def is_timm_name(self) -> bool:
        """Whether timm knows this model and all its settings under `name`."""
        return self.repository == f"timm/{self.name}"

    def tiling_advice(self, *, tile_size: int, mpp: float) -> str | None:
        """One line if tiles of `tile_size` pixels at `mpp` um/px differ from those in training, else None."""
        if self.tile_size is None:
            return None
        same_mpp = not self.mpp or any(abs(mpp - trained) <= 0.05 * trained for trained in self.mpp)
        if tile_size == self.tile_size and same_mpp:
            return None
        return (
            f"encoder {self.name} was trained on tiles of {self.tile_size} px{_at(self.mpp)}, not {tile_size} px at "
            f"{mpp:g} um/px: consider --tile_size {self.tile_size}"
            + ("" if same_mpp else f" --mpp {self._usual_mpp:g}")
        )

    @property
    def _usual_mpp(self) -> float:
        return 0.5 if 0.5 in self.mpp else self.mpp[0]


def _at(mpp: tuple[float, ...]) -> str:
    return f" at {' or '.join(f'{value:g}' for value in mpp)} um/px" if mpp else ""


# Facts were compared across these; a model card is the repository's page on the hub.
_TRIDENT = "https://github.com/mahmoodlab/TRIDENT"
_LAZYSLIDE = "https://github.com/rendeirolab/lazyslide-models"
_SLIDE2VEC = "https://github.com/clemsgrs/slide2vec"
_EVA = "https://github.com/kaiko-ai/eva"
_KAIKO = "https://github.com/kaiko-ai/towards_large_pathology_fms"
_LUNIT = "https://github.com/lunit-io/benchmark-ssl-pathology"


def _kaiko(
    variant: str, model: str, width: int, million_parameters: float, architecture: str | None = None
) -> EncoderPreset:
    return EncoderPreset(
        name=f"kaiko-{variant}",
        repository=f"1aurent/{model}.kaiko_ai_towards_large_pathology_fms",
        architecture=architecture or model,
        arguments={"img_size": 224, "dynamic_img_size": True},
        width=width,
        million_parameters=million_parameters,
        interpolation="bilinear",
        **HALF,
        tile_size=256,
        mpp=EVERY_MPP,
        licence="kaiko-non-commercial",
        sources=(_KAIKO, "https://arxiv.org/abs/2404.15217", _TRIDENT),
    )


def _lunit(patch_size: int, million_parameters: float, aliases: tuple[str, ...] = ()) -> EncoderPreset:
    return EncoderPreset(
        name=f"lunit-vits{patch_size}",
        repository=f"1aurent/vit_small_patch{patch_size}_224.lunit_dino",
        architecture=f"vit_small_patch{patch_size}_224",
        width=384,
        million_parameters=million_parameters,
        **LUNIT,
        tile_size=224,
        mpp=(0.5,),
        licence="lunit-non-commercial",
        sources=(_LUNIT, "https://arxiv.org/abs/2212.04690", _EVA, _SLIDE2VEC),
        aliases=aliases,
    )


def _quiltnet(patch_size: int, million_parameters: float) -> EncoderPreset:
    return EncoderPreset(
        name=f"quiltnet-b-{patch_size}",
        repository=f"wisdomik/QuiltNet-B-{patch_size}",
        architecture=f"vit_base_patch{patch_size}_clip_224",
        arguments={"num_classes": 512},
        weights_file="open_clip_pytorch_model.bin",
        token_pooling="projection",
        width=512,
        million_parameters=million_parameters,
        **CLIP,
        licence="mit",
        sources=("https://arxiv.org/abs/2306.11207",),
        aliases=("quiltnet",) if patch_size == 32 else (),
    )


def _timm(
    name: str,
    width: int,
    million_parameters: float,
    *,
    size: int = 224,
    licence: str = "apache-2.0",
    crop: float = 1.0,
    interpolation: str = "bicubic",
    colours: dict[str, tuple[float, float, float]] = IMAGENET,
) -> EncoderPreset:
    return EncoderPreset(
        name=name,
        repository=f"timm/{name}",
        architecture=name.partition(".")[0],
        token_pooling=None,
        width=width,
        million_parameters=million_parameters,
        input_size=size,
        interpolation=interpolation,
        crop_pct=crop,
        **colours,
        licence=licence,
        sources=("https://github.com/huggingface/pytorch-image-models",),
    )


_SWIGLU_GIANT = "vit_giant_patch14_dinov2"  # SwiGLU of timm's packed kind with SiLU, layer scale 1e-5
_SWIGLU_GIANT_REGISTERS = "vit_giant_patch14_reg4_dinov2"  # and 4 register tokens, no position added to them
_VIRCHOW = {"img_size": 224, "embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 5.3375}

PRESETS: tuple[EncoderPreset, ...] = (
    EncoderPreset(
        name="uni",
        repository="MahmoodLab/UNI",
        architecture="vit_large_patch16_224",
        arguments={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True},
        width=1024,
        million_parameters=303.4,
        interpolation="bilinear",
        **IMAGENET,
        tile_size=256,
        mpp=(0.5,),
        licence="cc-by-nc-nd-4.0",
        gated=True,
        sources=("https://github.com/mahmoodlab/UNI", _TRIDENT, _LAZYSLIDE),
        aliases=("uni-v1",),
    ),
    EncoderPreset(
        name="uni2-h",
        repository="MahmoodLab/UNI2-h",
        architecture=_SWIGLU_GIANT_REGISTERS,
        arguments={"img_size": 224, "depth": 24, "reg_tokens": 8, "dynamic_img_size": True},
        width=1536,
        million_parameters=681.4,
        interpolation="bilinear",
        **IMAGENET,
        tile_size=256,
        mpp=(0.5,),
        licence="cc-by-nc-nd-4.0",
        gated=True,
        sources=("https://github.com/mahmoodlab/UNI", _TRIDENT, _LAZYSLIDE),
        aliases=("uni2", "uni-v2"),
    ),
    EncoderPreset(
        name="virchow",
        repository="paige-ai/Virchow",
        architecture=_SWIGLU_GIANT,
        arguments=_VIRCHOW | {"dynamic_img_size": True},
        token_pooling="class_mean",
        width=2560,
        million_parameters=631.2,
        **IMAGENET,
        tile_size=224,
        mpp=(0.5,),
        licence="apache-2.0",
        gated=True,
        sources=("https://arxiv.org/abs/2309.07778", _TRIDENT, _LAZYSLIDE),
    ),
    EncoderPreset(
        name="virchow2",
        repository="paige-ai/Virchow2",
        architecture=_SWIGLU_GIANT,
        arguments=_VIRCHOW | {"reg_tokens": 4, "dynamic_img_size": True},
        token_pooling="class_mean",
        width=2560,
        million_parameters=631.2,
        **IMAGENET,
        tile_size=224,
        mpp=EVERY_MPP,
        licence="cc-by-nc-nd-4.0",
        gated=True,
        sources=("https://arxiv.org/abs/2408.00738", _TRIDENT, _LAZYSLIDE),
    ),
    EncoderPreset(
        name="prov-gigapath",
        repository="prov-gigapath/prov-gigapath",
        architecture=_SWIGLU_GIANT,
        arguments={"img_size": 224, "patch_size": 16, "mlp_ratio": 5.33334},
        width=1536,
        million_parameters=1130,
        crop_pct=224 / 256,
        **IMAGENET,
        tile_size=256,
        mpp=(0.5,),
        licence="apache-2.0 with conditions",
        gated=True,
        sources=("https://github.com/prov-gigapath/prov-gigapath", _TRIDENT, _LAZYSLIDE),
        aliases=("gigapath",),
    ),
    EncoderPreset(
        name="h-optimus-0",
        repository="bioptimus/H-optimus-0",
        architecture=_SWIGLU_GIANT_REGISTERS,
        arguments={"img_size": 224},
        width=1536,
        million_parameters=1130,
        **BIOPTIMUS,
        tile_size=224,
        mpp=(0.5,),
        licence="apache-2.0",
        gated=True,
        sources=("https://github.com/bioptimus/releases", _TRIDENT),
        aliases=("hoptimus0",),
    ),
    EncoderPreset(
        name="h-optimus-1",
        repository="bioptimus/H-optimus-1",
        architecture=_SWIGLU_GIANT_REGISTERS,
        arguments={"img_size": 224},
        width=1536,
        million_parameters=1130,
        **BIOPTIMUS,
        tile_size=224,
        mpp=(0.5,),
        licence="cc-by-nc-nd-4.0",
        gated=True,
        sources=(_TRIDENT, _LAZYSLIDE),
        aliases=("hoptimus1",),
    ),
    EncoderPreset(
        name="h0-mini",
        repository="bioptimus/H0-mini",
        architecture=_SWIGLU_GIANT_REGISTERS,
        arguments={"img_size": 224, "embed_dim": 768, "depth": 12, "num_heads": 12},
        token_pooling="class_mean",
        width=1536,
        million_parameters=85.7,
        **BIOPTIMUS,
        tile_size=224,
        mpp=(0.5,),
        licence="cc-by-nc-nd-4.0",
        gated=True,
        sources=("https://arxiv.org/abs/2501.16239", _LAZYSLIDE, _SLIDE2VEC),
    ),
    EncoderPreset(
        name="hibou-b",
        repository="histai/hibou-b",
        architecture="dinov2_with_registers",
        library="transformers",
        arguments={
            "image_size": 224,
            "patch_size": 14,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        width=768,
        million_parameters=85.7,
        **HIBOU,
        tile_size=224,
        mpp=(0.5,),
        licence="apache-2.0",
        sources=("https://github.com/HistAI/hibou", "https://arxiv.org/abs/2406.05074", _EVA, _SLIDE2VEC),
    ),
    EncoderPreset(
        name="hibou-l",
        repository="histai/hibou-L",
        architecture="dinov2_with_registers",
        library="transformers",
        arguments={
            "image_size": 224,
            "patch_size": 14,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        width=1024,
        million_parameters=303.7,
        **HIBOU,
        tile_size=224,
        mpp=(0.5,),
        licence="apache-2.0",
        gated=True,
        sources=("https://github.com/HistAI/hibou", "https://arxiv.org/abs/2406.05074", _EVA, _SLIDE2VEC),
    ),
    EncoderPreset(
        name="phikon",
        repository="owkin/phikon",
        architecture="vit",
        library="transformers",
        arguments={"image_size": 224, "patch_size": 16, "hidden_size": 768},
        width=768,
        million_parameters=85.8,
        interpolation="bilinear",
        **IMAGENET,
        tile_size=224,
        mpp=(0.5,),
        licence="owkin-non-commercial",
        sources=("https://github.com/owkin/HistoSSLscaling", _TRIDENT, _LAZYSLIDE),
    ),
    EncoderPreset(
        name="phikon-v2",
        repository="owkin/phikon-v2",
        architecture="dinov2",
        library="transformers",
        arguments={
            "image_size": 224,
            "patch_size": 16,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        width=1024,
        million_parameters=303.4,
        **IMAGENET,
        tile_size=224,
        mpp=(0.5,),
        licence="owkin-non-commercial",
        sources=("https://arxiv.org/abs/2409.09173", _LAZYSLIDE),
    ),
    EncoderPreset(
        name="midnight-12k",
        repository="kaiko-ai/midnight",
        architecture="dinov2",
        library="transformers",
        arguments={
            "image_size": 224,
            "patch_size": 14,
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "num_attention_heads": 24,
            "use_swiglu_ffn": True,
        },
        token_pooling="class_mean",
        width=3072,
        million_parameters=1140,
        interpolation="bilinear",
        **HALF,
        tile_size=256,
        mpp=EVERY_MPP,
        licence="mit",
        sources=("https://github.com/kaiko-ai/midnight", "https://arxiv.org/abs/2504.05186", _LAZYSLIDE),
        aliases=("midnight", "midnight12k"),
    ),
    EncoderPreset(
        name="openmidnight",
        repository="SophontAI/OpenMidnight",
        architecture=_SWIGLU_GIANT_REGISTERS,
        arguments={"img_size": 224},
        weights_file="teacher_checkpoint_load.pt",
        width=1536,
        million_parameters=1135,
        interpolation="bilinear",
        **IMAGENET,
        tile_size=224,
        mpp=EVERY_MPP,
        licence="apache-2.0",
        gated=True,
        sources=("https://github.com/MedARC-AI/OpenMidnight", _LAZYSLIDE),
        aliases=("open-midnight",),
    ),
    EncoderPreset(
        name="gpfm",
        repository="majiabo/GPFM",
        architecture="vit_large_patch14_dinov2",
        arguments={"img_size": 224},
        weights_file="GPFM.pth",
        width=1024,
        million_parameters=303,
        **IMAGENET,
        tile_size=512,
        licence="cc-by-nc-nd-4.0",
        sources=("https://github.com/birkhoffkiki/GPFM", "https://arxiv.org/abs/2407.18449", _EVA, _LAZYSLIDE),
    ),
    EncoderPreset(
        name="conch",
        repository="MahmoodLab/CONCH",
        architecture="conch_vit_base",
        arguments={"img_size": 448},
        weights_file="pytorch_model.bin",
        token_pooling="attention",
        width=512,
        million_parameters=87.6,
        input_size=448,
        **CLIP,
        tile_size=512,
        mpp=(0.5,),
        licence="cc-by-nc-nd-4.0",
        gated=True,
        sources=("https://github.com/mahmoodlab/CONCH", "https://arxiv.org/abs/2307.12914", _TRIDENT, _LAZYSLIDE),
        aliases=("conch-v1",),
    ),
    EncoderPreset(
        name="conch-v1.5",
        repository="MahmoodLab/conchv1_5",
        architecture="conch_vit_large",
        arguments={"img_size": 448},
        weights_file="pytorch_model_vision.bin",
        token_pooling="attention",
        width=768,
        million_parameters=306.7,
        input_size=448,
        interpolation="bilinear",
        **IMAGENET,
        tile_size=512,
        mpp=(0.5,),
        licence="cc-by-nc-nd-4.0",
        gated=True,
        sources=("https://github.com/mahmoodlab/TITAN", "https://arxiv.org/abs/2411.19666", _TRIDENT, _LAZYSLIDE),
        aliases=("conch-v15", "conchv1-5"),
    ),
    EncoderPreset(
        name="ctranspath",
        repository="1aurent/swin_tiny_patch4_window7_224.CTransPath",
        architecture="swin_tiny_conv_stem",
        arguments={"img_size": 224},
        token_pooling=None,
        width=768,
        million_parameters=27.5,
        interpolation="bilinear",
        **IMAGENET,
        tile_size=256,
        mpp=(1.0,),
        licence="gpl-3.0",
        sources=("https://github.com/Xiyue-Wang/TransPath", "https://doi.org/10.1016/j.media.2022.102559", _TRIDENT),
    ),
    EncoderPreset(
        name="keep",
        repository="Astaxanthin/KEEP",
        architecture="keep_vit_large",
        arguments={"img_size": 224},
        token_pooling="projection",
        width=768,
        million_parameters=304.7,
        **IMAGENET,
        licence="mit",
        sources=("https://github.com/MAGIC-AI4Med/KEEP", "https://arxiv.org/abs/2412.13126", _LAZYSLIDE),
    ),
    _kaiko("vits8", "vit_small_patch8_224", 384, 21.7),
    _kaiko("vits16", "vit_small_patch16_224", 384, 21.7),
    _kaiko("vitb8", "vit_base_patch8_224", 768, 85.8),
    _kaiko("vitb16", "vit_base_patch16_224", 768, 85.8),
    _kaiko("vitl14", "vit_large_patch14_reg4_224", 1024, 304.4, architecture="vit_large_patch14_reg4_dinov2"),
    _lunit(8, 21.7, aliases=("lunit", "lunit-dino-s8")),
    _lunit(16, 21.7, aliases=("lunit-dino-s16",)),
    EncoderPreset(
        name="plip",
        repository="vinid/plip",
        architecture="clip_vision_model",
        library="transformers",
        arguments={"image_size": 224, "patch_size": 32, "projection_dim": 512},
        token_pooling="projection",
        width=512,
        million_parameters=87.8,
        **CLIP,
        licence="not stated",
        sources=("https://github.com/PathologyFoundation/plip", _LAZYSLIDE),
    ),
    _quiltnet(32, 87.8),
    _quiltnet(16, 86.2),
    _timm("vit_so400m_patch14_siglip_384.webli", 1152, 428.2, size=384, crop=0.9, colours=HALF),
    _timm("vit_base_patch16_siglip_512.v2_webli", 768, 93.5, size=512, crop=0.9, colours=HALF),
    _timm("vit_so400m_patch14_siglip_378.v2_webli", 1152, 428.2, size=378, crop=0.9, colours=HALF),
    _timm("vit_base_patch16_clip_224.openai", 768, 85.8, crop=0.9, colours=CLIP),
    _timm("vit_large_patch14_clip_224.openai", 1024, 303.2, colours=CLIP),
    _timm("vit_base_patch14_dinov2.lvd142m", 768, 86.6, size=518),
    _timm("vit_large_patch14_dinov2.lvd142m", 1024, 304.4, size=518),
    _timm("vit_base_patch16_dinov3.lvd1689m", 768, 85.6, size=256, licence="dinov3-license"),
    _timm("vit_large_patch16_dinov3.lvd1689m", 1024, 303.1, size=256, licence="dinov3-license"),
    _timm("resnet50.a1_in1k", 2048, 23.5, crop=0.95),
    _timm("resnet50.tv_in1k", 2048, 23.5, crop=0.875, interpolation="bilinear", licence="bsd-3-clause"),
)

# Published encoders that need code of their own, which we do not run from a repository: name, repository, reason.
LEFT_OUT: tuple[tuple[str, str, str], ...] = (
    ("MUSK", "xiangjx/musk", "BEiT-3 with the authors' own package; multi-scale inference is part of it"),
)


def find_preset(name: str) -> EncoderPreset | None:
    """The preset that `name` stands for: a short name, an alias or a hub name (also `hf-hub:org/name@revision`)."""
    wanted = name.lower()
    for prefix in ("hf-hub:", "hf_hub:"):
        wanted = wanted.removeprefix(prefix)
    wanted = wanted.partition("@")[0]
    for preset in PRESETS:
        if "/" in wanted:
            # the hub gives `MahmoodLab/uni` and `MahmoodLab/UNI` alike; timm's own cards know their settings
            if wanted == preset.repository.lower() and not preset.is_timm_name:
                return preset
        elif wanted == preset.name or wanted.replace("_", "-") in (preset.name, *preset.aliases):
            return preset
    return None


def preset_names() -> list[str]:
    """Short names and aliases, without those that timm knows by itself."""
    return [name for preset in PRESETS if not preset.is_timm_name for name in (preset.name, *preset.aliases)]


def markdown_table() -> str:
    """The tables of docs/encoders.md: one row an encoder, then those left out."""
    return "\n".join(_rows())


def _rows() -> Iterator[str]:
    columns = "name, weights, licence, gated, tile → vector, width, parameters (M), input px, tile px, um/px, sources"
    yield f"| {columns.replace(', ', ' | ')} |"
    yield "|---" * 11 + "|"
    for preset in PRESETS:
        names = ", ".join(f"`{name}`" for name in (preset.name, *preset.aliases))
        sources = " ".join(f"[{number}]({url})" for number, url in enumerate(preset.sources, start=1))
        mpp = ", ".join(f"{value:g}" for value in preset.mpp) or ("any" if preset.tile_size else "–")
        yield (
            f"| {names} | [{preset.repository}]({preset.url}) | {preset.licence} | {'yes' if preset.gated else 'no'} "
            f"| {POOLINGS[preset.token_pooling]} | {preset.width} | {preset.million_parameters:g} "
            f"| {preset.input_size} | {preset.tile_size or '–'} | {mpp} | {sources} |"
        )
    yield ""
    yield "| left out | weights | why |"
    yield "|---|---|---|"
    for name, repository, reason in LEFT_OUT:
        yield f"| {name} | {f'[{repository}](https://huggingface.co/{repository})' if repository else '–'} | {reason} |"
