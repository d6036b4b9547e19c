"""Parts of a Model beyond token sequences: patches, conditioning vectors, convolution blocks."""

from __future__ import annotations

from .document import Value
from .errors import InputError


class Patches(Value, frozen=True, kw_only=True):
    """Square images (or latents) cut into square patches; one linear layer makes tokens of them."""

    size: int
    """Height and width of the image, in pixels (or latent cells)."""
    patch: int
    """Height and width of a patch."""
    channels: int = 3
    extra_tokens: int = 0
    """Learned tokens in front of the patches, such as the class token."""
    bias: bool = True

    def __post_init__(self) -> None:
        if min(self.size, self.patch, self.channels) < 1 or self.size % self.patch:
            raise InputError("patches.patch", self.patch, f"does not divide size={self.size}",
                             "give a divisor of the image's size")  # fmt: skip

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.size // self.patch) ** 2

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, the extra ones included."""
        return self.num_patches + self.extra_tokens

    @property
    def pixels(self) -> int:
        """Values of one patch."""
        return self.patch**2 * self.channels

    def num_params(self, hidden: int) -> int:
        """Weights of the patch embedding and the extra tokens."""
        return hidden * (self.pixels + int(self.bias) + self.extra_tokens)


class Conditioning(Value, frozen=True, kw_only=True):
    """A vector per sample that modulates every layer: time step and class (DiT, section 3.2).

    The time step's sinusoidal features pass two linear layers with biases; the class is looked up.
    """

    frequencies: int = 256
    """Features of the time step."""
    num_classes: int = 0
    """Rows of the class table, the one for "no class" included."""

    def num_params(self, hidden: int) -> int:
        """Weights that make the vector."""
        return hidden * (self.frequencies + 1 + hidden + 1 + self.num_classes)

    def forward_flops(self, hidden: int) -> float:
        """FLOPs per sample."""
        return 2.0 * hidden * (self.frequencies + hidden)


class Convolution(Value, frozen=True, kw_only=True):
    """A square convolution, padded so that only its stride shrinks the image."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int = 1
    groups: int = 1
    bias: bool = False
    norm: bool = True
    """A batch norm behind it."""
    relu: bool = True
    """A ReLU behind that."""

    @property
    def taps(self) -> int:
        """Inputs of one output value."""
        return self.in_channels // self.groups * self.kernel**2

    @property
    def num_params(self) -> int:
        """Weights, with those of the norm."""
        return self.out_channels * (self.taps + int(self.bias) + 2 * int(self.norm))

    def out_size(self, size: int) -> int:
        """Height and width of the output for those of the input."""
        return -(-size // self.stride)

    def forward_flops(self, size: int) -> float:
        """FLOPs of one sample at an input of that height and width."""
        return 2.0 * self.out_size(size) ** 2 * self.out_channels * self.taps


class ConvBlock(Value, frozen=True, kw_only=True):
    """Convolutions in a row, with or without a residual connection around them."""

    size: int
    """Height and width of the input in pixels."""
    path: tuple[Convolution, ...]
    shortcut: Convolution | None = None
    """On the residual connection, where shapes differ."""
    residual: bool = False
    """Whether the input (or the shortcut's output) is added, with a ReLU behind the sum."""
    pool: int = 1
    """Stride of a 3x3 max pool at the end; 1 = none."""

    def __post_init__(self) -> None:
        if not self.path:
            raise InputError("conv.path", "[]", "a block needs a convolution", "give one at least")
        channels = self.in_channels
        for c in self.path:
            if min(c.in_channels, c.out_channels, c.kernel, c.stride, c.groups) < 1:
                raise InputError("conv.path", c, "holds a size below 1", "correct the size")
            if c.in_channels != channels:
                raise InputError("conv.path.in_channels", c.in_channels,
                                 f"follows {channels} channels", "give that number")  # fmt: skip
            channels = c.out_channels
        if self.residual and self.shortcut is None and channels != self.in_channels:
            raise InputError("conv.shortcut", "(none)",
                             f"{self.in_channels} channels cannot be added to {channels}",
                             "give the block a shortcut")  # fmt: skip

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.path[0].in_channels

    @property
    def sizes(self) -> tuple[int, ...]:
        """Height and width of each convolution's input in turn, then of the last output."""
        sizes = [self.size]
        for convolution in self.path:
            sizes.append(convolution.out_size(sizes[-1]))
        return tuple(sizes)

    @property
    def num_params(self) -> int:
        """Weights of the block."""
        every = (*self.path, self.shortcut) if self.shortcut else self.path
        return sum(convolution.num_params for convolution in every)

    @property
    def forward_flops(self) -> float:
        """FLOPs of one sample."""
        flops = sum(c.forward_flops(s) for c, s in zip(self.path, self.sizes, strict=False))
        return flops + (self.shortcut.forward_flops(self.size) if self.shortcut else 0.0)
