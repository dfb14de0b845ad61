"""Networks of timm and torchvision, small ones of each family, and what must be tapped of them.

The table is written by hand from the code of the two libraries. The same rows make the table of
docs/reference/networks.md.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

FIRST, LAST = "(B, C, H, W)", "(B, H, W, C)"


class Family(NamedTuple):
    """One network: how it is built, and where its map is.

    `tensor` is the shape at the layer: FIRST, LAST, or how many tokens are no patches.
    """

    library: str
    name: str
    options: dict[str, Any]
    size: tuple[int, int]
    layer: str
    at: str
    tensor: str | int
    map: tuple[int, int, int]
    features: int

    def build(self, classes: int = 5) -> nn.Module:
        """Returns the network with new weights."""
        if self.library == "timm":
            import timm

            return timm.create_model(self.name, num_classes=classes, **self.options)
        import torchvision

        return getattr(torchvision.models, self.name)(num_classes=classes, **self.options)

    def map_of(self, value: Tensor) -> Tensor:
        """Returns the map (B, C, H, W) that the tensor at the layer is."""
        if self.tensor == FIRST:
            return value
        if self.tensor == LAST:
            return value.permute(0, 3, 1, 2)
        channels, height, width = self.map
        patches = value[:, int(self.tensor) :]
        return patches.reshape(len(value), height, width, channels).permute(0, 3, 1, 2)


SMALL = (64, 64)
_VIT = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3}
_VIT14 = {**_VIT, "img_size": 56}
_FOUR = {"depths": (1, 1, 1, 1)}


def _cnn(
    name: str,
    channels: int,
    features: int = 0,
    *,
    head: bool = False,
    size: Any = SMALL,
    **options: Any,
) -> Family:
    """Returns a row of timm's convolutional networks, which pool with a module."""
    layer = "head.global_pool.pool" if head else "global_pool.pool"
    return Family(
        "timm", name, options, size, layer, "input", FIRST, (channels, 2, 2), features or channels
    )


def _vision(
    name: str,
    layer: str,
    at: str,
    channels: int,
    features: int = 0,
    size: Any = SMALL,
    **options: Any,
) -> Family:
    """Returns a row of torchvision's convolutional networks."""
    grid = (channels, 2, 2)
    return Family("torchvision", name, options, size, layer, at, FIRST, grid, features or channels)


def _vit(
    name: str, layer: str, prefix: int, options: dict[str, Any], grid: Any = (48, 4, 4)
) -> Family:
    """Returns a row of timm's networks of tokens; `grid` is the shape of the map."""
    side = options.get("img_size", 64)
    size = (side, side) if isinstance(side, int) else side
    return Family("timm", name, options, size, layer, "output", prefix, grid, grid[0])


