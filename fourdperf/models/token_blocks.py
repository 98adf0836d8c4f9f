"""Parts of the tokenizers of images that are one-dimensional: transformer blocks, the ViT encoder, checks.

    images (B, H, W, 3)
      | patches, class token, latent tokens, positions, blocks, norm         TokenEncoder
    latents (B, N, C), which fourdperf.models.quantizer takes to codes

Source: "An Image is Worth 32 Tokens" (TiTok, arXiv 2406.07550).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourdperf.models.layers import attention, like, linear_gelu, may_look, tap


def _tanh(x: Tensor) -> Tensor:
    """On a CPU, in fp32: half the time of PyTorch's in bf16."""
    return x.float().tanh().to(x.dtype) if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x.tanh()


ACTIVATIONS = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's CLIP
    "tanh": _tanh,
}
LATENT_LAYOUTS = ("token", "upstream")


class Attention(nn.Module):
    """Multi-head self-attention `(B, N, D)` -> `(B, N, D)`; heads may be wider or narrower than D / H."""

    def __init__(self, features: int, num_heads: int, head_dim: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.qkv = nn.Linear(features, 3 * inner, bias=qkv_bias)
        self.out = nn.Linear(inner, features)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = (x.unflatten(-1, (self.num_heads, -1)) for x in self.qkv(tokens).chunk(3, dim=-1))
        return self.out(attention(*heads).flatten(-2))


class MLP(nn.Module):
    """dense_out(activation(dense_in(x)))."""

    def __init__(self, features: int, hidden_size: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.dense_in = nn.Linear(features, hidden_size)
        self.dense_out = nn.Linear(hidden_size, features)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is F.gelu:
            return self.dense_out(linear_gelu(x, self.dense_in))
        return self.dense_out(self.activation(self.dense_in(x)))


class Block(nn.Module):
    """Attention and an MLP around residuals, `(B, N, D)` -> `(B, N, D)`: norms before each, or after each sum.

    skip: takes a second input, which a linear layer joins to the first (U-ViT). dropout: of what both branches add.
    layer_scale: what each branch adds is multiplied by learned numbers `(D,)` (DINOv2), which begin as one.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        mlp_size: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        activation: str = "gelu",
        eps: float = 1e-5,
        post_norm: bool = False,
        skip: bool = False,
        dropout: float = 0.0,
        layer_scale: bool = False,
    ):
        super().__init__()
        if post_norm and layer_scale:
            raise ValueError("layer_scale: expected False with post_norm, got True")
        self.post_norm = post_norm
        self.attention_norm = nn.LayerNorm(features, eps=eps)
        self.attention = Attention(features, num_heads, head_dim or features // num_heads, qkv_bias)
        self.mlp_norm = nn.LayerNorm(features, eps=eps)
        self.mlp = MLP(features, mlp_size, activation)
        self.skip = nn.Linear(2 * features, features) if skip else None
        self.dropout = nn.Dropout(dropout)
        self.attention_scale = nn.Parameter(torch.ones(features)) if layer_scale else None
        self.mlp_scale = nn.Parameter(torch.ones(features)) if layer_scale else None

    def forward(self, tokens: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None:
            tokens = self.skip(torch.cat([tokens, skip], dim=-1))
        if self.post_norm:
            tokens = self.attention_norm(tokens + self.dropout(self.attention(tokens)))
            return self.mlp_norm(tokens + self.dropout(self.mlp(tokens)))
        tokens = tokens + self.dropout(_scaled(self.attention(self.attention_norm(tokens)), self.attention_scale))
        return tokens + self.dropout(_scaled(self.mlp(self.mlp_norm(tokens)), self.mlp_scale))


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.to(x.dtype)


class TokenEncoder(nn.Module):
    """ViT that reads pictures into latent tokens: `(B, H, W, 3)` -> `(B, N, C)`.

    The sequence is a class token, patches row by row, latent tokens; the norm of the latent tokens goes through `out`.
    positions: (1 + patches + N, D), without the class token's row where `class_position` is False.

    head_dim: D / num_heads unless given. norm_pre: one more norm, before the blocks. patch_bias: of the embedding of
    patches. layer_scale: of the blocks.
    latent_layout: "upstream" reads the (N, D) numbers after the norm as (D, N) without a transpose, so that a latent
        has numbers of all tokens; for checkpoints that were trained so.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        num_latents: int,
        channels: int,
        features: int,
        num_layers: int,
        num_heads: int,
        mlp_size: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        activation: str = "gelu",
        eps: float = 1e-5,
        norm_pre: bool = False,
        patch_bias: bool = True,
        layer_scale: bool = False,
        class_position: bool = True,
        latent_layout: str = "token",
    ):
        super().__init__()
        self.image_size, self.grid = image_size, grid_size(image_size, patch_size)
        self.num_latents, self.class_position, self.latent_layout = num_latents, class_position, latent_layout
        self.patch_embed = nn.Conv2d(3, features, patch_size, patch_size, bias=patch_bias)
        self.class_token = nn.Parameter(torch.empty(features))
        self.latent_tokens = nn.Parameter(torch.empty(num_latents, features))
        patches = self.grid[0] * self.grid[1]
        self.positions = nn.Parameter(torch.empty(class_position + patches + num_latents, features))
        self.norm_pre = nn.LayerNorm(features, eps=eps) if norm_pre else None
        options = {"head_dim": head_dim, "qkv_bias": qkv_bias, "activation": activation, "eps": eps}
        options["layer_scale"] = layer_scale
        self.blocks = nn.ModuleList(Block(features, num_heads, mlp_size, **options) for _ in range(num_layers))
        self.norm = nn.LayerNorm(features, eps=eps)
        self.out = nn.Linear(features, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear layers normal of deviation 0.02, tokens and positions of 1 / sqrt(D), patches' positions sincos."""
        reset_transformer(self)
        features = self.latent_tokens.shape[1]
        for parameter in (self.class_token, self.latent_tokens, self.positions):
            nn.init.normal_(parameter, std=features**-0.5)
        if features % 4 == 0:
            table = sincos_positions(features, *self.grid)
            with torch.no_grad():
                self.positions[int(self.class_position) :][: len(table)] = table

    def embed(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """The sequence before the blocks; latent_tokens: all of them, or the first few `(n, D)`."""
        patches = self.patch_embed(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        batch, dtype = len(images), patches.dtype
        class_token, latents = (x.to(dtype) for x in (self.class_token, latent_tokens))
        class_token = class_token.expand(batch, 1, -1)
        parts = [patches, latents.expand(batch, -1, -1)]
        places = self.class_position + patches.shape[1] + len(latents)
        positions = self.positions[:places].to(dtype)
        if self.class_position:
            tokens = torch.cat([class_token, *parts], dim=1) + positions
        else:
            tokens = torch.cat([class_token, torch.cat(parts, dim=1) + positions], dim=1)
        return tokens if self.norm_pre is None else self.norm_pre(tokens)

    def patch_features(self, images: Tensor) -> Tensor:
        """The norms of the patches' tokens `(B, P, D)`, as a ViT without latent tokens gives them."""
        tokens = self.embed(images, self.latent_tokens[:0])
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 1:]

    def forward(self, images: Tensor, taps: dict[str, Tensor] | None = None) -> Tensor:
        """`images` in whatever range the network was trained with; taps: "encoder/embed", "encoder/00", .."""
        tokens = self.embed(images, self.latent_tokens)
        tap(taps, "encoder/embed", tokens)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            tap(taps, f"encoder/{index:02d}", tokens)
        latents = self.norm(tokens[:, -self.num_latents :])
        tap(taps, "encoder/norm", latents)
        if self.latent_layout == "upstream":
            latents = latents.reshape(len(images), -1, self.num_latents).transpose(1, 2)
        latents = self.out(latents)
        tap(taps, "encoder/latents", latents)
        return latents


class MaskedTokens(nn.Module):
    """The sequence that a decoder begins with: class and mask tokens, then latents, all with positions.

    Latents `(B, N, C)` -> `(B, 1 + patches + N, D)`.
    """

    def __init__(self, patches: int, num_latents: int, channels: int, features: int):
        super().__init__()
        self.patches = patches
        self.embed = nn.Linear(channels, features)
        self.class_token = nn.Parameter(torch.empty(features))
        self.mask_token = nn.Parameter(torch.empty(features))
        self.positions = nn.Parameter(torch.empty(1 + patches + num_latents, features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Tokens and positions normal of deviation 1 / sqrt(D), the map of latents of 1 / sqrt(C): codes of length 1 are
        heard beside the positions."""
        reset_transformer(self)
        nn.init.normal_(self.embed.weight, std=self.embed.in_features**-0.5)
        for parameter in (self.class_token, self.mask_token, self.positions):
            nn.init.normal_(parameter, std=len(self.class_token) ** -0.5)

    def forward(self, latents: Tensor) -> Tensor:
        latents = self.embed(latents)
        class_token, mask_token, positions = (
            x.to(latents.dtype) for x in (self.class_token, self.mask_token, self.positions)
        )
        batch = len(latents)
        masks = mask_token.expand(batch, self.patches, -1)
        return torch.cat([class_token.expand(batch, 1, -1), masks, latents], dim=1) + positions


def sincos_positions(features: int, height: int, width: int) -> Tensor:
    """Sines and cosines of places in a grid, `(height width, features)`: half for the column, half for the row."""
    quarter = features // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)

    def table(places: int) -> Tensor:
        angles = torch.outer(torch.arange(places, dtype=torch.float64, device="cpu"), omega)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    column = table(width).expand(height, -1, -1)
    row = table(height)[:, None].expand(-1, width, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()


def reset_transformer(module: nn.Module) -> None:
    """Linear layers and patch embeddings: normal of deviation 0.02, cut at two; biases zero. The rest stays."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=0.02, a=-0.04, b=0.04)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def grid_size(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Patches along each axis; raises ValueError where they do not fill the picture."""
    if image_size[0] % patch_size or image_size[1] % patch_size:
        raise ValueError(f"image_size: expected multiples of patch_size {patch_size}, got {image_size}")
    return image_size[0] // patch_size, image_size[1] // patch_size


def check_images(images: Tensor, image_size: tuple[int, int], parameter: Tensor) -> Tensor:
    """The images in the parameters' dtype; raises ValueError unless they are floating `(B, *image_size, 3)`."""
    if not isinstance(images, Tensor) or images.shape[1:] != (*image_size, 3):
        wanted = f"(B, {image_size[0]}, {image_size[1]}, 3)"
        raise ValueError(f"images: expected a tensor {wanted}, got {tuple(getattr(images, 'shape', ()))}")
    return like(images, parameter, "images")


def check_latents(latents: Tensor, count: int, channels: int, parameter: Tensor) -> Tensor:
    """The latents in the parameters' dtype; raises ValueError unless they are floating `(B, count, channels)`."""
    if not isinstance(latents, Tensor) or latents.shape[1:] != (count, channels):
        wanted = f"(B, {count}, {channels})"
        raise ValueError(f"latents: expected a tensor {wanted}, got {tuple(getattr(latents, 'shape', ()))}")
    return like(latents, parameter, "latents")


def check_indices(indices: Tensor, count: int) -> Tensor:
    """The indices; raises ValueError unless they are `(B, count)`."""
    if not isinstance(indices, Tensor) or indices.ndim != 2 or indices.shape[1] != count:
        raise ValueError(f"indices: expected a tensor (B, {count}), got {tuple(getattr(indices, 'shape', ()))}")
    return indices


def check_codes(indices: Tensor, codes: int) -> Tensor:
    """The indices as int64; raises ValueError unless they are integers and, where they may be looked at, of `codes`."""
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"indices: expected an integer dtype, got {indices.dtype}")
    indices = indices.long()  # PyTorch takes uint8 for a mask, and no int8 or int16 at all
    if may_look(indices) and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < codes:
        got = f"{int(indices.min())} .. {int(indices.max())}"
        raise ValueError(f"indices: expected numbers in 0 .. {codes - 1}, got {got}")
    return indices
