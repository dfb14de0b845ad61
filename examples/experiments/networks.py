"""What CASN taps of networks of timm and torchvision at the size they are made for, as a table.

python examples/experiments/networks.py --write docs/reference/networks.md

Without --write it is printed. The networks have new weights: nothing is downloaded. The same
families, smaller, are tested against a table written by hand, tests/families.py.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from casn_plugin import CASN

NAMES = {
    "timm": (
        "resnet18", "resnext26ts", "resnetv2_50", "regnetx_002", "densenet121", "dla34", "vgg11",
        "hrnet_w18_small", "inception_v3", "inception_v4", "xception41", "efficientnet_b0",
        "tf_efficientnetv2_b0", "mobilenetv2_035", "mobilenetv3_small_050",
        "mobilenetv4_conv_small", "ghostnet_050", "mixnet_s", "mnasnet_050", "lcnet_050",
        "rexnet_100", "repvgg_a0", "nf_resnet26", "vovnet39a", "selecsls42b", "cspdarknet53",
        "convnext_atto", "convnextv2_atto", "inception_next_atto", "poolformer_s12",
        "focalnet_tiny_srf", "starnet_s1", "mobilevit_xxs", "mobilevitv2_050",
        "edgenext_xx_small", "fastvit_t8", "repvit_m0_9", "efficientformer_l1",
        "efficientformerv2_s0", "efficientvit_b0", "efficientvit_m0", "coatnet_nano_rw_224",
        "maxvit_rmlp_pico_rw_256", "pvt_v2_b0", "twins_pcpvt_small", "nest_tiny", "gcvit_xxtiny",
        "davit_tiny", "tiny_vit_5m_224", "levit_128s", "visformer_tiny",
        "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "mvitv2_tiny",
        "hiera_tiny_224", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2.lvd142m:img_size=224",
        "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "beit_base_patch16_224",
        "vit_base_patch16_siglip_224", "cait_xxs24_224", "convit_tiny", "xcit_nano_12_p16_224",
        "pit_ti_224", "coat_lite_tiny", "mixer_s32_224", "resmlp_12_224", "coat_tiny",
        "crossvit_tiny_240", "volo_d1_224",
    ),
    "torchvision": (
        "resnet18", "densenet121", "googlenet", "inception_v3", "vgg11", "alexnet",
        "squeezenet1_0", "shufflenet_v2_x0_5", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
        "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "convnext_tiny", "swin_t",
        "swin_v2_t", "maxvit_t", "vit_b_16",
    ),
}  # fmt: skip
HEADER = (
    "| network | image | tapped | map | other tokens | features | proved |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)
START, END = "<!-- table: start -->", "<!-- table: end -->"


def build(library: str, name: str) -> nn.Module:
    """Returns a network with new weights; options of timm's may follow its name."""
    name, _, option = name.partition(":")
    if library == "timm":
        import timm

        options: dict[str, Any] = {}
        if option:
            key, _, value = option.partition("=")
            options[key] = int(value)
        return timm.create_model(name, num_classes=5, **options)
    import torchvision

    quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(torchvision.models, name)(num_classes=5, **quick)  # type: ignore[no-any-return]


def row(library: str, name: str) -> str:
    """Returns the row of a network: what is tapped, or why it can't be read."""
    title = f"{library}: {name.partition(':')[0]}"
    try:
        backbone = build(library, name).eval()
        reader = CASN(backbone).reader
    except (TypeError, ValueError) as error:
        branched = "no layer of" in str(error)
        reason = "no single map" if branched else "no linear classifier at its end"
        return f"| {title} | | {reason} | | | | refused |"
    imgs = torch.randn(1, 3, *reader.input_size)
    shape = reader.tapped(backbone, imgs).activations.shape[1:]
    layout = reader.tap.layout
    proof = "nothing else goes round it" if layout.prefix else "nothing goes round it"
    cells = (
        title,
        "x".join(map(str, reader.input_size)),
        f"{reader.at} of `{reader.target_layer}`, {layout.kind}",
        "x".join(map(str, shape)),
        str(layout.prefix) if layout.kind == "tokens" else "",
        str(reader.feature_dim),
        proof,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the document in which the table is renewed")
    parser.add_argument("--only", nargs="*", help="names of some of the networks")
    args = parser.parse_args()
    rows = list(HEADER)
    for library, names in NAMES.items():
        for name in names:
            if args.only is None or name in args.only:
                rows.append(row(library, name))
                print(rows[-1], flush=True)
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        before, after = text.split(START)[0], text.split(END)[1]
        table = "\n".join([START, "", *rows, "", END])
        args.write.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    main()
