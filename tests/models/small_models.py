"""Small members of every model, shared by the tests of this folder."""

SWIN = "swin_tiny_patch4_window7_224"
NARROW_SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 4), "window_size": 4}

# name of the case: model, backbone, options, projector positions
SMALL = {
    "hrnet": ("hrnet", "hrnet_w18_small", {"head_channels": 16}, ("backbone", "concat")),
    "ocrnet": ("ocrnet", "hrnet_w18_small", {"mid_channels": 16, "key_channels": 8}, ("backbone",)),
    "ocrnet-resnet": ("ocrnet", "test_resnet", {"mid_channels": 16, "key_channels": 8}, ("backbone",)),
    "deeplabv3": ("deeplabv3", "test_resnet", {"aspp_channels": 16}, ("backbone",)),
    "upernet": ("upernet", "test_resnet", {"channels": 16, "dropout": 0.0}, ("backbone", "fpn")),
    "upernet-swin": (
        "upernet",
        SWIN,
        {
            "channels": 16,
            "aux_channels": 16,
            "dropout": 0.0,
            "drop_path_rate": 0.0,
            "backbone_options": NARROW_SWIN,
        },
        ("backbone", "fpn"),
    ),
}

# What turns our defaults into the networks of the repositories that the architectures come from.
UPSTREAM_OPTIONS = {
    "hrnet": {"fuse_align_corners": True, "head_kernel": 1, "head_relu": True, "head_bias": True},
    "ocrnet": {"fuse_align_corners": True, "aux_kernel": 1, "aux_channels": 720, "dropout": 0.05},
    "upernet": {"ppm_upsample_first": False},
}
