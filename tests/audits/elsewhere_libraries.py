"""Networks of torchvision and of other libraries, for ``every_shrink_elsewhere.py``.

All are built small and without weights. Of a library that is not installed nothing is tried.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from elsewhere_by_hand import Case
from torch import Tensor, nn


def image(size: int = 64, n: int = 2, channels: int = 3, dims: int = 2) -> Callable[[], Any]:
    """A batch of images, or of volumes."""
    return lambda: (torch.rand(n, channels, *[size] * dims),)


def of_torchvision() -> dict[str, Case]:
    """The smallest of each family."""
    models = torchvision.models
    names = """
        resnet18 resnet50 resnext50_32x4d squeezenet1_1 densenet121 shufflenet_v2_x0_5 mobilenet_v2
        mobilenet_v3_small mnasnet0_5 efficientnet_b0 efficientnet_v2_s regnet_x_400mf
        regnet_y_400mf convnext_tiny
    """
    found = {
        name: Case(functools.partial(models.get_model, name, num_classes=4), image())
        for name in names.split()
    }

    def with_small_head(name: str) -> nn.Module:
        model = models.get_model(name, num_classes=4)
        n = model.classifier[1 if name == "alexnet" else 0].in_features
        model.classifier = nn.Sequential(nn.Linear(n, 64), nn.ReLU(), nn.Linear(64, 4))
        return model

    for name in ("alexnet", "vgg11", "vgg11_bn"):
        found[name] = Case(functools.partial(with_small_head, name), image())
    for name, size in (("googlenet", 64), ("inception_v3", 299)):
        settings = {"num_classes": 4, "init_weights": False}
        for aux in (True, False):
            build = functools.partial(models.get_model, name, aux_logits=aux, **settings)
            found[name + ("" if aux else "_alone")] = Case(build, image(size))
    zero = functools.partial(models.resnet18, num_classes=4, zero_init_residual=True)
    found["resnet18_zero_init"] = Case(zero, image())
    vit = functools.partial(models.VisionTransformer, 32, 8, 2, 2, 32, 64, num_classes=4)
    found["vit"] = Case(vit, image(32))
    swin = functools.partial(
        models.SwinTransformer, [4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=4
    )
    found["swin"] = Case(swin, image(32))
    maxvit = functools.partial(
        models.MaxVit, (32, 32), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=4
    )
    found["maxvit"] = Case(maxvit, image(32))
    for name in ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large"):
        for aux in (False, True):
            settings = {"num_classes": 3, "weights_backbone": None, "aux_loss": aux}
            build = functools.partial(models.get_model, name, **settings)
            found[name + ("_aux" if aux else "")] = Case(build, image(64))
    lraspp = functools.partial(
        models.get_model, "lraspp_mobilenet_v3_large", num_classes=3, weights_backbone=None
    )
    found["lraspp_mobilenet_v3_large"] = Case(lraspp, image(64))
    found |= _detectors()
    for name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        build = functools.partial(models.get_model, name, num_classes=4)
        found[name] = Case(build, lambda: (torch.rand(2, 3, 4, 32, 32),))

    def for_small_videos() -> nn.Module:
        model = models.get_model("s3d", num_classes=4)
        model.avgpool = nn.AdaptiveAvgPool3d(1)
        return model

    found["s3d"] = Case(for_small_videos, lambda: (torch.rand(2, 3, 16, 32, 32),))
    for name in ("raft_small", "raft_large"):
        found[name] = Case(
            functools.partial(models.get_model, name),
            lambda: (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), 2),
        )
    for name in ("resnet18", "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x0_5"):
        build = functools.partial(models.get_model, f"quantized_{name}", num_classes=4)
        found[f"quantized_{name}"] = Case(build, image())
    return found


def _detectors() -> dict[str, Case]:
    """Detection, with thresholds that let all boxes through."""
    models = torchvision.models

    def targets(size: int) -> Any:
        each = {
            "boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, size, size, dtype=torch.uint8),
            "keypoints": torch.cat([torch.rand(1, 17, 2) * 40, torch.ones(1, 17, 1)], 2),
        }
        return list(torch.rand(2, 3, size, size)), [each, each]

    def case(name: str, size: int, **settings: Any) -> Case:
        settings |= {"weights": None, "weights_backbone": None}
        build = functools.partial(models.get_model, name, **settings)
        return Case(build, lambda: (list(torch.rand(2, 3, size, size)),), lambda: targets(size))

    two_stage = {
        "box_score_thresh": 0.0,
        "min_size": 64,
        "max_size": 64,
        "rpn_post_nms_top_n_test": 20,
    }
    one_stage = {"score_thresh": 0.0, "min_size": 64, "max_size": 64}
    return {
        "fasterrcnn_resnet50": case("fasterrcnn_resnet50_fpn", 64, num_classes=3, **two_stage),
        "fasterrcnn_resnet50_v2": case(
            "fasterrcnn_resnet50_fpn_v2", 64, num_classes=3, **two_stage
        ),
        "fasterrcnn_mobilenet": case(
            "fasterrcnn_mobilenet_v3_large_320_fpn", 64, num_classes=3, **two_stage
        ),
        "maskrcnn_resnet50": case("maskrcnn_resnet50_fpn", 64, num_classes=3, **two_stage),
        "keypointrcnn_resnet50": case("keypointrcnn_resnet50_fpn", 64, num_classes=2, **two_stage),
        "retinanet_resnet50": case("retinanet_resnet50_fpn", 64, num_classes=3, **one_stage),
        "fcos_resnet50": case("fcos_resnet50_fpn", 64, num_classes=3, **one_stage),
        "ssd300_vgg16": case("ssd300_vgg16", 64, num_classes=3, score_thresh=0.0),
        "ssdlite320_mobilenet": case(
            "ssdlite320_mobilenet_v3_large", 64, num_classes=3, score_thresh=0.0
        ),
        "ssdlite320_mobilenet_default": case("ssdlite320_mobilenet_v3_large", 64, num_classes=91),
    }


def _segmentation_models_pytorch(smp: Any) -> Iterator[tuple[str, Case]]:
    heads = """
        Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer
    """
    for kind in heads.split():
        build = functools.partial(getattr(smp, kind), "resnet18", encoder_weights=None)
        yield kind, Case(build, image(128 if kind == "PAN" else 32))
    encoders = """
        mobilenet_v2 efficientnet-b0 densenet121 vgg11_bn dpn68 mobileone_s0 mit_b0 xception
        timm-resnest14d timm-skresnet18
    """
    for name in encoders.split():
        yield (
            f"Unet_{name}",
            Case(functools.partial(smp.Unet, name, encoder_weights=None), image(32)),
        )
    settings = {"encoder_weights": None, "aux_params": {"classes": 3}}
    yield "Unet_aux", Case(functools.partial(smp.Unet, "resnet18", **settings), image(32))
    yield (
        "Unet_scse",
        Case(
            functools.partial(
                smp.Unet, "resnet18", encoder_weights=None, decoder_attention_type="scse"
            ),
            image(32),
        ),
    )


def _transformers(library: Any) -> Iterator[tuple[str, Case]]:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 12}
    bert = sizes | {"attention_probs_dropout_prob": 0.0}  # which no module does
    small = {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    small |= {"max_position_embeddings": 12, "attention_dropout": 0.0}
    kinds = {
        "Bert": ("ForSequenceClassification", bert),
        "Electra": ("ForSequenceClassification", bert | {"embedding_size": 16}),
        "DistilBert": ("ForSequenceClassification", small),
        "CLIPText": ("Model", sizes | {"bos_token_id": 1, "eos_token_id": 2}),
        "SiglipText": ("Model", sizes),
    }
    for name, (task, settings) in kinds.items():

        def build(name: str = name, task: str = task, settings: Any = settings) -> nn.Module:
            return getattr(library, name + task)(getattr(library, f"{name}Config")(**settings))

        # Sequences as long as there are positions, and shorter ones.
        for length in (12, 9):
            yield f"{name}_{length}", Case(build, lambda n=length: (torch.randint(3, 50, (2, n)),))


def _ultralytics(_: Any) -> Iterator[tuple[str, Case]]:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    names = """
        yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n yolo26n yolov8n-ghost
        yolov8n-seg yolov8n-cls yolo11n-pose yolo11n-obb yolov8n-rtdetr
    """
    kinds = {
        "seg": "Segmentation",
        "pose": "Pose",
        "obb": "OBB",
        "cls": "Classification",
        "rtdetr": "RTDETRDetection",
    }
    for name in names.split():
        kind = getattr(tasks, kinds.get(name.rpartition("-")[2], "Detection") + "Model")

        def build(name: str = name, kind: Any = kind) -> nn.Module:
            return kind(f"{name}.yaml", ch=3, verbose=False)

        yield name, Case(build, image())


def _diffusers(diffusers: Any) -> Iterator[tuple[str, Case]]:
    blocks = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    plain = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    yield (
        "UNet2D",
        Case(
            lambda: diffusers.UNet2DModel(sample_size=16, attention_head_dim=8, **blocks, **plain),
            lambda: (torch.rand(2, 3, 16, 16), torch.tensor([1, 2])),
        ),
    )
    cross = {"cross_attention_dim": 16, "attention_head_dim": 8}
    down = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}

    def conditioned() -> tuple[Tensor, Tensor, Tensor]:
        return torch.rand(2, 4, 16, 16), torch.tensor([1, 2]), torch.rand(2, 5, 16)

    up = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    yield (
        "UNet2DCondition",
        Case(lambda: diffusers.UNet2DConditionModel(**blocks, **cross, **down, **up), conditioned),
    )
    yield (
        "ControlNet",
        Case(
            lambda: diffusers.ControlNetModel(
                **blocks, **cross, **down, conditioning_embedding_out_channels=(8, 16)
            ),
            lambda: (*conditioned(), torch.rand(2, 3, 32, 32)),
        ),
    )
    coder = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    yield "AutoencoderKL", Case(lambda: diffusers.AutoencoderKL(**blocks, **coder), image(32))
    yield (
        "VQModel",
        Case(lambda: diffusers.VQModel(**blocks, **coder, num_vq_embeddings=16), image(32)),
    )
    tiny = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    tiny |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    yield "AutoencoderTiny", Case(lambda: diffusers.AutoencoderTiny(**tiny), image(32))


def _monai(_: Any) -> Iterator[tuple[str, Case]]:
    nets = importlib.import_module("monai.networks.nets")
    widths = {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 1}
    for norm in ("batch", "instance", ("instance", {"affine": True})):
        word = norm if isinstance(norm, str) else "instance_affine"
        yield (
            f"UNet_{word}",
            Case(functools.partial(nets.UNet, 3, 1, 2, norm=norm, **widths), image(16, 2, 1, 3)),
        )
        settings = {
            "filters": (8, 16, 32),
            "strides": (1, 2, 2),
            "kernel_size": (3, 3, 3),
            "upsample_kernel_size": (2, 2),
        }
        settings["norm_name"] = norm
        yield (
            f"DynUNet_{word}",
            Case(functools.partial(nets.DynUNet, 3, 1, 2, **settings), image(16, 2, 1, 3)),
        )
        yield (
            f"BasicUNet_{word}",
            Case(
                functools.partial(nets.BasicUNet, 2, 1, 2, (8, 8, 16, 16, 16, 8), norm=norm),
                image(32, 2, 1),
            ),
        )
    yield (
        "DynUNet_deep",
        Case(
            functools.partial(
                nets.DynUNet, 3, 1, 2, **settings | {"norm_name": "batch"}, deep_supervision=True
            ),
            image(16, 2, 1, 3),
        ),
    )
    yield (
        "AttentionUnet",
        Case(functools.partial(nets.AttentionUnet, 2, 1, 2, (8, 16, 32), (2, 2)), image(32, 2, 1)),
    )
    yield (
        "SegResNet",
        Case(functools.partial(nets.SegResNet, 3, 8, norm="BATCH"), image(16, 2, 1, 3)),
    )
    yield (
        "SegResNet_instance",
        Case(
            functools.partial(nets.SegResNet, 3, 8, norm=("instance", {"affine": True})),
            image(16, 2, 1, 3),
        ),
    )
    yield "VNet", Case(functools.partial(nets.VNet), image(16, 2, 1, 3))
    yield "HighResNet", Case(functools.partial(nets.HighResNet, 3), image(16, 2, 1, 3))
    yield (
        "DenseNet",
        Case(functools.partial(nets.DenseNet, 2, 1, 2, 16, 8, (2, 2)), image(32, 2, 1)),
    )
    yield (
        "ResNet",
        Case(
            functools.partial(nets.resnet10, n_input_channels=1, num_classes=2), image(32, 2, 1, 3)
        ),
    )
    yield (
        "EfficientNet",
        Case(
            functools.partial(
                nets.EfficientNetBN, "efficientnet-b0", False, spatial_dims=2, num_classes=3
            ),
            image(),
        ),
    )
    yield "FlexibleUNet", Case(functools.partial(nets.FlexibleUNet, 3, 2, "resnet18"), image())
    yield (
        "Regressor",
        Case(
            functools.partial(nets.Regressor, (1, 32, 32), (2,), (8, 16), (2, 2), norm="BATCH"),
            image(32, 2, 1),
        ),
    )
    yield (
        "AutoEncoder",
        Case(
            functools.partial(nets.AutoEncoder, 2, 1, 1, (8, 16), (2, 2), norm="BATCH"),
            image(32, 2, 1),
        ),
    )
    yield (
        "UNETR",
        Case(
            functools.partial(nets.UNETR, 1, 2, (32, 32), 8, 32, 64, 4, spatial_dims=2),
            image(32, 2, 1),
        ),
    )


def _torchaudio(torchaudio: Any) -> Iterator[tuple[str, Case]]:
    models = torchaudio.models
    yield (
        "Conformer",
        Case(
            functools.partial(models.Conformer, 16, 2, 32, 1, 3),
            lambda: (torch.rand(2, 10, 16), torch.tensor([10, 8])),
        ),
    )
    yield (
        "Conformer_group",
        Case(
            functools.partial(models.Conformer, 16, 2, 32, 1, 3, use_group_norm=True),
            lambda: (torch.rand(2, 10, 16), torch.tensor([10, 8])),
        ),
    )
    yield (
        "ConvTasNet",
        Case(
            functools.partial(models.ConvTasNet, 2, 16, 32, 3, 16, 32, 2, 1),
            lambda: (torch.rand(2, 1, 400),),
        ),
    )
    yield (
        "Wav2Letter",
        Case(functools.partial(models.Wav2Letter, 5, "mfcc", 8), lambda: (torch.rand(2, 8, 200),)),
    )
    yield (
        "DeepSpeech",
        Case(functools.partial(models.DeepSpeech, 8, 16, 5), lambda: (torch.rand(2, 1, 20, 8),)),
    )
    yield (
        "WaveRNN",
        Case(
            functools.partial(models.WaveRNN, [2, 2, 2], 4, 8, 1, 16, 16, 3, 8, 8, 16),
            lambda: (torch.rand(2, 1, 48), torch.rand(2, 1, 8, 8)),
        ),
    )


def _torch_geometric(_: Any) -> Iterator[tuple[str, Case]]:
    models = importlib.import_module("torch_geometric.nn.models")

    def graph() -> tuple[Tensor, Tensor]:
        nodes = torch.arange(8)
        return torch.randn(8, 6), torch.stack(
            [nodes.repeat(2), torch.cat([nodes.roll(1), nodes.roll(3)])]
        )

    for name in ("GCN", "GraphSAGE", "GAT", "GIN", "EdgeCNN"):
        for norm in ("batch_norm", None):
            build = functools.partial(getattr(models, name), 6, 16, 3, 4, norm=norm)
            yield f"{name}_{norm}", Case(build, graph)
    settings = {
        "aggregators": ["mean", "max"],
        "scalers": ["identity"],
        "deg": torch.tensor([0, 0, 8]),
    }
    yield (
        "PNA",
        Case(functools.partial(models.PNA, 6, 16, 2, 4, norm="batch_norm", **settings), graph),
    )
    yield "MLP", Case(functools.partial(models.MLP, [6, 16, 16, 4]), lambda: (torch.randn(8, 6),))
    yield "GraphUNet", Case(functools.partial(models.GraphUNet, 6, 16, 4, 2), graph)


def _pytorchcv(_: Any) -> Iterator[tuple[str, Case]]:
    get_model = importlib.import_module("pytorchcv.model_provider").get_model
    names = """
        nin_cifar10 resnet20_cifar10 preresnet20_cifar10 seresnet20_cifar10 sepreresnet20_cifar10
        densenet40_k12_cifar10 xdensenet40_2_k24_bc_cifar10 rir_cifar10 resdropresnet20_cifar10
        shakeshakeresnet20_2x16d_cifar10 diaresnet20_cifar10 shufflenet_g3_wd4 shufflenetv2_wd2
        mobilenet_wd4 mobilenetv2_wd4 mobilenetv3_small_w7d20 igcv3_wd4 condensenet74_c8_g8
        sqnxt23_w1 darknet_tiny peleenet hardnet39ds ghostnet fdmobilenet_wd4 mnasnet_small
        octresnet10_ad2 dicenet_wd5 cbam_resnet18 mixnet_s
    """
    for name in names.split():
        size = 32 if name.endswith("cifar10") else 224
        yield name, Case(functools.partial(get_model, name, pretrained=False), image(size))


def _kornia(_: Any) -> Iterator[tuple[str, Case]]:
    feature = importlib.import_module("kornia.feature")
    names = ("HardNet", "HyNet", "SOSNet", "TFeat", "HardNet8", "OriNet")
    for name in names:
        yield (
            name,
            Case(functools.partial(getattr(feature, name), pretrained=False), image(32, 2, 1)),
        )
    yield "KeyNet", Case(functools.partial(feature.KeyNet, pretrained=False), image(32, 2, 1))
    yield "DISK", Case(feature.DISK, image(32))
    yield (
        "DexiNed",
        Case(
            lambda: importlib.import_module("kornia.models.dexined").DexiNed(pretrained=False),
            image(32),
        ),
    )


def _efficientnet_pytorch(library: Any) -> Iterator[tuple[str, Case]]:
    kind = library.EfficientNet
    yield (
        "b0",
        Case(lambda: kind.from_name("efficientnet-b0", num_classes=4, image_size=64), image()),
    )


def _pretrainedmodels(library: Any) -> Iterator[tuple[str, Case]]:
    for name, size in {
        "bninception": 224,
        "xception": 64,
        "dpn68": 224,
        "nasnetamobile": 224,
    }.items():
        yield (
            name,
            Case(
                lambda name=name: getattr(library, name)(num_classes=1000, pretrained=None),
                image(size),
            ),
        )


def _facenet_pytorch(library: Any) -> Iterator[tuple[str, Case]]:
    for classify in (True, False):
        build = functools.partial(library.InceptionResnetV1, classify=classify, num_classes=4)
        yield f"InceptionResnetV1_{classify}", Case(build, image(96))
    for name, size in (("PNet", 24), ("RNet", 24), ("ONet", 48)):
        yield (
            name,
            Case(
                functools.partial(getattr(library.models.mtcnn, name), pretrained=False),
                image(size),
            ),
        )


def _torchxrayvision(library: Any) -> Iterator[tuple[str, Case]]:
    build = functools.partial(
        library.models.DenseNet,
        weights=None,
        num_classes=4,
        growth_rate=8,
        block_config=(2, 2),
        num_init_features=16,
    )
    yield "DenseNet", Case(build, lambda: (torch.rand(2, 1, 224, 224),))


def _effdet(library: Any) -> Iterator[tuple[str, Case]]:
    def build() -> nn.Module:
        config = library.get_efficientdet_config("tf_efficientdet_lite0")
        config.image_size, config.num_classes = (64, 64), 3
        return library.EfficientDet(config, pretrained_backbone=False)

    yield "lite0", Case(build, image())


def _dynamic_network_architectures(_: Any) -> Iterator[tuple[str, Case]]:
    unet = importlib.import_module("dynamic_network_architectures.architectures.unet")
    for word, norm in (("instance", nn.InstanceNorm2d), ("batch", nn.BatchNorm2d)):
        stages = {
            "input_channels": 1,
            "n_stages": 3,
            "features_per_stage": (8, 16, 16),
            "conv_op": nn.Conv2d,
            "kernel_sizes": 3,
            "strides": (1, 2, 2),
            "num_classes": 2,
            "conv_bias": True,
            "norm_op": norm,
            "norm_op_kwargs": {"affine": True},
            "nonlin": nn.LeakyReLU,
            "nonlin_kwargs": {},
        }
        for deep in (False, True):
            more = {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2, "deep_supervision": deep}
            yield (
                f"PlainConvUNet_{word}_{deep}",
                Case(functools.partial(unet.PlainConvUNet, **stages, **more), image(16, 2, 1)),
            )
        more = {"n_blocks_per_stage": 1, "n_conv_per_stage_decoder": 1}
        yield (
            f"ResidualEncoderUNet_{word}",
            Case(functools.partial(unet.ResidualEncoderUNet, **stages, **more), image(16, 2, 1)),
        )


def _pytorch_tcn(library: Any) -> Iterator[tuple[str, Case]]:
    for norm in ("weight_norm", "batch_norm", "layer_norm", None):
        build = functools.partial(library.TCN, 4, [8, 8], use_norm=norm, dropout=0.0)
        yield f"TCN_{norm}", Case(build, lambda: (torch.randn(2, 4, 12),))


_LIBRARIES: tuple[Callable[[Any], Iterator[tuple[str, Case]]], ...] = (
    _effdet,  # the first, since its import fails after some of the others
    _segmentation_models_pytorch,
    _transformers,
    _ultralytics,
    _diffusers,
    _monai,
    _torchaudio,
    _torch_geometric,
    _pytorchcv,
    _kornia,
    _efficientnet_pytorch,
    _pretrainedmodels,
    _facenet_pytorch,
    _torchxrayvision,
    _dynamic_network_architectures,
    _pytorch_tcn,
)


def of_libraries() -> Iterator[tuple[str, Case]]:
    """Those of libraries that can be imported."""
    for tried in _LIBRARIES:
        library = tried.__name__[1:]
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed")
            continue
        try:
            module = importlib.import_module(library)
            for name, case in tried(module):
                yield f"{library}/{name}", case
        except Exception as error:
            print(f"{library} cannot be used: {type(error).__name__}: {error}"[:200])
