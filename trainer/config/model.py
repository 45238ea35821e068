"""The networks: what a config says of each. `model.name` says which one it is, and so which keys there are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, PlainSerializer, Tag, model_validator

from trainer.config.diffusion import LowResNoiseConfig
from trainer.config.section import Section


class ModelConfig(Section):
    """What every network has."""

    name: str
    image_size: int = Field(ge=4)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    num_classes: int = Field(0, ge=0)  # 0: unconditional
    null_class: bool = False  # one class more, "none": what label -1 means, and dropped labels become
    low_res_size: int = Field(0, ge=0)  # > 0: super-resolution net, conditioned on images of this size
    low_res_noise: LowResNoiseConfig | None = None  # these images are noisy, and the net is told how much

    @model_validator(mode="after")
    def _condition_fits(self) -> ModelConfig:
        if self.low_res_size and (self.low_res_size >= self.image_size or self.image_size % self.low_res_size):
            raise ValueError(
                f"model.low_res_size={self.low_res_size} must divide model.image_size={self.image_size} and be smaller"
            )
        if self.low_res_noise and not self.low_res_size:
            raise ValueError(
                "model.low_res_noise is noise on the images that are enlarged, and model.low_res_size=0 has none; set "
                "the size of theirs, or model.low_res_noise=null"
            )
        if self.null_class and not self.num_classes:
            raise ValueError("model.null_class=true needs classes; set model.num_classes, or model.null_class=false")
        return self

    @property
    def hears_classes(self) -> bool:
        """Whether classes are among what the network is given; a classifier's are what it gives."""
        return self.num_classes > 0


# A level's width in units of C: a whole number, or such as 0.5. Kept, and written, as an int where it is whole.
WidthMultiplier = Annotated[
    float, Field(gt=0), AfterValidator(lambda m: int(m) if m.is_integer() else m), PlainSerializer(lambda m: m)
]


class EncoderConfig(ModelConfig):
    """The levels of a UNet's encoder (Nichol & Dhariwal 2021, section 3 and appendix A).

    The last four keys are what ADM changed or tried (Dhariwal & Nichol 2021, section 3).
    """

    channels: int = Field(ge=4, description="width C of the first level")
    channel_mult: tuple[WidthMultiplier, ...] = Field(min_length=1)  # width of each level, in units of C
    num_res_blocks: int = Field(ge=1)  # per encoder level; the decoder has one more
    attention_resolutions: tuple[int, ...] = (16, 8)  # feature map sizes with self-attention
    num_heads: int = Field(4, ge=1)
    use_scale_shift_norm: bool = True  # time enters as GroupNorm(h) * (1 + scale) + shift
    num_head_channels: int | None = Field(None, ge=1)  # width of a head; replaces num_heads
    attention_order: Literal["heads_first", "qkv_first"] = "heads_first"  # of what qkv puts out, channel by channel
    resblock_updown: bool = False  # residual blocks halve and double feature maps, instead of single convolutions
    rescale_residuals: bool = False  # x + h of every block is divided by sqrt(2)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(mult * self.channels) for mult in self.channel_mult)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Height and width of each level's feature maps."""
        return tuple(self.image_size // 2**level for level in range(len(self.channel_mult)))

    def heads_of(self, width: int) -> int:
        """Attention heads of a block of so many channels."""
        return self.num_heads if self.num_head_channels is None else width // self.num_head_channels

    @model_validator(mode="after")
    def _shapes_fit(self) -> EncoderConfig:
        factor = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % factor:
            raise ValueError(
                f"model.image_size={self.image_size} cannot be halved {len(self.channel_mult) - 1} times; "
                f"with {len(self.channel_mult)} levels in model.channel_mult use a multiple of {factor}"
            )
        for mult in self.channel_mult:
            if mult * self.channels % 1:
                raise ValueError(
                    f"model.channel_mult={list(self.channel_mult)}: {mult} x model.channels={self.channels} is no "
                    "whole number; change the one or the other"
                )
        if self.channels % 2:
            raise ValueError(f"model.channels={self.channels} must be even (sine and cosine halves of the embedding)")
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> EncoderConfig:
        key = "num_heads" if self.num_head_channels is None else "num_head_channels"
        divisor = getattr(self, key)
        attending = [(w, f"the {s}x{s} level") for w, s in zip(self.widths, self.sizes, strict=True)
                     if s in self.attention_resolutions]  # fmt: skip
        for width, place in [*attending, (self.widths[-1], "the middle block")]:
            if width % divisor:
                raise ValueError(
                    f"model.channels={self.channels}: {place} has {width} channels, which model.{key}={divisor} does "
                    f"not divide; choose channels as a multiple of {key}"
                )
        return self


class UNetConfig(EncoderConfig):
    """The UNet of Improved DDPM and ADM; its decoder mirrors the encoder."""

    name: Literal["unet"] = "unet"


# The sizes of Peebles & Xie 2023 (table 1): depth, width, heads.
DIT_SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "width": 384, "num_heads": 6},
    "B": {"depth": 12, "width": 768, "num_heads": 12},
    "L": {"depth": 24, "width": 1024, "num_heads": 16},
    "XL": {"depth": 28, "width": 1152, "num_heads": 16},
}


