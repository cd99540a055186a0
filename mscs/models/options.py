"""The options of each model and their defaults, in plain Python: reading a configuration needs no torch.

The defaults are those of the paper's own networks. A comment names the value that the recipes `code` (the
authors' code) or `upstream` (the repository that the architecture comes from) use where they differ.
"""

BACKBONE_DEFAULTS: dict[str, object] = {
    "drop_path_rate": None,  # None: 0.3 for Swin, 0 for all others
    "checkpointing": False,  # recompute the backbone's blocks in the backward pass
    "backbone_options": {},  # passed to timm.create_model, such as embed_dim, depths, window_size
}
FUSION_DEFAULTS: dict[str, object] = {
    "fuse_align_corners": False,  # upsampling inside HRNet; upstream: True
}
COMMON_DEFAULTS: dict[str, object] = {**BACKBONE_DEFAULTS, "projector_channels": 256}

MODEL_OPTIONS: dict[str, dict[str, object]] = {
    "hrnet": {
        **COMMON_DEFAULTS,
        **FUSION_DEFAULTS,
        "align_corners": True,
        "head_channels": None,  # None: as many as the concatenated features have
        "head_kernel": 3,  # upstream: 1
        "head_relu": False,  # upstream: True
        "head_bias": False,  # of the classifier; upstream: True
    },
    "ocrnet": {
        **COMMON_DEFAULTS,
        **FUSION_DEFAULTS,
        "align_corners": True,
        "output_stride": None,  # None: 8, or 32 for HRNet, which keeps a branch at stride 4
        "mid_channels": 512,
        "key_channels": 256,
        "aux_channels": None,  # None: mid_channels; upstream: 720
        "aux_kernel": 3,  # upstream: 1
        "dropout": 0.0,  # upstream: 0.05
    },
    "deeplabv3": {
        **COMMON_DEFAULTS,
        "align_corners": True,  # upstream: False
        "output_stride": 8,
        "aspp_channels": 256,
        "aspp_rates": (12, 24, 36),
        "aspp_bn_eps": 3e-4,  # torch's default is 1e-5
    },
    "upernet": {
        **COMMON_DEFAULTS,
        "align_corners": False,  # code: True with a ResNet, for which it has no configuration
        "channels": 512,
        "pool_sizes": (1, 2, 3, 6),
        "ppm_upsample_first": True,  # pool, upsample, convolve; upstream: False (pool, convolve, upsample)
        "dropout": 0.1,  # code: 0 with a ResNet
        "aux_index": "auto",  # stage that feeds the auxiliary head; auto: 2 for Swin, else no head; code: 3
        "aux_channels": 256,
    },
}

# What turns the defaults into the networks of the repositories that the architectures come from. The
# checkpoints that `mscs.models.load_upstream` reads need these.
UPSTREAM_OPTIONS: dict[str, dict[str, object]] = {
    "hrnet": {"fuse_align_corners": True, "head_kernel": 1, "head_relu": True, "head_bias": True},
    "ocrnet": {"fuse_align_corners": True, "aux_kernel": 1, "aux_channels": 720, "dropout": 0.05},
    "deeplabv3": {"aspp_bn_eps": 1e-5, "align_corners": False},
    "upernet": {"ppm_upsample_first": False},
}
# What the published configuration files of the authors' code set differently from our defaults; for UPerNet
# that is the one on Swin (with a ResNet their auxiliary head ends in an error).
CODE_OPTIONS: dict[str, dict[str, object]] = {
    "hrnet": {},
    "ocrnet": {},
    "deeplabv3": {},
    "upernet": {"aux_index": 3},
}