FAMILIES = (
    # convolutional networks of timm
    _cnn("resnet10t", 512),
    _cnn("resnext26ts", 2048, head=True),
    _cnn("resnetv2_50", 2048, head=True, layers=(1, 1, 1, 1)),
    _cnn("regnetx_002", 368, head=True),
    _cnn("densenet121", 1024),
    _cnn("dla34", 512),
    _cnn("hrnet_w18_small", 2048),
    _cnn("inception_v3", 2048, size=(128, 128)),
    _cnn("efficientnet_b0", 1280),
    _cnn("mobilenetv2_035", 1280),
    _cnn("mobilenetv3_small_050", 288, 1024),
    _cnn("mobilenetv4_conv_small", 960, 1280),
    _cnn("ghostnet_050", 480, 1280),
    _cnn("mixnet_s", 1536),
    _cnn("mnasnet_050", 1280),
    _cnn("lcnet_050", 256, 1280),
    _cnn("rexnet_100", 1280, head=True),
    _cnn("repvgg_a0", 1280, head=True),
    _cnn("convnext_atto", 320, head=True),
    _cnn("convnextv2_atto", 320, head=True),
    _cnn("inception_next_atto", 320, 960, head=True),
    _cnn("poolformer_s12", 512, head=True),
    _cnn("focalnet_tiny_srf", 768, head=True),
    # hybrids of timm
    _cnn("mobilevit_xxs", 320, head=True),
    _cnn("mobilevitv2_050", 256, head=True),
    _cnn("edgenext_xx_small", 168, head=True),
    _cnn("fastvit_t8", 768, head=True),
    _cnn("coatnet_nano_rw_224", 512, head=True, img_size=64),
    _cnn("efficientvit_b0", 1024, 1280, head=True),
    Family("timm", "pvt_v2_b0", {}, SMALL, "stages", "output", FIRST, (256, 2, 2), 256),
    Family("timm", "repvit_m0_9", {}, SMALL, "stages", "output", FIRST, (384, 2, 2), 384),
    Family(
        "timm", "efficientformerv2_s0", {}, (224, 224), "norm", "output", FIRST, (176, 7, 7), 176,
    ),
    # maps with channels last
    Family(
        "timm", "swin_tiny_patch4_window7_224",
        {"img_size": (128, 64), "window_size": 2, "embed_dim": 24, **_FOUR},
        (128, 64), "head.global_pool.pool", "input", LAST, (192, 4, 2), 192,
    ),
    Family(
        "timm", "swinv2_tiny_window8_256",
        {"img_size": 128, "window_size": 4, "embed_dim": 24, **_FOUR},
        (128, 128), "head.global_pool.pool", "input", LAST, (192, 4, 4), 192,
    ),
    # tokens: read by the class token, or all averaged
    _vit("vit_tiny_patch16_224", "blocks.2.norm1", 1, _VIT),
    _vit("vit_tiny_patch16_224", "norm", 1, {**_VIT, "global_pool": "avg"}),
    _vit("vit_tiny_patch16_224", "blocks.2.norm1", 1, {**_VIT, "img_size": (128, 64)}, (48, 8, 4)),
    _vit("deit_tiny_distilled_patch16_224", "blocks.2.norm1", 2, _VIT),
    _vit("deit3_small_patch16_224", "blocks.2.norm1", 1, _VIT),
    _vit("vit_small_patch14_reg4_dinov2", "blocks.2.norm1", 5, _VIT14),
    _vit("vit_small_patch16_dinov3", "norm", 5, _VIT),
    _vit("eva02_tiny_patch14_224", "norm", 1, _VIT14),
    _vit("beit_base_patch16_224", "norm", 1, _VIT),
    _vit("cait_xxs24_224", "blocks_token_only.1.norm1", 1, _VIT),
    _vit(
        "convit_tiny", "blocks.2.norm1", 1, {**_VIT, "num_heads": 4, "local_up_to_layer": 2},
        (192, 4, 4),
    ),
    _vit("xcit_nano_12_p16_224", "cls_attn_blocks.1.norm1", 1, {"depth": 3}, (128, 4, 4)),
    _vit(
        "pit_ti_224", "transformers.2.blocks.0.norm1", 1, {"depth": (1, 1, 1), "img_size": 112},
        (256, 4, 4),
    ),
    _vit("mixer_s32_224", "norm", 0, {"img_size": 64}, (512, 2, 2)),
    _vit("resmlp_12_224", "norm", 0, {"img_size": 64}, (384, 4, 4)),
    _vit(
        "hiera_tiny_224", "blocks.3", 0,
        {"stages": (1, 1, 1, 1), "embed_dim": 24, "img_size": (224, 224)}, (192, 7, 7),
    ),
    # torchvision
    _vision("resnet18", "avgpool", "input", 512),
    _vision("densenet121", "features", "output", 1024),
    _vision("googlenet", "avgpool", "input", 1024, init_weights=False),
    _vision("shufflenet_v2_x0_5", "conv5", "output", 1024),
    _vision("mobilenet_v2", "features", "output", 1280),
    _vision("mobilenet_v3_small", "avgpool", "input", 576, 1024),
    _vision("mnasnet0_5", "layers", "output", 1280),
    _vision("efficientnet_b0", "avgpool", "input", 1280),
    _vision("regnet_y_400mf", "avgpool", "input", 440),
    _vision("convnext_tiny", "avgpool", "input", 768),
    Family(
        "torchvision", "SwinTransformer",
        {"patch_size": [4, 4], "embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8],
         "window_size": [2, 2]},
        (128, 64), "avgpool", "input", FIRST, (192, 4, 2), 192,
    ),
    _vision("swin_v2_t", "avgpool", "input", 768),
    Family(
        "torchvision", "VisionTransformer",
        {"image_size": 64, "patch_size": 16, "num_layers": 3, "num_heads": 3, "hidden_dim": 48,
         "mlp_dim": 96},
        SMALL, "encoder.layers.encoder_layer_2.ln_1", "output", 1, (48, 4, 4), 48,
    ),
)  # fmt: skip