class DiTConfig(ModelConfig):
    """The diffusion transformer (Peebles & Xie 2023) with adaLN-Zero conditioning.

    `size` gives depth, width and num_heads their published values; without it they are set one by one.
    """

    name: Literal["dit"] = "dit"
    size: Literal["S", "B", "L", "XL"] | None = None
    patch_size: int = Field(ge=1)  # pixels a side of what becomes one token
    depth: int = Field(ge=1)  # blocks
    width: int = Field(ge=4)  # of a token
    num_heads: int = Field(ge=1)
    mlp_ratio: float = Field(4.0, gt=0, allow_inf_nan=False)  # width of a block's hidden layer, in units of `width`

    @property
    def grid_size(self) -> int:
        """Tokens a side of the image."""
        return self.image_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        """Of a block's hidden layer."""
        return round(self.mlp_ratio * self.width)

    @model_validator(mode="before")
    @classmethod
    def _size_is_spelled_out(cls, tree: Any) -> Any:
        size = tree.get("size") if isinstance(tree, dict) else None
        return DIT_SIZES[size] | tree if isinstance(size, str) and size in DIT_SIZES else tree

    @model_validator(mode="after")
    def _is_of_its_size(self) -> DiTConfig:
        for key, value in DIT_SIZES.get(self.size or "", {}).items():
            if getattr(self, key) != value:
                raise ValueError(
                    f"model.{key}={getattr(self, key)}: model.size={self.size} has {value}; leave model.{key} out, or "
                    "set model.size=null and each of depth, width and num_heads"
                )
        return self

    @model_validator(mode="after")
    def _patches_and_heads_fit(self) -> DiTConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"model.patch_size={self.patch_size} must divide model.image_size={self.image_size}")
        if self.width % self.num_heads:
            raise ValueError(
                f"model.width={self.width} is not divided by model.num_heads={self.num_heads}; choose width as a "
                "multiple of num_heads"
            )
        if self.width % 4:
            raise ValueError(f"model.width={self.width} must be a multiple of 4 (sines and cosines of row and column)")
        if not self.mlp_width:
            raise ValueError(f"model.mlp_ratio={self.mlp_ratio:g} of model.width={self.width} is less than one channel")
        return self


class ClassifierConfig(EncoderConfig):
    """The noisy classifier of Dhariwal & Nichol 2021: a UNet's encoder and middle, pooled to class logits."""

    name: Literal["classifier"] = "classifier"
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = "attention"  # how feature maps become logits

    @model_validator(mode="after")
    def _tells_classes_apart(self) -> ClassifierConfig:
        if self.num_classes < 2:
            raise ValueError(
                f"model.num_classes={self.num_classes}: a classifier tells two classes or more apart; set the number "
                "of the data's classes"
            )
        if self.null_class:
            raise ValueError(
                "model.null_class=true: a classifier has no class for dropped labels; set model.null_class=false"
            )
        if self.low_res_size:
            raise ValueError(
                f"model.low_res_size={self.low_res_size}: a classifier sees the noisy image alone; set "
                "model.low_res_size=0"
            )
        return self

    @property
    def hears_classes(self) -> bool:
        return False


def _network(tree: Any) -> Any:
    """Which network a section `model` is about."""
    return tree.get("name", "unet") if isinstance(tree, dict) else getattr(tree, "name", None)


# The section `model` of a run: one of the networks' own, told by its name.
AnyModel = Annotated[
    Annotated[UNetConfig, Tag("unet")]
    | Annotated[DiTConfig, Tag("dit")]
    | Annotated[ClassifierConfig, Tag("classifier")],
    Discriminator(_network),
]
NETWORK_CONFIGS: dict[str, type[ModelConfig]] = {"unet": UNetConfig, "dit": DiTConfig, "classifier": ClassifierConfig}
